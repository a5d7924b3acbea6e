"""Features on disk change no result and survive kills; and no step waits for the device."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

import model as module
import pretrain
import runtime
import sft
from extras.cache import FeatureCache
from kernels import patch_loss as kernels
from model import PatchAlignedModel, read_checkpoint, save_checkpoint
from runtime import InputError

IMAGES, STEPS = 48, 12  # two epochs of six steps


@pytest.fixture(scope="module")
def flags(world):
    """Two epochs on the small world; later flags override earlier ones."""
    return [
        "--data",
        world / "train.jsonl",
        "--image-dir",
        world / "images",
        "--batch-size",
        8,
        "--steps",
        STEPS,
        "--log-every",
        1,
        "--save-every",
        4,
    ]


def train(*arguments, script=pretrain):
    """A run in this process."""
    script.main(runtime.parse(script.Args, "", [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def straight(here, flags, world, tmp_path_factory):
    """The run without a cache, which the others are compared with."""
    out = tmp_path_factory.mktemp("straight")
    finished(here("pretrain.py", *flags, "--val-data", world / "val.jsonl", "--out", out))
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
    return PatchAlignedModel(
        {name: getattr(pretrain.Args(), name) for name in pretrain.CONFIG} | changes
    )


def test_a_cached_run_is_the_same_and_needs_no_image_twice(
    here, flags, straight, world, images, tmp_path
):
    """Filled in the first epoch, read in the second. A second run opens no image: all are zeros."""
    cached = [
        *flags,
        "--image-dir",
        images,
        "--val-data",
        world / "val.jsonl",
        "--cache-features",
        tmp_path / "cache",
    ]
    said = finished(here("pretrain.py", *cached, "--out", tmp_path / "cold"))
    assert f"features: 0 of {IMAGES} images are in {tmp_path / 'cache'}/toy-clip-" in said
    assert "features: 0 of 6 images" in said  # the validation split's, in a file of its own
    assert_same(straight, tmp_path / "cold")
    assert list(log(tmp_path / "cold", "cache_hits").values()) == [0.0] * 6 + [1.0] * 6
    for image in images.rglob("*.png"):
        before = image.stat()
        image.write_bytes(bytes(before.st_size))
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    said = finished(here("pretrain.py", *cached, "--out", tmp_path / "warm"))
    assert f"features: {IMAGES} of {IMAGES} images" in said and "features: 6 of 6 images" in said
    assert_same(straight, tmp_path / "warm")
    assert (
        log(straight, "val_patch_loss")
        == log(tmp_path / "cold", "val_patch_loss")
        == log(tmp_path / "warm", "val_patch_loss")
    )
    assert set(log(tmp_path / "warm", "cache_hits").values()) == {1.0}


def test_processes_fill_one_cache(ranks, flags, straight, world, tmp_path):
    """Two processes, over uneven micro-batches: what one gives, and every row."""
    cached = [*flags, "--cache-features", tmp_path / "cache", "--out", tmp_path / "two"]
    finished(ranks("pretrain.py", *cached, "--micro-batch", 3, "--workers", 1))
    assert log(straight, "caption_loss") == pytest.approx(
        log(tmp_path / "two", "caption_loss"), rel=1e-5
    )
    model = build()
    records = model.records(world / "train.jsonl", world / "images")
    cache = FeatureCache(tmp_path / "cache", model, records)
    Z = model.encode(torch.stack([records[i]["pixel_values"] for i in range(IMAGES)]))
    torch.testing.assert_close(torch.stack([cache[i]["features"] for i in range(IMAGES)]), Z)


def test_a_run_killed_while_it_writes_resumes_to_the_same_end(here, flags, straight, tmp_path):
    """Killed with half a row on disk in step 6; resumed from step 4: it is encoded anew."""
    cached = [*flags, "--cache-features", tmp_path / "cache", "--out", tmp_path / "run"]
    code = """
import os, signal, sys, pretrain, runtime
from extras.cache import FeatureCache
flush, calls = FeatureCache.flush, []
def half(self):
    calls.append(bool(self.pending))
    if sum(calls) == 6 and self.pending:
        missing, Z, copied = self.pending
        self.pending = missing[:3], Z[:3], copied
        flush(self)
        self.Z[missing[3][0], :999] = Z[3].flatten().view(runtime.torch.uint8).numpy()[:999]
        os.kill(os.getpid(), signal.SIGKILL)
    flush(self)
FeatureCache.flush = half
pretrain.main(runtime.parse(pretrain.Args, "", sys.argv[1:]))
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, *map(str, cached)],
        cwd=Path(pretrain.__file__).parent,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"features: 43 of {IMAGES} images" in finished(here("pretrain.py", *cached, "--resume"))
    assert_same(straight, tmp_path / "run")
    assert log(tmp_path / "run", "cache_hits") == dict.fromkeys(range(1, 5), 0.0) | {
        5: 1.0,
        6: 3 / 8,
    } | dict.fromkeys(range(7, 13), 1.0)


@pytest.fixture
def images(world, tmp_path):
    """A copy of the images that a test may change."""
    return shutil.copytree(world / "images", tmp_path / "images")


@pytest.fixture
def fill(world, images, tmp_path):
    """fill(model, records file, all but) -> a cache over its records, written in batches of 7."""

    def fill(model, path=world / "train.jsonl", without=()):
        records = model.records(path, images, require_image=False)
        cache = FeatureCache(tmp_path / "cache", model, records)
        every = [i for i in range(len(cache)) if records.records[i].get("image") not in without]
        for own in runtime.split(every, 7):
            cache.complete(cache.collate([cache[i] for i in own]))
        return cache

    return fill


def where(cache):
    """The file of its features."""
    return Path(cache.Z.filename)


def test_hits_and_misses_share_a_batch(world, images, fill, tmp_path, capsys):
    """Records without an image, several of one image, one not yet there: all is as in Records."""
    model = build(prompt="chat")
    lines = (world / "train_sft.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join(lines + lines[:4]))
    plain = model.records(tmp_path / "records.jsonl", images, require_image=False)
    names = [r.get("image") for r in plain.records]
    shown = [i for i, name in enumerate(names) if name is not None]
    absent, different = names[shown[1]], len(set(names) - {None})
    assert None in names and different < len(shown)
    fill(model, tmp_path / "records.jsonl", without=[absent])
    cache = fill(model, tmp_path / "records.jsonl", without=set(names) - {None})
    assert f"features: {different - 1} of {different} images" in capsys.readouterr().out
    other = next(i for i in shown if names[i] not in (absent, names[shown[0]]))
    picked = [shown[0], names.index(None), shown[1], other, shown[1]]
    batch, expected = (
        cache.collate([cache[i] for i in picked]),
        plain.collate([plain[i] for i in picked]),
    )
    assert len(batch["features"]) == len(batch["pixel_values"]) == len(batch["missing"]) == 2
    Z = model.encode(expected["pixel_values"])
    completed = cache.complete(batch)
    assert torch.equal(completed["features"], Z)
    for key in ("input_ids", "labels", "places", "patch_ids", "patch_weights"):
        assert torch.equal(completed[key], expected[key]), key
    assert torch.equal(cache[shown[1]]["features"], Z[1])
    model.tune("full")  # in stage 1 every record has an image
    alone = cache.complete(cache.collate([cache[names.index(None)]]))
    loss = model(plain.collate([plain[names.index(None)]]))["caption_loss"]
    assert torch.equal(model(alone)["caption_loss"], loss)


def test_another_encoder_image_or_geometry_is_another_file(world, images, fill):
    """Whatever changes Z changes the name; what does not, such as the projector, does not."""
    first = fill(build())
    other = build()
    with torch.no_grad():
        next(other.encoder.parameters())[0] += 1e-3
    models = {
        "weights": other,
        "low": PatchAlignedModel(build().config, torch.bfloat16),
        "same": build(projector="linear", tau=0.5),
    }
    for name, value in (("image_size", 48), ("geometry", "stretch"), ("feature_layer", -1)):
        models[name] = build(**{name: value})

    def open_cache(model):
        folder, records = where(first).parent, model.records(world / "train.jsonl", images)
        return FeatureCache(folder, model, records)

    caches = {name: open_cache(model) for name, model in models.items()}
    picture = images / first.records[3]["image"]
    ImageOps.mirror(Image.open(picture)).save(picture)
    os.utime(picture, ns=(1, 1))
    caches["image"] = open_cache(models["same"])
    assert where(caches["same"]) == where(first)
    assert len({where(cache) for cache in caches.values()}) == len(caches)
    for name, cache in caches.items():
        there = [cache[i]["features"] is not None for i in range(IMAGES)]
        assert there == [name == "same"] * IMAGES, name
    assert torch.equal(caches["same"][0]["features"], first[0]["features"])


def test_a_file_cut_short_is_made_anew_and_a_full_disk_refused(fill, capsys, monkeypatch, tmp_path):
    model = build()
    cache = fill(model)
    for file in (where(cache), where(cache).with_suffix(".there")):
        Z = cache[5]["features"]
        os.truncate(file, 100)
        capsys.readouterr()
        again = fill(model)
        assert f"features: 0 of {IMAGES} images" in capsys.readouterr().out
        cache = FeatureCache(where(cache).parent, model, again.dataset)
        assert f"features: {IMAGES} of {IMAGES} images" in capsys.readouterr().out
        assert torch.equal(cache[5]["features"], Z)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused = "--cache-features .*other: No space left on device; 0.002 GB are needed"
    with pytest.raises(InputError, match=refused):
        FeatureCache(tmp_path / "other", model, cache.dataset)
    assert not list((tmp_path / "other").iterdir())


# ---- no waiting ----------------------------------------------------------------------------------


class Launch:
    """In the place of a Triton kernel, on tensors without data."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def without_data(monkeypatch):
    """The device is "meta", without data: whatever would have to wait for an answer raises.

    The patch loss runs the host's side of the fused path, as on a GPU.
    """
    monkeypatch.setattr(runtime, "start", lambda seed: torch.device("meta"))
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nothing())  # knows no "meta"
    for name in ("order", "gather", "scores", "finish", "gradient"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Launch())
    monkeypatch.setattr(
        kernels, "launch_plan", lambda h, w: (*kernels.TILES["sm_80", w.dtype], False, 108)
    )
    monkeypatch.setattr(
        kernels, "default_impl", lambda *tensors: "triton" if kernels.triton else "reference"
    )
    monkeypatch.setattr(pretrain, "default_impl", kernels.default_impl)
    steps = []

    def count(self, step=torch.optim.AdamW.step):
        for group in self.param_groups:
            group["fused"] = False  # the fused update knows no "meta"
        step(self)
        steps.append(1)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    return steps


@pytest.mark.skipif(
    kernels.triton is None,
    reason="without Triton the default patch loss is the chunked one, which waits",
)
@pytest.mark.parametrize(
    "how",
    [
        ["--micro-batch", 3],
        ["--patch-loss", "cosine", "--centre-words"],
        ["--patch-schedule", "decay"],
    ],
)
def test_pretraining_waits_for_the_device_only_where_it_logs(how, flags, without_data, tmp_path):
    """Every step runs to its end; the first question is the logged loss of the last."""
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        train(*flags, *how, "--steps", 3, "--log-every", 9, "--out", tmp_path)
    assert len(without_data) == 3


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_fine_tuning_waits_for_the_device_only_where_it_logs(tune, world, without_data, tmp_path):
    save_checkpoint(tmp_path / "start.pt", build(), "pretrain", {})
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        train(
            tmp_path / "start.pt",
            "--data",
            world / "train_sft.jsonl",
            "--image-dir",
            world / "images",
            "--batch-size",
            6,
            "--prompt",
            "chat",
            "--tune",
            tune,
            "--steps",
            3,
            "--log-every",
            9,
            "--out",
            tmp_path,
            script=sft,
        )
    assert len(without_data) == 3


def test_padding_needs_no_mask(world):
    """Samples of different lengths have the same logits without an attention mask as with one.

    Other callers' packed sequences are still looked for.
    """
    model = build()
    lengths = torch.tensor([90, 41, 70])
    X = torch.randn(3, 90, model.word_embeddings.shape[1])
    mask = torch.arange(90) < lengths[:, None]
    with module.never_packed():
        bare = model.llm(inputs_embeds=X, use_cache=False).logits
    torch.testing.assert_close(
        bare[mask], model.llm(inputs_embeds=X, attention_mask=mask, use_cache=False).logits[mask]
    )
    assert (
        module.masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]])) is not None
    )
