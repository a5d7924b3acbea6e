"""What all tests share: no network, NaN in uninitialised memory, a very small toy world."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model is an error, not a download
os.environ["OMP_NUM_THREADS"] = "1"  # so that `run` and `here` give equal numbers

import contextlib
import importlib
import io
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runtime
import toy

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"train": 48, "val": 6, "test": 6, "hard": 4, "distract": 4}

torch.set_num_threads(1)
with torch.device("meta"):  # torch notes once which functions make tensors: the true ones,
    torch.empty(0)  # not those that poisoned_memory puts in their places


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty holds NaN, so that reading what nobody wrote shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*size, make=make, **options):
            tensor = make(*size, **options)
            on_cpu = tensor.is_floating_point() and tensor.device.type == "cpu"
            return tensor.fill_(float("nan")) if on_cpu else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy data folder of 68 scenes."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    everything = dict(toy.SPLITS)
    toy.SPLITS.update(COUNTS)
    try:
        toy.build(folder)
    finally:
        toy.SPLITS.update(everything)
    return folder


@pytest.fixture(scope="session")
def run():
    """run("pretrain.py", "--steps", 3) -> the finished process, as from a user's shell.

    A name without .py is a package (python -m); processes > 1 go through torchrun.
    """

    def run(script, *arguments, processes=0, cwd=ROOT):
        launcher = (
            [sys.executable]
            if not processes
            else [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
            ]
        )
        target = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
        environment = dict(os.environ, COLUMNS="200", PYTHONPATH=str(ROOT))
        command = [*launcher, *target, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def here():
    """The same in this process, without seconds of imports: here("pretrain.py", "--steps", 3)."""

    def here(script, *arguments):
        stage = script.endswith(".py")
        name = script.removesuffix(".py") if stage else f"{script}.__main__"
        module = importlib.import_module(name)
        words, out, err, code = [script, *map(str, arguments)], io.StringIO(), io.StringIO(), 0
        before, sys.argv = sys.argv, words
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if stage:
                    runtime.run(module.main, module.Args, module.__doc__)
                else:
                    module.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        finally:
            sys.argv = before
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return here


@pytest.fixture(scope="session")
def ranks(here, tmp_path_factory):
    """ranks("sft.py", "--steps", 3): the same in two processes, as torchrun starts them.

    They are forked, without imports. When one fails, the other one gets SIGTERM.
    """

    def ranks(script, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder, alive = tmp_path_factory.mktemp("ranks"), {}
        for rank in range(2):
            if pid := os.fork():
                alive[pid] = rank
                continue
            code = 1
            try:
                place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
                place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                os.environ.update({name: str(value) for name, value in place.items()})
                done = here(script, *arguments)
                (folder / f"out{rank}").write_text(done.stdout)
                (folder / f"err{rank}").write_text(done.stderr)
                code = done.returncode
            finally:
                os._exit(code)
        codes = []
        while alive:
            pid, status = os.wait()
            codes.append(os.waitstatus_to_exitcode(status))
            alive.pop(pid)
            for other in alive if codes[-1] else ():
                os.kill(other, signal.SIGTERM)
        said = [
            "".join(path.read_text() for path in sorted(folder.glob(f"{name}?")))
            for name in ("out", "err")
        ]
        return subprocess.CompletedProcess([script], next(filter(None, codes), 0), *said)

    return ranks
