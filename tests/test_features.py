"""Features kept on disk change no result, are never another image's or encoder's, and survive kills; and no step waits for the device."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import features
import numpy as np
import pytest
import torch
from features import FeatureCache
from PIL import Image, ImageOps

import model as module
import pretrain
import runtime
import sft
from data import InputError, collate
from kernels import patch_loss as kernels
from model import PatchAlignedModel, read_checkpoint, save_checkpoint

IMAGES, STEPS = 48, 12                                   # two epochs of six steps


@pytest.fixture(scope="module")
def flags(world):
    """Two epochs on the small world; later flags override earlier ones."""
    return ["--data", world / "train.jsonl", "--image-dir", world / "images", "--batch-size", 8, "--steps", STEPS, "--log-every", 1,
            "--save-every", 4]


def train(*arguments, script=pretrain):
    """A run in this process."""
    script.main(runtime.parse(script.Args, "", [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def straight(run, flags, world, tmp_path_factory):
    """The run without a cache, which the others are compared with."""
    out = tmp_path_factory.mktemp("straight")
    finished(run("pretrain.py", *flags, "--val-data", world / "val.jsonl", "--out", out))
    return out


def finished(done):
    """The standard output of a run that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(folder, key):
    """{step: value} of a key of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same(a, b):
    """Bit for bit: the losses of every step and the projector."""
    for key in ("caption_loss", "patch_loss", "grad_norm"):
        assert log(a, key) == log(b, key), key
    states = [read_checkpoint(folder / "ckpt.pt")["model"] for folder in (a, b)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def build(**changes):
    """The default model, in its first state."""
    torch.manual_seed(0)
    return PatchAlignedModel({name: getattr(pretrain.Args(), name) for name in pretrain.CONFIG} | changes)


def test_a_cached_run_is_the_same_and_needs_no_image_twice(run, flags, straight, world, images, tmp_path):
    """Filled in the first epoch, read in the second. A second run never opens an image: all have been overwritten, size and time kept."""
    cached = [*flags, "--image-dir", images, "--val-data", world / "val.jsonl", "--cache-features", tmp_path / "cache"]
    said = finished(run("pretrain.py", *cached, "--out", tmp_path / "cold"))
    assert f"features: 0 of {IMAGES} images x 64 x 128 in float32 are in {tmp_path / 'cache'}/toy-clip-" in said
    assert "features: 0 of 6 images" in said                             # the validation split's, in a file of its own
    assert_same(straight, tmp_path / "cold")
    assert list(log(tmp_path / "cold", "cache_hits").values()) == [0.0] * 6 + [1.0] * 6
    for image in images.rglob("*.png"):
        before = image.stat()
        image.write_bytes(bytes(before.st_size))
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    said = finished(run("pretrain.py", *cached, "--out", tmp_path / "warm"))
    assert f"features: {IMAGES} of {IMAGES} images" in said and "features: 6 of 6 images" in said
    assert_same(straight, tmp_path / "warm")
    assert log(straight, "val_patch_loss") == log(tmp_path / "cold", "val_patch_loss") == log(tmp_path / "warm", "val_patch_loss")
    assert set(log(tmp_path / "warm", "cache_hits").values()) == {1.0}
    waiting, outside = log(tmp_path / "warm", "waiting"), log(tmp_path / "warm", "outside")
    assert all(0 < waiting[step] <= outside[step] < 1 for step in range(1, STEPS + 1))


def test_processes_fill_one_cache(run, flags, straight, world, tmp_path):
    """Two processes with a data loading one each, over uneven micro-batches, give what one gives, and every row."""
    cached = [*flags, "--cache-features", tmp_path / "cache", "--out", tmp_path / "two"]
    finished(run("pretrain.py", *cached, "--micro-batch", 3, "--workers", 1, processes=2))
    assert log(straight, "caption_loss") == pytest.approx(log(tmp_path / "two", "caption_loss"), rel=1e-5)
    model = build()
    records = model.records(world / "train.jsonl", world / "images")
    cache = FeatureCache(tmp_path / "cache", model, records)
    Z = model.encode(torch.stack([records[i]["pixel_values"] for i in range(IMAGES)]))
    torch.testing.assert_close(torch.stack([cache[i]["features"] for i in range(IMAGES)]), Z)


def test_a_run_killed_while_it_writes_resumes_to_the_same_end(run, flags, straight, tmp_path):
    """Killed with half a row on disk, in the sixth step. Resumed from the fourth: what was whole is read, the half row encoded again."""
    cached = [*flags, "--cache-features", tmp_path / "cache", "--out", tmp_path / "run"]
    code = ("import os, signal, sys, features, pretrain, runtime\n"
            "whole, calls = features.FeatureCache.write, []\n"
            "def write(self, rows, Z):\n"
            "    calls.append(1)\n"
            "    if len(calls) < 6: return whole(self, rows, Z)\n"
            "    whole(self, rows[:3], Z[:3])\n"
            "    with open(self.path, 'r+b') as file:\n"
            "        file.seek(rows[3][0] * self.row_bytes); file.write(bytes(Z[3].numpy())[:999]); file.flush()\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "features.FeatureCache.write = write\n"
            "pretrain.main(runtime.parse(pretrain.Args, '', sys.argv[1:]))")
    killed = subprocess.run([sys.executable, "-c", code, *map(str, cached)], cwd=Path(pretrain.__file__).parent, capture_output=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"features: 43 of {IMAGES} images" in finished(run("pretrain.py", *cached, "--resume"))
    assert_same(straight, tmp_path / "run")
    assert log(tmp_path / "run", "cache_hits") == dict.fromkeys(range(1, 5), 0.0) | {5: 1.0, 6: 3 / 8} | dict.fromkeys(range(7, 13), 1.0)


@pytest.fixture
def images(world, tmp_path):
    """A copy of the images that a test may change."""
    return shutil.copytree(world / "images", tmp_path / "images")


@pytest.fixture
def fill(world, images, tmp_path):
    """fill(model, records file) -> a cache over its records, every row written in batches of seven."""
    def fill(model, path=world / "train.jsonl"):
        cache = FeatureCache(tmp_path / "cache", model, model.records(path, images, require_image=False))
        for first in range(0, len(cache), 7):
            cache.complete(model, cache.collate([cache[i] for i in range(first, min(first + 7, len(cache)))], 0))
        return cache

    return fill


def test_hits_and_misses_share_a_batch(world, images, fill, tmp_path, capsys):
    """Changed and unchanged images, records without an image, and several of one image: features and labels are those of `Records`."""
    model = build(prompt="chat")
    lines = (world / "train_sft.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join(lines + lines[:4]))
    plain, cache = model.records(tmp_path / "records.jsonl", images, require_image=False), fill(model, tmp_path / "records.jsonl")
    names = [r.get("image") for r in plain.records]
    assert None in names and len(cache.stamps) == len(set(names) - {None}) < sum(n is not None for n in names)
    shown = [i for i, n in enumerate(names) if n is not None]
    changed = names[shown[1]]
    picture = ImageOps.mirror(Image.open(images / changed))
    picture.save(images / changed)
    os.utime(images / changed, ns=(1, 1))
    again = FeatureCache(cache.folder, model, plain)
    assert f"features: {len(cache.stamps) - 1:,} of {len(cache.stamps):,} images" in capsys.readouterr().out
    picked = [shown[0], names.index(None), shown[1], next(i for i in shown if names[i] not in (changed, names[shown[0]])), shown[1]]
    batch, expected = again.collate([again[i] for i in picked], 0), collate([plain[i] for i in picked], 0)
    assert len(batch["features"]) == 2 and len(batch["pixel_values"]) == len(batch["missing"]) == 2
    Z = model.encode(expected["pixel_values"])
    completed = again.complete(model, batch)
    assert torch.equal(completed["features"], Z)
    assert all(torch.equal(completed[k], expected[k]) for k in ("input_ids", "labels", "places", "patch_ids", "patch_weights"))
    assert torch.equal(again[shown[1]]["features"], Z[1]) and again[shown[1]]["image_size"] == picture.size
    model.tune("full")                                                   # in stage 1 every record has an image
    alone = again.complete(model, again.collate([again[names.index(None)]], 0))
    assert torch.equal(model(alone)["caption_loss"], model(collate([plain[names.index(None)]], 0))["caption_loss"])


def test_another_encoder_image_size_or_geometry_is_another_file(world, images, fill):
    """Whatever changes Z changes the name; what does not, such as the prompt or the projector, does not."""
    first = fill(build())
    other = build()
    with torch.no_grad():
        next(other.encoder.parameters())[0] += 1e-3
    records = {"weights": other, "low": PatchAlignedModel(build().config, torch.bfloat16), "same": build(projector="linear", tau=0.5)} | {
        name: build(**{name: value}) for name, value in (("image_size", 48), ("geometry", "stretch"), ("feature_layer", -1))}
    caches = {name: FeatureCache(first.folder, m, m.records(world / "train.jsonl", images)) for name, m in records.items()}
    assert caches["same"].filled() == IMAGES and caches["same"].path == first.path
    assert len({cache.path for cache in caches.values()}) == len(caches)
    assert all(cache.filled() == 0 and cache[0]["features"] is None for name, cache in caches.items() if name != "same")
    assert torch.equal(caches["same"][0]["features"], first[0]["features"])


def test_damage_is_said_and_mended(images, world, fill, capsys, monkeypatch):
    """A row with a wrong byte is encoded again; a file cut short is made anew, each with one line; a full disk is refused beforehand."""
    model = build()
    cache = fill(model)
    Z, size = cache.read(5)
    with open(cache.path, "r+b") as file:
        file.seek(5 * cache.row_bytes + 4321)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    assert cache.read(5) is None and cache.read(5) is None and cache.read(4) is not None
    assert capsys.readouterr().out == f"{cache.path}: row 5 is damaged; it and others like it are encoded again\n"
    fill(model)
    assert torch.equal(cache.read(5)[0], Z) and cache.read(5)[1] == size

    for path in (cache.path, cache.entries):
        os.truncate(path, 1000)
        assert cache.read(40) is None                                    # shortened under a running process
        capsys.readouterr()
        again = fill(model)
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"{cache.path}: {path.name} is damaged (1000 bytes in place of ") and said[0].endswith("it is made anew")
        assert f"features: 0 of {IMAGES}" in said[1] and len(said) == 2 and again.filled() == IMAGES
        assert torch.equal(again.read(5)[0], Z)
    entries = np.fromfile(cache.entries, features.ENTRY)
    assert (entries["bytes"] > 0).all() and cache.path.stat().st_size == IMAGES * 64 * 128 * 4

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    FeatureCache(cache.folder, model, cache.records)                     # all is there: no room is needed
    refused = f"--cache-features .*elsewhere: {IMAGES} images x 64 x 128 in float32 take 0.002 GB more, but 0.001 GB are free"
    with pytest.raises(InputError, match=refused):
        FeatureCache(cache.folder / "elsewhere", model, cache.records)


# ------------------------------------------------------------------------------------------------------------------ no waiting


class Launch:
    """In the place of a Triton kernel, on tensors without data."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def without_data(monkeypatch):
    """The device is "meta": its tensors hold no data, so that whatever would have to wait for an answer raises. The patch loss runs the
    host's side of the fused path, as on a GPU."""
    monkeypatch.setattr(runtime, "start", lambda seed: torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())             # knows no "meta"
    for name in ("gather_kernel", "scores_kernel", "finish_kernel", "gradient_kernel"):
        monkeypatch.setattr(kernels, name, Launch())
    monkeypatch.setattr(kernels, "launch_plan", lambda h, w: (*kernels.TILES["sm_80", w.dtype], False, 108))
    monkeypatch.setattr(kernels, "default_impl", lambda *tensors: "triton" if kernels.triton else "reference")
    monkeypatch.setattr(pretrain, "default_impl", kernels.default_impl)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, step=torch.optim.AdamW.step: (step(self), steps.append(1)))
    return steps


@pytest.mark.skipif(kernels.triton is None, reason="without Triton the default patch loss is the chunked one, which waits")
@pytest.mark.parametrize("how", [["--micro-batch", 3], ["--patch-loss", "cosine", "--centre-words"], ["--patch-schedule", "decay"]])
def test_pretraining_waits_for_the_device_only_where_it_logs(how, flags, without_data, tmp_path):
    """Every step runs to the end without an answer; the first question is the logged loss of the last."""
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        train(*flags, *how, "--steps", 3, "--log-every", 9, "--out", tmp_path)
    assert len(without_data) == 3


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_fine_tuning_waits_for_the_device_only_where_it_logs(tune, world, without_data, tmp_path):
    save_checkpoint(tmp_path / "start.pt", build(), "pretrain", {})
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        train(tmp_path / "start.pt", "--data", world / "train_sft.jsonl", "--image-dir", world / "images", "--batch-size", 6,
              "--prompt", "chat", "--tune", tune, "--steps", 3, "--log-every", 9, "--out", tmp_path, script=sft)
    assert len(without_data) == 3


def test_padding_needs_no_mask(world):
    """Without an attention mask, samples of different lengths have the logits that they have with one, and other callers' packed
    sequences are still looked for."""
    model = build()
    lengths = torch.tensor([90, 41, 70])
    X = torch.randn(3, 90, model.word_embeddings.shape[1])
    mask = torch.arange(90) < lengths[:, None]
    with module.never_packed():
        bare = model.llm(inputs_embeds=X, use_cache=False).logits
    torch.testing.assert_close(bare[mask], model.llm(inputs_embeds=X, attention_mask=mask, use_cache=False).logits[mask])
    assert module.masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]])) is not None
