"""What must never get silently wrong: inputs that went wrong elsewhere, and what is right.

cases.jsonl has inputs of words and parsers; the rest needs files, a run or a signal. What belongs
to readers of annotations is in test_annotate.py.
"""

import errno
import importlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import eval as evaluation
import labels
import projector
import runtime
from extras import check, guard
from model import read_checkpoint
from runtime import InputError

ROOT = Path(__file__).resolve().parent.parent
CASES = [json.loads(line) for line in (ROOT / "tests" / "cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['call']}-{c['input']}"[:60] for c in CASES])
def test_case(case):
    module, name = case["call"].split(".")
    call, given = getattr(importlib.import_module(module), name), case["input"]
    found = call(*given) if isinstance(given, list) else call(given)
    assert found == case["right"]


# ---- units ---------------------------------------------------------------------------------------


def unit_boxes(n=60, size=(640, 480)):
    """n pixel boxes [x0, y0, x1, y1] of all sizes in an image."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((n, 2, 2)), 1)
    return (corners.reshape(n, 4) * (*size, *size)).round(1)


@pytest.mark.parametrize("size", [(96, 96), (640, 480), (2000, 1500)])
@pytest.mark.parametrize("n", [1, 4, 60])
def test_boxes_of_another_unit_are_known_together(n, size):
    boxes, sizes, names = unit_boxes(n, size), [size] * n, [f"r{i}" for i in range(n)]
    labels.check_frame(names, boxes, sizes)
    labels.check_frame(names, boxes + [0, 0, 5, 5], sizes)  # a little over the edge
    labels.check_frame(names, boxes, sizes, corners=False)  # as a COCO file's, converted
    full = np.array(size * 2)
    with pytest.raises(InputError, match="r0: .* divided by the image size"):
        labels.check_frame(names, boxes / full, sizes)
    if n > 1:
        wide = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        with pytest.raises(InputError, match="looks like .x, y, width, height"):
            labels.check_frame(names, wide, sizes)
        xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    if n > 4:
        with pytest.raises(InputError, match="like 0 .. 1000"):
            labels.check_frame(names, boxes / full * 1000, sizes)
        with pytest.raises(InputError, match="looks "):
            labels.check_frame(names, xyxy, sizes, corners=False)


UNITS = {
    "divided by the image size": lambda b: [v / 96 for v in b],
    "0 .. 1000": lambda b: [v / 96 * 1000 for v in b],
    "width, height": lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
}


def boxed(world, folder, change, split="train", count=12):
    """Records of the world with one box each, changed, as a file."""
    records = data.read_records(world / f"{split}.jsonl")[:count]
    for i, record in enumerate(records):
        box = [20 + i, 40, 50 + i, 60 + i]
        record["regions"] = [{"phrase": "a red circle", "bbox": change(box)}]
    return written(folder / "boxed.jsonl", records)


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def one_line(done, *texts, code=2):
    """It ended with one error line that has the texts, and no traceback."""
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(found) == 1 and "Traceback" not in done.stderr, done
    assert all(text in found[0] for text in texts), found[0]
    return found[0]


@pytest.fixture
def train(here, world, tmp_path):
    """train(*flags): pretrain.py for two steps of 4 -> the finished process; OUT: tmp_path/out."""

    def train(*flags, script="pretrain.py"):
        common = [
            "--image-dir",
            world / "images",
            "--batch-size",
            4,
            "--steps",
            2,
            "--log-every",
            1,
        ]
        return here(script, *common, "--out", tmp_path / "out", *flags)

    return train


@pytest.mark.parametrize("looks", UNITS)
def test_training_and_probe_refuse_another_unit(train, here, world, tmp_path, looks):
    file = boxed(world, tmp_path, UNITS[looks])
    one_line(train("--data", file), "boxed.jsonl: record train_0000", looks)
    assert not (tmp_path / "out" / "ckpt.pt").exists()
    regions = [{"id": r["id"], "regions": r["regions"]} for r in data.read_records(file)]
    joined = written(tmp_path / "regions.jsonl", regions)
    done = train("--data", world / "train.jsonl", "--regions", joined, "--skip-bad")
    said = f"{done.stdout}{done.stderr}"
    if looks != "width, height":  # among others, which are masks
        assert looks in said and done.returncode == 2
    assert train("--data", world / "train.jsonl").returncode == 0
    probed = ["--data", file, "--image-dir", world / "images"]
    one_line(here("probe.py", tmp_path / "out" / "ckpt.pt", *probed), "train_0000", looks)


@pytest.mark.parametrize("looks", UNITS)
def test_eval_refuses_another_unit(here, world, tmp_path, looks):
    records = data.read_records(world / "test_refer.jsonl")[:8]
    for i, record in enumerate(records):
        record["answer"] = UNITS[looks]([20 + i, 40, 50 + i, 60 + i])
    file = written(tmp_path / "refer.jsonl", records)
    done = here("eval.py", "none.pt", "--data", file, "--image-dir", world / "images")
    one_line(done, "refer.jsonl: record", looks)


# ---- labels --------------------------------------------------------------------------------------


def test_training_says_how_many_patches_are_labelled_and_refuses_none(train, world, tmp_path):
    records = data.read_records(world / "train.jsonl")[:8]
    for i, record in enumerate(records):  # the left half of all but two
        record["regions"] = [{"phrase": "a circle", "bbox": [0, 0, 48, 96]}] if i > 1 else []
    done = train("--data", written(tmp_path / "half.jsonl", records))
    assert "of 64 patches an image, 24.0 are labelled; 25% of the images have none" in done.stdout
    for record in records:
        record["regions"] = [{"phrase": "no circle", "bbox": [0, 0, 48, 96]}]
    none = written(tmp_path / "none.jsonl", records)
    one_line(train("--data", none), "no patch has a label", "--patch-weight 0")
    assert train("--data", none, "--patch-weight", 0).returncode == 0


def test_outputs_without_places_get_no_labels(train, here, world, tmp_path, monkeypatch):
    """A projector whose outputs are no grid: the patch loss is refused, the rest works."""

    class Resampler(torch.nn.Module):
        def __init__(self, D_v, D, grid, pool):
            super().__init__()
            self.linear = torch.nn.Linear(D_v, D)

        def forward(self, Z):
            return self.linear(Z.unflatten(1, (4, -1)).mean(2))

    monkeypatch.setitem(projector.PROJECTORS, "resampler", Resampler)
    monkeypatch.setitem(projector.PLACELESS, "resampler", lambda grid, pool: 4)
    monkeypatch.setattr(runtime, "parse", lambda cls, doc: cls(**vars(parsed[0])))
    import pretrain

    parsed = [
        pretrain.Args(
            data=str(world / "train.jsonl"),
            image_dir=str(world / "images"),
            out=str(tmp_path / "out"),
            steps=1,
            batch_size=2,
            projector="resampler",
        )
    ]
    one_line(here("pretrain.py"), "--projector resampler", "no places in the image")
    parsed[0].patch_weight = 0
    assert here("pretrain.py").returncode == 0
    (row,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["patch_loss"] is None
    monkeypatch.undo()
    monkeypatch.setitem(projector.PROJECTORS, "resampler", Resampler)
    monkeypatch.setitem(projector.PLACELESS, "resampler", lambda grid, pool: 4)
    done = here(
        "probe.py", tmp_path / "out" / "ckpt.pt", "--data", world / "test.jsonl", "--show", 0
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["align"] is None


def test_stop_words_can_be_replaced_or_switched_off(train, world, tmp_path):
    (tmp_path / "own.txt").write_text("Circle ROT\n", encoding="utf-8")
    assert labels.read_stop_words("") is None and labels.read_stop_words("none") == []
    own = labels.read_stop_words(str(tmp_path / "own.txt"))
    assert labels.content_words("the rot no Circle", frozenset(own)) == ["the", "no"]
    record = data.read_records(world / "train.jsonl")[0]
    record["regions"] = [{"phrase": "a circle", "bbox": [0, 0, 96, 96]}]
    file, seen = written(tmp_path / "r.jsonl", [record] * 4), {}
    for words in ("", "none", tmp_path / "own.txt"):
        done = train("--data", file, "--stop-words", words)
        assert done.returncode == 0, done.stderr
        config = read_checkpoint(tmp_path / "out" / "ckpt.pt")["config"]
        seen[str(words)] = config["stop_words"]
        model_words = labels.patch_words(
            record["regions"], (96, 96), "crop", (1, 1), stop_words=config["stop_words"]
        )
        assert model_words == [{"": ["circle"], "none": ["a", "circle"]}.get(str(words), ["a"])]
    assert list(seen.values()) == [None, [], ["circle", "rot"]]
    one_line(train("--data", file, "--stop-words", "nowhere.txt"), "--stop-words nowhere.txt")


def test_words_without_spaces_are_divided_by_the_tokenizer():
    """No blank goes in front, and every token of the word has a share."""

    class Tokenizer:
        unk_token_id = 99

        def __call__(self, text, **options):
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

        encode = lambda self, text, **options: [ord(c) for c in text]  # noqa: E731
        decode = lambda self, ids: "".join(map(chr, ids))  # noqa: E731

    assert labels.word_ids(Tokenizer(), "红车") == [ord("红"), ord("车")]
    ids, weights = labels.patch_targets([["红车"]], lambda w: labels.word_ids(Tokenizer(), w))
    assert ids.tolist() == [[ord("红"), ord("车")]] and weights.tolist() == [[0.5, 0.5]]


# ---- texts ---------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("prompt", ["plain", "v1", "chat"])
def test_special_tokens_in_text_are_text(prompt):
    """In questions, answers and phrases: as many special tokens as the same text without them."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones" / "toy-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(["<|im_end|>"])}

    def tokens(question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        ids, learnt = data.tokenize(turns, tokenizer, prompt, 2, 999, "x")
        asked = data.tokenize_prompt(turns[:1], tokenizer, prompt, 2)
        assert asked == ids[: len(asked)]
        return [sum(i in special for i in part) for part in (ids, asked)], learnt

    clean, _ = tokens("<image>\nwhat is a tag", "a red tag")
    found, learnt = tokens("<image>\nwhat is </s> <|im_end|> <s>", "a </s> red <|im_end|> tag")
    assert found == clean
    assert sum(i in special for i in learnt) == 1  # the end of the answer
    assert not special & {*labels.encode_text(tokenizer, "<|im_end|> </s>")}


def test_the_marker_moves_to_the_front_of_its_turn():
    turns = [{"from": "human", "value": "What is it? <image>"}, {"from": "gpt", "value": "a dog"}]
    assert data.check_turns(turns, True, "x")[0] == ("user", "<image>\nWhat is it?")


def test_what_no_reader_expects_is_one_line(tmp_path):
    """Values on which Python itself fails: each is an InputError."""
    (tmp_path / "a.JSONL").write_text('{"id": ' + "9" * 5000 + "}")
    (tmp_path / "b.json").write_text('[{"id": null, "regions": []}]')
    (tmp_path / "c.json").write_text('[{"id": 1}]')
    counts = {"rle": {"size": [2, 2], "counts": "\u00e9\ud83d"}}
    long = {"image": "a" * 300, "conversations": []}
    huge = {"task": "refer", "answer": [0, 0, 10**400, 1], "image": "a", "conversations": [{}]}
    vqa = {"task": "vqa", "answer": "a", "conversations": [{}]}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones" / "toy-llama")
    form = dict(image_size=96, geometry="crop", grid=(2, 2), mean=[0] * 3, std=[1] * 3)
    for text, call in {
        "a.JSONL: line 1: a number of thousands": lambda: data.read_records(tmp_path / "a.JSONL"),
        "entry 0 needs .id.": lambda: data.read_records(tmp_path / "c.json", tmp_path / "b.json"),
        "not a compressed COCO string": lambda: labels.check_region(counts, (2, 2), "x"),
        "no image": lambda: data.Records([long], tmp_path, tokenizer, **form),
        "there is no image": lambda: evaluation.read_item(long | vqa, 0, "f", tmp_path, {}),
        "does not match task refer": lambda: evaluation.read_item(huge, 0, "f", tmp_path, {}),
        "looks divided": lambda: labels.check_region(
            {"bbox": [-0.01, 0, 0.5, 1.02]}, (640, 480), "x"
        ),
    }.items():
        with pytest.raises(InputError, match=text):
            call()


# ---- images --------------------------------------------------------------------------------------


def orientated(path, value, size=(40, 20), broken=False):
    """A photograph with a red corner, stored so that it stands upright by this orientation."""
    image = Image.new("RGB", size, "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = value, "x" * 50
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(value, value)
    stored = image.transpose(data.UPRIGHT[back]) if back in data.UPRIGHT else image
    block = exif.tobytes()
    stored.save(path, exif=block[: len(block) - 40] if broken else block, quality=95)
    return image


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_header_says_what_decoding_gives(tmp_path, value, ending):
    path = tmp_path / f"a.{ending}"
    orientated(path, value)
    image = data.open_image(path, "x")
    assert data.image_header(path, "x") == (image.size, value) and image.size == (40, 20)
    red = np.asarray(image, np.int64)[:8, :8].mean((0, 1))
    assert red[0] > 200 and red[1] < 90


def test_a_broken_exif_block_costs_nothing(tmp_path):
    orientated(tmp_path / "a.jpg", 6, broken=True)
    image = data.open_image(tmp_path / "a.jpg", "x")
    assert data.image_header(tmp_path / "a.jpg", "x") == (image.size, 6)


# ---- one check before the first step -------------------------------------------------------------


@pytest.fixture
def bad(world, tmp_path):
    """16 records, of which five cannot be used and one (number 9) not be decoded -> the file."""
    records = data.read_records(world / "train.jsonl")[:16]
    shutil.copytree(world / "images", tmp_path / "images")
    records[3]["regions"] = [{"phrase": "a dog", "bbox": [200, 0, 300, 9]}]
    records[5]["conversations"][1]["value"] = "half \ud83d"
    records[7]["conversations"][1]["value"] = " "
    (tmp_path / "images" / records[11]["image"]).write_bytes(b"no image")
    records[13]["regions"] = [{"phrase": " ", "bbox": [0, 0, 9, 9]}]
    whole = tmp_path / "images" / records[9]["image"]
    whole.write_bytes(whole.read_bytes()[:700])
    return written(tmp_path / "bad.jsonl", records)


def test_everything_that_a_step_would_refuse_is_listed_first(train, bad, tmp_path, monkeypatch):
    flags = ["--data", bad, "--image-dir", tmp_path / "images", "--steps", 8]
    for alone in (check.ALONE, 1):  # in this process; in processes of their own
        monkeypatch.setattr(check, "ALONE", alone)
        done = train(*flags)
        one_line(done, "bad.jsonl: 5 of 16 records", "record train_00003: regions[0]", "--skip-bad")
        assert len(re.findall(r"^  .*bad.jsonl: record train_000\d\d", done.stdout, re.M)) == 5
        assert list((tmp_path / "out").iterdir()) == []
    done = train(*flags, "--skip-bad", "--cache-features", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "5 of 16 records cannot be used and are left out" in done.stdout
    assert "1 records had images that could not be decoded and were skipped: train_00009" in (
        done.stdout
    )
    one_line(train(*flags, "--max-length", 64), "cuts off the image")


def test_what_is_found_is_plain(world, tmp_path):
    """A tensor or an array in it would cost a file descriptor each, until none is left."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones" / "toy-llama")
    records = data.read_records(boxed(world, tmp_path, lambda box: [-9, *box[1:]], count=4))
    form = dict(image_size=96, geometry="crop", grid=(2, 2), mean=[0] * 3, std=[1] * 3)
    dataset = data.Records(records, world / "images", tokenizer, **form)
    found = [check.examine(dataset, i, closely=True) for i in range(4)]
    assert [one["clipped"] for one in found] == [1] * 4 and found[0]["labelled"] > 0
    assert not {b"torch", b"numpy"} & set(re.findall(rb"torch|numpy", pickle.dumps(found)))


def test_two_processes_share_the_check(ranks, bad, world, tmp_path):
    flags = ["--data", bad, "--image-dir", tmp_path / "images", "--batch-size", 4, "--steps", 1]
    done = ranks("pretrain.py", *flags, "--out", tmp_path / "out")
    one_line(done, "bad.jsonl: 5 of 16 records cannot be used")  # of one of the two
    assert "step" not in done.stdout


def test_a_run_stopped_by_a_broken_image_goes_on_without_it(train, bad, tmp_path):
    usable = [r for i, r in enumerate(data.read_records(bad)) if i not in (3, 5, 7, 11, 13)]
    flags = ["--data", written(bad, usable), "--image-dir", tmp_path / "images", "--steps", 11]
    flags += ["--batch-size", 1]
    one_line(train(*flags), "train_00009", "truncated", "pass over it with --skip-bad")
    done = train(*flags, "--skip-bad", "--resume")
    assert done.returncode == 0 and "were skipped: train_00009" in done.stdout, done.stderr


# ---- a run that is stopped -----------------------------------------------------------------------


def projector_of(folder):
    return read_checkpoint(folder / "ckpt.pt")["model"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_unstopped(
    train, tmp_path, world, number, monkeypatch
):
    flags = ["--data", world / "train.jsonl", "--steps", 6]
    assert train(*flags).returncode == 0
    straight = projector_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    update = guard.Guard.update

    def hit(self, done):
        if done == 3:
            os.kill(os.getpid(), number)
        return update(self, done)

    monkeypatch.setattr(guard.Guard, "update", hit)
    done = train(*flags)
    assert (
        done.returncode == 128 + number and f"stopped by {number.name} after step 3" in done.stdout
    )
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"resume.pt", "metrics.jsonl"}
    monkeypatch.undo()
    done = train(*flags, "--resume")
    assert done.returncode == 0 and "at step 3" in done.stdout
    assert all(torch.equal(a, straight[n]) for n, a in projector_of(tmp_path / "out").items())


def test_ten_minutes_without_a_save_are_the_most(train, tmp_path, world, monkeypatch):
    saved, save = [], runtime.save_resume
    monkeypatch.setattr(
        runtime,
        "save_resume",
        lambda path, args, step, **s: saved.append(step) or save(path, args, step, **s),
    )
    monkeypatch.setattr(guard, "SECONDS", 0)
    assert train("--data", world / "train.jsonl", "--steps", 3).returncode == 0
    assert saved == [1, 2, 3]


# ---- numbers that are not numbers ----------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(train, tmp_path, world):
    flags = ["--data", world / "train.jsonl", "--steps", 6, "--save-every", 1, "--log-every", 3]
    assert train(*flags).returncode == 0
    good = (tmp_path / "out" / "ckpt.pt").read_bytes()
    said = one_line(train(*flags, "--lr", 1e30), "is not finite", "train_0", "--lr")
    assert re.search(r"step [23]: the (loss|gradient)", said)
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(rows) and all(map(json.loads, rows))
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == good
    one_line(train(*flags, "--lr", 1e30, "--steps", 1, "--val-data", world / "val.jsonl"), "finite")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == good


def test_weights_that_are_not_finite_are_refused_by_name(train, here, tmp_path, world):
    llm = AutoModelForCausalLM.from_pretrained(ROOT / "backbones" / "toy-llama")
    llm.get_input_embeddings().weight.data[17] = float("nan")
    shutil.copytree(ROOT / "backbones" / "toy-llama", tmp_path / "llm")
    llm.save_pretrained(tmp_path / "llm")
    flags = ["--data", world / "train.jsonl"]
    one_line(train(*flags, "--llm", tmp_path / "llm"), "embed_tokens.weight", "row 17")

    assert train(*flags).returncode == 0
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    name = list(checkpoint["model"])[0]
    checkpoint["model"][name].view(-1)[5] = float("inf")
    torch.save(checkpoint, path)
    images = ["--image-dir", world / "images"]
    captions = ["--data", world / "test.jsonl", *images]
    for script, *more in (
        ["sft.py", path, "--data", world / "train_sft.jsonl", *images, "--out", tmp_path / "sft"],
        ["eval.py", path, *captions],
        ["probe.py", path, *captions],
    ):
        one_line(here(script, *more), name, "not finite")
    done = here("hf", "export", path, tmp_path / "exported")
    assert done.returncode == 2 and name in done.stderr and not (tmp_path / "exported").exists()


# ---- the system ----------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_what_was_there(train, tmp_path, world):
    flags = ["--data", world / "train.jsonl"]
    assert train(*flags).returncode == 0
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    command = [sys.executable, ROOT / "pretrain.py", *flags, "--image-dir", world / "images"]
    command += ["--batch-size", 4, "--steps", 2, "--out", tmp_path / "out"]

    def small():  # no file may grow beyond 20 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        list(map(str, command)), preexec_fn=small, cwd=ROOT, capture_output=True, text=True
    )
    one_line(done, "resume.pt: cannot be written")
    left = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert left["ckpt.pt"] == before["ckpt.pt"] and set(left) <= set(before)
    with pytest.raises(InputError, match="part: cannot be written .*; it is kept"):
        with runtime.writing(tmp_path / "part", "it is kept"):
            raise OSError(errno.ENOSPC, "full")


def test_two_runs_do_not_share_a_place(train, here, tmp_path, world):
    """The second is refused while the first lives; what a killed one leaves stops nobody."""
    out, records = tmp_path / "out", tmp_path / "photos.jsonl"
    assert train("--data", world / "train.jsonl", "--steps", 0).returncode == 0
    captions = ["eval.py", out / "ckpt.pt", "--data", world / "test.jsonl"]
    annotate = ["annotate.py", "--from", "llava", "--data", world / "train.jsonl"]
    annotate += ["--image-dir", world / "images", "--out", records]
    places = [out, out / "eval.json", records]
    code = f"import runtime, time, pathlib; [runtime.lock(pathlib.Path(p)) for p in {places}]; "
    code = code.replace("PosixPath", "str") + "print('there', flush=True); time.sleep(99)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    first.stdout.readline()
    one_line(train("--data", world / "train.jsonl"), f"--out {out}: another process")
    one_line(here(*captions), f"--out {out / 'eval.json'}: another process")
    one_line(here(*annotate), f"--out {records}: another process")
    first.kill()
    first.wait()
    assert (out / ".lock").exists() and train("--data", world / "train.jsonl").returncode == 0
    assert here(*captions).returncode == 0 and here(*annotate).returncode == 0
    assert not list(tmp_path.rglob(".*.lock")) and not (out / ".lock").exists()


def test_a_folder_that_disagrees_with_its_weights_names_the_first_tensor(train, tmp_path, world):
    shutil.copytree(ROOT / "backbones" / "toy-llama", tmp_path / "llm")
    file = tmp_path / "llm" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    flags = ["--data", world / "train.jsonl", "--llm", tmp_path / "llm"]
    one_line(
        train(*flags), "model.layers.0.mlp.down_proj.weight has the shape (128, 320)", "(128, 328)"
    )
    file.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    one_line(train(*flags), "model.layers.4.", "is not among its weights")


def test_the_next_command_can_be_pasted(train, here, world, tmp_path):
    out = tmp_path / "with a space"
    done = train("--data", world / "train.jsonl", "--out", out)
    following = done.stdout.splitlines()[-1].split("; next: ")[1]
    assert shlex.split(following)[1:3] == ["probe.py", str(out / "ckpt.pt")]
    done = here("eval.py", out / "ckpt.pt", "--data", world / "test.jsonl")
    assert str(out / "ckpt.pt") in shlex.split(done.stdout.splitlines()[-1].split("; next: ")[1])
    assert "note: test: captions of 6 images" in done.stdout
    assert json.loads((out / "eval.json").read_text())["notes"]


def test_frames_of_presets_fit_the_data_that_they_name():
    """Boxes in LLaVA's mix665k are relative to the padded square."""
    for preset in (ROOT / "presets").glob("*.sft.txt"):
        text = preset.read_text()
        if "mix665k" in text.split("torchrun")[1].splitlines()[1]:
            assert "--geometry pad" in text and "--box-frame square" in text, preset
