"""The paper's comparison by one command: does patch-aligned pretraining help under the same fine-tuning?

    python reproduce.py                                     # the toy world, five seeds, CPU or GPU
    python reproduce.py --quick                             # one seed and few steps: minutes; all of it in runs/quick
    python reproduce.py --ablations --budget 540            # stops in time; the same command again goes on
    python reproduce.py --report                            # only the report, from what is there
    python reproduce.py --out runs/own --seeds 3 \\
        --pretrain-flags "--vision facebook/dinov2-small --llm HuggingFaceTB/SmolLM2-135M --data train.jsonl" \\
        --probe-flags "--data test.jsonl" --caption-eval-flags "--data captions.jsonl" \\
        --sft-flags "--data talk.jsonl" --eval-flags "--data refer.jsonl vqa.jsonl"               # your own models and data: all five

A cell is one variant (caption-only, patch-aligned, patch-aligned-cosine) with one seed, or one ablation with seed 0. Each goes through

    pretrain.py, probe.py, eval.py (captions), sft.py, probe.py, eval.py, and eval.py on checkpoints kept along the fine-tuning

by the command lines that a user types. A stage whose output is there is not run again; to have it run again, delete the cell's folder.

reads:  what the stages read
writes: OUT/CELL/pretrain and OUT/CELL/sft, as the stages write them (resume.pt goes once it is of no more use), OUT/CELL/STAGE.log (what
        the stage printed), OUT/CELL/STAGE.command.json (its command, where and how long it ran); RESULTS and PICTURE
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import results
import runtime
from data import InputError
from results import ALIGNED, BASE, COSINE, CURVE_LIMIT, LINEAR, PRETRAINING, TUNING, VARIANTS

ROOT = Path(__file__).resolve().parent                          # where the stages' scripts are

# ------------------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Flags of reproduce.py. The flags of a stage are one text; a single flag needs an equals sign: --sft-flags=--checkpointing."""

    out: str = "runs/reproduce"
    """folder of all cells"""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """what is compared: caption-only, patch-aligned (softmax), patch-aligned-cosine"""
    seeds: int = 0
    """cells of each variant, with seeds from 0; 0: five, with --quick one"""
    patch_weight: float = 0
    """weight of the softmax patch loss; 0: pretrain.py's default"""
    cosine_weight: float = 0
    """weight of the cosine patch loss; 0: pretrain.py's default"""
    ablations: bool = False
    """also patch-aligned cells with another tau, weight, schedule, coverage, projector, or centred words; one seed"""
    quick: bool = False
    """one seed, few steps and records, in runs/quick"""
    keep_every: int = -1
    """fine-tuning steps between points of the curve; 0: no curve, -1: none with data of your own, 100 on the toy world"""
    pretrain_flags: str = ""
    """more flags of pretrain.py"""
    probe_flags: str = ""
    """more flags of probe.py"""
    caption_eval_flags: str = ""
    """more flags of eval.py after pretraining"""
    sft_flags: str = ""
    """more flags of sft.py"""
    eval_flags: str = ""
    """more flags of eval.py after the fine-tuning and along it"""
    jobs: int = 0
    """cells at a time, which share the CPU's cores; 0: 1 on a GPU, which often has room for more, else one for each core"""
    budget: float = 0
    """seconds that this call may take, and more than probe.py or eval.py, which do not resume; 0: no limit"""
    report: bool = False
    """run nothing, report what is there"""
    results: str = ""
    """the report; none: RESULTS.md, of another comparison than the default one OUT/RESULTS.md"""
    picture: str = ""
    """the picture; none: docs/results.png, of another comparison than the default one OUT/results.png"""


FLAGS = {"pretrain": "--steps 100", "probe": "--images 60", "caption_eval": "--limit 60", "sft": "--steps 100", "eval": "--limit 60"}
OWN = {"--out", "--seed", "--resume", "--keep-every", "--patch-loss", "--patch-weight"}        # these are set here, not by a user
BASELINE_COVERAGE = 0.25                                        # of labels by which all cells are scored, pretrain.py's default
TOY_KEEP_EVERY = 100                                            # fine-tuning steps between points of the curve


def flags(args: Args, stage: str) -> list[str]:
    """A stage's flags: those of --quick, then the user's."""
    try:
        return shlex.split(FLAGS[stage]) * args.quick + shlex.split(getattr(args, f"{stage}_flags"))
    except ValueError as error:
        raise InputError(f"--{stage.replace('_', '-')}-flags {getattr(args, f'{stage}_flags')}: {str(error).lower()}") from None


def check(args: Args) -> Args:
    """Fill in what depends on other flags; refuse what makes no sense."""
    if args.quick and args.out == Args().out:
        args = dataclasses.replace(args, out="runs/quick")
    if unknown := set(args.variants) - set(VARIANTS):
        raise InputError(f"--variants {' '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    for name, low in (("seeds", 0), ("patch_weight", 0), ("cosine_weight", 0), ("keep_every", -1), ("jobs", 0), ("budget", 0)):
        if getattr(args, name) < low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than {low}")
    given = {f"--{stage.replace('_', '-')}-flags": {flag.split("=")[0] for flag in flags(args, stage)} for stage in FLAGS}
    for name, names in given.items():
        if names & OWN:
            raise InputError(f"{name}: {', '.join(sorted(names & OWN))} cannot be given there; reproduce.py sets it")
    lacking = [name for name, names in given.items() if "--data" not in names]
    if 0 < len(lacking) < len(given):
        raise InputError(f"{', '.join(lacking)}: no --data, which the other stages' flags have; without it a stage takes the toy world's")
    keep_every = args.keep_every if args.keep_every >= 0 else TOY_KEEP_EVERY * bool(lacking)
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    variants, seeds = [v for v in VARIANTS if v in args.variants], args.seeds or (1 if args.quick else 5)
    ours = not args.quick and seeds >= 5 and len(variants) == len(VARIANTS) and not any(getattr(args, f"{stage}_flags") for stage in FLAGS)
    places = ("RESULTS.md", "docs/results.png") if ours else (f"{args.out}/RESULTS.md", f"{args.out}/results.png")
    return dataclasses.replace(args, out=str(Path(args.out)), variants=variants, keep_every=keep_every, jobs=jobs, seeds=seeds,
                               results=args.results or places[0], picture=args.picture or places[1])


# -------------------------------------------------------------------------------------------------------------- cells and stages

ABLATIONS = {
    "tau-0.03": {"--tau": "0.03"}, "tau-0.2": {"--tau": "0.2"},
    **{f"weight-{w}": {"--patch-weight": w} for w in ("0.03", "0.1", "0.3", "3")},
    "decay": {"--patch-schedule": "decay"},
    "coverage-0.1": {"--coverage": "0.1"}, "coverage-0.5": {"--coverage": "0.5"},
    LINEAR: {"--projector": "linear", "--patch-weight": "0"}, "linear": {"--projector": "linear"},
    "centre-words": {"--centre-words": ""},
}                                                               # name: flags of pretrain.py beside those of the patch-aligned variant


class Cell(NamedTuple):
    """One variant or ablation with one seed; flags: of pretrain.py."""
    name: str
    seed: int
    flags: dict[str, str]

    @property
    def label(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.seed}"


class Stage(NamedTuple):
    """A command, and the file that says that it has run; `spent`: a file of no more use then."""
    name: str
    folder: Path
    command: list[str]
    output: Path
    spent: Path | None


def cells(args: Args) -> list[Cell]:
    """All cells: the variants seed by seed, then the ablations."""
    weight, cosine = ({"--patch-weight": f"{w:g}"} if w else {} for w in (args.patch_weight, args.cosine_weight))
    variants = {BASE: {"--patch-weight": "0"}, ALIGNED: weight, COSINE: {"--patch-loss": "cosine"} | cosine}
    compared = [Cell(name, seed, variants[name]) for seed in range(args.seeds) for name in args.variants]
    return compared + [Cell(name, 0, weight | changed) for name, changed in ABLATIONS.items()] * args.ablations


def stages(cell: Cell, args: Args) -> list[Stage]:
    """A cell's stages in order, those for the curve as far as sft.py has left checkpoints."""
    folder = Path(args.out) / cell.label
    first, tuned = folder / "pretrain", folder / "sft"

    def stage(name, output, script, *arguments, spent=None):
        return Stage(name, folder, [script, *map(str, arguments)], output, spent)

    scored = ["--coverage", BASELINE_COVERAGE] if "--coverage" in cell.flags else []            # one set of labels for all cells
    changed, keep = [text for pair in cell.flags.items() for text in pair if text], args.keep_every * (cell.name in VARIANTS)
    steps = {int(path.stem[5:]) for path in [*tuned.glob("ckpt-*.pt"), *tuned.glob("step-*")]}
    last = results.last_step(tuned) if keep and (tuned / "ckpt.pt").exists() else 0             # the curve's last point: the same records
    return [
        stage("pretrain", first / "ckpt.pt", "pretrain.py", *flags(args, "pretrain"), *changed, "--seed", cell.seed, "--out", first,
              spent=first / "resume.pt"),
        stage("probe", first / "probe.json", "probe.py", first / "ckpt.pt", *flags(args, "probe"), *scored),
        stage("captions", first / "eval.json", "eval.py", first / "ckpt.pt", *flags(args, "caption_eval")),
        stage("sft", tuned / "ckpt.pt", "sft.py", first / "ckpt.pt", *flags(args, "sft"), *["--keep-every", keep][:2 * bool(keep)],
              "--seed", cell.seed, "--out", tuned, spent=tuned / "resume.pt"),
        stage("sft-probe", tuned / "probe.json", "probe.py", tuned / "ckpt.pt", *flags(args, "probe"), *scored),
        stage("eval", tuned / "eval.json", "eval.py", tuned / "ckpt.pt", *flags(args, "eval")),
        *(stage(f"step-{n}", tuned / f"step-{n}" / "eval.json", "eval.py", tuned / f"ckpt-{n}.pt", "--limit", CURVE_LIMIT,
                *flags(args, "eval"), "--out", tuned / f"step-{n}", spent=tuned / f"ckpt-{n}.pt") for n in sorted(steps - {last})),
        *[stage(f"step-{last}", tuned / f"step-{last}" / "eval.json", "eval.py", tuned / "ckpt.pt", "--limit", CURVE_LIMIT,
                *flags(args, "eval"), "--out", tuned / f"step-{last}")] * (last > 0)]


def command_line(stage: Stage) -> str:
    """A stage's command, as a user types it."""
    return shlex.join(["python", *stage.command])


def made_by(stage: Stage, args: Args) -> str:
    """The command as it is recorded: with OUT for the folder, which may be moved."""
    moved = [f"OUT/{text.removeprefix(f'{args.out}/')}" if text.startswith(f"{args.out}/") else text for text in stage.command]
    return shlex.join(["python", *moved])


def record(stage: Stage, **values) -> dict:
    """How the stage was run: {command, hardware, python, torch, transformers, commit, date, seconds}, after these values are written."""
    file = stage.folder / f"{stage.name}.command.json"
    row = (json.loads(file.read_text()) if file.exists() else {}) | values
    if values:
        with runtime.atomic(file) as path:
            path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def check_made_by(stage: Stage, args: Args) -> None:
    """InputError: what is there comes from another command."""
    made = record(stage).get("command")
    if made != made_by(stage, args) and (made or stage.output.exists()):
        raise InputError(f"{stage.folder} is from `{made or 'another program'}`, where it would now be `{made_by(stage, args)}`: name "
                         "another --out, or delete that folder")


# ----------------------------------------------------------------------------------------------------------------------- running


def machine(threads: int) -> dict:
    """What the stages run on, and with what."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    described = ""
    with contextlib.suppress(OSError):                          # no git here
        described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, threads per stage: {threads}",
                python=platform.python_version(), torch=torch.__version__, transformers=metadata.version("transformers"),
                commit=described or "unknown", date=time.strftime("%Y-%m-%d"))


def start(stage: Stage, args: Args, here: dict, threads: int) -> subprocess.Popen:
    """Begin a stage, or go on with it where it left a resume.pt."""
    before = record(stage)                                       # of a stage that goes on, all machines and commits, each once
    both = {name: "; ".join(dict.fromkeys([*filter(None, before.get(name, "").split("; ")), value])) for name, value in here.items()}
    record(stage, command=made_by(stage, args), **both)
    goes_on = ["--resume"] if stage.spent and stage.spent.name == "resume.pt" and stage.spent.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}       # the log's last line is the last said
    with (stage.folder / f"{stage.name}.log").open("a") as log:
        print("$", command_line(stage), *goes_on, file=log, flush=True)
        command = [sys.executable, str(ROOT / stage.command[0]), *stage.command[1:], *goes_on]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def finish(stage: Stage, code: int) -> None:
    """After a stage's end: delete what is of no more use. InputError: the stage failed."""
    if code or not stage.output.exists():
        log = stage.folder / f"{stage.name}.log"
        said = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]      # no bars
        reason = said[-1].strip().removeprefix("error: ") if code > 0 else f"ended by signal {-code}" if code else f"no {stage.output}"
        raise InputError(f"{command_line(stage)} failed ({log}): {reason}")
    if stage.spent:
        stage.spent.unlink(missing_ok=True)


def run_all(plan: list[Cell], args: Args, until: float) -> bool:
    """Run what has not run, each cell's stages in order, `args.jobs` cells at a time -> whether all has run by `until`. InputError: a
    stage failed. However it ends, no stage is left running."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, os.cpu_count() // args.jobs))
    here, running, bar = machine(threads), {}, tqdm(desc="stages", smoothing=0)         # running: {label: (stage, process, its start)}

    def ended(label):
        stage, process, began = running.pop(label)
        code = process.wait()
        record(stage, seconds=round(record(stage).get("seconds", 0) + time.time() - began, 1))
        return stage, code

    try:
        while True:
            chains = {cell.label: stages(cell, args) for cell in plan}
            todo = {label: [stage for stage in chain if not stage.output.exists()] for label, chain in chains.items()}
            for label, waiting in todo.items():
                if waiting and label not in running and len(running) < args.jobs:
                    running[label] = waiting[0], start(waiting[0], args, here, threads), time.time()
            bar.total = sum(map(len, chains.values()))
            bar.n = bar.total - sum(map(len, todo.values()))
            bar.set_postfix_str(", ".join(f"{label} {stage.name}" for label, (stage, *_) in running.items()))
            if not running:
                return True
            while not (over := [label for label, (_, process, _) in running.items() if process.poll() is not None]):
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)
            for label in over:
                finish(*ended(label))
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for label in list(running):
            ended(label)
        bar.close()


# ------------------------------------------------------------------------------------------------------------------------ report


def asked(args: Args) -> str:
    """The command of this report, from the flags as given."""
    given = []
    for f in dataclasses.fields(Args):
        value, name = getattr(args, f.name), "--" + f.name.replace("_", "-")
        if f.name not in ("jobs", "budget", "report") and value != getattr(Args(), f.name):
            given += [name] if value is True else [name, *value] if isinstance(value, list) else [f"{name}={value}"]
    return shlex.join(["python", "reproduce.py", *given])


def report(args: Args, plan: list[Cell], table: results.Table, command: str) -> str:
    """RESULTS.md; command: what `asked` says."""
    every = [stage for cell in plan for stage in stages(cell, args)]
    ran = [(stage, record(stage)) for stage in every if stage.output.exists()]
    missing = len(every) - len(ran)

    def seen(name):
        return "; ".join(dict.fromkeys(value for _, row in ran for value in row[name].split("; ")))

    minutes = {}
    for stage, row in ran:
        minutes.setdefault("a point of the curve" if stage.name.startswith("step-") else stage.name, []).append(row.get("seconds", 0) / 60)
    finished = {v: sum((Path(args.out) / f"{v}-{seed}" / "sft" / "eval.json").exists() for seed in table.seeds) for v in table.variants}
    example = [f"    {made_by(stage, args)}" for stage in stages(plan[0], args) if not stage.name.startswith("step-")]
    changed = {cell.name: " ".join(text for pair in cell.flags.items() for text in pair if text) for cell in plan}
    lines = [
        "# Results", "", "Written by reproduce.py." + f" **Not complete: {missing} of {len(every)} stages have not run.**" * bool(missing),
        "",
        f"- command: `{command}`", f"- hardware: {seen('hardware')}",
        f"- Python {seen('python')}, torch {seen('torch')}, transformers {seen('transformers')}; commit {seen('commit')}; {seen('date')}",
        f"- seeds: from 0 on, {', '.join(f'{variant} {n}' for variant, n in finished.items())}",
        "- minutes, mean: " + ", ".join(f"{name} {statistics.fmean(m):.1f}" for name, m in minutes.items()), "",
        f"The cell {plan[0].label} is", "", *example, "", "The others differ in --seed and in these flags of pretrain.py: "
        f"{'; '.join(f'{name} `{text}`' if text else f'{name} none' for name, text in changed.items())}." +
        " Ablations keep no points of the curve." * (args.ablations and args.keep_every > 0), "",
        "Scores: mean over seeds ± half of its 95 % t-interval; of one seed alone [95 % interval of the bootstrap over images]. Changes "
        f"are from {BASE}: relative to its mean (in brackets the mean paired difference ± half of its 95 % interval, and p of the paired "
        "t-test over seeds); bold: the interval excludes zero. p is not corrected for the number of rows. Losses are better when lower; a "
        "lower entropy is stronger compression. The paper's changes are what it reports for its own models and benchmarks.", ""]
    for part in (PRETRAINING, TUNING):
        lines += [f"## {part.capitalize()}", "", *results.comparison(table, table.part(part))] if table.part(part) else []
    return "\n".join([*lines, *results.reading(table), *results.curves(table), *results.ablations(table, list(ABLATIONS))]).rstrip() + "\n"


# -------------------------------------------------------------------------------------------------------------------------- main

def main(args: Args) -> None:
    """Run what has not run; with everything there, or with --report, write the report and the picture."""
    until = time.monotonic() + 0.97 * args.budget if args.budget else math.inf                  # the rest is for starting and stopping
    command, args = asked(args), check(args)
    plan = cells(args)
    for cell in plan:
        for stage in stages(cell, args):
            check_made_by(stage, args)
    if not args.report:
        try:
            complete = run_all(plan, args, until)
        except KeyboardInterrupt:
            runtime.log("interrupted; to go on, run the same command again")
            sys.exit(130)
        if not complete:
            left = sum(not stage.output.exists() for cell in plan for stage in stages(cell, args))
            runtime.log(f"incomplete: {left} stages or more are left when the time is up; to go on, run the same command again")
            return
    table = results.Table(Path(args.out), [cell.label for cell in plan], args.variants, args.seeds)
    if not table.rows:
        raise InputError(f"{args.out}: nothing to report yet; run without --report")
    with runtime.atomic(args.results) as path:
        path.write_text(report(args, plan, table, command))
    files = [args.results]
    if drawn := results.picture(table):
        files.append(args.picture)
        with runtime.atomic(args.picture) as path:
            drawn.save(path, "PNG")
    runtime.log(f"wrote {' and '.join(files)}; next: read {args.results}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that the stages are ended
    runtime.run(main, Args, __doc__, InputError)
