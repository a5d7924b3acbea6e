"""What every stage does around its loop: flags, ranks, batches, schedule, atomic files, the log.

Nothing here knows the method. A stage's loop and its losses stand in the stage's own file.
"""
import argparse
import ast
import contextlib
import dataclasses
import errno
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
import typing
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None


class InputError(ValueError):
    """Bad user input, in one line: where (file, record, flag), what is wrong, what to do."""


# ---- flags ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; in place of @FILE come the words of FILE."""

    def error(self, message: str):
        """Print the line and exit with status 2."""
        self.exit(2, f"error: {message}; --help lists the flags\n")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """A line of a flag file -> its words, as a shell splits them; # begins a comment."""
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"flag file, line {line.strip()!r}: {str(error).lower()}")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """--help with one line per flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=112)

    def _format_action_invocation(self, action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _format_args(self, action, default_metavar) -> str:
        return action.metavar or action.dest             # without [NAME ...]


def parse(cls, doc: str, argv: list[str] | None = None):
    """Command line -> instance of the dataclass `cls`: a flag per field, its docstring the help.

    Booleans become --[no-]x, `list[str]` fields take several values. metadata {"positional": True}
    makes a positional argument, {"choices": [...]} a closed set. A comment `# --- model` between
    two fields begins a group of --help. A bad flag prints one line and exits with status 2.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0].body
    helps = {a.target.id: b.value.value for a, b in zip(body, body[1:])
             if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
    titles = {i: match[1] for i, line in enumerate(source.splitlines(), 1)
              if (match := re.match(r"\s*# --- (.+)", line))}
    lines = {a.target.id: a.lineno for a in body if isinstance(a, ast.AnnAssign)}

    parser = Parser(description=doc, formatter_class=Formatter, allow_abbrev=False, add_help=False,
                    fromfile_prefix_chars="@", usage="%(prog)s [flags] [arguments]",
                    epilog="@FILE reads flags from a file, with # comments; flags after it win.")
    groups, types = {}, typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        title = titles.get(max((i for i in titles if i < lines[f.name]), default=0), "main")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, choices, text = types[f.name], f.metadata.get("choices"), helps.get(f.name, "")
        many = dict(nargs="+") if kind == list[str] else {}
        if f.metadata.get("positional"):
            groups[title].add_argument(f.name, help=text, **many)
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = " ".join(default) if kind == list[str] else default
        shown = f" [{shown}]" if shown not in ("", False) else ""
        named = f"{' | '.join(filter(None, choices))}; " if choices else ""
        text = f"{named}{text}{shown}".replace("%", "%%")
        options = dict(default=default, help=text, dest=f.name)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= many or dict(type=kind, choices=choices)
            options["metavar"] = {int: "N", float: "X", str: "NAME"}.get(kind, "NAMES")
        flag = "--" + f.name.rstrip("_").replace("_", "-")     # from_, since from is Python's
        groups[title].add_argument(flag, **options)
    groups[title].add_argument("-h", "--help", action="help", help="show this and exit")
    try:
        return cls(**vars(parser.parse_args(argv)))
    except UnicodeDecodeError:
        parser.error("an @FILE is not UTF-8 text")


def run(main, cls, doc: str) -> None:
    """`main(args)` with flags from the command line.

    InputError, and a file or a disk that the system refuses, become one line on stderr and exit
    status 2; of several processes the first to fail says it. Ctrl-C is status 130. Any other
    exception is a bug and keeps its traceback.
    """
    try:
        main(parse(cls, doc))
    except (InputError, OSError) as error:
        system = isinstance(error, OSError)
        temporary = "temporary directory" in str(error)         # there is none: no error of ours
        if system and not (error.filename or error.errno in FULL or temporary):
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}" if system else str(error)
        message = message.strip().splitlines()[-1]      # a loader's worker has a traceback in front
        if first_to_fail():
            say("error: " + message.removeprefix("runtime.InputError: "))
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            say("error: stopped by Ctrl-C")
        sys.exit(130)
    except RuntimeError:
        if not dist.is_initialized() or first_to_fail():
            raise
        sys.exit(2)                                     # the process that it waited for has gone
    finally:
        unlock()
        if dist.is_initialized():
            dist.destroy_process_group()


def say(message: str) -> None:
    """A line on stderr, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def first_to_fail() -> bool:
    """Whether no other process has failed before this one and said why."""
    if not dist.is_initialized():                       # what is wrong with flags, all see
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:                                # the store has gone
        return True


def check_lowest(args, **lowest: float) -> None:
    """Refuse flags below their lowest value."""
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than {low}")


# ---- ranks and devices ---------------------------------------------------------------------------


def toy_data(args, toy, *own: str) -> Path:
    """The toy world's folder, made if it is not there. `own`: flags that need --data."""
    for name in own:
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} needs --data; without it the toy world is"
                             " used")
    return toy.DATA if args.dry_run else toy.ensure_once()


def rank() -> int:
    """This process's number, from torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(seed: int) -> torch.device:
    """Join the process group (NCCL or gloo), seed all ranks alike -> this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world() > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    return device


def precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """The dtype of the products, by name. auto: bfloat16 on GPUs that have it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    low = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if low else torch.float32


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


# ---- batches, means, validation ------------------------------------------------------------------


def loader(dataset, index_lists, workers: int, device: torch.device) -> DataLoader:
    """Batches of these lists of record indices. workers -1: 4 processes on a GPU, else none."""
    workers = workers if workers >= 0 else 4 if device.type == "cuda" else 0
    return DataLoader(
        dataset, batch_sampler=index_lists, collate_fn=dataset.collate, num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        generator=torch.Generator())                     # torch's own numbers are dropout's alone


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch's tensors on the device."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


def split(items: list, size: int) -> list[list]:
    """The items in runs of `size`."""
    return [items[i: i + size] for i in range(0, len(items), size)]


def mean(total: float, count: float) -> float | None:
    """Their quotient; None, not a perfect loss of 0, where nothing was counted."""
    return total / count if count else None


class Validation:
    """Mean losses over held-out records, each rank on its share.

    Every rank goes through as many batches, since sharded weights are gathered together. A rank
    that runs out of records repeats one that it does not count.
    """

    def __init__(self, dataset, micro: int, workers: int, device: torch.device):
        own = list(range(rank(), len(dataset), world()))
        lists = split(own, micro)
        self.dataset, self.device, self.counted = dataset, device, len(lists)
        lists += [[0]] * (-(-len(dataset) // (world() * micro)) - len(lists))
        self.batches = loader(dataset, lists, workers, device)

    @torch.no_grad()
    def __call__(self, model, names: dict[str, tuple[str, str]], autocast) -> dict[str, float]:
        """names: {name: (sum, count)} of what `model(batch)` returns -> {name: mean}."""
        model.eval()
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(self.batches):
            with autocast:
                sums = model(self.dataset.complete(to_device(batch, self.device)))
            if i < self.counted:
                totals += torch.stack([torch.stack([sums[k].double() for k in pair])
                                       for pair in names.values()])
        self.dataset.flush()
        all_sum([totals])
        model.train()
        return {name: mean(*pair) for name, pair in zip(names, totals.tolist())}


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor of update `step`: linear warm-up to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- files and log -------------------------------------------------------------------------------


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)     # of a disk


@contextlib.contextmanager
def writing(path, rest: str):
    """Around what writes a file. InputError: the disk is full; rest: what is there now."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        by_torch = isinstance(error, RuntimeError) and any(     # its writer has no errno
            part in str(error) for part in ("PytorchStreamWriter", "inline_container"))
        if by_torch or (isinstance(error, OSError) and error.errno in FULL):
            reason = "is the disk full?" if by_torch else os.strerror(error.errno)
            raise InputError(f"{path}: cannot be written ({reason}); {rest}") from None
        raise


@contextlib.contextmanager
def atomic(path):
    """A temporary file to write to, renamed to `path` on success: never half a file.

    InputError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with writing(path, "what was there is as it was"):
            yield Path(temporary)
            os.chmod(temporary, 0o644)                   # mkstemp's files are private
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


LOCKS = {}                                               # lock files that are open


def hold(file, flag: str) -> bool:
    """Lock an open file while this process has it open; -> whether the file system has locks.

    The system holds the lock, so it ends with this process, however that ends. InputError: another
    process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return False
        raise InputError(f"{flag}: another process is writing there; wait for it, or name another"
                         " place") from None
    return True


def lock(out: Path) -> None:
    """Keep other runs out of a folder, or a file to be, until `unlock`. InputError: one is there.

    A name with an ending is a file's.
    """
    path = out.parent / f".{out.name}.lock" if out.suffix in (".json", ".jsonl") else out / ".lock"
    if rank() or path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    if not hold(file, f"--out {out}"):
        return
    LOCKS[path] = file
    there = os.stat(file.name) if os.path.exists(file.name) else None
    if there is None or there.st_ino != os.fstat(file.fileno()).st_ino:
        unlock()                                         # the one before removed it meanwhile
        lock(out)


def unlock() -> None:
    """Let other runs in."""
    while LOCKS:
        _, file = LOCKS.popitem()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def begin(out: Path) -> None:
    """Start anew in `out`: say what will be replaced, remove an earlier run's resume.pt."""
    if rank() == 0:
        if (out / "ckpt.pt").exists():
            print(f"{out / 'ckpt.pt'} is there and will be replaced; --resume goes on from its run,"
                  " --out names another folder")
        (out / "resume.pt").unlink(missing_ok=True)


def save_resume(path: Path, args, step: int, **state) -> None:
    """Training state after `step` updates, and the flags, from rank 0.

    Neither the data position nor random numbers are in it: both are functions of the step.
    """
    if rank() == 0:
        with atomic(path) as temporary:
            torch.save(dict(state, step=step, args=dataclasses.asdict(args)), temporary)


def load_resume(path: Path, args, free: set[str]) -> dict:
    """What `save_resume` wrote. free: flags that may differ. InputError: none, or other flags."""
    if not path.is_file():
        raise InputError(f"--resume: {path} does not exist; run without --resume,"
                         " or name the folder with --out")
    try:                                                 # mmap: the ranks share its pages
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                                    # truncated or foreign
        raise InputError(f"--resume: {path} cannot be read; start again without --resume") from None
    changed = [f"--{name.replace('_', '-')} {value}" for name, value in state["args"].items()
               if name not in free and getattr(args, name, None) != value]
    if changed:
        raise InputError(f"--resume: {path} was written with {', '.join(changed)};"
                         " use the same flags")
    log(f"resumed {path} at step {state['step']}")
    return state


def log(*text) -> None:
    """Print on rank 0 only, above any progress bar."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(" ".join(str(t) for t in text))


def finished(files, following: str | list = "") -> None:
    """The last line of a stage: what it wrote, and the next command, if a list to paste in a shell.
    """
    unlock()
    files = [files] if isinstance(files, str | Path) else files
    following = following if isinstance(following, str) else shlex.join(map(str, following))
    log(f"wrote {', '.join(map(str, files))}" + f"; next: {following}" * bool(following))


class Metrics:
    """metrics.jsonl: a line per logged step, with the seconds since the start; rank 0 writes."""

    def __init__(self, path: Path, step: int = 0):
        """step: lines of later steps, left by an interrupted run, are dropped; 0 starts anew."""
        self.path, self.began = Path(path), time.time()
        if rank() == 0:
            lines = self.path.read_text().splitlines() if step and self.path.exists() else []
            whole = [line for line in lines if line.endswith("}")]   # a killed process leaves half
            kept = [line + "\n" for line in whole if json.loads(line)["step"] <= step]
            with atomic(self.path) as temporary:
                temporary.write_text("".join(kept))

    def write(self, step: int, **values: float) -> None:
        """Append one line; floats are kept to 6 significant digits."""
        if rank() == 0:
            row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            row = {"step": step, "seconds": round(time.time() - self.began, 1), **row}
            line = json.dumps(row, allow_nan=False) + "\n"          # the caller refuses NaN
            with writing(self.path, "all steps before are in it"), self.path.open("a") as file:
                file.write(line)


def shown(values: dict[str, float]) -> str:
    """Named numbers as a text."""
    return ", ".join(f"{k} {v:.5g}" for k, v in values.items() if v is not None)


def table(rows: list[list]) -> str:
    """Rows as aligned text: the first column to the left, floats to three decimals, None as "-"."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row]
             for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(row, widths))) for row in cells)


def spread(items, n: int) -> list:
    """n of the items at even steps; all of them for n = 0."""
    return [items[i * len(items) // n] for i in range(n)] if 0 < n < len(items) else list(items)


def outputs(checkpoints: list[str], out: str, *names: str) -> tuple[list[str], list[list[Path]]]:
    """Short distinct names of checkpoints, and where the files `names` of each go.

    Beside ckpt.pt stands eval.json, beside other.pt eval-other.json; a LLaVA folder gets it inside,
    a hub name in runs/NAME; `out` takes those of all. InputError: two would be written to one file.
    """
    paths = [Path(c) for c in checkpoints]
    file = [p.is_file() or p.suffix in (".pt", ".bin") for p in paths]
    home = [p.parent if f else p if p.is_dir() else Path("runs", p.name)
            for p, f in zip(paths, file)]
    usual = [p.name == "ckpt.pt" or not f for p, f in zip(paths, file)]
    short = [p.stem if not u else (p.resolve().parent if f else p.resolve()).name
             for p, f, u in zip(paths, file, usual)]
    if len(set(short)) < len(short):
        short = [str(c).strip("./").replace("/", "-") for c in checkpoints]
    folders = [Path(out or h) for h in home]
    files = []
    for folder, name, plain in zip(folders, short, usual):
        ending = f"-{name}" if folders.count(folder) > 1 or not (plain or out) else ""
        files.append([folder / f"{Path(n).stem}{ending}{Path(n).suffix}" for n in names])
    if len(set(map(tuple, files))) < len(files):
        raise InputError(f"{' '.join(map(str, checkpoints))}: two of them would be written to one"
                         " file; name each once")
    return short, files


def machine() -> dict[str, str]:
    """What runs here: hardware, versions, the commit of this project, the date."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cpu = f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"
    described = "git describe --always --dirty"
    commit = subprocess.run(described, shell=True, cwd=Path(__file__).parent, capture_output=True)
    return dict(hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
                python=platform.python_version(), torch=torch.__version__,
                transformers=metadata.version("transformers"), date=time.strftime("%Y-%m-%d"),
                commit=commit.stdout.decode().strip() or "unknown")
