"""From the files of all cells to the report and its picture: scores, paired statistics over seeds, tables, curves. Half of reproduce.py.

A cell is a variant or ablation with one seed, in a folder NAME-SEED with pretrain/ and sft/ as the stages write them.
"""
import functools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

BASE, ALIGNED, COSINE = VARIANTS = ("caption-only", "patch-aligned", "patch-aligned-cosine")
LINEAR = "linear-caption-only"                                  # the linear projector's own baseline
CURVE_LIMIT = 300                                               # records of each file at a point of the curve; --limit of its commands

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
    """A paired difference from the baseline over seeds: mean, half of its 95 % interval, p; per cent: what makes it relative, if it can."""
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
        """Of the baseline's mean, in per cent; the difference where that is 0 to three decimals."""
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
    return Change(difference, half, p, 100 / abs(level) if abs(level) >= 0.0005 else None)


# ------------------------------------------------------------------------------------------------------------------------ scores

PRETRAINING, TUNING, CURVE = "after pretraining", "after the same fine-tuning", "along the fine-tuning"
LOSSES = {"val_caption_loss": "caption loss, validation, nats per token", "val_loss": "loss, validation, nats per token"}
PROBED = {"align": "alignment", "chance": "alignment, chance", "recall/5": "recall@5", "recall_chance/5": "recall@5, chance",
          **{f"pursuit/recall/{k - 1}": f"words among {k} {'atom' if k == 1 else 'atoms'}" for k in (1, 2, 4, 8)},
          "pursuit/control_recall/7": "words among 8 atoms, rotated",
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
    found, every = {}, json.loads(file.read_text())["scores"] if file.exists() else {}
    for key, score in every.items():
        stem, metric, *kind = key.split("/", 2)
        if kind and score["n"] == every[f"{stem}/{metric}"]["n"]:                                        # the only kind, so nothing new
            continue
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
                    value = dict(enumerate(value)).get(int(name)) if isinstance(value, list) else (value or {}).get(name)
                if value is not None and not (part == TUNING and key.startswith("entropy/encoder")):       # Z stays as it was
                    found[Row(part, label, key)] = Score(value)
        found |= evaluated(stage / "eval.json", part)
    for step, file in sorted((int(file.parent.name[5:]), file) for file in folder.glob("sft/step-*/eval.json")):
        found |= evaluated(file, CURVE, step)
    return found


def last_step(tuned: Path) -> int:
    """The number of fine-tuning steps that a cell has behind it."""
    return json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])["step"]


class Table:
    """The scores of all cells: {label of the cell: {row: score}}."""

    def __init__(self, out: Path, labels: list[str], variants: list[str], seeds: int):
        self.found = {label: scores(out / label) for label in labels}
        self.variants, self.seeds = variants, range(seeds)
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
    return ["## Against fine-tuning steps", "", f"At most {CURVE_LIMIT} records of each file, so not quite the scores above. The learning "
            "rate falls over the whole run, so an earlier point is not what a shorter run would reach.", "", *lines, "",
            *comparison(table, points)]


def ablations(table: Table, names: list[str]) -> list[str]:
    """The ablations' section, of those with these names that have run; nothing without any."""
    names = [name for name in names if table.found.get(f"{name}-0")]
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
    left = f"on the left of the paired difference over the mean of {BASE}"
    note = f"{seeds} seeds; bars: 95 % t-intervals, {left}" if seeds > 1 else "one seed"
    draw.text((40, below + 52), note + "; right: against fine-tuning steps" * bool(drawn), INK, font, anchor="lm")
    return image
