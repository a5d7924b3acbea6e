"""Stage 1 from a user's shell: it learns, resumes, splits over processes, chains into the probe,
and refuses bad input in one line."""

import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image

import pretrain
import runtime
from data import StepSampler, read_records
from model import read_checkpoint


@pytest.fixture(scope="module")
def flags(world):
    """A short run on the small world; later flags override earlier ones."""
    return [
        "--data",
        world / "train.jsonl",
        "--image-dir",
        world / "images",
        "--val-data",
        world / "val.jsonl",
        "--batch-size",
        8,
        "--steps",
        6,
        "--log-every",
        1,
        "--save-every",
        3,
        "--patch-schedule",
        "constant",
    ]


def log(folder, key="caption_loss"):
    """{step: value} of a key of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def straight(here, flags, tmp_path_factory):
    """The uninterrupted run that the others are compared with."""
    out = tmp_path_factory.mktemp("straight")
    done = here("pretrain.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        f"wrote {out / 'ckpt.pt'}; next: python probe.py {out / 'ckpt.pt'} --data "
    )
    return out


def assert_same(a, b, tolerance):
    """Two runs logged the same losses and ended in the same projector."""
    for key in ("caption_loss", "patch_loss", "grad_norm", "val_caption_loss", "val_patch_loss"):
        assert log(a, key) == pytest.approx(log(b, key), rel=tolerance), key
    weights = [read_checkpoint(folder / "ckpt.pt")["model"] for folder in (a, b)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=10 * tolerance)


def test_low_precision_on_request(here, flags, straight, tmp_path):
    """--dtype bfloat16 is said, taken, and gives about the same first loss."""
    done = here("pretrain.py", *flags, "--steps", 1, "--dtype", "bfloat16", "--out", tmp_path)
    assert done.returncode == 0 and ", bfloat16; " in done.stdout, done.stderr
    first, low = log(straight)[1], log(tmp_path)[1]
    assert low != first and abs(low - first) < 0.05 * first


def test_overfitting_one_batch_lowers_both_losses(here, flags, tmp_path):
    done = here("pretrain.py", *flags, "--overfit", "--steps", 40, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    caption, patch = log(tmp_path), log(tmp_path, "patch_loss")
    assert caption[40] < 0.8 * caption[1] and patch[40] < 0.5 * patch[1]


def test_an_error_in_mid_run_loses_nothing_and_resuming_is_not_noticeable(
    here, flags, straight, world, tmp_path
):
    """An image of the fifth step is broken: one line, and resume.pt of step 4. Mended and
    resumed, the run ends as if unstopped."""
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)
    name = read_records(world / "train.jsonl")[StepSampler(48, 8, 0).indices(4)[2]]["image"]
    whole = (images / name).read_bytes()
    (images / name).write_bytes(whole[:700])
    arguments = [*flags, "--image-dir", images, "--out", tmp_path / "run"]
    stopped = here("pretrain.py", *arguments)
    assert stopped.returncode == 2 and re.search(
        rf"^error: .*{name}.*truncated", stopped.stderr, re.M
    ), stopped.stderr
    assert list(log(tmp_path / "run")) == [1, 2, 3, 4]
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"resume.pt", "metrics.jsonl"}

    (images / name).write_bytes(whole)
    changed = here("pretrain.py", *arguments, "--resume", "--tau", 0.5)
    assert changed.returncode == 2 and "with --tau 0.07; use the same flags" in changed.stderr
    resumed = here("pretrain.py", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 4" in resumed.stdout
    assert_same(straight, tmp_path / "run", 0)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on GPUs the products are in bfloat16, which rounds differently in smaller batches",
)
def test_processes_and_micro_batches_change_nothing(run, flags, straight, tmp_path):
    """Two processes, each accumulating over uneven micro-batches (3 + 1), give what one process
    gives in one piece."""
    done = run("pretrain.py", *flags, "--micro-batch", 3, "--out", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 2 x 3" in done.stdout
    assert_same(straight, tmp_path, 1e-5)


def test_the_baseline_sees_the_same_data(here, flags, straight, tmp_path):
    """--patch-weight 0: the same first batch and initial projector, so the same first losses; then
    the two part."""
    done = here("pretrain.py", *flags, "--patch-weight", 0, "--workers", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(log(tmp_path, k)[1] == log(straight, k)[1] for k in ("caption_loss", "patch_loss"))
    assert log(tmp_path, "patch_loss")[6] > log(straight, "patch_loss")[6] + 0.1


def test_the_weight_decays_on_request(here, flags, straight, tmp_path):
    """--patch-schedule decay: the first update is that of a constant weight, the last that of
    nearly none."""
    done = here("pretrain.py", *flags, "--patch-schedule", "decay", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        all(log(tmp_path)[i] == log(straight)[i] for i in (1, 2))
        and log(tmp_path)[3] != log(straight)[3]
    )
    assert log(tmp_path, "grad_norm")[6] < 0.9 * log(straight, "grad_norm")[6]


def test_the_weight_ends_after_a_third_and_checkpoints_are_kept(here, flags, straight, tmp_path):
    """--patch-schedule first: two of six updates have the patch loss. --keep-every 2: what a run
    of two steps with a constant weight and the same rate has after its second."""
    first = [*flags, "--patch-schedule", "first", "--keep-every", 2, "--out", tmp_path / "a"]
    assert here("pretrain.py", *first).returncode == 0
    steps, base = log(tmp_path / "a"), log(straight)
    assert [steps[i] == base[i] for i in (1, 2, 3)] == [True] * 3 and steps[4] != base[4]
    kept = sorted(f.name for f in (tmp_path / "a").glob("ckpt*"))
    assert kept == ["ckpt-0.pt", "ckpt-2.pt", "ckpt-4.pt", "ckpt.pt"]
    early, late = (read_checkpoint(tmp_path / "a" / name) for name in kept[1:3])
    assert early["metrics"] == {"steps": 2} and early["stage"] == "pretrain"
    assert any((early["model"][n] != t).any() for n, t in late["model"].items())


def test_the_stages_chain(run, straight, world, tmp_path):
    """The probe reads what pretraining wrote, from another folder and without a model flag, and
    finds it above chance."""
    done = run(
        "probe.py",
        straight / "ckpt.pt",
        "--data",
        world / "test.jsonl",
        "--out",
        tmp_path,
        "--atoms",
        3,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "probe.json").read_text())
    assert (
        result["images"] == 6
        and result["patches"] == 6 * 64
        and result["align"] > result["chance"] + 0.02
    )
    assert 0 < result["entropy"]["projected"] < result["entropy"]["encoder"] < math.log(64)
    assert Image.open(tmp_path / "probe.png").width > 400


BROKEN = {
    "folder": (["--image-dir", "nowhere"], {}, "--image-dir nowhere is not a folder"),
    "file": (["--data", "nowhere.jsonl"], {}, "nowhere.jsonl: cannot read"),
    "jpeg": ([], {"image": "cut.jpg"}, "record r1: cannot read the image .*cut.jpg .*truncated"),
    "no image": ([], {"image": None}, 'record r1: "image" is missing'),
    "outside": (
        [],
        {"image": "../secret.png"},
        "record r1: image '../secret.png' is not a path inside the image folder",
    ),
    "region": (
        [],
        {"regions": [{"phrase": "a dog", "bbox": [90, 90, 190, 120]}]},
        r"record r1: regions\[0\]: .* outside its 96 x 96",
    ),
    "encoder": (
        ["--vision", "nowhere/at/all"],
        {},
        "--vision nowhere/at/all: no such model folder",
    ),
    "temperature": (["--tau", "0.001"], {}, "--tau: 0.001 is too small"),
    "batch": (["--batch-size", "-3"], {}, "--batch-size -3 is less than 0"),
    "out": (["--out", "/proc/none"], {}, "/proc/none.*: No such file"),
    "resume": (["--resume"], {}, "--resume: .*resume.pt does not exist"),
}


@pytest.mark.parametrize("arguments, changes, message", BROKEN.values(), ids=BROKEN)
def test_bad_input_is_one_line(arguments, changes, message, world, tmp_path, monkeypatch, capfd):
    """Exit status 2, one line on stderr that names what is wrong, and no checkpoint."""
    records = read_records(world / "train.jsonl")[:3]
    records[1].update(id="r1", **changes)
    shutil.copytree(
        world / "images",
        tmp_path / "images",
        ignore=lambda folder, names: [n for n in names if int(n[-9:-4]) > 2],
    )
    Image.open(world / "images" / records[0]["image"]).save(tmp_path / "images" / "cut.jpg")
    (tmp_path / "images" / "cut.jpg").write_bytes(
        (tmp_path / "images" / "cut.jpg").read_bytes()[:900]
    )
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in r.items() if v is not None}) + "\n" for r in records)
    )
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv",
        [
            "pretrain.py",
            *map(
                str,
                [
                    "--data",
                    tmp_path / "records.jsonl",
                    "--image-dir",
                    tmp_path / "images",
                    "--batch-size",
                    3,
                    "--steps",
                    2,
                    "--out",
                    out,
                    *arguments,
                ],
            ),
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        runtime.run(pretrain.main, pretrain.Args, pretrain.__doc__)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not out.exists() or {f.name for f in out.iterdir()} <= {"metrics.jsonl"}


def test_the_probe_refuses_foreign_checkpoints(here, world, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    done = here("probe.py", tmp_path / "ckpt.pt", "--data", world / "test.jsonl")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert "ckpt.pt: not a checkpoint of this project" in done.stderr


def test_flags_come_from_the_dataclass():
    """Every field is a flag with its help; a typo, a bad choice and a bad number are errors."""
    args = runtime.parse(
        pretrain.Args, "", ["--steps", "7", "--overfit", "--no-resume", "--geometry", "pad"]
    )
    assert (args.steps, args.overfit, args.resume, args.geometry, args.tau) == (
        7,
        True,
        False,
        "pad",
        pretrain.Args.tau,
    )
    for wrong in (["--step", "7"], ["--geometry", "round"], ["--steps", "many"]):
        with pytest.raises(SystemExit) as stopped:
            runtime.parse(pretrain.Args, "", wrong)
        assert stopped.value.code == 2


def test_schedule_and_atomic_files(tmp_path):
    """Warm-up rises to the peak, the cosine ends near zero; a file appears whole or not at all."""
    factors = [runtime.cosine(s, 100, 10) for s in range(100)]
    assert (
        factors[:10] == sorted(factors[:10])
        and factors[10] == 1
        and factors[10:] == sorted(factors[10:], reverse=True)
    )
    assert (
        factors[0] == pytest.approx(1 / 11)
        and factors[55] == pytest.approx(0.5)
        and factors[-1] < 1e-3
    )
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with runtime.atomic(tmp_path / "f") as path:
            path.write_text("half")
            raise KeyboardInterrupt
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
