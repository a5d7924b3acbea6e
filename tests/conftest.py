"""What all tests share: no network, NaN in uninitialised memory, and a very small toy world of our own making."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"                       # before transformers is imported: a missing model is an error, not a download

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toy

ROOT = Path(toy.__file__).parent
COUNTS = {"train": 48, "val": 6, "test": 6, "hard": 4, "distract": 4}


with torch.device("meta"):                               # torch notes once which functions make tensors: let it be the true ones, not those
    torch.empty(0)                                       # that poisoned_memory puts in their places


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty holds NaN, so that reading what nobody wrote shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*size, make=make, **options):
            tensor = make(*size, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

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
    """run("pretrain.py", "--steps", 3, ...) -> the finished process, as from a user's shell; `processes` > 1 goes through torchrun."""
    def run(script, *arguments, processes=0, cwd=ROOT):
        launcher = [sys.executable] if not processes else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="200")
        command = [*launcher, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run
