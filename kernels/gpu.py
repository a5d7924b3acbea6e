"""All that only a GPU can say about the patch loss, in calls of at most nine minutes: tests, tile sizes, counters, benchmark.

    python kernels/gpu.py --out OUT                        # 540 s at most; the same command again goes on where this one stopped
    python kernels/gpu.py --out OUT --budget 1200          # the same with more time

Stages, in order of value; each gets a share of the time that is left:

    tests   tests/test_triton.py: the kernels' numbers in bfloat16, float16 and float32, that nothing waits, what they compile to
    tiles   product 1 (scores) and product 2 (gradient) cut up in other ways, each beside a bare torch.mm of the same size
    ncu     what Nsight Compute counts in the two products, if it is installed; it leaves the clocks alone
    bench   kernels/bench.py, with whatever time is left
    suite   all other tests, where the stages train and generate on the GPU

A result is written as soon as it is there, and what fails is a result too; delete its line in gpu.jsonl to have it run again. A stage that
ran out of time is tried again, a tile that hung is not. A changed patch_loss.py is tested and measured anew. Exit status: 1 if
tests, benchmark or shipped tiles failed, 2 without a GPU. To ship other tiles, edit TILES in patch_loss.py.

reads:  OUT/gpu.jsonl, and what bench.py reads
writes: OUT/gpu.jsonl (a line per result), OUT/tests.txt (what pytest printed), OUT/gpu.txt (the summary), and what bench.py writes
"""
import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                  # `python kernels/gpu.py` has only kernels/ on its path

import runtime  # noqa: E402
from data import InputError  # noqa: E402
from kernels import patch_loss  # noqa: E402
from kernels.bench import Case, Provider, errors, make_inputs, ours, step, truth  # noqa: E402
from kernels.measure import CUDA, DEVICE, machine, noted, read_rows, time_all, title  # noqa: E402
from kernels.patch_loss import Tile  # noqa: E402

KERNELS = {1: "scores_kernel", 2: "gradient_kernel"}
SHAPES = (4608, 4096, 32000), (4608, 4096, 128256)

# Tried beside what TILES ships: without spills on sm_90, and within its shared memory, by Triton 3.6 (which asks the device for its limit
# before it launches, and refuses). The other product of a call then runs with the first tile of its own list that has the same BM.
CANDIDATES = {
    1: [Tile(128, 256, 64, 8, 2), Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 3), Tile(128, 128, 64, 4, 4),
        Tile(256, 128, 64, 8, 3), Tile(64, 256, 64, 4, 4)],
    2: [Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 2), Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 3),
        Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 4), Tile(64, 256, 64, 4, 4)],
}
GOES_ON = "the same command goes on"                           # printed by whatever stopped early, here and in bench.py

# --------------------------------------------------------------------------------------------------------------------- results


class Log:
    """OUT/gpu.jsonl, lines of {stage, name, device, patch_loss, error, ...}, or {..., begun} where a result is to follow."""

    def __init__(self, out: Path, here: dict):
        """`here`: what `machine` returns. Only lines of the same device and patch_loss.py are looked at."""
        self.path, self.stamp = out / "gpu.jsonl", {name: here[name] for name in ("device", "patch_loss")}
        out.mkdir(parents=True, exist_ok=True)

    def rows(self) -> dict[tuple, dict]:
        """The newest line of each (stage, name)."""
        return {(row["stage"], row["name"]): row for row in read_rows(self.path) if self.stamp.items() <= row.items()}

    def write(self, stage: str, name: str, **values) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(stage=stage, name=name, **self.stamp, **values)) + "\n")

    def attempt(self, stage: str, name: str, function, mark: bool = False) -> None:
        """Unless it has a row without `again`: function() -> the values of its row; what is raised is its error. With `mark` the attempt
        itself leaves a line; where that is the newest, the attempt before did not come to an end, and this becomes the result."""
        last = self.rows().get((stage, name), dict(again=True))
        if last.get("begun"):
            self.write(stage, name, error="it hung, or ended its process")
        elif last.get("again"):
            if mark:
                self.write(stage, name, begun=True)
            row, began = dict(error=None), time.time()
            with noted(row):
                row |= function()
            self.write(stage, name, **row, seconds=round(time.time() - began, 1))


def command(*arguments, seconds: float) -> tuple[str, dict]:
    """Run a program -> (what it printed, its row). If it does not end in time, it and all that it started are ended."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*map(str, arguments)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    last = (text.strip().splitlines() or ["nothing printed"])[-1][:300]
    error = f"did not end in {seconds:.0f} s" if code is None else f"exit status {code}" if code else None
    return text, dict(error=error, said=last, again=code is None or GOES_ON in text)


# ---------------------------------------------------------------------------------------------------------------------- stages
#
# Each is a function of the folder and the seconds it may take -> a row.


def run_pytest(out: Path, seconds: float, *arguments: str) -> dict:
    """pytest; what it prints goes to tests.txt."""
    text, row = command(sys.executable, "-m", "pytest", "-rfEs", "--tb=short", *arguments, seconds=seconds)
    with (out / "tests.txt").open("a") as file:
        file.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} pytest {' '.join(arguments)}\n{text[-200_000:]}\n")
    return row


def run_tiles(out: Path, seconds: float) -> dict:
    """In a process of its own, begun anew where a tile has ended it: once a GPU has failed a process, nothing more runs in that process."""
    until = time.time() + seconds
    for _ in range(4):
        left = until - time.time()
        _, row = command(sys.executable, __file__, "--out", out, "--only", "tiles", "--budget", max(0, left - 30), seconds=max(1, left))
        if not row["error"] or row["again"]:
            return row
    return row | dict(again=True)


COUNTERS = {
    "gpu__time_duration.sum": "duration", "launch__registers_per_thread": "registers", "dram__bytes.sum.per_second": "DRAM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM of peak", "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "breakdown:sm__throughput.avg.pct_of_peak_sustained_elapsed": ""}      # all pipes; the matrix units' is not named alike on all chips


def ncu_launches(text: str) -> list[dict]:
    """What `ncu --csv --page raw` prints, a line of names, one of units, one per launch -> [{"kernel": its name, counter: value unit}]."""
    table = [*csv.reader(line for line in text.splitlines() if line.startswith('"'))]
    names, units, *launches = table if len(table) > 2 else ([], [])
    return [{"kernel": launch[names.index("Kernel Name")]} | {
        COUNTERS.get(name, name): f"{value} {unit}".strip() for name, unit, value in zip(names, units, launch)
        if COUNTERS.get(name) or "pipe_tensor" in name} for launch in launches]


def run_ncu(out: Path, seconds: float) -> dict:
    """Counters of the first launch of each product, in a single call at the first of SHAPES."""
    program = shutil.which("ncu") or next(iter(glob("/usr/local/cuda*/bin/ncu") + glob("/opt/nvidia/nsight-compute/*/ncu")), None)
    if not program:
        return dict(error="ncu is not on this machine")
    text, row = command(program, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--launch-count", 2,
                        "--kernel-name", f"regex:^({'|'.join(KERNELS.values())})$", "--metrics", ",".join(COUNTERS),
                        sys.executable, __file__, "--out", out, "--only", "call", seconds=seconds)
    launches = ncu_launches(text)
    return row | dict(launches=launches, error=row["error"] or (None if launches else "no counters"))


def run_bench(out: Path, seconds: float) -> dict:
    """bench.py, which keeps rows of its own."""
    _, row = command(sys.executable, ROOT / "kernels" / "bench.py", "--out", out, "--budget", seconds - 15, seconds=seconds)
    return row | dict(again=row["again"] or not row["said"].startswith("wrote"))


STAGES = {                                                     # how it is run, its share of the time that is left, arguments
    "tests": (run_pytest, 0.4, "tests/test_triton.py"), "tiles": (run_tiles, 0.5), "ncu": (run_ncu, 0.3), "bench": (run_bench, 1.0),
    "suite": (run_pytest, 1.0, "tests", "--ignore=tests/test_triton.py")}
LEAST = 100                                                    # seconds; with less, no stage is begun


def run_stages(stages: dict, log: Log, out: Path, until: float) -> list[str]:
    """One after the other -> those that are not finished."""
    def unfinished():
        return [stage for stage in stages if log.rows().get((stage, ""), dict(again=True)).get("again")]

    for stage in unfinished():
        function, share, *arguments = stages[stage]
        left = until - time.time()
        if left >= LEAST:
            seconds = max(LEAST, share * left)
            runtime.log(f"{stage}: {seconds:.0f} s at most")
            log.attempt(stage, "", functools.partial(function, out, seconds, *arguments))
    return unfinished()


# ----------------------------------------------------------------------------------------------------------------------- tiles


class Recorder:
    """Stands in for a kernel of patch_loss.py: launches it, and keeps the first launch, so that it can be repeated alone."""

    def __init__(self, kernel):
        self.kernel, self.again = kernel, None

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            again = functools.partial(self.kernel[grid], *arguments, **options)
            binary = again()
            if not self.again:
                self.again, self.binary, self.rows = again, binary, arguments[self.kernel.arg_names.index("R")]
        return launch


@contextmanager
def recorded(product: int, key: tuple, pair: tuple[Tile, Tile]):
    """patch_loss.py with this pair of tiles -> the Recorder of one of its products."""
    name, shipped = KERNELS[product], patch_loss.TILES[key]
    recorder = Recorder(getattr(patch_loss, name))
    patch_loss.TILES[key] = pair
    setattr(patch_loss, name, recorder)
    try:
        yield recorder
    finally:
        patch_loss.TILES[key] = shipped
        setattr(patch_loss, name, recorder.kernel)


@functools.lru_cache(1)
def problem(case: Case) -> tuple:
    """Inputs, and their loss and gradient in float64."""
    inputs = make_inputs(case, 0)
    return inputs, truth(inputs)


def measure_tile(case: Case, product: int, tile: Tile, repeats: int = 20) -> dict:
    """One product as this tile launches it, a bare torch.mm of its size and the whole call, timed in turn; and the error of the call."""
    key = patch_loss.chip(DEVICE)[0], getattr(torch, case.w)
    other = next(t for t in (patch_loss.TILES[key][2 - product], *CANDIDATES[3 - product]) if t.BM == tile.BM)
    (inputs, expected), loss = problem(case), ours("triton")
    with recorded(product, key, (tile, other) if product == 1 else (other, tile)) as recorder:
        row = errors(case, Provider("ours: triton", "", loss), inputs, expected)
        x, w = inputs.h.detach()[:recorder.rows].to(inputs.w.dtype), inputs.w                                # (R, D), (V, D)
        scores = x @ w.T                                                                                     # (R, V)
        calls = {"product": lambda _: recorder.again(), "torch.mm": lambda _: x @ w.T if product == 1 else scores @ w,
                 "call": lambda _: step(loss, inputs, True)}
        timed = {name: dict(error=None) for name in calls}
        time_all(calls, timed, repeats)
    if failed := next((each["error"] for each in timed.values() if each["error"]), None):
        raise RuntimeError(failed)
    ms, binary = {name: each["time_ms"] for name, each in timed.items()}, recorder.binary
    return row | dict(case=title(dataclasses.asdict(case)), product=product, tile=tile, other=other, rows=recorder.rows, ms=ms,
                      tflops=2 * recorder.rows * case.d * case.v / ms["product"][0][0] / 1e9,
                      registers=getattr(binary, "n_regs", None), spills=getattr(binary, "n_spills", None),
                      shared=binary.metadata.shared if binary else None)                # the interpreter makes no binary


def measure_tiles(log: Log, until: float) -> None:
    """At each shape, for each product, the shipped tile and then the others."""
    kind = patch_loss.chip(DEVICE)[0]
    for case in (Case(*shape) for shape in SHAPES):
        for product, shipped in zip(KERNELS, patch_loss.TILES[kind, getattr(torch, case.w)]):
            for tile in dict.fromkeys([shipped, *CANDIDATES[product] * (kind == "sm_90")]):
                if time.time() > until:
                    print(GOES_ON)
                    return
                name = f"product {product}, V {case.v}, {'x'.join(map(str, tile))}{', shipped' * (tile == shipped)}"
                log.attempt("tiles", name, functools.partial(measure_tile, case, product, tile), mark=True)


# --------------------------------------------------------------------------------------------------------------------- summary


def tile_tables(rows: list[dict]) -> list[str]:
    """A table for each product and shape, fastest first; then what failed."""
    head = ["BM, BN, BK, warps, stages", "ms", "again", "rows", "TFLOP/s", "of torch.mm", "call ms", "registers", "spills", "shared",
            "grad error", ""]
    tables = {}
    for r in sorted((r for r in rows if "tile" in r), key=lambda r: -r["tflops"]):
        (ms, again), (bare, _), (call, _) = ([median for median, *_ in r["ms"][name]] for name in ("product", "torch.mm", "call"))
        tables.setdefault(f"product {r['product']}: {r['case']}", [head]).append(
            [", ".join(map(str, r["tile"])), ms, again, r["rows"], round(r["tflops"]), f"{bare / ms:.0%}", call,
             r["registers"], r["spills"], r["shared"], f"{float(r['grad_error']):.1e}",
             "shipped " * r["name"].endswith("shipped") + "WRONG" * (not r["passed"])])
    parts = [f"{name}\n{runtime.table(lines)}" for name, lines in sorted(tables.items())]
    return parts + [f"{r['stage']}: {r['name']}: {r['error']}" for r in rows if r["name"] and r.get("error")]


def call_table(out: Path, device: str) -> list[str]:
    """What decides FASTEST_ON_GPU: whole calls by Triton and by cuBLAS, wherever bench.py has timed them."""
    shown, times = ("ours: triton", "ours: cublas", "torch.mm"), {}
    for r in read_rows(out / "rows.jsonl"):
        if r.get("time_ms") and r["device"] == device and r["provider"] in shown:
            times.setdefault(title(r["case"]), {})[r["provider"]] = r["time_ms"][0][0]
    return [runtime.table([["whole calls, ms", *shown]] + [[case, *map(mine.get, shown)] for case, mine in times.items()])] * bool(times)


def summary(log: Log, out: Path, here: dict, unfinished: list[str]) -> list[str]:
    """Write and print OUT/gpu.txt -> what failed and must not."""
    rows = list(log.rows().values())
    parts = ["\n".join(f"{name}: {value}" for name, value in here.items()),
             "\n".join(f"{r['stage']}: {'; '.join(filter(None, (r['error'], r.get('said'))))}" for r in rows if not r["name"]),
             *tile_tables(rows)]
    for r in rows:
        if launches := r.get("launches"):
            parts.append(runtime.table([[name, *(launch.get(name) for launch in launches)] for name in launches[0]]))
    parts += call_table(out, here["device"])
    if unfinished:
        parts.append(f"not finished: {', '.join(unfinished)}; {GOES_ON}")
    text = "\n\n".join(parts)
    with runtime.atomic(out / "gpu.txt") as path:
        path.write_text(text + "\n")
    runtime.log(text)
    return [f"{r['stage']} {r['name']}".strip() for r in rows if (r.get("error") or not r.get("passed", True))
            and (r["stage"] in ("tests", "bench", "suite") or r["name"].endswith("shipped"))]


# ------------------------------------------------------------------------------------------------------------------------ main


@dataclass
class Args:
    """Flags of gpu.py."""

    out: str = "runs/gpu"
    """folder for all results"""
    budget: float = 540
    """seconds that this call may take"""
    only: str = field(default="", metadata={"choices": ["", "tiles", "call"]})
    """what a stage starts in a process of its own: "tiles", or "call", one call of the patch loss"""


def main(args: Args) -> None:
    """All stages, or what one of them has asked for."""
    until = time.time() + args.budget
    if not CUDA:
        raise InputError("no GPU (torch.cuda.is_available() is false); on a CPU run pytest and kernels/bench.py")
    if args.only == "call":
        step(ours("triton"), make_inputs(Case(*SHAPES[0]), 0), True)
        return
    here, out = machine(ROOT / "kernels" / "patch_loss.py"), Path(args.out).resolve()
    log = Log(out, here)
    if args.only == "tiles":
        measure_tiles(log, until)
        return
    unfinished = run_stages(STAGES, log, out, until - 10)
    failed = summary(log, out, here, unfinished)
    runtime.log(f"wrote {args.out}/gpu.txt; {'FAILED: ' + '; '.join(failed) if failed else 'nothing that ran failed'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, InputError)
