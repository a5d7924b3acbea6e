"""The paper's comparison by one command: does patch-aligned pretraining help under the same fine-tuning?

    python reproduce.py                                     # the toy world, five seeds, CPU or GPU
    python reproduce.py --quick                             # one seed and few steps: minutes; all of it in runs/quick
    python reproduce.py --ablations --budget 540            # stops in time; the same command again goes on
    python reproduce.py --report                            # only the report, from what is there
    python reproduce.py --out runs/real --results runs/real/RESULTS.md --picture runs/real/results.png --seeds 3 \\
        --pretrain-flags "--vision dinov2-small --llm smollm2-135m --data train.jsonl --image-dir images" --probe-flags "--data ..." \\
        --sft-flags "--data ..." --eval-flags "--data ..." --caption-eval-flags "--data ..."      # your own models and data: all five

A cell is one variant (caption-only, patch-aligned, patch-aligned-cosine) with one seed, or one ablation with seed 0. Each goes through

    pretrain.py, probe.py, eval.py (captions), sft.py, probe.py, eval.py, and eval.py on checkpoints kept along the fine-tuning

by the command lines that a user types. A stage whose output is there is not run again; to have it run again, delete the cell's folder.

reads:  what the stages read
writes: OUT/CELL/pretrain and OUT/CELL/sft, as the stages write them (resume.pt goes once it is of no more use), OUT/CELL/STAGE.log (what
        the stage printed), OUT/CELL/STAGE.command.json (its command, where and how long it ran); RESULTS and PICTURE
"""
import contextlib
import dataclasses
import functools
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
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import runtime
from data import InputError

ROOT = Path(__file__).resolve().parent                          # where the stages' scripts are
BASE, ALIGNED, COSINE = VARIANTS = ("caption-only", "patch-aligned", "patch-aligned-cosine")

# ------------------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Flags of reproduce.py. The flags of a stage are one text; a single flag needs an equals sign: --sft-flags=--checkpointing."""

    out: str = "runs/reproduce"
    """folder of all cells"""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """what is compared"""
    seeds: int = 5
    """cells of each variant, with seeds from 0"""
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
    """seconds that this call may take, longer than any stage that writes no resume.pt; 0: no limit"""
    report: bool = False
    """run nothing, report what is there"""
    results: str = "RESULTS.md"
    """the report"""
    picture: str = "docs/results.png"
    """the picture"""


QUICK = dict(out="runs/quick", seeds=1, results="runs/quick/RESULTS.md", picture="runs/quick/results.png")             # flags under --quick
FLAGS = {"pretrain": "--steps 100", "probe": "--images 60", "caption_eval": "--limit 60", "sft": "--steps 100", "eval": "--limit 60"}
OWN = {"--out", "--seed", "--resume", "--keep-every", "--patch-loss", "--patch-weight"}        # these are set here, not by a user
TOY_KEEP_EVERY, CURVE_LIMIT = 100, 300                          # steps between points of the curve; records of each file at a point


def flags(args: Args, stage: str) -> list[str]:
    """A stage's flags: those of --quick, then the user's."""
    try:
        return shlex.split(FLAGS[stage]) * args.quick + shlex.split(getattr(args, f"{stage}_flags"))
    except ValueError as error:
        raise InputError(f"--{stage.replace('_', '-')}-flags {getattr(args, f'{stage}_flags')}: {str(error).lower()}") from None


def check(args: Args) -> Args:
    """Fill in what depends on other flags; refuse what makes no sense."""
    if args.quick:
        defaults = Args()
        args = dataclasses.replace(args, **{k: v for k, v in QUICK.items() if getattr(args, k) == getattr(defaults, k)})
    if unknown := set(args.variants) - set(VARIANTS):
        raise InputError(f"--variants {' '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    for name, low in (("seeds", 1), ("patch_weight", 0), ("cosine_weight", 0), ("keep_every", -1), ("jobs", 0), ("budget", 0)):
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
    variants = [v for v in VARIANTS if v in args.variants]
    return dataclasses.replace(args, out=str(Path(args.out)), variants=variants, keep_every=keep_every, jobs=jobs)


# -------------------------------------------------------------------------------------------------------------- cells and stages

LINEAR = "linear-caption-only"                                  # the linear projector's own baseline
ABLATIONS = {
    "tau-0.03": {"--tau": "0.03"}, "tau-0.2": {"--tau": "0.2"},
    **{f"weight-{w}": {"--patch-weight": w} for w in ("0.01", "0.1", "0.3", "1")},
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

    changed, keep = [text for pair in cell.flags.items() for text in pair if text], args.keep_every * (cell.name in VARIANTS)
    steps = {int(path.stem[5:]) for path in [*tuned.glob("ckpt-*.pt"), *tuned.glob("step-*")]}
    return [
        stage("pretrain", first / "ckpt.pt", "pretrain.py", *flags(args, "pretrain"), *changed, "--seed", cell.seed, "--out", first,
              spent=first / "resume.pt"),
        stage("probe", first / "probe.json", "probe.py", first / "ckpt.pt", *flags(args, "probe")),
        stage("captions", first / "eval.json", "eval.py", first / "ckpt.pt", *flags(args, "caption_eval")),
        stage("sft", tuned / "ckpt.pt", "sft.py", first / "ckpt.pt", *flags(args, "sft"), *["--keep-every", keep][:2 * bool(keep)],
              "--seed", cell.seed, "--out", tuned, spent=tuned / "resume.pt"),
        stage("sft-probe", tuned / "probe.json", "probe.py", tuned / "ckpt.pt", *flags(args, "probe")),
        stage("eval", tuned / "eval.json", "eval.py", tuned / "ckpt.pt", *flags(args, "eval")),
        *(stage(f"step-{n}", tuned / f"step-{n}" / "eval.json", "eval.py", tuned / f"ckpt-{n}.pt", "--limit", CURVE_LIMIT,
                *flags(args, "eval"), "--out", tuned / f"step-{n}", spent=tuned / f"ckpt-{n}.pt") for n in sorted(steps))]


def command_line(stage: Stage) -> str:
    """A stage's command, as a user types it."""
    return shlex.join(["python", *stage.command])


def made_by(stage: Stage, args: Args) -> str:
    """The command as it is recorded: with OUT for the folder, which may be moved."""
    return command_line(stage).replace(f"{args.out}/", "OUT/")


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
    record(stage, command=made_by(stage, args), **here)
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


# -------------------------------------------------------------------------------------------------------------------- statistics


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (Abramowitz and Stegun 26.5.8), from the far end."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):                               # there it converges slowly, and fast at 1 - x
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for k in range(400, 0, -1):
        m = k // 2
        over, under = (-(a + m) * (a + b + m), a + k) if k % 2 else (m * (b - m), a + k - 1)
        fraction = 1 + x * over / (under * (a + 2 * m) * fraction)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / (a * fraction)


def p_value(t: float, freedom: int) -> float:
    """Chance of a Student's t at least as far from 0, on either side."""
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


@functools.cache
def t_quantile(freedom: int) -> float:
    """The t that 5 % lie beyond, on both sides together, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > 0.05 else (low, middle)
    return low


def mean_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % t-interval; None for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


class Change(NamedTuple):
    """A paired difference from the baseline over seeds: mean, half of its 95 % interval, p; per cent: what makes it relative."""
    difference: float
    half: float | None
    p: float | None
    per_cent: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.difference) > self.half

    @property
    def relative(self) -> str:
        """Of the baseline's mean, in per cent; the difference where that is 0."""
        return f"{self.difference * self.per_cent:+.1f} %" if self.per_cent else f"{self.difference:+.3f}"

    def __str__(self):
        if self.half is None:
            return self.relative
        p = f"p {self.p:.3f}" if self.p >= 0.0005 else "p < 0.001"
        return f"{f'**{self.relative}**' if self.clear else self.relative} ({self.difference:+.3f} ± {self.half:.3f}, {p})"


def compare(base: dict[int, float], other: dict[int, float]) -> Change | None:
    """{seed: score} of the baseline and of another -> their difference over the seeds of both; None without any."""
    seeds = sorted(base.keys() & other.keys())
    if not seeds:
        return None
    difference, half = mean_interval([other[s] - base[s] for s in seeds])
    level = statistics.fmean(base[s] for s in seeds)
    p = None
    if half is not None:
        error = half / t_quantile(len(seeds) - 1)
        p = p_value(difference / error, len(seeds) - 1) if error else float(difference == 0)
    return Change(difference, half, p, 100 / abs(level) if level else None)


# ------------------------------------------------------------------------------------------------------------------------ scores

PRETRAINING, TUNING, CURVE = "after pretraining", "after the same fine-tuning", "along the fine-tuning"
LOSSES = {"val_caption_loss": "caption loss, validation, nats per token", "val_loss": "loss, validation, nats per token"}
PROBED = {"align": "alignment", "chance": "alignment, chance", "recall/5": "recall@5", "recall_chance/5": "recall@5, chance",
          "entropy/encoder": "entropy of Z per image, nats", "entropy/projected": "entropy of H per image, nats",
          "entropy/encoder_pooled": "entropy of Z, pooled", "entropy/projected_pooled": "entropy of H, pooled",
          "entropy/encoder_centred": "entropy of Z, pooled, centred", "entropy/projected_centred": "entropy of H, pooled, centred"}
METRICS = {"Acc@0.5": "grounding, Acc@0.5", "mIoU": "grounding, mean IoU", "accuracy": "question answering",
           "exact": "instruction following", "choice": "multiple choice", "CIDEr": "captions, CIDEr", "BLEU-4": "captions, BLEU-4",
           "ROUGE-L": "captions, ROUGE-L"}
PAPER = {"Acc@0.5": 16, "accuracy": 4, "exact": 3}              # the paper's relative gains, %, of the first file with the metric


class Row(NamedTuple):
    """What a score is of. key: of eval.json, or of metrics.jsonl, or a path in probe.json; kind: of the questions; step: on the curve."""
    part: str
    label: str
    key: str
    metric: str = ""
    kind: str = ""
    step: int = 0


class Score(NamedTuple):
    """A cell's score, with the bootstrap's 95 % interval where eval.py gives one."""
    value: float
    low: float | None = None
    high: float | None = None


def evaluated(file: Path, part: str, step: int = 0) -> dict[Row, Score]:
    """The scores of an eval.json that METRICS names, in its order. Exact match counts for instructions, VQA accuracy for the others."""
    found = {}
    for key, score in (json.loads(file.read_text())["scores"] if file.exists() else {}).items():
        stem, metric, *kind = key.split("/", 2)
        name, _, frame = metric.partition(" (")
        if name in METRICS and name != ("accuracy" if stem.endswith("instruct") else "exact"):
            label = ", ".join([METRICS[name] + f" ({frame}" * bool(frame), *kind, stem])
            found[Row(part, label, key, metric, "".join(kind), step)] = Score(score["value"], score["low"], score["high"])
    order = list(METRICS)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].metric.partition(" (")[0])))


def scores(folder: Path) -> dict[Row, Score]:
    """All that a cell's files say."""
    found = {}
    for part, stage in ((PRETRAINING, folder / "pretrain"), (TUNING, folder / "sft")):
        logged, probe = {}, {}
        if (stage / "probe.json").exists():                     # then the training has ended
            probe = json.loads((stage / "probe.json").read_text())
            for line in (stage / "metrics.jsonl").read_text().splitlines():
                logged |= json.loads(line)                      # the last of each
        for names, source in ((LOSSES, logged), (PROBED, probe)):
            for key, label in names.items():
                value = source
                for name in key.split("/"):
                    value = (value or {}).get(name)
                if value is not None and not (part == TUNING and key.startswith("entropy/encoder")):       # Z stays as it was
                    found[Row(part, label, key)] = Score(value)
        found |= evaluated(stage / "eval.json", part)
    points = sorted((int(file.parent.name[5:]), file) for file in folder.glob("sft/step-*/eval.json"))
    if points and logged:
        points.append((logged["step"], folder / "sft" / "eval.json"))
    for step, file in points:
        found |= evaluated(file, CURVE, step)
    return found


class Table:
    """The scores of all cells: {label of the cell: {row: score}}."""

    def __init__(self, args: Args, plan: list[Cell]):
        self.found = {cell.label: scores(Path(args.out) / cell.label) for cell in plan}
        self.variants, self.seeds = args.variants, range(args.seeds)
        self.rows = list(dict.fromkeys(row for found in self.found.values() for row in found))
        self.headlines = {}                                     # metric of PAPER: its first row after the fine-tuning
        for row in self.part(TUNING):
            if row.metric in PAPER and not row.kind:
                self.headlines.setdefault(row.metric, row)

    def part(self, part: str) -> list[Row]:
        """The rows of a part."""
        return [row for row in self.rows if row.part == part]

    def points(self, row: Row) -> list[Row]:
        """The curve's rows for a row."""
        return sorted((r for r in self.part(CURVE) if r.key == row.key), key=lambda r: r.step)

    def scores(self, variant: str, row: Row) -> dict[int, Score]:
        """{seed: score} of a variant."""
        found = {seed: self.found.get(f"{variant}-{seed}", {}).get(row) for seed in self.seeds}
        return {seed: score for seed, score in found.items() if score}

    def change(self, variant: str, row: Row) -> Change | None:
        """From caption-only."""
        return compare(*({s: score.value for s, score in self.scores(v, row).items()} for v in (BASE, variant)))

    def aligned(self) -> list[str]:
        """The variants to compare with caption-only."""
        return [variant for variant in self.variants if BASE in self.variants and variant != BASE]


# ------------------------------------------------------------------------------------------------------------------------ report


def markdown(rows: list[list]) -> list[str]:
    """A table, its header first; None: nothing."""
    lines = ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]


def written(found: dict[int, Score]) -> str | None:
    """The mean over seeds with its interval; a single one with the bootstrap's, if it has one."""
    if not found:
        return None
    mean, half = mean_interval([score.value for score in found.values()])
    score = next(iter(found.values()))
    if half is None:
        return f"{mean:.3f}" + (f" [{score.low:.3f}, {score.high:.3f}]" if score.low is not None else "")
    return f"{mean:.3f} ± {half:.3f}"


def comparison(table: Table, rows: list[Row]) -> list[str]:
    """Each row's scores and changes; the paper's where a row is of its kind."""
    known = {row: f"{PAPER[row.metric]:+d} %" for row in table.headlines.values() if row in rows}
    lines = [["", *table.variants, *(f"{variant}: change" for variant in table.aligned()), *["the paper's change"] * bool(known)]]
    for row in rows:
        lines.append([row.label + f", {row.step} steps" * bool(row.step), *(written(table.scores(v, row)) for v in table.variants),
                      *(table.change(variant, row) for variant in table.aligned()), *[known.get(row)] * bool(known)])
    return markdown(lines)


def reading(table: Table) -> list[str]:
    """What the intervals say, in words; nothing where there is nothing to compare."""
    lines = ["## In words", ""] * bool(table.aligned())
    for variant in table.aligned():
        for part in (PRETRAINING, TUNING):
            changes = {row.label: change for row in table.part(part) if not row.kind and (change := table.change(variant, row))}
            clear = {label: change for label, change in changes.items() if change.clear}
            said = {f"higher than {BASE}": [f"{label} ({c.relative})" for label, c in clear.items() if c.difference > 0],
                    "lower": [f"{label} ({c.relative})" for label, c in clear.items() if c.difference < 0],
                    "the interval includes zero": [label for label, c in changes.items() if c.half is not None and not c.clear]}
            if any(said.values()):
                words = [f"- {name}: {'; '.join(labels) or 'nothing'}" for name, labels in said.items()]
                lines += [f"**{variant}, {part}**, by the 95 % interval of the paired difference over seeds:", "", *words, ""]
            elif changes:
                lines += [f"**{variant}, {part}**: one seed, so no test: the changes say nothing about other seeds.", ""]
        beside = []
        for metric, row in table.headlines.items():
            if change := table.change(variant, row):
                state = "one seed" if change.half is None else f"the interval {'excludes' if change.clear else 'includes'} zero"
                beside.append(f"- {row.label}: {change} here, {PAPER[metric]:+d} % in the paper; {state}")
        lines += [f"**{variant}, beside the paper**:", "", *beside, ""] if beside else []
    return lines


def lead(changes: dict[int, Change]) -> str:
    """{fine-tuning step: change} -> where the variant is ahead of caption-only, and whether it stays so."""
    steps, last = list(changes), max(changes)
    behind = [step for step in steps if changes[step].difference <= 0]
    clear = [str(step) for step in steps if changes[step].clear and step not in behind]
    if not behind:
        text = "ahead at every point"
    elif last not in behind:
        text = f"ahead from step {min(step for step in steps if step > max(behind))} to the end"
    else:
        ahead = [str(step) for step in steps if step not in behind]
        text = f"ahead at steps {', '.join(ahead)}, no more at the end" if ahead else "never ahead"
    return text + (f"; the interval is above zero at steps {', '.join(clear)}" if clear else "; the interval is nowhere above zero")


def curves(table: Table) -> list[str]:
    """The curve's section; nothing without a curve."""
    points = [point for row in table.headlines.values() for point in table.points(row)]
    if not points:
        return []
    lines = []
    for variant in table.aligned():
        for row in table.headlines.values():
            if changes := {p.step: change for p in table.points(row) if (change := table.change(variant, p))}:
                lines.append(f"- {variant}, {row.label}: {lead(changes)}")
    return ["## Against fine-tuning steps", "", f"At most {CURVE_LIMIT} records of each file at a point, all at the last. The learning "
            "rate falls over the whole run, so an earlier point is not what a shorter run would reach.", "", *lines, "",
            *comparison(table, points)]


def ablations(table: Table) -> list[str]:
    """The ablations' section; nothing without any."""
    names = [name for name in ABLATIONS if table.found.get(f"{name}-0")]
    if not names:
        return []
    wanted = ("val_caption_loss", "align", "recall/5", "entropy/projected")
    rows = [row for row in table.part(PRETRAINING) if row.key in wanted or row.metric == "CIDEr" and not row.kind]
    rows += table.headlines.values()
    lines = [["", *(f"{row.label}, {row.part}" for row in rows)]]
    for name in [*table.variants, *names]:
        found, line = table.found.get(f"{name}-0", {}), [name]
        base = {} if name in (BASE, LINEAR) else table.found.get(f"{LINEAR if name == 'linear' else BASE}-0", {})
        for row in rows:
            change = f" ({compare({0: base[row].value}, {0: found[row].value})})" if row in base and row in found else ""
            line.append(f"{found[row].value:.3f}{change}" if row in found else None)
        lines.append(line)
    return ["## Ablations", "", f"One seed (0), so no test. In brackets the change from {BASE}, for linear from {LINEAR}.", "",
            *markdown(lines)]


def asked(args: Args) -> str:
    """The command of this report, from the flags as given."""
    given = []
    for f in dataclasses.fields(Args):
        value, name = getattr(args, f.name), "--" + f.name.replace("_", "-")
        if f.name not in ("jobs", "budget", "report") and value != getattr(Args(), f.name):
            given += [name] if value is True else [name, *value] if isinstance(value, list) else [f"{name}={value}"]
    return shlex.join(["python", "reproduce.py", *given])


def report(args: Args, plan: list[Cell], table: Table, command: str) -> str:
    """RESULTS.md; command: what `asked` says."""
    every = [stage for cell in plan for stage in stages(cell, args)]
    ran = [(stage, record(stage)) for stage in every if stage.output.exists()]
    missing = len(every) - len(ran)

    def seen(name):
        return "; ".join(dict.fromkeys(row[name] for _, row in ran))

    minutes = {}
    for stage, row in ran:
        minutes.setdefault("a point of the curve" if stage.name.startswith("step-") else stage.name, []).append(row.get("seconds", 0) / 60)
    finished = {v: sum(any(row.part == TUNING for row in table.found[f"{v}-{seed}"]) for seed in table.seeds) for v in table.variants}
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
        f"{'; '.join(f'{name} `{text}`' if text else f'{name} none' for name, text in changed.items())}.", "",
        "Scores: mean over seeds ± half of its 95 % t-interval; of one seed alone [95 % interval of the bootstrap over images]. Changes "
        f"are from {BASE}: relative to its mean (in brackets the mean paired difference ± half of its 95 % interval, and p of the paired "
        "t-test over seeds); bold: the interval excludes zero. p is not corrected for the number of rows. Losses are better when lower; a "
        "lower entropy is stronger compression. The paper's changes are what it reports for its own models and benchmarks.", ""]
    for part in (PRETRAINING, TUNING):
        lines += [f"## {part.capitalize()}", "", *comparison(table, table.part(part))] if table.part(part) else []
    return "\n".join([*lines, *reading(table), *curves(table), *ablations(table)]).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------------- picture

INK, GRID = (40, 40, 46), (222, 222, 226)
COLOURS = dict(zip(VARIANTS, ((120, 120, 126), (214, 39, 40), (31, 119, 180))))
WIDTH, LINE, CURVE_HEIGHT = 1800, 66, 330                      # pixels, for a page half as wide: all, a row, a curve
LIMIT = 60                                                      # %: of what is beyond, the number is written
PICTURED = ("Acc@0.5", "accuracy", "exact", "choice", "CIDEr")


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers in a range."""
    step = next(m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5) if (high - low) / (m * 10.0**e) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def diamond(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """The mark of the paper's change."""
    draw.polygon([(x, y - 12), (x + 9, y), (x, y + 12), (x - 9, y)], "white", INK, 3)


def draw_changes(draw: ImageDraw.ImageDraw, box, table: Table, rows: dict[Row, str], font) -> None:
    """Relative changes, a line of dots with intervals per row, whose label is given; diamonds: the paper's."""
    x0, y0, x1, y1 = box
    changes = {(row, v): change for row in rows for v in table.aligned() if (change := table.change(v, row)) and change.per_cent}
    ends = [0, *PAPER.values(), *(c.per_cent * (c.difference + side * (c.half or 0)) for c in changes.values() for side in (-1, 1))]
    low, high = max(-LIMIT, min(ends)), min(LIMIT, max(ends))

    def at(x):
        return x0 + (x1 - x0) * (0.08 + 0.84 * (min(max(x, low), high) - low) / (high - low))

    for x in ticks(low, high):
        draw.line((at(x), y0, at(x), y1), INK if x == 0 else GRID, 2)
        draw.text((at(x), y1 + 10), f"{x:+g}" if x else "0", INK, font, anchor="mt")
    draw.text((x0, y0 - 16), f"change from {BASE}, %", INK, font, anchor="ls")
    for i, (row, label) in enumerate(rows.items()):
        y = y0 + LINE * (i + 0.5)
        draw.text((x0 - 14, y), label, INK, font, anchor="rm")
        for n, variant in enumerate(table.aligned()):
            if change := changes.get((row, variant)):
                height, centre = y + 24 * (n - (len(table.aligned()) - 1) / 2), change.per_cent * change.difference
                reach = change.per_cent * (change.half or 0)
                draw.line((at(centre - reach), height, at(centre + reach), height), COLOURS[variant], 4)
                draw.ellipse((at(centre) - 8, height - 8, at(centre) + 8, height + 8), COLOURS[variant])
                if not low <= centre <= high:
                    side = "lm" if centre > 0 else "rm"
                    draw.text((at(centre) + math.copysign(12, centre), height), f"{centre:+.0f}", COLOURS[variant], font, anchor=side)
        if row in table.headlines.values():
            diamond(draw, at(PAPER[row.metric]), y)


def draw_curve(draw: ImageDraw.ImageDraw, box, table: Table, row: Row, font) -> None:
    """A score against fine-tuning steps, means over seeds with their intervals."""
    x0, y0, x1, y1 = box
    lines = {v: [(p.step, *mean_interval([s.value for s in found.values()])) for p in table.points(row) if (found := table.scores(v, p))]
             for v in table.variants}
    every = [point for line in lines.values() for point in line]
    last = max(step for step, *_ in every)
    low, high = (f(mean + side * (half or 0) for _, mean, half in every) for f, side in ((min, -1), (max, 1)))
    low, high = max(0, low - 0.02), min(1, high + 0.02)

    def at(step, y):
        return x0 + (x1 - x0) * 0.96 * step / last, y1 - (y1 - y0) * (min(max(y, low), high) - low) / (high - low)

    for y in ticks(low, high):
        draw.line((x0, at(0, y)[1], x1, at(0, y)[1]), GRID, 2)
        draw.text((x0 - 10, at(0, y)[1]), f"{y:.10g}", INK, font, anchor="rm")
    draw.rectangle(box, outline=INK, width=2)
    draw.text((x0, y0 - 14), row.label, INK, font, anchor="ls")
    for step in ticks(0, last):
        draw.text((at(step, 0)[0], y1 + 8), f"{step:g}", INK, font, anchor="mt")
    for variant, line in lines.items():
        draw.line([at(step, mean) for step, mean, _ in line], COLOURS[variant], 4)
        for step, mean, half in line:
            draw.line((*at(step, mean - (half or 0)), *at(step, mean + (half or 0))), COLOURS[variant], 3)
            x, y = at(step, mean)
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), COLOURS[variant])


def picture(table: Table) -> Image.Image | None:
    """Left the relative changes, right the curves, if there are any; None: nothing to compare."""
    rows = {row: row.label + ", pretrained" * (part == PRETRAINING) for part in (TUNING, PRETRAINING) for row in table.part(part)
            if row.metric in PICTURED and not row.kind}
    if not rows or not table.aligned():
        return None
    font, drawn = ImageFont.load_default(24), [row for row in table.headlines.values() if table.points(row)]
    below = 70 + max(LINE * len(rows) + 60, CURVE_HEIGHT * len(drawn))
    image = Image.new("RGB", (WIDTH if drawn else WIDTH * 5 // 8, below + 90), "white")
    draw = ImageDraw.Draw(image)
    left = 40 + max(map(font.getlength, rows.values()))
    draw_changes(draw, (left, 70, 1080, 70 + LINE * len(rows)), table, rows, font)
    for i, row in enumerate(drawn):
        draw_curve(draw, (1200, 70 + CURVE_HEIGHT * i, WIDTH - 30, CURVE_HEIGHT * (i + 1) - 20), table, row, font)
    x = 40
    for variant in table.variants:
        draw.ellipse((x, below + 2, x + 16, below + 18), COLOURS[variant])
        draw.text((x + 28, below + 10), variant, INK, font, anchor="lm")
        x += 70 + int(font.getlength(variant))
    diamond(draw, x + 8, below + 10)
    draw.text((x + 28, below + 10), "the paper's change", INK, font, anchor="lm")
    seeds = max(len(table.scores(variant, row)) for variant in table.variants for row in rows)
    note = f"{seeds} seeds; bars: 95 % t-intervals, on the left of the paired difference" if seeds > 1 else "one seed"
    draw.text((40, below + 52), note + "; right: against fine-tuning steps" * bool(drawn), INK, font, anchor="lm")
    return image


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
    table = Table(args, plan)
    if not table.rows:
        raise InputError(f"{args.out}: nothing to report yet; run without --report")
    with runtime.atomic(args.results) as path:
        path.write_text(report(args, plan, table, command))
    files = [args.results]
    if drawn := picture(table):
        files.append(args.picture)
        with runtime.atomic(args.picture) as path:
            drawn.save(path, "PNG")
    runtime.log(f"wrote {' and '.join(files)}; next: read {args.results}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that the stages are ended
    runtime.run(main, Args, __doc__, InputError)
