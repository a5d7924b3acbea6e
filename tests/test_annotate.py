"""annotate.py and formats.py: masks are pycocotools' own, labels those of a count of pixels, every format arrives, what breaks is told."""
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import formats
import large_json
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import annotate
import data
import eval as scorer
import pretrain
from data import InputError
from model import PatchAlignedModel

ROOT = Path(annotate.__file__).parent


def coco_polygon(rings, size):
    """bool (height, width): pycocotools' mask of a polygon."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, size[1], size[0]))).astype(bool)


def counted_labels(masks, words, size, geometry, grid, threshold=4):
    """The words of each patch, counted in whole numbers: every pixel is cut into grid x grid pieces, so every patch has side^2 of them."""
    width, height = size
    side = max(size) if geometry == "pad" else min(size)
    labels = [[] for _ in range(grid * grid)]
    for mask, word in zip(masks, words):
        canvas = np.zeros((side, side), np.int64)
        if geometry == "pad":
            top, left = (side - height) // 2, (side - width) // 2
            canvas[top: top + height, left: left + width] = mask
        else:
            top, left = (height - side) // 2, (width - side) // 2
            canvas[:] = mask[top: top + side, left: left + side]
        rows = np.repeat(canvas, grid, 0).reshape(grid, side, side).sum(1)
        pieces = np.repeat(rows, grid, 1).reshape(grid, grid, side).sum(2)
        for i in np.flatnonzero(threshold * pieces.ravel() >= side * side):
            labels[i] += [w for w in word if w not in labels[i]]
    return labels


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def photo(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def convert(out, *flags):
    """annotate.py in this process -> its records and its problems."""
    annotate.main(annotate.runtime.parse(annotate.Args, "", ["--out", str(out), *map(str, flags)]))
    listing = Path(f"{out}.problems")
    return lines(out), listing.read_text().splitlines() if listing.exists() else []


# ------------------------------------------------------------------------------------------------------------------------- COCO


def coco_files(folder, count=3, size=(53, 41), seed=0):
    """COCO's three files about `count` random images: polygons of one and two rings, a crowd both ways; panoptic segments of the last two
    images and of one more; two captions each. -> the flags."""
    rng = np.random.default_rng(seed)
    width, height = size
    images = [{"id": 7 * i + 3, "file_name": f"{i}.jpg", "width": width, "height": height} for i in range(count)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "traffic light"}]
    annotations = []
    for i, image in enumerate(images):
        photo(folder / "images" / image["file_name"], size, i)
        blob = np.kron(rng.integers(0, 2, (5, 6)), np.ones((9, 9)))[:height, :width].astype(np.uint8)
        crowd = coco_mask.encode(np.asfortranarray(blob))
        counts = crowd["counts"].decode() if i % 2 else data.encode_rle(blob, compressed=False)["counts"]
        crowd = {"size": [height, width], "counts": counts}
        rings = [rng.uniform(0, [width, height], (n, 2)).round(2).ravel().tolist() for n in (3, 5, 8)]
        for segmentation, category in (([rings[0]], 1), ([rings[1], rings[2]], 18), (crowd, 1)):
            annotations.append({"id": len(annotations), "image_id": image["id"], "category_id": category, "segmentation": segmentation,
                                "bbox": [1, 2, 30, 20], "iscrowd": int(isinstance(segmentation, dict))})
    rng.shuffle(annotations)                                    # COCO's are in no order either
    stuff = [{"id": 1, "name": "person", "isthing": 1}, {"id": 187, "name": "sky-other-merged", "isthing": 0},
             {"id": 175, "name": "wall-brick", "isthing": 0}]
    panoptic = [dict(image) for image in images[-2:]] + [{"id": 1000, "file_name": "only.jpg", "width": width, "height": height}]
    photo(folder / "images" / "only.jpg", size)
    segments = []
    for image in panoptic:
        ids = np.kron(rng.integers(0, 4, (5, 6)), np.ones((9, 9)))[:height, :width].astype(int)
        ids = np.int64([0, 5, 70000, 300])[ids]                 # 0: nothing
        (folder / "panoptic").mkdir(exist_ok=True)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colours).save(folder / "panoptic" / f"{image['id']}.png")
        segments.append({"image_id": image["id"], "file_name": f"{image['id']}.png", "segments_info": [
            {"id": 5, "category_id": 1}, {"id": 70000, "category_id": 187}, {"id": 300, "category_id": 175}]})
    told = [{"id": i, "image_id": image["id"], "caption": f"caption {i // 2}.{i % 2} é"} for i, image in
            enumerate(image for image in images for _ in range(2))]
    for name, content in (("instances", {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}),
                          ("panoptic", {"categories": stuff, "annotations": segments, "images": panoptic}),
                          ("captions", {"annotations": told, "images": images})):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return ["--from", "coco", "--image-dir", folder / "images", *(f for n in ("instances", "panoptic", "captions")
                                                                 for f in (f"--{n}", folder / f"{n}.json"))]


def test_an_image_has_the_size_that_training_gives_it(tmp_path):
    """Whatever its EXIF orientation, also one that does not exist."""
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
        assert formats.image_size(tmp_path / "a.jpg", "") == data.open_image(tmp_path / "a.jpg", "").size, orientation


def test_polygons_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for i in range(600):
        size = rng.integers(3, 50, 2).tolist()
        rings = [rng.uniform(-8, 60, (rng.integers(3, 9), 2)).round(rng.integers(0, 3)) for _ in range(1 + i % 3 // 2)]
        rings = [np.repeat(ring, 1 + i % 2, 0).ravel().tolist() for ring in rings]                  # every other one with points twice
        assert (data.decode_rle(formats.polygon_rle(rings, size)) == coco_polygon(rings, size)).all(), (rings, size)


def test_coco_masks_and_patch_labels_equal_pycocotools_and_a_count_of_pixels(tmp_path):
    flags, size = coco_files(tmp_path), (53, 41)
    records, problems = convert(tmp_path / "out.jsonl", *flags, "--captions-per-image", 0)
    assert not problems
    assert [r["id"] for r in records] == ["3_0", "3_1", "10_0", "10_1", "17_0", "17_1", "1000"]
    assert records[3]["conversations"][1]["value"] == "caption 1.1 é" and records[3]["image"] == "1.jpg"
    assert records[6]["conversations"][1]["value"] == "person, sky, wall brick"                         # no caption: its phrases
    source, panoptic = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("instances", "panoptic"))
    for record in records[::2]:
        own, key = [], int(record["id"].split("_")[0])
        for a in (a for a in source["annotations"] if a["image_id"] == key):
            s = a["segmentation"]
            mask = coco_polygon(s, size) if isinstance(s, list) else coco_mask.decode(
                s if isinstance(s["counts"], str) else coco_mask.frPyObjects(s, size[1], size[0]))
            own.append((mask.astype(bool), {1: ["person"], 18: ["traffic", "light"]}[a["category_id"]]))
        for a in (a for a in panoptic["annotations"] if a["image_id"] == key):
            r, g, b = np.asarray(Image.open(tmp_path / "panoptic" / a["file_name"]), int).transpose(2, 0, 1)
            things = [] if own else [(5, ["person"])]           # else the instances are the things
            own += [(r + 256 * g + 65536 * b == i, words) for i, words in [*things, (70000, ["sky"]), (300, ["wall", "brick"])]]
        masks = [data.region_mask(r, size, "") for r in record["regions"]]
        assert len(masks) == len(own) and all((ours == mask).all() for ours, (mask, _) in zip(masks, own))
        for geometry in ("pad", "crop"):
            for grid in (16, 24):
                labels = data.patch_words(record["regions"], size, geometry, (grid, grid))
                assert labels == counted_labels(*zip(*own), size, geometry, grid)


@pytest.mark.skipif("COCO_SMALL" not in os.environ, reason="COCO_SMALL: a folder of COCO's files, images/ and panoptic/")
def test_real_coco_masks_and_patch_labels(tmp_path):
    folder = Path(os.environ["COCO_SMALL"])
    records, problems = convert(tmp_path / "out.jsonl", "--from", "coco", "--instances", folder / "instances.json", "--image-dir",
                                folder / "images", "--panoptic", folder / "panoptic.json", "--panoptic-dir", folder / "panoptic")
    assert not problems
    source, panoptic = (json.loads((folder / f"{n}.json").read_text()) for n in ("instances", "panoptic"))
    names = {c["id"]: formats.category_phrase(c["name"]) for c in source["categories"] + panoptic["categories"]}
    checked = 0
    for record in records:
        size, own = Image.open(folder / "images" / record["image"]).size, []
        for a in (a for a in source["annotations"] if str(a["image_id"]) == record["id"]):
            s = a["segmentation"]
            mask = coco_polygon(s, size) if isinstance(s, list) else coco_mask.decode(coco_mask.frPyObjects(s, size[1], size[0]))
            own.append((mask.astype(bool), data.content_words(names[a["category_id"]])))
        for a in (a for a in panoptic["annotations"] if str(a["image_id"]) == record["id"] and not own):
            r, g, b = np.asarray(Image.open(folder / "panoptic" / a["file_name"]), int).transpose(2, 0, 1)
            own += [(r + 256 * g + 65536 * b == s["id"], data.content_words(names[s["category_id"]])) for s in a["segments_info"]]
        masks = [data.region_mask(r, size, "") for r in record["regions"]]
        assert len(masks) == len(own) and all((ours == mask).all() for ours, (mask, _) in zip(masks, own))
        checked += len(masks)
        for geometry, grid in (("pad", 16), ("crop", 24), ("crop", 16), ("pad", 24)):
            assert data.patch_words(record["regions"], size, geometry, (grid, grid)) == counted_labels(*zip(*own), size, geometry, grid)
    assert checked > 500


# ----------------------------------------------------------------------------------------------------------------------- other formats


def flickr_files(folder, size=(60, 40)):
    photo(folder / "images" / "11_ab.jpg", size)
    (folder / "images" / "11.json").write_text("{}")            # no image
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir()
    (folder / "Sentences" / "11.txt").write_text(
        "[/EN#5/people Two men ] hold [/EN#6/other a red ball] in [/EN#7/scene/other a park] .\n"
        "[/EN#0/notvisual It] is [/EN#6/other the ball] of [/EN#8/people a man] and [/EN#9/people a man] .\n")
    items = [([5, 8], (1, 1, 20, 30)), ([5, 9], (31, 2, 60, 40)), ([6], (10, 10, 14, 15)), ([7], None)]     # 7 is a scene
    xml = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for names, box in items:
        corners = box and "".join(f"<{k}>{n}</{k}>" for k, n in zip(("xmin", "ymin", "xmax", "ymax"), box))
        xml += "<object>" + "".join(f"<name>{n}</name>" for n in names)
        xml += (f"<bndbox>{corners}</bndbox>" if box else "<scene>1</scene>") + "</object>"
    (folder / "Annotations" / "11.xml").write_text(xml + "</annotation>")
    return ["--from", "flickr30k", "--data", folder, "--image-dir", folder / "images"]


def test_flickr30k_entities_to_records_and_to_referring_expressions(tmp_path, capsys):
    flags = flickr_files(tmp_path)
    (record,), problems = convert(tmp_path / "out.jsonl", *flags)
    assert not problems
    assert record["conversations"][1]["value"] == "Two men hold a red ball in a park ."
    assert [(r["phrase"], r["bbox"]) for r in record["regions"]] == [
        ("two men", [0, 0, 20, 30]), ("two men", [30, 1, 60, 40]), ("a red ball", [9, 9, 14, 15]), ("the ball", [9, 9, 14, 15]),
        ("a man", [0, 0, 20, 30]), ("a man", [30, 1, 60, 40])]  # counted from 1, the last pixel included
    (red, ball), problems = convert(tmp_path / "refer.jsonl", *flags, "--to", "refer", "--request", "Where is {}?")
    assert (red["answer"], red["conversations"][0]["value"], ball["conversations"][0]["value"]) == (
        [9, 9, 14, 15], "<image>\nWhere is a red ball?", "<image>\nWhere is the ball?")              # "a man": two; "two men": two boxes
    assert len(scorer.read_items([tmp_path / "refer.jsonl"], tmp_path / "images", 0)) == 2
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f"next: python eval.py runs/sft/ckpt.pt --data {tmp_path / 'refer.jsonl'} --image-dir {tmp_path / 'images'}")
    xml, text = tmp_path / "Annotations" / "11.xml", tmp_path / "Sentences" / "11.txt"
    whole = text.read_text(), xml.read_text()
    text.write_text(whole[0] + "[/EN#7/scene The ball] and [/EN#8/people one of them] .\n")             # "the ball": 6, or 7, a scene
    xml.write_text(whole[1].replace("<xmax>60<", "<xmax>600<"))                                          # so 8 has one box left of two
    records, problems = convert(tmp_path / "unsure.jsonl", *flags, "--to", "refer")
    assert [r["conversations"][0]["value"].split(": ")[1] for r in records] == ["a red ball", "one of them"] and len(problems) == 1
    text.write_text(whole[0])
    xml.write_text(whole[1])
    photo(tmp_path / "images" / "11_ab.jpg", (120, 20))
    with pytest.raises(InputError, match="no record could be made of 1 images: .*is 120 x 20 pixels, but its annotation says 60 x 40"):
        convert(tmp_path / "b.jsonl", *flags)
    assert [path.name for path in tmp_path.glob("b.*")] == ["b.jsonl.problems"]
    assert convert(tmp_path / "c.jsonl", *flags, "--resized")[0][0]["regions"][2]["bbox"] == [18, 4.5, 28, 7.5]
    xml.write_text(whole[1].replace("<width>60<", "<width>0<"))
    with pytest.raises(InputError, match="ZeroDivisionError"):
        convert(tmp_path / "d.jsonl", *flags, "--resized")


def test_grandf_in_its_three_forms(tmp_path):
    size, ring = (50, 40), [5, 5, 30, 8, 20, 35]
    photo(tmp_path / "images" / "a.jpg", size)
    mask = coco_polygon([ring], size)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    forms = {
        "psg": [{"file_name": "a.jpg", "image_id": "9", "caption": '"A dog on grass."', "groundings": {
            "grass": {"token_positives": [9, 14]}, "A dog": {"token_positives": [0, 5], "rle_masks": [rle, rle]}}}],
        "refcocog": [{"9": {"img_file_name": "a.jpg", "caption": '"A dog on grass."', "refs": [
            {"segmentation": [ring]}, {"sentence": "A dog", "segmentation": [ring]}]}}],
        "flickr": {"images": [{"id": 9, "file_name": "a.jpg", "width": 50, "height": 40, "caption": "A dog on grass."}], "annotations": [
            {"id": 0, "image_id": 9, "tokens_positive": [], "sam_mask": rle},
            {"id": 1, "image_id": 9, "tokens_positive": [[0, 5]], "sam_mask": rle, "bbox": [0, 0, 5, 5]}]}}
    for name, content in forms.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (record,), problems = convert(tmp_path / f"{name}.jsonl", "--from", "grandf", "--data", tmp_path / f"{name}.json",
                                      "--image-dir", tmp_path / "images")
        assert record["conversations"][1]["value"] == "A dog on grass." and record["id"] == "9", name
        assert len(problems) == 1 and "not of the expected form" in problems[0], problems               # the malformed one, alone
        assert len(record["regions"]) == (2 if name == "psg" else 1)
        assert all(r["phrase"] == "A dog" and (data.region_mask(r, size, "") == mask).all() for r in record["regions"])


def test_refcoco_to_records_and_to_referring_expressions(tmp_path):
    coco_files(tmp_path)
    refs = [{"ref_id": i, "ann_id": a, "image_id": image, "split": split, "file_name": "x.jpg", "category_id": 1,
             "sentences": [{"sent": text, "tokens": text.split()} for text in texts]}
            for i, (a, image, split, texts) in enumerate([
                (0, 3, "train", ["left guy", "man"]), (1, 3, "val", ["light"]), (4, 10, "val", ["señal"])])]
    unicode, bytes_ = (letter + b"\x06\0\0\0" + "señal".encode() for letter in (b"X", b"T"))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2).replace(unicode, bytes_))     # as Python 2 wrote its texts
    flags = ["--from", "refcoco", "--data", tmp_path / "refs(unc).p", "--instances", tmp_path / "instances.json",
             "--image-dir", tmp_path / "images"]
    records, problems = convert(tmp_path / "out.jsonl", *flags, "--captions", tmp_path / "captions.json")
    assert not problems and [[r["phrase"] for r in record["regions"]] for record in records] == [["left guy", "man", "light"], ["señal"]]
    assert records[0]["conversations"][1]["value"] == "caption 0.0 é"
    rings = {a["id"]: a["segmentation"] for a in json.loads((tmp_path / "instances.json").read_text())["annotations"]}
    assert (data.region_mask(records[0]["regions"][1], (53, 41), "") == coco_polygon(rings[0], (53, 41))).all()
    convert(tmp_path / "val.jsonl", *flags, "--to", "refer", "--split", "val")
    items = scorer.read_items([tmp_path / "val.jsonl"], tmp_path / "images", 0)
    assert [item["answer"] for item in items] == [[1, 2, 31, 22]] * 2
    assert items[1]["conversations"][0]["value"].endswith("sentence describes: señal")
    with pytest.raises(InputError, match="--split test: .* has train .1., val .2."):
        convert(tmp_path / "test.jsonl", *flags, "--split", "test")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(InputError, match="mkdir"):
        convert(tmp_path / "evil.jsonl", *flags)
    assert not (tmp_path / "evil").exists()


def test_llava_records_stay_as_they_are(tmp_path):
    photo(tmp_path / "a.png", (20, 10))
    good = {"id": 1, "image": "a.png", "extra": [1], "conversations": [{"from": "human", "value": "é?"}, {"from": "gpt", "value": "x"}],
            "regions": [{"phrase": "x", "bbox": [0, 0, 5, 5]}]}
    bad = good | {"id": 2, "regions": [{"phrase": "x", "bbox": [0, 0, 50, 5]}, *good["regions"]]}
    records = [good, {"id": 0, "conversations": good["conversations"]}, bad, good | {"image": "b.png"}]
    records += [good | {"id": 4, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": None}]},
                good | {"id": 5, "conversations": good["conversations"][:1]}, good | {"id": 6, "image": None}]
    (tmp_path / "in.json").write_text(json.dumps(records))
    (tmp_path / "in.jsonl").write_text("\ufeff" + "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")      # with a mark
    for name in ("in.json", "in.jsonl"):
        made, problems = convert(tmp_path / f"{name}.out.jsonl", "--from", "llava", "--data", tmp_path / name, "--image-dir", tmp_path)
        assert made == [good, records[1], good | {"id": 2}]
        assert len(problems) == 5 and all(words in own for words, own in zip(
            ("outside its 20 x 10 image", "b.png", "record 4: turn 1 is not", "record 5: the last turn is the human's",
             'record 6: "image" is missing'), problems)), problems


# --------------------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_counted_and_listed_and_costs_nothing_else(tmp_path):
    flags = coco_files(tmp_path, count=9)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"].sort(key=lambda a: a["id"])
    annotations, height = content["annotations"], 41
    annotations[0]["segmentation"] = {"size": [height, 52], "counts": [height * 52]}
    annotations[1]["segmentation"] = [[0, 0, 1e12, 0, 5, 5]]
    annotations[3]["segmentation"] = {"size": [height, 53], "counts": [7]}
    annotations[6]["segmentation"] = [[1, 2, 3, 4]]
    annotations[9] |= {"segmentation": [], "bbox": [20, 5, -4, 9]}
    annotations[12]["category_id"] = 99
    annotations[15]["segmentation"] = [[1, 2, 3, 4, 5, 6, "x"]]
    annotations[18]["image_id"] = 12345
    (tmp_path / "images" / "8.jpg").unlink()
    photo(tmp_path / "images" / "7.jpg", (41, 53))
    (tmp_path / "images" / "6.jpg").write_bytes((tmp_path / "images" / "6.jpg").read_bytes()[:900])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    told = json.loads((tmp_path / "captions.json").read_text())
    told["annotations"][0]["caption"] = 5
    told["annotations"].append({"caption": "of no image"})
    told["images"] += [told["images"][0], told["images"][1] | {"id": str(told["images"][1]["id"])}]     # twice; as a text: the same
    (tmp_path / "captions.json").write_text(json.dumps(told))
    (tmp_path / "panoptic" / "1000.png").unlink()
    records, problems = convert(tmp_path / "out.jsonl", *flags)
    assert problems[1:4] == [f"{tmp_path / 'captions.json'}: {words}" for words in (
        '1 of annotations have no "image_id"', "image 3 occurs 2 times; the first one counts",
        "image 10 occurs 2 times; the first one counts")]
    del problems[1:4]
    assert [len(r.get("regions", [])) for r in records] == [1, 2, 2, 2, 2, 2]
    assert [r["id"] for r in records] == ["3", "10", "17", "24", "31", "38"]
    assert records[0]["conversations"][1]["value"] == "caption 0.1 é"
    for i, words in enumerate((
            "1 annotations of image 12345", "rle size [41, 52] is not the image's", "far outside of its 53 x 41", "caption 5: not of",
            "rle counts add up to 7", "at least 3 points", "bbox [20, 5, 16, 14] is not",
            "category_id 99 is not among", "not a list of finite numbers", "cannot read the image",
            "is 41 x 53 pixels, but its annotation says 53 x 41", "No such file", "1000.png", "image 1000: has no caption and no region")):
        assert words in problems[i], (words, problems[i])
    assert len(problems) == 14


@pytest.mark.parametrize("form", ["coco", "flickr30k", "flickr30k refer", "grandf", "refcoco", "refcoco refer"])
def test_a_region_without_a_phrase_is_listed_since_training_refuses_it(tmp_path, form):
    if "flickr" in form:
        flags, file = flickr_files(tmp_path), tmp_path / "Sentences" / "11.txt"
        file.write_text(file.read_text().replace("a red ball", ""))
    else:
        flags, file = coco_files(tmp_path, count=1), tmp_path / "instances.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = " " if form == "coco" else "person"
        file.write_text(json.dumps(content))
    if form == "coco":
        flags = ["--from", "coco", "--instances", file, "--image-dir", tmp_path / "images"]
    if "refcoco" in form:
        refs = [{"ann_id": 0, "image_id": 3, "split": "val", "sentences": [{"sent": ""}, {"sent": "man"}]}]
        (tmp_path / "refs.p").write_bytes(pickle.dumps(refs))
        flags = ["--from", "refcoco", "--data", tmp_path / "refs.p", "--instances", file, "--image-dir", tmp_path / "images"]
    if form == "grandf":
        shape = {"segmentation": [[1, 1, 30, 1, 1, 30]]}
        (tmp_path / "g.json").write_text(json.dumps([{"9": {
            "img_file_name": "0.jpg", "caption": "A dog", "refs": [shape | {"sentence": text} for text in (" ", None, "A dog")]}}]))
        flags = ["--from", "grandf", "--data", tmp_path / "g.json", "--image-dir", tmp_path / "images"]
    records, problems = convert(tmp_path / "out.jsonl", *flags, *(["--to", "refer"] if "refer" in form else []))
    assert problems and all('"phrase" is missing, empty' in line for line in problems)
    regions = [region for record in records for region in record.get("regions", [])]
    assert records and all(data.region_phrase(region, form) for region in regions)
    assert not any(turn["value"].endswith((" ", ", ")) or turn["value"].startswith(",") for r in records for turn in r["conversations"])


def test_text_that_is_not_unicode_costs_its_record(tmp_path):
    """Half of an emoji, as JSON can hold it, in a caption, in the name of a file and in an id; the name of a file in Latin-1."""
    photo(tmp_path / "a.png", (20, 10))
    shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xe9.png")
    told = [("a.png", "whole \U0001f600"), ("a.png", "cut \ud83d"), ("\udce9.png", "x"), ("\ud83d.png", "x"), ("a.png", "é")]
    (tmp_path / "in.json").write_text(json.dumps([
        {"id": i, "image": image, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]}
        for i, (image, text) in enumerate(told)]))
    made, problems = convert(tmp_path / "out.jsonl", "--from", "llava", "--data", tmp_path / "in.json", "--image-dir", tmp_path)
    assert [(r["id"], r["conversations"][1]["value"]) for r in made] == [(0, told[0][1]), (4, "é")]
    assert len(problems) == 3 and all(words in own for words, own in zip(
        ("record 1: a text or file name is not Unicode", "record 2: a text", "record 3: cannot read the image"), problems)), problems
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [
        {"image_id": 1, "caption": "x"}, {"image_id": "\ud83d", "caption": "y"}]}))
    made, problems = convert(tmp_path / "coco.jsonl", "--from", "coco", "--captions", tmp_path / "c.json", "--image-dir", tmp_path)
    assert len(made) == 1 and "1 annotations of image ?, which is not" in problems[0]


@pytest.mark.parametrize("content, message", [
    (b'{"images": [{"id": 1, "file_name": "\xff"}]}', "not UTF-8 text"), (b'{"images": [{"id": 1}', "not valid JSON"),
    (b'{"images": [{"id": 1} {"id": 2}]}', "not valid JSON"), (b'[{"id": 1}]', "no list 'images'"), (b"", "not valid JSON"),
    (b'{"images": [{"ID": 1}], "annotations": []}', 'has no "id"'), (b'{"images": [12', "not valid JSON"),
    (b'{"images": [], "annotations": []} {}', "more at byte 34"), (b'{"x": ' + b"[" * 10**5, "nested too deep"),
    (b'{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', 'no "caption"; is this COCO')])
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, run, content, message):
    (tmp_path / "c.json").write_bytes(content)
    (tmp_path / "images").mkdir()
    done = run("annotate.py", "--from", "coco", "--captions", tmp_path / "c.json", "--image-dir", tmp_path / "images",
               "--out", tmp_path / "o.jsonl")
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "c.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--from", "llava", "--data", "x.json", "--split", "val"], "--split is not read by --from llava"),
    (["--from", "coco"], "needs one or more"), (["--from", "flickr30k", "--data", "."], "Sentences"), ([], "--from says"),
    (["--inspect", "1", "--grid", "3"], "--grid 3"), (["--from", "refcoco"], "needs --data"),
    (["--from", "refcoco", "--to", "refer", "--inspect", "1"], "--inspect draws regions"),
    (["--inspect", "1", "--pool", "3"], "--pool is not read without --vision"),
    (["--inspect", "1", "--vision", "x", "--grid", "3", "3"], "--grid is not read with --vision"),
    (["--from", "llava", "--data", "x.json", "--geometry", "pad"], "--geometry is read by --inspect alone"),
    (["--from", "grandf"], "needs --data"), (["--from", "llava", "--data", "/"], "needs --data"),
    (["--inspect", "1", "--vision", str(ROOT / "backbones" / "toy-llama")], "has no patches"), (["--inspect", "1", "--llm", "x"], "--llm")])
def test_flags_that_make_no_sense_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "out.jsonl", "--image-dir", tmp_path, *flags)


def test_large_files_are_read_by_position(tmp_path, monkeypatch):
    """scan_json, with pieces of a few bytes, sees what json.load sees; positions lead back to it, whatever the text."""
    rng = random.Random(0)
    values = ["é\\\"]}", -12.5e3, [1, {}], None, "漢字"]
    content = {"a": 1.5, "é": {"x": [[]]}, "b": [{"id": rng.choice([1, 2, "é漢"]), "v": rng.choice(values)} for _ in range(60)],
               "numbers": [1, 23, 456.5, -7], "empty": []}
    reader = open

    class Pieces(io.BytesIO):
        def read(self, size):
            return super().read(rng.randint(1, 9))

    path = tmp_path / "x.json"
    for ascii_only, indent in ((True, None), (False, 2)):
        path.write_text(("" if ascii_only else "\ufeff") + json.dumps(content, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
        monkeypatch.setattr("builtins.open", lambda p, *m: Pieces(path.read_bytes()) if p is path and m == ("rb",) else reader(p, *m))
        lists = set()
        found = list(large_json.scan_json(path, lists))
        monkeypatch.undo()
        raw = path.read_bytes()
        assert [(name, element, json.loads(raw[start:end])) for name, element, start, end in found] == [
            (name, v, v) for name in ("b", "numbers") for v in content[name]]
        assert lists == {"b", "numbers", "empty"}
        objects = large_json.Objects(str(path), {"b": "id"}, "a test")
        assert list(objects.spans["b"]) == list(dict.fromkeys(str(v["id"]) for v in content["b"]))
        assert objects.get("b", "é漢") == [v for v in content["b"] if v["id"] == "é漢"] and objects.get("b", 4) == []


# ----------------------------------------------------------------------------------------------------------------------- parts and resuming


def test_images_in_no_part_are_told_and_nothing_is_written(tmp_path):
    """As on several machines that do not share the folder."""
    (tmp_path / "out.jsonl.rank-0").write_text('{}\n[0, [{"id": 1}], []]\n')
    with pytest.raises(InputError, match="1 images are in no part; --out must lie in a folder that all machines share"):
        annotate.merge(formats.Source(2, None), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.rank-0"]


def test_two_processes_write_what_one_writes(tmp_path, run):
    flags = coco_files(tmp_path, count=150)
    (tmp_path / "images" / "70.jpg").unlink()
    for name, processes in (("one", 0), ("two", 2)):
        done = run("annotate.py", *flags, "--out", tmp_path / f"{name}.jsonl", processes=processes)
        assert done.returncode == 0, done.stderr
        assert "150 records of 151 images; 1 problems" in done.stdout
    for ending in ("jsonl", "jsonl.problems"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    assert not list(tmp_path.glob("*rank*"))


KILL =
"""
import os, signal, sys
import annotate, formats, runtime
name, after = sys.argv[1], int(sys.argv[2])
module, attribute = {"image": (formats, "image_size"), "rename": (os, "replace"), "delete": (annotate.Path, "unlink")}[name]
real, calls = getattr(module, attribute), []
def dying(*arguments, **options):
    calls.append(arguments)
    if len(calls) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(module, attribute, dying)
runtime.run(annotate.main, annotate.Args, "", annotate.InputError) if sys.argv.pop(1) and sys.argv.pop(1) else None
"""


def test_killed_and_resumed_is_as_if_uninterrupted(tmp_path):
    """SIGKILL while converting (twice: a line is torn, then again), before OUT is renamed, and while parts are deleted; each time with the
    same command again."""
    flags = [*coco_files(tmp_path, count=150), "--out"]
    (tmp_path / "images" / "70.jpg").unlink()

    def start(out, *killed):
        command = [sys.executable, *(["-c", KILL, *map(str, killed)] if killed else ["annotate.py"]), *map(str, flags), str(out)]
        return subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)

    assert start(tmp_path / "whole.jsonl").returncode == 0
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.rank-0"
    assert start(out, "image", 75).returncode == -9
    written = part.read_bytes()
    assert 64 <= written.count(b"\n") < 80
    part.write_bytes(written[:-20])                             # the last line is torn
    assert start(out, "image", 80).returncode == -9              # the torn batch again, the next one, half of a third
    assert part.read_bytes().startswith(written[: written.rindex(b"\n", 0, -20) + 1]) and 96 <= part.read_bytes().count(b"\n") < 130
    assert start(out, "rename", 0).returncode == -9 and not out.exists()
    assert start(out, "delete", 1).returncode == -9 and out.exists() and part.exists()
    done = start(out)
    assert done.returncode == 0, done.stderr
    for ending in ("", ".problems"):
        assert Path(f"{out}{ending}").read_bytes() == Path(f"{tmp_path / 'whole.jsonl'}{ending}").read_bytes()
    assert not part.exists()
    done = start(out)
    assert done.returncode == 2 and "exists; delete it" in done.stderr


def test_parts_of_other_flags_are_refused(tmp_path):
    flags = coco_files(tmp_path)
    (tmp_path / "out.jsonl.rank-3").write_text('{"from_": "llava"}\n')
    with pytest.raises(InputError, match="rank-3 is left of a run with other flags"):
        convert(tmp_path / "out.jsonl", *flags)


# --------------------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_labels_that_training_sees(tmp_path, capsys, world):
    size = (40, 20)
    photo(tmp_path / "a.png", size)
    Image.new("RGB", size, (0, 0, 0)).save(tmp_path / "a.png")
    record = {"id": 1, "image": "a.png", "conversations": [], "regions": [
        {"phrase": "a dog", "bbox": [10, 0, 20, 20]}, {"phrase": "brown dogs", "bbox": [10, 0, 30, 10]}]}
    others = [record | {"id": 2, "regions": []}, record | {"id": 3, "image": "b.png"}, 5, record | {"id": 4, "regions": ["x"]}]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (record, *others)))
    annotate.main(annotate.runtime.parse(annotate.Args, "", [
        "--inspect", "3", "--out", str(tmp_path / "out.jsonl"), "--image-dir", str(tmp_path), "--grid", "2", "2",
        "--llm", str(ROOT / "backbones" / "toy-llama")]))
    said = capsys.readouterr().out
    assert "5 records, 2 of them with regions; 2 images; 4 regions" in said and "3 records cannot be used: " in said and "b.png" in said
    assert "2 x 2, crop, coverage 0.25: 75.0% labelled, with 2.00 words each" in said            # dog + brown dogs, brown dogs, dog, none
    assert "dog 2, brown 2, dogs 2" in said and "words are not one token" in said
    assert said.splitlines()[-1] == (
        f"wrote {tmp_path / 'out.png'}; next: python pretrain.py --data {tmp_path / 'out.jsonl'} --image-dir {tmp_path}"
        f" --llm {ROOT / 'backbones' / 'toy-llama'}")
    picture, left = np.asarray(Image.open(tmp_path / "out.png")), annotate.SIDE + annotate.LEGEND
    shown = [tuple(picture[y, left + x]) for y in (100, 330) for x in (150, 380)]
    colours = [tuple(int(0.55 * n) for n in colour) for colour in (*annotate.COLOURS[:3], (0, 0, 0))]
    assert shown == [colours[i] for i in (2, 1, 0, 3)]          # both, "brown dogs" and "a dog" as in the image beside it, none
    assert tuple(picture[15, 15]) == colours[0] and tuple(picture[5, 25]) == colours[1]


@pytest.mark.parametrize("size, flags, grid", [
    ([36, 96], [], (3, 8)), ([96, 36], ["--geometry", "pad"], (8, 3)), ([96, 96], ["--image-size", "48"], (4, 4)),
    ([60, 96], ["--projector", "c_abstractor", "--pool", "3", "--geometry", "stretch"], (2, 3))])
def test_inspect_takes_the_flags_of_training_for_the_same_labels(tmp_path, monkeypatch, size, flags, grid):
    """The labels of the summary, those drawn and those of a training sample, where the input is no square, of another size or pooled."""
    shutil.copytree(ROOT / "backbones" / "toy-clip", tmp_path / "vision", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "vision" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_size": dict(zip(("height", "width"), size))}))
    photo(tmp_path / "a.png", (50, 40))
    record = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a dog"}], "regions": [
        {"phrase": "a dog", "bbox": [3, 2, 21, 29]}, {"phrase": "brown cat", "bbox": [14, 16, 43, 37]}]}
    (tmp_path / "out.jsonl").write_text(json.dumps(record) + "\n")
    labels, rule = [], data.patch_words
    monkeypatch.setattr(data, "patch_words", lambda *given: labels.append(rule(*given)) or labels[-1])
    flags = ["--vision", str(tmp_path / "vision"), *flags]
    annotate.main(annotate.runtime.parse(annotate.Args, "", [
        "--inspect", "1", "--out", str(tmp_path / "out.jsonl"), "--image-dir", str(tmp_path), *flags]))
    args = annotate.runtime.parse(pretrain.Args, "", flags)
    model = PatchAlignedModel({name: getattr(args, name) for name in pretrain.CONFIG}, weights=False)
    model.records(str(tmp_path / "out.jsonl"), str(tmp_path))[0]
    assert model.grid == grid and len(labels) == 3 and labels[0] == labels[1] == labels[2] != [[]] * (grid[0] * grid[1])
