"""What every stage does around its loop: flags from a dataclass, rank and device, schedule, atomic files, logging.

Nothing here knows the method. A stage's loop, model and losses stay in the stage's own file, in full view.
"""
import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import textwrap
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error in place of the whole usage, and flag files: in place of @FILE come the words of FILE."""

    def error(self, message: str):
        """Print the line and exit with status 2."""
        self.exit(2, f"error: {message}; --help lists the flags\n")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """A line of a flag file -> its words, as a shell splits them; from a # on it is a comment."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"flag file, line {line.strip()!r}: {str(error).lower()}")


def parse(cls, doc: str, argv: list[str] | None = None):
    """Command line -> instance of the dataclass `cls`: a flag per field, its default the field's, its help the string below the field.

    Booleans become --x/--no-x, `list[str]` fields flags that take several values, fields with metadata {"positional": True} positional
    arguments, metadata {"choices": ...} a closed set. An unknown flag or a bad value prints one line and exits with status 2.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    helps = {a.target.id: b.value.value for a, b in zip(body, body[1:])
             if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)}
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, fromfile_prefix_chars="@",
                    epilog="@FILE reads flags from a file, with # comments; flags after it win.")
    types = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        text = helps.get(f.name, "")
        if f.metadata.get("positional"):
            parser.add_argument(f.name, nargs="+" if types[f.name] == list[str] else None, help=text)
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = default if default not in ("", []) else "none"
        options = dict(default=default, help=f"{text} (default: {shown})".replace("%", "%%"), dest=f.name)
        if types[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif types[f.name] == list[str]:
            options["nargs"] = "+"
        else:
            options |= dict(type=types[f.name], choices=f.metadata.get("choices"))
        parser.add_argument("--" + f.name.rstrip("_").replace("_", "-"), **options)                  # from_, since from is Python's
    try:
        return cls(**vars(parser.parse_args(argv)))
    except UnicodeDecodeError:
        parser.error("an @FILE is not UTF-8 text")


def run(main, cls, doc: str, bad_input: type[Exception]) -> None:
    """`main(args)` with flags from the command line; `bad_input`, or a file that the system refuses, becomes one line on stderr and exit
    status 2. Any other exception is a bug and keeps its traceback."""
    try:
        main(parse(cls, doc))
    except (bad_input, OSError) as error:
        if isinstance(error, OSError) and not error.filename:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error).strip()
        message = message.splitlines()[-1]               # a data loader's worker puts its traceback in front
        print("error: " + message.removeprefix(f"{bad_input.__module__}.{bad_input.__qualname__}: "), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- ranks and devices


def rank() -> int:
    """This process's number, from torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(seed: int) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPU), seed torch alike on all ranks, and return this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world() > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    return device


def precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """The dtype of the matrix products, by name; auto: bfloat16 on GPUs that have it, else float32, since few CPUs are faster in
    bfloat16 (those with AMX may be)."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def all_sum(tensors: list[torch.Tensor]) -> None:
    """Sum each tensor over all ranks, in place; small ones share a message."""
    while world() > 1 and tensors:
        ends = itertools.accumulate(t.numel() for t in tensors)
        many = max(1, sum(end <= 2**26 for end in ends))
        flat = torch.cat([t.reshape(-1) for t in tensors[:many]])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors[:many]])):
            t.copy_(part.view_as(t))
        tensors = tensors[many:]


# --------------------------------------------------------------------------------------------------------------- batches and means


def loader(dataset, index_lists, collate, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    """Batches of the given lists of record indices, in order; `workers` -1: 4 processes on a GPU, none on a CPU."""
    workers = workers if workers >= 0 else 4 if device.type == "cuda" else 0
    return torch.utils.data.DataLoader(dataset, batch_sampler=index_lists, collate_fn=collate, num_workers=workers,
                                       pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                                       generator=torch.Generator())      # torch's own is dropout's alone


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch's tensors on the device."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def mean(total: float, count: float) -> float | None:
    """Their quotient; None, not a perfect loss of 0, where nothing was counted."""
    return total / count if count else None


class Clock:
    """Samples per second, and which shares of the time between two logged steps pass outside the model; the host never waits for it.

        with clock("data"): the loop waits for batches; with clock("model"): forward, backward and update; with clock("validation"): not
        counted at all. On a GPU the host only starts what is in "model", so the GPU's own clock measures it.
    """

    def __init__(self, device: torch.device, step: int):
        self.cuda, self.step = device.type == "cuda", step
        self._restart()

    def _restart(self) -> None:
        self.began, self.seconds, self.events = time.perf_counter(), dict(data=0.0, model=0.0, validation=0.0), []

    @contextlib.contextmanager
    def __call__(self, part: str):
        began = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda and part == "model" else []
        for event in events[:1]:
            event.record()
        yield
        for event in events[1:]:
            event.record()
            self.events.append(events)
        self.seconds[part] += time.perf_counter() - began

    def read(self, step: int, batch_size: int) -> dict[str, float]:
        """{samples_per_second, waiting: share of the time for data, outside: share outside the model} since the last call."""
        model = self.seconds["model"]
        if self.events:
            self.events[-1][1].synchronize()
            model = sum(start.elapsed_time(end) for start, end in self.events) / 1000
        total = time.perf_counter() - self.began - self.seconds["validation"]
        result = dict(samples_per_second=(step - self.step) * batch_size / total, waiting=self.seconds["data"] / total,
                      outside=max(0.0, 1 - model / total))
        self.step = step
        self._restart()
        return result


# --------------------------------------------------------------------------------------------------------------------- schedule


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor of update `step` (from 0) out of `steps`: linear warm-up to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------------------------------------------- files and logging


@contextlib.contextmanager
def atomic(path):
    """A temporary file beside `path` to write to, renamed to `path` on success and removed on failure: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)                       # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_resume(path: Path, args, step: int, **state) -> None:
    """Training state after `step` updates, on rank 0: whatever is given, and the flags. The data position and the random numbers are
    functions of the step."""
    if rank() == 0:
        with atomic(path) as temporary:
            torch.save(dict(state, step=step, args=dataclasses.asdict(args)), temporary)


def load_resume(path: Path, args, free: set[str], bad_input: type[Exception]) -> dict:
    """What `save_resume` wrote. `free`: flags that may differ. `bad_input`: no file, or other flags."""
    if not path.is_file():
        raise bad_input(f"--resume: {path} does not exist; run without --resume, or name the folder with --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)                  # the ranks share its pages
    except Exception:                                    # truncated or foreign
        raise bad_input(f"--resume: {path} cannot be read; start again without --resume") from None
    flag = {f.name: "" if f.metadata.get("positional") else f"--{f.name.replace('_', '-')} " for f in dataclasses.fields(args)}
    changed = [f"{flag.get(k, k + ' ')}{v}" for k, v in state["args"].items() if k not in free and getattr(args, k, None) != v]
    if changed:
        raise bad_input(f"--resume: {path} was written with {', '.join(changed)}; use the same flags")
    log(f"resumed {path} at step {state['step']}")
    return state


def log(*text) -> None:
    """Print on rank 0 only, above any progress bar."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(" ".join(str(t) for t in text))


class Metrics:
    """metrics.jsonl: one line per logged step, each with the step and seconds since the start; rank 0 writes."""

    def __init__(self, path: Path, step: int = 0):
        """`step`: lines of later steps, left by an interrupted run, are dropped; 0 starts the file anew."""
        self.path, self.began = Path(path), time.time()
        if rank() == 0:
            lines = self.path.read_text().splitlines() if step and self.path.exists() else []
            whole = [line for line in lines if line.endswith("}")]       # a killed process may leave half a line
            with atomic(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))

    def write(self, step: int, **values: float) -> None:
        """Append one line; floats are kept to 6 significant digits."""
        if rank() == 0:
            row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "seconds": round(time.time() - self.began, 1), **row}) + "\n")


def table(rows: list[list]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right, floats to three decimals."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells)
