"""The paper's comparison by one command: does patch-aligned pretraining help the same fine-tuning?

    python reproduce.py                                 # the toy world, five seeds, CPU or GPU
    python reproduce.py --quick                         # one seed, few steps: minutes; runs/quick
    python reproduce.py --ablations --budget 540        # stops in time; the same command goes on
    python reproduce.py --report                        # only the report, from what is there
    python reproduce.py --out runs/own --seeds 3 \\
           --pretrain-flags "--vision facebook/dinov2-small --llm HuggingFaceTB/SmolLM2-135M \\
                             --data train.jsonl" \\
           --probe-flags "--data test.jsonl" --caption-eval-flags "--data captions.jsonl" \\
           --sft-flags "--data talk.jsonl" --eval-flags "--data refer.jsonl vqa.jsonl"

A cell is one variant (caption-only or patch-aligned) with one seed, or one ablation with seed 0.
Each goes through

    pretrain.py, probe.py, eval.py (captions), sft.py, probe.py, eval.py, and for the curves
    probe.py and eval.py on checkpoints kept along the pretraining and the fine-tuning

by the command lines that a user types. A stage whose output is there is not run again; to have it
run again, delete the cell's folder.

reads:  what the stages read
writes: OUT/CELL/pretrain and OUT/CELL/sft, as the stages write them; OUT/CELL/STAGE.log (what it
        printed) and STAGE.command.json (its command, where and how long it ran); OUT/results.json
        and OUT/results.md, the report
"""
import dataclasses
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import runtime
from runtime import InputError

ROOT = Path(__file__).resolve().parent                          # where the stages' scripts are
BASE, ALIGNED = VARIANTS = ("caption-only", "patch-aligned")
LINEAR = "linear-caption-only"  # the linear projector's own baseline
ABLATIONS = {                                                   # flags of pretrain.py
    "constant": "--patch-schedule constant", "decay": "--patch-schedule decay",
    **{f"constant-{w}": f"--patch-schedule constant --patch-weight {w}" for w in ("0.1", "0.3")},
    "constant-0.3-tau-0.03": "--patch-schedule constant --patch-weight 0.3 --tau 0.03",
    "tau-0.03": "--tau 0.03", "weight-0.3": "--patch-weight 0.3", "weight-3": "--patch-weight 3",
    "cosine": "--patch-loss cosine", "centre-words": "--centre-words",
    LINEAR: "--projector linear --patch-weight 0", "linear": "--projector linear"}
CELLS = {BASE: "--patch-weight 0", ALIGNED: ""} | ABLATIONS
CURVE_LIMIT = 300               # records of each file at a point of the fine-tuning's curve

# ---- Args ----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Flags. A stage's flags are one text; a single one needs an equals sign:
    --sft-flags=--shard."""

    out: str = "runs/reproduce"
    """folder of all cells"""
    seeds: int = 0
    """cells of each variant, from 0 on; 0: five, with --quick one"""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """what is compared"""
    ablations: bool = False
    """also other schedules, weights, tau, losses, projectors; seed 0"""
    quick: bool = False
    """one seed, few steps and records, in runs/quick"""
    jobs: int = 0
    """cells at a time; 0: 1 on a GPU, else one for each core"""
    budget: float = 0
    """seconds that this call may take; 0: no limit"""
    report: bool = False
    """run nothing, report what is there"""
    # --- flags of the stages
    pretrain_flags: str = ""
    """of pretrain.py"""
    probe_flags: str = ""
    """of probe.py"""
    caption_eval_flags: str = ""
    """of eval.py after pretraining"""
    sft_flags: str = ""
    """of sft.py"""
    eval_flags: str = ""
    """of eval.py after the fine-tuning and along it"""
    keep_every: int = -1
    """steps between points of the curves; 0: no curves; -1: 100 (own data: 0)"""


QUICK = {"pretrain": "--steps 100", "probe": "--images 60", "caption_eval": "--limit 60",
         "sft": "--steps 100", "eval": "--limit 60"}
OWN = {"--out", "--seed", "--resume", "--keep-every", "--patch-loss", "--patch-weight"}  # set here


def flags(args: Args, stage: str) -> list[str]:
    """A stage's flags: those of --quick, then the user's."""
    given = getattr(args, f"{stage}_flags")
    try:
        return shlex.split(QUICK[stage]) * args.quick + shlex.split(given)
    except ValueError as error:
        name = f"--{stage.replace('_', '-')}-flags"
        raise InputError(f"{name} {given}: {str(error).lower()}") from None


def check(args: Args) -> Args:
    """Fill in what depends on other flags; refuse what makes no sense."""
    if unknown := set(args.variants) - set(VARIANTS):
        raise InputError(f"--variants {' '.join(sorted(unknown))}: choose from"
                         f" {', '.join(VARIANTS)}")
    runtime.check_lowest(args, seeds=0, keep_every=-1, jobs=0, budget=0)
    given = {f"--{stage.replace('_', '-')}-flags": {f.split("=")[0] for f in flags(args, stage)}
             for stage in QUICK}
    for name, names in given.items():
        if names & OWN:
            raise InputError(f"{name}: {', '.join(sorted(names & OWN))} cannot be given there;"
                             " reproduce.py sets it")
    lacking = [name for name, names in given.items() if "--data" not in names]
    if 0 < len(lacking) < len(given):
        raise InputError(f"{', '.join(lacking)}: no --data, which the other stages' flags have;"
                         " without it a stage takes the toy world's")
    out = "runs/quick" if args.quick and args.out == Args().out else args.out
    return dataclasses.replace(
        args, out=str(Path(out)), variants=[v for v in VARIANTS if v in args.variants],
        seeds=args.seeds or (1 if args.quick else 5),
        keep_every=args.keep_every if args.keep_every >= 0 else 100 * bool(lacking),
        jobs=args.jobs or (1 if torch.cuda.is_available() else os.cpu_count()))


# ---- cells and stages ----------------------------------------------------------------------------


class Stage(NamedTuple):
    """A command, and the file that says that it has run; `spent`: a file of no more use then."""
    name: str
    folder: Path
    command: list[str]
    output: Path
    spent: Path | None


def cells(args: Args) -> list[tuple[str, int]]:
    """(name, seed) of all cells: the variants seed by seed, then the ablations."""
    compared = [(name, seed) for seed in range(args.seeds) for name in args.variants]
    return compared + [(name, 0) for name in ABLATIONS] * args.ablations


def last_step(folder: Path) -> int:
    """The number of steps that a training has behind it."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def kept_steps(folder: Path) -> list[int]:
    """Of the checkpoints kept along a training, also of those that are measured and deleted."""
    return sorted({int(path.stem[5:])
                   for path in [*folder.glob("ckpt-*.pt"), *folder.glob("step-*")]})


def stages(name: str, seed: int, args: Args) -> list[Stage]:
    """A cell's stages in order, those for the curves as far as training has left checkpoints."""
    folder = Path(args.out) / f"{name}-{seed}"
    first, tuned, own = folder / "pretrain", folder / "sft", shlex.split(CELLS[name])

    def stage(name, output, *command, spent=None):
        return Stage(name, folder, list(map(str, command)), output, spent)

    def point(step, checkpoint, spent=None):
        out = tuned / f"step-{step}"
        return stage(f"step-{step}", out / "eval.json", "eval.py", checkpoint, "--limit",
                     CURVE_LIMIT, *(f for f in flags(args, "eval") if f != "--blind"), "--out",
                     out, spent=spent)

    def measured(step):
        checkpoint, out = first / f"ckpt-{step}.pt", first / f"step-{step}"
        return stage(f"pretrain-{step}", out / "probe.json", "probe.py", checkpoint, *probe,
                     "--show", 0, "--out", out, spent=checkpoint)

    probe = flags(args, "probe")
    keep = args.keep_every * (name in VARIANTS)
    kept = ["--keep-every", keep] if keep else []
    chain = [
        stage("pretrain", first / "ckpt.pt", "pretrain.py", *flags(args, "pretrain"), *own,
              "--seed", seed, *kept, "--out", first, spent=first / "resume.pt"),
        stage("probe", first / "probe.json", "probe.py", first / "ckpt.pt", *probe),
        stage("captions", first / "eval.json", "eval.py", first / "ckpt.pt",
              *flags(args, "caption_eval")),
        stage("sft", tuned / "ckpt.pt", "sft.py", first / "ckpt.pt", *flags(args, "sft"), *kept,
              "--seed", seed, "--out", tuned, spent=tuned / "resume.pt"),
        stage("sft-probe", tuned / "probe.json", "probe.py", tuned / "ckpt.pt", *probe),
        stage("eval", tuned / "eval.json", "eval.py", tuned / "ckpt.pt", *flags(args, "eval"))]
    last = last_step(tuned) if keep and (tuned / "ckpt.pt").exists() else 0
    chain += [measured(step) for step in kept_steps(first)]
    for step in kept_steps(tuned):
        if step != last:
            checkpoint = tuned / f"ckpt-{step}.pt"
            chain.append(point(step, checkpoint, checkpoint))
    return chain + [point(last, tuned / "ckpt.pt")] * (last > 0)


def made_by(stage: Stage, args: Args) -> str:
    """The command as it is recorded: with OUT for the folder, which may be moved."""
    return shlex.join(["python", *(text.replace(f"{args.out}/", "OUT/", 1)
                                   if text.startswith(f"{args.out}/") else text
                                   for text in stage.command)])


def record(stage: Stage, **values) -> dict:
    """How the stage was run, {command, seconds, hardware, ...}, after these values are written."""
    file = stage.folder / f"{stage.name}.command.json"
    row = (json.loads(file.read_text()) if file.exists() else {}) | values
    if values:
        with runtime.atomic(file) as path:
            path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def check_made_by(stage: Stage, args: Args) -> None:
    """InputError: what is there comes from another command."""
    made, now = record(stage).get("command"), made_by(stage, args)
    if made != now and (made or stage.output.exists()):
        raise InputError(f"{stage.folder} is from `{made or 'another program'}`, where it would now"
                         f" be `{now}`: name another --out, or delete that folder")


# ---- running -------------------------------------------------------------------------------------


def start(stage: Stage, args: Args, here: dict, threads: int) -> subprocess.Popen:
    """Begin a stage, or go on with it where it left a resume.pt."""
    before = record(stage)  # of one that goes on, all machines and commits, each once
    both = {key: "; ".join(dict.fromkeys([*filter(None, before.get(key, "").split("; ")), value]))
            for key, value in here.items()}
    record(stage, command=made_by(stage, args), **both)
    goes_on = stage.spent and stage.spent.name == "resume.pt" and stage.spent.exists()
    command = [*stage.command, *["--resume"] * bool(goes_on)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (stage.folder / f"{stage.name}.log").open("a") as log:
        print("$", shlex.join(["python", *command]), file=log, flush=True)
        return subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], env=environment,
                                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def finish(stage: Stage, code: int) -> None:
    """After a stage's end: delete what is of no more use. InputError: the stage failed."""
    if code or not stage.output.exists():
        log = stage.folder / f"{stage.name}.log"
        lines = log.read_text().replace("\r", "\n").splitlines()
        said = [line for line in lines if line.strip() and "%|" not in line]    # no progress bars
        reason = said[-1].strip().removeprefix("error: ") if code > 0 else f"no {stage.output}"
        reason = f"ended by signal {-code}" if code < 0 else reason
        raise InputError(f"{shlex.join(['python', *stage.command])} failed ({log}): {reason}")
    if stage.spent:
        stage.spent.unlink(missing_ok=True)


def run_all(plan: list[tuple[str, int]], args: Args, until: float) -> bool:
    """Run what has not run, each cell's stages in order -> whether all has run by `until`.

    `args.jobs` cells at a time. InputError: a stage failed. However it ends, none is left running.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, os.cpu_count() // args.jobs))
    here, running, bar = runtime.machine(), {}, tqdm(desc="stages", smoothing=0)

    def ended(cell):  # running: {cell: (stage, process, when)}
        stage, process, began = running.pop(cell)
        code = process.wait()
        seconds = record(stage).get("seconds", 0) + time.time() - began
        record(stage, seconds=round(seconds, 1))
        return stage, code

    try:
        while True:
            chains = {cell: stages(*cell, args) for cell in plan}
            todo = {cell: [s for s in chain if not s.output.exists()]
                    for cell, chain in chains.items()}
            for cell, waiting in todo.items():
                if waiting and cell not in running and len(running) < args.jobs:
                    process = start(waiting[0], args, here, threads)
                    running[cell] = waiting[0], process, time.time()
            bar.total = sum(map(len, chains.values()))
            bar.n = bar.total - sum(map(len, todo.values()))
            names = (f"{name}-{seed} {stage.name}" for (name, seed), (stage, *_) in running.items())
            bar.set_postfix_str(", ".join(names))
            if not running:
                return True
            while not (over := [c for c, (_, p, _) in running.items() if p.poll() is not None]):
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)
            for cell in over:
                finish(*ended(cell))
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for cell in list(running):
            ended(cell)
        bar.close()


# ---- statistics ----------------------------------------------------------------------------------

# Student's t, 95%, two-sided, for 1 to 19 degrees of freedom
T = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
     2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930]


def mean_interval(values: list[float]) -> dict:
    """{mean, half}: half the width of the 95% t-interval, None for a single value."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if not freedom:
        return dict(mean=mean, half=None)
    t = T[freedom - 1] if freedom <= len(T) else 1.96
    return dict(mean=mean, half=t * statistics.stdev(values) / math.sqrt(len(values)))


def change(base: dict[int, float], other: dict[int, float]) -> dict | None:
    """The paired difference of {seed: score} from the baseline: {difference, half, percent}.

    percent: of the baseline's mean, None where that is 0 to three decimals; None: no seed of both.
    """
    seeds = sorted(base.keys() & other.keys())
    if not seeds:
        return None
    found = mean_interval([other[s] - base[s] for s in seeds])
    level = abs(statistics.fmean(base[s] for s in seeds))
    percent = 100 * found["mean"] / level if level >= 0.0005 else None
    return dict(difference=found["mean"], half=found["half"], percent=percent)


# ---- scores --------------------------------------------------------------------------------------

BEFORE, AFTER = "after pretraining", "after the same fine-tuning"
PRETRAINING, ALONG = "along the pretraining", "along the fine-tuning"
LOSSES = {"val_caption_loss": "caption loss, validation, nats per token",
          "val_loss": "loss, validation, nats per token"}
PROBED = {
    "align": "alignment", "chance": "alignment, chance", "recall/5": "recall@5",
    "recall_chance/5": "recall@5, chance", "pursuit/recall/0": "words among 1 atom",
    **{f"pursuit/recall/{k - 1}": f"words among {k} atoms" for k in (2, 4, 8)},
    "pursuit/control_recall/7": "words among 8 atoms, rotated",
    **{f"entropy/{key}{where}": f"entropy of {symbol}{text}"
       for where, text in (("", " per image, nats"), ("_pooled", ", pooled"),
                           ("_centred", ", pooled, centred"))
       for key, symbol in (("encoder", "Z"), ("projected", "H"))},
    **{f"energy/projected/{key}": f"energy of H, {text}" for key, text in (
        ("shared", "of the mean of all"), ("between", "between images"),
        ("within", "within images"))}}
CURVED = {key: label for key, label in PROBED.items()
          if key.startswith(("align", "recall/", "entropy/projected", "energy"))}
METRICS = {"Acc@0.5": "grounding, Acc@0.5", "mIoU": "grounding, mean IoU",
           "accuracy": "question answering", "exact": "instruction following",
           "choice": "multiple choice", "CIDEr": "captions, CIDEr", "BLEU-4": "captions, BLEU-4",
           "ROUGE-L": "captions, ROUGE-L"}
PAPER = {"Acc@0.5": 16, "accuracy": 4, "exact": 3}      # its gains, %; of the first file so scored


class Row(NamedTuple):
    """What a score is of. key: of metrics.jsonl, probe.json or eval.json; step: on the curve."""
    part: str
    label: str
    key: str
    metric: str = ""
    kind: str = ""
    step: int = 0


def evaluated(file: Path, part: str, step: int = 0) -> dict[Row, float]:
    """The scores of an eval.json that METRICS names, in its order.

    Exact match counts for instructions, the VQA accuracy for other questions.
    """
    found, every = {}, json.loads(file.read_text())["scores"] if file.exists() else {}
    for key, score in every.items():
        stem, metric, *kind = key.split("/", 2)
        if kind and score["n"] == every[f"{stem}/{metric}"]["n"]:       # the only kind: nothing new
            continue
        name, _, frame = metric.partition(" (")
        if name in METRICS and name != ("accuracy" if stem.endswith("instruct") else "exact"):
            label = ", ".join([METRICS[name] + f" ({frame}" * bool(frame), *kind, stem])
            found[Row(part, label, key, metric, "".join(kind), step)] = score["value"]
            if "blind" in score and not step:
                blind = Row(part, f"{label}, blind", f"{key}/blind", metric, "blind")
                found[blind] = score["blind"]
    order = list(METRICS)
    return dict(sorted(found.items(), key=lambda i: order.index(i[0].metric.partition(" (")[0])))


def named(names: dict[str, str], source: dict, part: str, step: int = 0) -> dict[Row, float]:
    """{key with a slash at each level: label} and a log or probe.json -> the scores that it has."""
    found = {}
    for key, label in names.items():
        value = source
        for name in key.split("/"):
            own = dict(enumerate(value)) if isinstance(value, list) else value or {}
            value = own.get(int(name) if isinstance(value, list) else name)
        if value is not None:
            found[Row(part, label, key, step=step)] = value
    return found


def scores(folder: Path) -> dict[Row, float]:
    """All that a cell's files say."""
    found = {}
    for part, stage in ((BEFORE, folder / "pretrain"), (AFTER, folder / "sft")):
        logged, probe = {}, {}
        if (stage / "probe.json").exists():                     # then the training has ended
            probe = json.loads((stage / "probe.json").read_text())
            for line in (stage / "metrics.jsonl").read_text().splitlines():
                logged |= json.loads(line)                      # the last of each
        again = part == AFTER                                   # Z stays as it was
        found |= named(LOSSES, logged, part) | named(
            {k: v for k, v in PROBED.items() if not (again and k.startswith("entropy/encoder"))},
            probe, part)
        found |= evaluated(stage / "eval.json", part)
    points = {step: folder / f"pretrain/step-{step}" for step in kept_steps(folder / "pretrain")}
    if points and (folder / "pretrain/ckpt.pt").exists():
        points[last_step(folder / "pretrain")] = folder / "pretrain"
    for step, place in points.items():
        if (place / "probe.json").exists():
            found |= named(CURVED, json.loads((place / "probe.json").read_text()), PRETRAINING,
                           step)
    points = {int(file.parent.name[5:]): file for file in folder.glob("sft/step-*/eval.json")}
    for step, file in sorted(points.items()):
        found |= evaluated(file, ALONG, step)
    return found


def summary(args: Args, plan: list[tuple[str, int]], command: str) -> dict:
    """results.json: how it was made, {part: rows} of the comparison, and the ablations' rows."""
    every = [stage for cell in plan for stage in stages(*cell, args)]
    ran = [(stage, record(stage)) for stage in every if stage.output.exists()]
    minutes = {}
    for stage, row in ran:
        name = "a point of a curve" if stage.name.rpartition("-")[2].isdigit() else stage.name
        minutes.setdefault(name, []).append(row.get("seconds", 0) / 60)
    seen = {key: "; ".join(dict.fromkeys(v for _, row in ran for v in row.get(key, "").split("; ")))
            for key in ("hardware", "python", "torch", "transformers", "commit", "date")}

    found = {cell: scores(Path(args.out) / f"{cell[0]}-{cell[1]}") for cell in plan}
    order = list(dict.fromkeys(row for own in found.values() for row in own))
    first = {}                                                  # metric of PAPER: its first row
    for row in order:
        if row.part == AFTER and row.metric in PAPER and not row.kind:
            first.setdefault(row.metric, row)
    rows = []
    for row in order:
        headline = row.key in [own.key for own in first.values()]
        if row.part == ALONG and not headline:
            continue
        values = {v: {seed: found[v, seed][row] for seed in range(args.seeds)
                      if row in found.get((v, seed), {})} for v in args.variants}
        changes = {v: change(values.get(BASE, {}), values[v]) for v in args.variants if v != BASE}
        rows.append(row._asdict() | dict(
            scores={v: mean_interval(list(own.values())) | dict(seeds=own)
                    for v, own in values.items() if own},
            changes={v: own for v, own in changes.items() if own},
            paper=PAPER[row.metric] if row.part == AFTER and row in first.values() else None))
    wanted = [row for row in order if row.part == BEFORE and not row.kind and (
        row.key in ("val_caption_loss", "align", "recall/5", "entropy/projected")
        or row.metric == "CIDEr")] + list(first.values())
    ablations = {name: {f"{row.label}, {row.part}": found[name, 0].get(row) for row in wanted}
                 for name in [*args.variants, *ABLATIONS] if found.get((name, 0))}
    return dict(
        command=command, missing=len(every) - len(ran), stages=len(every), **seen, seeds=args.seeds,
        variants=args.variants, minutes={k: statistics.fmean(v) for k, v in minutes.items()},
        flags={name: CELLS[name] for name, _ in plan}, rows=rows,
        ablations=ablations if args.ablations else {})


# ---- report --------------------------------------------------------------------------------------


def markdown(rows: list[list]) -> list[str]:
    """A table, its header first; None: nothing."""
    lines = ["| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]


def shown(score: dict | None) -> str | None:
    """The mean over seeds, with its interval."""
    if score:
        half = "" if score["half"] is None else f" ± {score['half']:.3f}"
        return f"{score['mean']:.3f}{half}"


def shown_change(found: dict | None) -> str | None:
    """A change in per cent and as a difference; bold: its interval excludes zero."""
    if not found:
        return None
    difference, half, percent = found["difference"], found["half"], found["percent"]
    text = f"{difference:+.3f}" if percent is None else f"{percent:+.1f}%"
    if half is None:
        return text
    text = f"**{text}**" if abs(difference) > half else text
    return f"{text} ({difference:+.3f} ± {half:.3f})"


def tables(results: dict) -> str:
    """The tables of results.md."""
    lines = []
    for part in (BEFORE, PRETRAINING, AFTER, ALONG):
        rows, variants = [r for r in results["rows"] if r["part"] == part], results["variants"]
        if not rows:
            continue
        others = [v for v in variants if v != BASE and BASE in variants]
        paper = any(row["paper"] for row in rows)
        table = [["", *variants, *(f"{v}: change" for v in others), *["the paper's"] * paper]]
        for row in rows:
            table.append([
                row["label"] + f", {row['step']} steps" * (part in (PRETRAINING, ALONG)),
                *(shown(row["scores"].get(v)) for v in variants),
                *(shown_change(row["changes"].get(v)) for v in others),
                *[f"{row['paper']:+d}%" if row["paper"] else None] * paper])
        lines += [f"## {part.capitalize()}", "", *markdown(table)]
    if results["ablations"]:
        columns = list(next(iter(results["ablations"].values())))
        table = [[name, *(None if own.get(c) is None else f"{own[c]:.3f}" for c in columns)]
                 for name, own in results["ablations"].items()]
        lines += ["## Ablations, seed 0", "", *markdown([["", *columns], *table])]
    return "\n".join(lines)


def report(results: dict) -> str:
    """results.md."""
    missing = f"**Not complete: {results['missing']} of {results['stages']} stages have not run.**"
    flags = "; ".join(f"{name} `{text or 'none'}`" for name, text in results["flags"].items())
    lines = [
        "# Results", "", "Written by reproduce.py. " + missing * bool(results["missing"]), "",
        f"- command: `{results['command']}`", f"- hardware: {results['hardware']}",
        f"- Python {results['python']}, torch {results['torch']}, transformers"
        f" {results['transformers']}; commit {results['commit']}; {results['date']}",
        f"- seeds: from 0 on, {results['seeds']} of each variant",
        "- minutes, mean: " + ", ".join(f"{k} {m:.1f}" for k, m in results["minutes"].items()),
        f"- flags of pretrain.py: {flags}", "",
        "Scores: mean over seeds ± half of its 95% t-interval. Changes are from caption-only: in"
        " per cent of its mean,", "in brackets the mean paired difference ± half of its 95%"
        " interval; bold: the interval excludes zero. None is", "corrected for the number of rows."
        " Losses are better when lower; a lower entropy is stronger compression.", "",
        tables(results)]
    return "\n".join(lines).rstrip() + "\n"


# ---- main ----------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Run what has not run; with everything there, or with --report, write the report."""
    until = time.monotonic() + 0.97 * args.budget if args.budget else math.inf  # the rest: to stop
    command, args = shlex.join(["python", "reproduce.py", *sys.argv[1:]]), check(args)
    plan = cells(args)
    for cell in plan:
        for stage in stages(*cell, args):
            check_made_by(stage, args)
    if not args.report:
        try:
            complete = run_all(plan, args, until)
        except KeyboardInterrupt:
            runtime.log("interrupted; to go on, run the same command again")
            sys.exit(130)
        if not complete:
            left = sum(not s.output.exists() for cell in plan for s in stages(*cell, args))
            runtime.log(f"incomplete: {left} stages or more are left when the time is up; to go on,"
                        " run the same command again")
            return
    results = summary(args, plan, command)
    if not results["rows"]:
        raise InputError(f"{args.out}: nothing to report yet; run without --report")
    files = [Path(args.out) / name for name in ("results.json", "results.md")]
    for file, text in zip(files, (json.dumps(results, indent=1) + "\n", report(results))):
        with runtime.atomic(file) as path:
            path.write_text(text)
    runtime.finished(files, f"read {files[1]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that the stages are ended
    runtime.run(main, Args, __doc__)
