"""How bench.py measures and what it shows: memory, interleaved times, rows on disk, table and picture. Nothing here knows the loss.

A row: {device, patch_loss (hash of the source), case {n, d, v, ...} or {step}, provider, setting ("" = its default), error, time_ms
[[median, p10, p90] of each of two rounds], memory_bytes, unit_w_bytes, loss_error, grad_error, and for ours gate and passed}.
"""
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import multiprocessing
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import runtime
from data import InputError

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BOTH = "forward+backward"                                      # value of case["run"]; the others are "forward" and "check"

# -------------------------------------------------------------------------------------------------------------- time and memory


@contextlib.contextmanager
def noted(row: dict):
    """What is raised inside becomes the row's error. A GPU that fails for good ends the run here: later rows would be wrong."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if CUDA and row["error"]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def poisoned_memory():
    """Uninitialised memory holds NaN: on a GPU by filling what the allocator will hand out next, on a CPU by torch's own switch."""
    if CUDA:
        torch.cuda.empty_cache()
        sizes = [2**19] * 64 + [min(24 * 2**30, torch.cuda.mem_get_info()[0] // 2)]          # small blocks come from a pool of their own
        filled = [torch.full((size // 4,), math.nan, device=DEVICE) for size in sizes]
        del filled
        yield
        return
    with warnings.catch_warnings(action="ignore"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def peak_memory(call) -> int | None:
    """Peak bytes during the call, above what was there before: the allocator's on a GPU, resident memory on a CPU (None: not Linux)."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def resident(key):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    if sys.platform != "linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")              # the peak restarts at what is resident now
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def start_process(threads: int) -> None:
    """As many threads as here; freed memory of 64 kB or more goes back at once, so that what is resident is what is in use."""
    torch.set_num_threads(threads)
    with contextlib.suppress(AttributeError, OSError, TypeError):        # mallopt(M_MMAP_THRESHOLD, ...) is the GNU C library's
        ctypes.CDLL(None).mallopt(-3, 2**16)


def in_own_process(function, *arguments):
    """The function's result from a new process."""
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, context, initializer=start_process, initargs=(threads,)) as pool:
        return pool.submit(function, *arguments).result()


@cache
def l2_filler() -> torch.Tensor:
    """Many times the size of any L2 cache."""
    return torch.empty(2**30, dtype=torch.int8, device=DEVICE)


def milliseconds(call) -> float:
    """The time of one call."""
    if not CUDA:
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    l2_filler().zero_()                                        # nobody finds inputs in L2, and Python runs ahead of the GPU
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_all(calls: dict, rows: dict, repeats: int) -> None:
    """Interleaved: in each repeat every provider once, another one first each time. calls {name: function of the repeat's number},
    rows {name: row}, which get time_ms: [median, p10, p90] of two rounds after a warm-up."""
    names = list(calls)
    for count in (max(1, repeats // 5), repeats, repeats):
        taken = {name: [] for name in names}
        for repeat in range(count):
            for name in names[repeat % len(names):] + names[:repeat % len(names)]:
                if not rows[name]["error"]:
                    with noted(rows[name]):
                        taken[name].append(milliseconds(partial(calls[name], repeat)))
        for name, row in rows.items():
            if not row["error"]:
                quantiles = [float(torch.tensor(taken[name]).quantile(q)) for q in (0.5, 0.1, 0.9)]
                row["time_ms"] = [*row.get("time_ms", []), quantiles][-2:]


# -------------------------------------------------------------------------------------------------------------------------- rows


def machine(source: Path) -> dict:
    """What is measured, and with what; `source`: the file under test."""
    def output(*command):
        with contextlib.suppress(OSError):
            return subprocess.run(command, cwd=source.parent, capture_output=True, text=True).stdout.strip() or None

    installed = {d.name: d.version for d in metadata.distributions()}
    cpu = [line.split(": ")[1] for line in (output("cat", "/proc/cpuinfo") or "").splitlines() if line.startswith("model name")] or ["CPU"]
    return dict(device=torch.cuda.get_device_name() if CUDA else f"{cpu[0]}, {torch.get_num_threads()} threads",
                driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), python=sys.version.split()[0],
                versions={p: installed.get(p) for p in ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy")},
                commit=output("git", "describe", "--always", "--dirty"), time=time.strftime("%Y-%m-%d %H:%M:%S"),
                patch_loss=hashlib.sha256(source.read_bytes()).hexdigest()[:12])


def read_rows(path: Path) -> list[dict]:
    """The whole lines of the file; a killed run may leave half of one."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def key(row: dict, source: bool) -> str:
    """What a row is about; with `source`, another patch_loss.py makes another row of what runs it."""
    source = source and ("step" in row["case"] or row["provider"].startswith("ours"))
    return json.dumps([row["device"], row["case"], row["provider"], row["setting"], source and row["patch_loss"]])


class Rows:
    """OUT/rows.jsonl, a line per row."""

    def __init__(self, out: Path, here: dict):
        """`here`: what `machine` returned, whose line stands before the new rows."""
        self.path, self.stamp = out / "rows.jsonl", {name: here[name] for name in ("device", "patch_loss")}
        rows = read_rows(self.path)
        self.known = {key(row, source=True) for row in rows if "case" in row}
        with runtime.atomic(self.path) as temporary:           # rewritten, without half a line at its end
            temporary.write_text("".join(json.dumps(row) + "\n" for row in [*rows, here]))

    def lacks(self, case: dict, provider: str, setting: str) -> bool:
        """Whether this is still to be measured."""
        return key(self.stamp | dict(case=case, provider=provider, setting=setting), source=True) not in self.known

    def write(self, row: dict) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(self.stamp | row) + "\n")


def title(case: dict) -> str:
    """A case in words."""
    return ", ".join(f"{name.upper() if name in 'vk' else name} {value}" for name, value in case.items() if value != "")


def report(out: Path) -> list[dict]:
    """Write bench.json, bench.txt and bench.png from the newest rows of each kind in rows.jsonl -> those rows."""
    lines = read_rows(out / "rows.jsonl")
    rows = list({key(r, source=False): r for r in lines if "case" in r}.values())
    if not rows:
        raise InputError(f"{out / 'rows.jsonl'} holds no measurements; run without --report")
    with runtime.atomic(out / "bench.json") as path:
        path.write_text(json.dumps(dict(machines=[r for r in lines if "case" not in r], rows=rows), indent=1) + "\n")
    with runtime.atomic(out / "bench.txt") as path:
        path.write_text(table(rows) + "\n")
    if drawn := picture(rows):
        with runtime.atomic(out / "bench.png") as path:
            drawn.save(path, "PNG")
    runtime.log(table(rows))
    return rows


# ------------------------------------------------------------------------------------------------------------- table and picture


def speed(row: dict) -> float:
    """Median of the first round; infinite without one."""
    return row["time_ms"][0][0] if row.get("time_ms") else math.inf


def shown(rows: list[dict]) -> list[dict]:
    """Of the rows of one case each provider's default and, if that is another, its fastest setting; fastest first."""
    fastest = {row["provider"]: row for row in sorted(rows, key=speed, reverse=True)}
    return sorted((r for r in rows if not r["setting"] or (r is fastest[r["provider"]] and r.get("time_ms"))), key=speed)


def table(rows: list[dict]) -> str:
    """Every case of every device. Ratios are to the naive version, or to the step without labels."""
    parts = []
    for device, case in dict.fromkeys((r["device"], json.dumps(r["case"])) for r in rows):
        about, mine = json.loads(case), shown([r for r in rows if r["device"] == device and json.dumps(r["case"]) == case])
        base = next((r for r in mine if r["provider"] in ("naive", "no labels")), {})
        floor = next((speed(r) for r in mine if r["provider"] == "torch.mm" and r.get("time_ms")), None)
        lines = [["", "ms", "p10", "p90", "again", "ratio", "of torch.mm", "MiB", "ratio", "+ unit W", "loss error", "grad error", ""]]
        for r in mine:
            first, again = r.get("time_ms") or [[None] * 3] * 2
            ms, memory, unit_w = first[0], r.get("memory_bytes"), r.get("unit_w_bytes")
            note = r["error"] or {True: "passed", False: f"FAILED gate {r.get('gate')}"}.get(r.get("passed"), "")
            if "images" in r and ms:
                note = f"{r['images']} images, {r['tokens']} tokens"
            if r["provider"] == "torch.mm" and ms:
                flops = (4 if about["run"] == BOTH else 2) * about["n"] * about["labelled"] * about["v"] * about["d"]
                note = f"{flops / ms / 1e9:.3g} TFLOP/s"
            lines.append([", ".join(filter(None, (r["provider"], r["setting"]))), *first, again[0],
                          ms / speed(base) if ms and base.get("time_ms") else None, f"{floor / ms:.0%}" if ms and floor else None,
                          memory and round(memory / 2**20), memory / base["memory_bytes"] if memory and base.get("memory_bytes") else None,
                          unit_w and round(unit_w / 2**20),
                          *(f"{e:.1e}" if isinstance(e := r.get(k), float) else e for k in ("loss_error", "grad_error")), note])
        parts.append(f"{device}: {title(about)}\n{runtime.table(lines)}")
    return "\n\n".join(parts)


INK, GRID, GREY = (40, 40, 46), (222, 222, 226), (150, 150, 150)
COLOURS = [(214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 130, 140), (140, 86, 75), (227, 119, 194)]


def panel(draw, box, caption, lines, colours, font):
    """{provider: [(x, y)]} on two logarithmic axes: ticks on x where there are points, on y at 1, 2, 5 times powers of ten."""
    x0, y0, x1, y1 = box
    xs, ys = ([math.log(c) for c in column] for column in zip(*itertools.chain(*lines.values())))
    left, wide, low, high = min(xs), max(max(xs) - min(xs), 1e-9), min(ys) - 0.1, max(ys) + 0.1

    def at(x, y):
        return x0 + (x1 - x0) * (0.04 + 0.92 * (math.log(x) - left) / wide), y1 - (y1 - y0) * (math.log(y) - low) / (high - low)

    for y in [m * 10**e for e in range(-4, 8) for m in (1, 2, 5) if low <= math.log(m * 10**e) <= high]:
        draw.line((x0, at(1, y)[1], x1, at(1, y)[1]), GRID, 2)
        draw.text((x0 - 10, at(1, y)[1]), f"{y:g}", INK, font, anchor="rm")
    draw.rectangle(box, outline=INK, width=2)
    draw.text((x0, y0 - 14), caption, INK, font, anchor="ls")
    for name, line in lines.items():
        points = [at(*p) for p in line]
        draw.line(points, colours[name], 5)
        for x, y in points:
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), colours[name])
    for x in {x for line in lines.values() for x, _ in line}:
        draw.text((at(x, 1)[0], y1 + 10), f"{x}", INK, font, anchor="mt")


def picture(rows: list[dict]) -> Image.Image | None:
    """Time and memory against n and V, everything else as in the first case; drawn at twice the size. None: nothing to draw."""
    rows = [r for r in rows if r["device"] == rows[-1]["device"] and r["case"].get("run") == BOTH]
    rows = [r for r in rows if r.get("time_ms") and r.get("memory_bytes") is not None]
    if not rows:
        return None
    case, font = rows[0]["case"], ImageFont.load_default(24)
    names = list(dict.fromkeys(r["provider"] for r in rows if r["case"] == case))
    colours = dict(zip(names, itertools.cycle(COLOURS))) | {"torch.mm": GREY}
    image = Image.new("RGB", (1560, 1110 + 36 * -(-len(names) // 3)), "white")
    draw = ImageDraw.Draw(image)
    quantities = {"milliseconds": speed, "MiB": lambda row: max(row["memory_bytes"], 2**12) / 2**20}     # at least a page: no log of 0
    for i, ((axis, fixed), (unit, value)) in enumerate(itertools.product((("n", "v"), ("v", "n")), quantities.items())):
        best = {(r["provider"], r["case"][axis]): r for r in sorted(rows, key=speed, reverse=True)           # the fastest is last and stays
                if r["provider"] in names and r["case"] == case | {axis: r["case"][axis]}}
        lines = {name: sorted((size, value(r)) for (p, size), r in best.items() if p == name) for name in names}
        x, y = 100 + i // 2 * 780, 60 + i % 2 * 510
        caption = f"{unit} against {axis}; {fixed} = {case[fixed]}, d = {case['d']}".replace("v", "V")
        panel(draw, (x, y, x + 640, y + 400), caption, lines, colours, font)
    for i, name in enumerate(names):
        x, y = 100 + i % 3 * 480, 1060 + i // 3 * 36
        draw.line((x, y, x + 50, y), colours[name], 6)
        draw.text((x + 64, y), name, INK, font, anchor="lm")
    draw.text((100, image.height - 24), f"{case['h']}, {BOTH}, each at its fastest setting; {rows[0]['device']}", INK, font, anchor="lm")
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
