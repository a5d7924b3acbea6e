"""annotate.py --conversations and --dry-run: true, balanced, by image, and nothing given away."""

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import annotate
import eval as scorer
import runtime
from annotations.conversations import article, plural, words

SIZE = (80, 50)
NAMES = ["person", "dog", "wine glass", "apple", "knife"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def annotated(*flags):
    annotate.main(runtime.parse(annotate.Args, "", list(map(str, flags))))


def write_coco(folder, count=100):
    """Images with none to three of some things, each a box; now and then a crowd of people.
    -> the flags, and {image: {name: its boxes, None for a crowd}}."""
    rng, truth = np.random.default_rng(0), {}
    images, annotations, captions = [], [], []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        name = f"{i:03}.png"
        Image.new("RGB", SIZE, (i, 90, 2 * i)).save(folder / "images" / name)
        images.append({"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        found = truth.setdefault(name, {})
        for category, thing in enumerate(NAMES):
            for k in range(rng.integers(0, 4) if rng.random() < 0.6 else 0):
                x, y = rng.integers(0, (60, 35)).tolist()
                crowd = thing == "person" and i % 5 == 0 and k == 0
                annotations.append({
                    "id": len(annotations), "image_id": i, "category_id": category,
                    "bbox": [x, y, 18, 12], "iscrowd": int(crowd),
                    "segmentation": [[x, y, x + 18, y, x + 18, y + 12, x, y + 12]]})
                found.setdefault(thing, []).append(None if crowd else [x, y, x + 18, y + 12])
        seen = plural(next(iter(found))) if found else "nothing"
        captions.append({"id": i, "image_id": i, "caption": f"scene {i} with {seen}"})
        captions.append({"id": count + i, "image_id": i, "caption": f"view {i}"})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    for file, more in (("instances", dict(annotations=annotations, categories=categories)),
                       ("captions", dict(annotations=captions))):
        (folder / f"{file}.json").write_text(json.dumps(dict(images=images) | more))
    return ["--from", "coco", "--instances", folder / "instances.json", "--captions",
            folder / "captions.json", "--image-dir", folder / "images"], truth


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    flags, truth = write_coco(folder)
    annotated(*flags, "--out", folder / "coco.jsonl", "--conversations", folder / "made")
    return folder, flags, truth


def asked(record):
    return record["conversations"][0]["value"].removeprefix("<image>\n")


def named(text):
    """The thing that a question names."""
    return next(n for n in NAMES if {*words(n)} <= {*words(text)}
                or {*words(plural(n))} <= {*words(text)})


def test_each_image_is_in_one_split(made):
    folder, _, truth = made
    splits = {name: {r["image"] for r in lines(folder / f"made/{name}.jsonl")}
              for name in ("train", "val", "test")}
    assert [len(own) for own in splits.values()] == [80, 10, 10]
    assert set().union(*splits.values()) == set(truth)
    for name, own in splits.items():
        for file in (folder / "made").glob(f"{name}_*.jsonl"):
            assert {r["image"] for r in lines(file)} <= own
        if name != "test":
            assert len(lines(folder / f"made/{name}_sft.jsonl")) == len(own)
    references = lines(folder / "made/test_caption.jsonl")[0]["answer"]
    assert len(references) == 2  # all, though the records take the first


def test_answers_are_true_and_balanced(made):
    folder, _, truth = made
    records = lines(folder / "made/val_vqa.jsonl") + lines(folder / "made/test_vqa.jsonl")
    count = Counter()
    for record in records:
        found, question, answer = truth[record["image"]], asked(record), record["answer"]
        if record["kind"] == "exist":
            count[named(question), answer] += 1
            assert answer == ("yes" if named(question) in found else "no")
        elif record["kind"] == "count":
            boxes = found[named(question)]
            assert None not in boxes and answer == str(len(boxes))
        else:
            both = [name for name in found if f"the {name}" in question]
            a, b = (found[name] for name in both)
            assert len(a) == len(b) == 1 and None not in (*a, *b)
            assert answer == min(both, key=lambda name: found[name][0][0])
    assert {r["kind"] for r in records} == {"exist", "count", "left"}
    assert len(count) > 8
    for thing, _ in count:
        assert count[thing, "yes"] == count[thing, "no"], thing


def test_boxes_are_of_what_occurs_once_in_the_frame_of_stage_2(made):
    folder, _, truth = made
    records = lines(folder / "made/test_refer.jsonl")
    assert len(records) > 3
    for record in records:
        (box,) = truth[record["image"]][named(asked(record))]
        assert np.abs(np.subtract(record["answer"], box)).max() <= 1
        said = scorer.parse_box(record["conversations"][1]["value"])
        back = scorer.box_in_pixels(said, SIZE, "square", "pad")  # sft.py pads
        assert np.abs(np.subtract(back, box)).max() <= 1


def test_no_turn_gives_a_later_answer_away(made):
    folder, _, truth = made
    turns = 0
    for record in lines(folder / "made/train_sft.jsonl"):
        heard = set()
        for question, answer in zip(record["conversations"][::2], record["conversations"][1::2]):
            told = set(words(question["value"]))
            if {"is", "there"} <= told or "many" in told:
                name = named(question["value"])
                assert not heard & {*words(name), *words(plural(name))}, record
                turns += 1
            heard |= told | set(words(answer["value"]))
    assert turns > 40


def test_the_same_again(made, tmp_path):
    folder, flags, _ = made
    annotated(*flags, "--out", tmp_path / "coco.jsonl", "--conversations", tmp_path / "made")
    files = sorted(path.name for path in (folder / "made").iterdir())
    assert len(files) == 11 and files == sorted(p.name for p in (tmp_path / "made").iterdir())
    for name in files:
        assert (folder / "made" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()


def test_articles_and_plurals():
    assert [plural(n) for n in ("wine glass", "person", "skis", "bench", "dog")] == [
        "wine glasses", "people", "skis", "benches", "dogs"]
    assert [article(n) for n in ("apple", "dog", "skis")] == ["an apple", "a dog", "skis"]


def test_a_dry_run_draws_a_few_images_and_writes_nothing_else(made, tmp_path, capsys):
    _, flags, _ = made
    annotated(*flags, "--out", tmp_path / "coco.jsonl", "--dry-run", 3)
    said = capsys.readouterr().out
    assert "all 100 take about" in said and "look at" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "coco.dry-run.jsonl", "coco.dry-run.png"}
    images = {record["image"] for record in lines(tmp_path / "coco.dry-run.jsonl")}
    assert images == {"000.png", "033.png", "066.png"}


@pytest.mark.parametrize(("extra", "message"), [
    (["--to", "caption", "--conversations", "x"], "--conversations are made of --instances"),
    (["--to", "caption", "--dry-run", 2], "--dry-run draws regions"),
    (["--geometry", "pad"], "--geometry is read by"),
])
def test_flags_that_make_no_sense(made, tmp_path, extra, message):
    _, flags, _ = made
    with pytest.raises(runtime.InputError, match=message):
        annotated(*flags, "--out", tmp_path / "coco.jsonl", *extra)


def test_too_few_images_for_three_splits(tmp_path):
    flags, _ = write_coco(tmp_path, 9)
    with pytest.raises(runtime.InputError, match="9 images are too few"):
        annotated(*flags, "--out", tmp_path / "o.jsonl", "--conversations", tmp_path / "made")


@pytest.mark.skipif("COCO_SMALL" not in os.environ, reason="COCO_SMALL: COCO's files and images/")
def test_the_whole_way_on_photographs(tmp_path):
    """docs/own_data.sh, two steps: every command, and transformers answers as eval.py does."""
    script = Path(annotate.__file__).parent / "docs" / "own_data.sh"
    told = {"DATA": os.environ["COCO_SMALL"], "STEPS": "4", "OUT": str(tmp_path / "own")}
    environment = os.environ | told
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^# \d+ min \d+ s$", done.stdout, re.M)) == 8
    assert "20 of 20 answers are the same to the letter" in done.stdout
