"""annotate.py and its readers.

Masks are pycocotools' own, labels those of a count of pixels, every format arrives, what breaks is
told, and an interrupted run ends as if it had not been interrupted.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import annotate
import data
import eval as scorer
import labels
import pretrain
import runtime
from annotations import Source, coco, image_files, picture
from model import PatchAlignedModel
from runtime import InputError

ROOT = Path(annotate.__file__).parent


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def photo(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def annotated(*flags):
    """annotate.py in this process."""
    annotate.main(runtime.parse(annotate.Args, "", list(map(str, flags))))


def convert(out, *flags):
    """The same -> its records and its problems."""
    annotated("--out", out, *flags)
    listing = Path(f"{out}.problems")
    return lines(out), listing.read_text().splitlines() if listing.exists() else []


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def told(record, turn=1):
    return record["conversations"][turn]["value"]


# ---- COCO ----------------------------------------------------------------------------------------


def coco_polygon(rings, size):
    """bool (height, width): pycocotools' mask of a polygon."""
    rle = coco_mask.merge(coco_mask.frPyObjects(rings, size[1], size[0]))
    return coco_mask.decode(rle).astype(bool)


def coco_shape(shape, size):
    """The same of what an annotation has."""
    if isinstance(shape, list):
        return coco_polygon(shape, size)
    packed = isinstance(shape["counts"], str)
    rle = shape if packed else coco_mask.frPyObjects(shape, size[1], size[0])
    return coco_mask.decode(rle).astype(bool)


def counted_labels(masks, words, size, geometry, grid, threshold=4):
    """The words of each patch, counted in whole numbers.

    Every pixel is cut into grid x grid pieces, so every patch has side^2 of them.
    """
    width, height = size
    side = max(size) if geometry == "pad" else min(size)
    found = [[] for _ in range(grid * grid)]
    for mask, word in zip(masks, words):
        canvas = np.zeros((side, side), np.int64)
        if geometry == "pad":
            top, left = (side - height) // 2, (side - width) // 2
            canvas[top : top + height, left : left + width] = mask
        else:
            top, left = (height - side) // 2, (width - side) // 2
            canvas[:] = mask[top : top + side, left : left + side]
        rows = np.repeat(canvas, grid, 0).reshape(grid, side, side).sum(1)
        pieces = np.repeat(rows, grid, 1).reshape(grid, grid, side).sum(2)
        for i in np.flatnonzero(threshold * pieces.ravel() >= side * side):
            found[i] += [w for w in word if w not in found[i]]
    return found


def coco_flags(folder, *names):
    given = (part for name in names for part in (f"--{name}", folder / f"{name}.json"))
    return ["--from", "coco", "--image-dir", folder / "images", *given]


def coco_files(folder, count=3, size=(53, 41), seed=0):
    """COCO's three files about `count` random images -> the flags.

    Polygons of one and two rings, a crowd both ways; panoptic segments of the last two images and
    of one more; two captions each.
    """
    rng, (width, height) = np.random.default_rng(seed), size

    def blobs(count):
        return np.kron(rng.integers(0, count, (5, 6)), np.ones((9, 9)))[:height, :width]

    images = [
        {"id": 7 * i + 3, "file_name": f"{i}.jpg", "width": width, "height": height}
        for i in range(count)
    ]
    annotations, segments = [], []
    for i, image in enumerate(images):
        photo(folder / "images" / image["file_name"], size, i)
        blob = blobs(2).astype(np.uint8)
        crowd = {"size": [height, width], "counts": labels.encode_rle(blob, False)["counts"]}
        if i % 2:
            crowd["counts"] = coco_mask.encode(np.asfortranarray(blob))["counts"].decode()
        rings = [
            rng.uniform(0, [width, height], (n, 2)).round(2).ravel().tolist() for n in (3, 5, 8)
        ]
        for shape, category in (([rings[0]], 1), ([rings[1], rings[2]], 18), (crowd, 1)):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "segmentation": shape,
                    "bbox": [1, 2, 30, 20],
                    "iscrowd": int(shape is crowd),
                }
            )
    rng.shuffle(annotations)  # COCO's are in no order either

    only = {"id": 1000, "file_name": "only.jpg", "width": width, "height": height}
    photo(folder / "images" / "only.jpg", size)
    (folder / "panoptic").mkdir()
    for image in (*images[-2:], only):
        ids = np.int64([0, 5, 70000, 300])[blobs(4).astype(int)]  # 0: nothing
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        name = f"{image['id']}.png"
        Image.fromarray(colours).save(folder / "panoptic" / name)
        segments.append(
            {
                "image_id": image["id"],
                "file_name": name,
                "segments_info": [
                    {"id": own, "category_id": category}
                    for own, category in ((5, 1), (70000, 187), (300, 175))
                ],
            }
        )
    captions = [
        {"id": 2 * i + k, "image_id": image["id"], "caption": f"caption {i}.{k} é"}
        for i, image in enumerate(images)
        for k in (0, 1)
    ]
    for name, content in {
        "instances": {
            "info": {"year": 2017},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "traffic light"}],
        },
        "panoptic": {
            "annotations": segments,
            "images": [*images[-2:], only],
            "categories": [
                {"id": 1, "name": "person", "isthing": 1},
                {"id": 187, "name": "sky-other-merged", "isthing": 0},
                {"id": 175, "name": "wall-brick", "isthing": 0},
            ],
        },
        "captions": {"annotations": captions, "images": images},
    }.items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return coco_flags(folder, "instances", "panoptic", "captions")


def expected_coco(folder, record, size):
    """(mask, words) of each region that a record of COCO must have."""
    files = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("instances", "panoptic")}
    names = {
        n: {
            c["id"]: (labels.content_words(coco.category_phrase(c["name"])), c.get("isthing"))
            for c in file["categories"]
        }
        for n, file in files.items()
    }
    key, own = record["id"].split("_")[0], []
    for a in files["instances"]["annotations"]:
        if str(a["image_id"]) == key:
            mask = coco_shape(a["segmentation"], size)
            own.append((mask, names["instances"][a["category_id"]][0]))
    both = key in {str(image["id"]) for image in files["instances"]["images"]}
    for a in files["panoptic"]["annotations"]:
        if str(a["image_id"]) == key:
            colours = np.asarray(Image.open(folder / "panoptic" / a["file_name"]), int)
            ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
            for s in a["segments_info"]:
                words, thing = names["panoptic"][s["category_id"]]
                own += [] if both and thing else [(ids == s["id"], words)]
    return own


def check_coco(folder, record, size, views):
    """Masks and patch labels of a record -> how many masks."""
    own = expected_coco(folder, record, size)
    masks = [labels.region_mask(r, size, "") for r in record["regions"]]
    assert len(masks) == len(own)
    assert all((ours == mask).all() for ours, (mask, _) in zip(masks, own))
    assert all(isinstance(r["rle"]["counts"], str) for r in record["regions"])  # compressed
    for geometry, grid in views:
        found = labels.patch_words(record["regions"], size, geometry, (grid, grid))
        assert found == counted_labels(*zip(*own), size, geometry, grid)
    return len(own)


VIEWS = [("pad", 16), ("crop", 24), ("crop", 16), ("pad", 24)]


def test_polygons_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for i in range(600):
        size = rng.integers(3, 50, 2).tolist()
        rings = [
            rng.uniform(-8, 60, (rng.integers(3, 9), 2)).round(rng.integers(0, 3))
            for _ in range(1 + i % 3 // 2)
        ]  # every other one with points twice
        rings = [np.repeat(ring, 1 + i % 2, 0).ravel().tolist() for ring in rings]
        mask = labels.decode_rle(coco.polygon_rle(rings, size))
        assert (mask == coco_polygon(rings, size)).all(), (rings, size)


def test_coco_masks_and_patch_labels_equal_pycocotools_and_a_count_of_pixels(tmp_path):
    flags = coco_files(tmp_path)
    records, problems = convert(tmp_path / "out.jsonl", *flags, "--captions-per-image", 0)
    assert not problems
    assert [r["id"] for r in records] == ["3_0", "3_1", "10_0", "10_1", "17_0", "17_1", "1000"]
    assert told(records[3]) == "caption 1.1 é" and records[3]["image"] == "1.jpg"
    assert told(records[6]) == "person, sky, wall brick"  # no caption: its phrases
    assert [check_coco(tmp_path, r, (53, 41), VIEWS) for r in records[::2]] == [3, 5, 5, 3]


@pytest.mark.skipif("COCO_SMALL" not in os.environ, reason="COCO_SMALL: COCO's files and images/")
def test_real_coco_masks_and_patch_labels(tmp_path):
    folder = Path(os.environ["COCO_SMALL"])
    flags = coco_flags(folder, "instances", "panoptic")
    records, problems = convert(tmp_path / "out.jsonl", *flags)
    sizes = [Image.open(folder / "images" / record["image"]).size for record in records]
    counts = [check_coco(folder, *own, VIEWS) for own in zip(records, sizes)]
    assert not problems and sum(counts) > 500


# ---- other formats -------------------------------------------------------------------------------


def flickr_files(folder, size=(60, 40)):
    """Flickr30k Entities' files about one image -> the flags."""
    photo(folder / "images" / "11_ab.jpg", size)
    (folder / "images" / "11.json").write_text("{}")  # no image
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir()
    (folder / "Sentences" / "11.txt").write_text(
        "[/EN#5/people Two men ] hold [/EN#6/other a red ball] in [/EN#7/scene/other a park] .\n"
        "[/EN#0/notvisual It] is [/EN#6/other the ball] of [/EN#8/people a man]"
        " and [/EN#9/people a man] .\n"
    )
    items = [
        ([5, 8], (1, 1, 20, 30)),
        ([5, 9], (31, 2, 60, 40)),
        ([6], (10, 10, 14, 15)),
        ([7], None),
    ]  # 7 is a scene
    xml = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for names, box in items:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box or ())
        corners = "".join(f"<{k}>{n}</{k}>" for k, n in corners)
        shape = f"<bndbox>{corners}</bndbox>" if box else "<scene>1</scene>"
        xml += "<object>" + "".join(f"<name>{n}</name>" for n in names) + shape + "</object>"
    (folder / "Annotations" / "11.xml").write_text(xml + "</annotation>")
    return ["--from", "flickr30k", "--data", folder, "--image-dir", folder / "images"]


def test_flickr30k_entities_to_records_and_to_referring_expressions(tmp_path, capsys):
    flags = flickr_files(tmp_path)
    (record,), problems = convert(tmp_path / "out.jsonl", *flags)
    assert not problems and told(record) == "Two men hold a red ball in a park ."
    left, right, ball = [0, 0, 20, 30], [30, 1, 60, 40], [9, 9, 14, 15]  # counted from 1, the
    assert [(r["phrase"], r["bbox"]) for r in record["regions"]] == [  # last pixel included
        ("two men", left),
        ("two men", right),
        ("a red ball", ball),
        ("the ball", ball),
        ("a man", left),
        ("a man", right),
    ]
    # "a man" is two entities, "two men" has two boxes
    refer, problems = convert(tmp_path / "refer.jsonl", *flags, "--to", "refer")
    assert [r["answer"] for r in refer] == [ball, ball]
    assert [told(r, 0).split(": ")[1] for r in refer] == ["a red ball", "the ball"]
    assert told(refer[0], 0).startswith("<image>\nPlease provide the bounding box coordinate of")
    assert len(scorer.read_items([tmp_path / "refer.jsonl"], tmp_path / "images", 0)) == 2
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(
            f"next: python eval.py runs/sft/ckpt.pt --data {tmp_path / 'refer.jsonl'} --image-dir"
            f" {tmp_path / 'images'}"
        )
    )


def test_flickr30k_entities_that_are_ambiguous_or_do_not_fit(tmp_path):
    flags = flickr_files(tmp_path)
    xml, text = tmp_path / "Annotations" / "11.xml", tmp_path / "Sentences" / "11.txt"
    whole = text.read_text(), xml.read_text()
    # "the ball" is 6 or 7, which is a scene; 5 and 9 lose a box, so 8 has its one box, 9 has none
    text.write_text(whole[0] + "[/EN#7/scene The ball] and [/EN#8/people one of them] .\n")
    xml.write_text(whole[1].replace("<xmax>60<", "<xmax>6<"))
    records, problems = convert(tmp_path / "unsure.jsonl", *flags, "--to", "refer")
    assert [told(r, 0).split(": ")[1] for r in records] == ["a red ball", "one of them"]
    assert len(problems) == 1 and "is not [x0, y0, x1, y1]" in problems[0]
    (record,), _ = convert(tmp_path / "less.jsonl", *flags)
    assert [r["phrase"] for r in record["regions"]] == [
        "two men",
        "a red ball",
        "the ball",
        "a man",
        "one of them",
    ]
    text.write_text(whole[0])
    xml.write_text(whole[1])
    photo(tmp_path / "images" / "11_ab.jpg", (120, 20))
    with pytest.raises(
        InputError,
        match="no record could be made of 1 images: .*is 120 x 20"
        " pixels, but its annotation says 60 x 40",
    ):
        convert(tmp_path / "b.jsonl", *flags)
    assert [path.name for path in tmp_path.glob("b.*")] == ["b.jsonl.problems"]
    (record,), _ = convert(tmp_path / "c.jsonl", *flags, "--resized")
    assert record["regions"][2]["bbox"] == [18, 4.5, 28, 7.5]
    xml.write_text(whole[1].replace("<width>60<", "<width>0<"))
    with pytest.raises(InputError, match="ZeroDivisionError"):
        convert(tmp_path / "d.jsonl", *flags, "--resized")


def test_grandf_in_its_three_forms(tmp_path):
    size, ring, text = (50, 40), [5, 5, 30, 8, 20, 35], '"A dog on grass."'
    photo(tmp_path / "images" / "a.jpg", size)
    mask = coco_polygon([ring], size)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    image = {"id": 9, "file_name": "a.jpg", "width": 50, "height": 40, "caption": text[1:-1]}
    forms = {  # each with one that is malformed
        "psg": [
            {
                "file_name": "a.jpg",
                "image_id": "9",
                "caption": text,
                "groundings": {
                    "grass": {"token_positives": [9, 14]},
                    "A dog": {"token_positives": [0, 5], "rle_masks": [rle, rle]},
                },
            }
        ],
        "refcocog": [
            {
                "9": {
                    "img_file_name": "a.jpg",
                    "caption": text,
                    "refs": [
                        {"segmentation": [ring]},
                        {"sentence": "A dog", "segmentation": [ring]},
                    ],
                }
            }
        ],
        "flickr": {
            "images": [image],
            "annotations": [
                {"id": 0, "image_id": 9, "tokens_positive": [], "sam_mask": rle},
                {"id": 1, "image_id": 9, "tokens_positive": [[0, 5]], "sam_mask": rle},
            ],
        },
    }
    for name, content in forms.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        (record,), problems = convert(
            tmp_path / f"{name}.jsonl",
            "--from",
            "grandf",
            "--data",
            file,
            "--image-dir",
            tmp_path / "images",
        )
        assert told(record) == "A dog on grass." and record["id"] == "9", name
        assert len(problems) == 1 and "not of the expected form" in problems[0], problems
        assert len(record["regions"]) == (2 if name == "psg" else 1)
        assert all(r["phrase"] == "A dog" for r in record["regions"])
        assert all((labels.region_mask(r, size, "") == mask).all() for r in record["regions"])


def refer_files(folder, *refs):
    """REFER's pickle: (annotation, image, split, sentences) of each reference -> the flags."""
    content = [
        {
            "ann_id": a,
            "image_id": image,
            "split": split,
            "sentences": [{"sent": text} for text in texts],
        }
        for a, image, split, texts in refs
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(content, protocol=2))
    return [
        "--from",
        "refcoco",
        "--data",
        folder / "refs(unc).p",
        "--instances",
        folder / "instances.json",
        "--image-dir",
        folder / "images",
    ]


def test_refcoco_to_records_and_to_referring_expressions(tmp_path):
    coco_files(tmp_path)
    flags = refer_files(
        tmp_path,
        (0, 3, "train", ["left guy", "man"]),
        (1, 3, "val", ["light"]),
        (4, 10, "val", ["señal"]),
    )
    pickled = tmp_path / "refs(unc).p"  # as Python 2 wrote its texts
    unicode, bytes_ = (kind + b"\x06\0\0\0" + "señal".encode() for kind in (b"X", b"T"))
    assert unicode in pickled.read_bytes()
    pickled.write_bytes(pickled.read_bytes().replace(unicode, bytes_))
    records, problems = convert(
        tmp_path / "out.jsonl", *flags, "--captions", tmp_path / "captions.json"
    )
    assert not problems and told(records[0]) == "caption 0.0 é"
    assert [[r["phrase"] for r in record["regions"]] for record in records] == [
        ["left guy", "man", "light"],
        ["señal"],
    ]
    content = json.loads((tmp_path / "instances.json").read_text())
    rings = next(a["segmentation"] for a in content["annotations"] if a["id"] == 0)
    mask = labels.region_mask(records[0]["regions"][1], (53, 41), "")
    assert (mask == coco_polygon(rings, (53, 41))).all()
    convert(tmp_path / "val.jsonl", *flags, "--to", "refer", "--split", "val")
    items = scorer.read_items([tmp_path / "val.jsonl"], tmp_path / "images", 0)
    assert [item["answer"] for item in items] == [[1, 2, 31, 22]] * 2
    assert told(items[1], 0).endswith("sentence describes: señal")
    with pytest.raises(InputError, match="--split test: .* has train .1., val .2."):
        convert(tmp_path / "test.jsonl", *flags, "--split", "test")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    pickled.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(InputError, match="mkdir"):
        convert(tmp_path / "evil.jsonl", *flags)
    assert not (tmp_path / "evil").exists()


def test_llava_records_stay_as_they_are(tmp_path):
    photo(tmp_path / "a.png", (20, 10))
    region = {"phrase": "x", "bbox": [0, 0, 5, 5]}
    good = {
        "id": 1,
        "image": "a.png",
        "extra": [1],
        "conversations": turns("é?", "x"),
        "regions": [region],
    }
    records = [
        good,
        {"id": 0, "conversations": good["conversations"]},
        good | {"id": 2, "regions": [{"phrase": "x", "bbox": [20, 0, 50, 5]}, region]},
        good | {"image": "b.png"},
        good | {"id": 4, "conversations": turns("?", None)},
        good | {"id": 5, "conversations": turns("?", "x")[:1]},
        good | {"id": 6, "image": None},
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    text = "\ufeff" + "".join(json.dumps(r) + "\n" for r in records)  # with a mark
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    for name in ("in.json", "in.jsonl"):
        made, problems = convert(
            tmp_path / f"{name}.out.jsonl",
            "--from",
            "llava",
            "--data",
            tmp_path / name,
            "--image-dir",
            tmp_path,
        )
        assert made == [good, records[1], good | {"id": 2}]
        for own, words in zip(
            problems,
            (
                "outside its 20 x 10 image",
                "b.png",
                "record 4: turn 1 is not",
                "record 5: the last turn is the human's",
                'record 6: "image" is missing',
            ),
        ):
            assert words in own, own
        assert len(problems) == 5


# ---- what a run joins, and what it mends ---------------------------------------------------------


def small_coco(folder, images, annotations, categories=None):
    """An instances file -> the flags. images: {id: (file name, size said or None)}."""
    infos = []
    for key, (name, size) in images.items():
        known = {} if size is None else dict(zip(("width", "height"), size))
        infos.append({"id": key, "file_name": name, **known})
    categories = categories or [{"id": 1, "name": "dog"}, {"id": 2, "name": "without_mask"}]
    content = {"images": infos, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return coco_flags(folder, "instances")


def box_on(image, box, **more):
    return {"id": 1, "image_id": image, "category_id": 1, "bbox": box, **more}


@pytest.mark.parametrize(
    "looks, change",
    [
        ("divided by the image size", lambda x, y, w, h: [x / 60, y / 40, w / 60, h / 40]),
        ("0 .. 1000", lambda x, y, w, h: [x / 0.06, y / 0.04, w / 0.06, h / 0.04]),
        ("like corners", lambda x, y, w, h: [x, y, x + w, y + h]),
    ],
)
def test_files_in_another_unit_are_refused(tmp_path, looks, change):
    photo(tmp_path / "images" / "a.png", (60, 40))
    boxes = [(12 + i, 8 + i, 30, 20) for i in range(8)]
    flags = small_coco(tmp_path, {1: ("a.png", (60, 40))}, [box_on(1, b) for b in boxes])
    assert len(convert(tmp_path / "good.jsonl", *flags)[0][0]["regions"]) == 8
    flags = small_coco(tmp_path, {1: ("a.png", (60, 40))}, [box_on(1, change(*b)) for b in boxes])
    with pytest.raises(InputError, match=f"annotation 1 of image 1 .*{looks}"):
        convert(tmp_path / "bad.jsonl", *flags)
    assert not list(tmp_path.glob("bad.*"))


def test_ids_are_joined_by_what_they_mean_and_once(tmp_path):
    for name in "ab":
        photo(tmp_path / "images" / f"{name}.png", (60, 40))
    said = {5: ("a.png", None), "6": ("b.png", None)}
    good = [
        box_on("5", [1, 2, 30, 20]),
        box_on(5.0, [1, 2, 30, 20], category_id="1"),
        box_on(6, [1, 2, 30, 20], category_id=2.0),
    ]
    records, problems = convert(tmp_path / "out.jsonl", *small_coco(tmp_path, said, good))
    assert [len(r["regions"]) for r in records] == [2, 1] and not problems
    for images, categories, message in (
        ({5: ("a.png", None), "5": ("b.png", None)}, None, "image id 5 occurs 2 times"),
        ({5: ("a.png", None), 6: ("a.png", None)}, None, "a.png has two ids, 5 and 6"),
        (said, [{"id": i, "name": "dog"} for i in (1, 1.0)], "category id 1 occurs 2 times"),
    ):
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "no.jsonl", *small_coco(tmp_path, images, good, categories))
    records = [
        {"id": i, "image": image, "conversations": turns("?", "x")}
        for i, image in (("5", "a.png"), (5, "a.png"), (6.0, "b.png"))
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    regions = [{"id": i, "regions": [{"phrase": "x", "bbox": [0, 0, 9, 9]}]} for i in (5.0, "6")]
    (tmp_path / "more.json").write_text(json.dumps(regions))
    joined = data.read_records(tmp_path / "r.json", tmp_path / "more.json")
    assert all(r["regions"] for r in joined)
    (tmp_path / "r.json").write_text(json.dumps([records[0], records[1] | {"image": "b.png"}]))
    with pytest.raises(InputError, match="record 5 is of two images, a.png and b.png"):
        data.read_records(tmp_path / "r.json", tmp_path / "more.json")


def test_an_interrupted_run_starts_anew_where_its_annotations_changed(tmp_path, capsys):
    photo(tmp_path / "images" / "a.png", (60, 40))
    images = {1: ("a.png", None)}
    flags = small_coco(tmp_path, images, [box_on(1, [1, 2, 30, 20])])
    out = tmp_path / "out.jsonl"
    assert forked(out, flags, dying=(os, "replace", 0)) == [-9]  # the part is complete
    small_coco(tmp_path, images, [box_on(1, [1, 2, 10, 10])])
    (record,), _ = convert(out, *flags)
    assert record["regions"][0]["bbox"] == [1, 2, 11, 12]
    assert "have changed since the run that was interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_on_stored_pixels_follow_the_image_upright(tmp_path, capsys, turn):
    """A red block, and the box, polygon and mask round it on the pixels as they are stored."""
    pixels = np.full((40, 60, 3), 255, np.uint8)
    pixels[5:15, 8:28] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    mask = pixels[..., 1] == 0
    ring = [8, 5, 28, 5, 28, 15, 8, 15]
    annotations = [
        box_on(1, [8, 5, 20, 10]),
        box_on(1, [8, 5, 20, 10], segmentation=[ring]),
        box_on(1, [8, 5, 20, 10], segmentation=labels.encode_rle(mask, False)),
    ]
    flags = small_coco(tmp_path, {1: ("a.png", (60, 40))}, annotations)
    (record,), problems = convert(tmp_path / "out.jsonl", *flags)  # COCO's: stored
    image = data.open_image(tmp_path / "images" / "a.png", "x")
    red = np.asarray(image)[..., 1] == 0
    for region in record["regions"]:
        found = labels.region_mask(region, image.size, "x") > 0.5
        assert (found == red).all() and not problems
    told = "1 images are turned by EXIF; boxes are taken on their stored pixels"
    assert (told in capsys.readouterr().out) == (turn > 1)
    if turn > 4:
        with pytest.raises(InputError, match="use --boxes-on stored"):
            convert(tmp_path / "no.jsonl", *flags, "--boxes-on", "upright")
        flags = small_coco(tmp_path, {1: ("a.png", (40, 60))}, [box_on(1, [5, 8, 10, 20])])
        with pytest.raises(InputError, match="use --boxes-on upright"):
            convert(tmp_path / "no.jsonl", *flags)
        (record,), _ = convert(tmp_path / "up.jsonl", *flags, "--boxes-on", "upright")
        assert record["regions"][0]["bbox"] == [5, 8, 15, 28]


def test_what_the_field_takes_is_taken_and_counted(tmp_path, capsys):
    """A box over the edge, one empty ring of three, a mask of another size beside a box, width
    null, LVIS's coco_url."""
    photo(tmp_path / "images" / "train2017" / "a.png", (60, 40))
    rings = [[1, 1, 9, 1, 9, 9], [], [20, 20, 30, 20, 30, 30]]
    annotations = [
        box_on(1, [40, 10, 25, 20]),
        box_on(1, [1, 1, 30, 30], segmentation=rings),
        box_on(1, [5, 5, 9, 9], segmentation={"size": [9, 9], "counts": [81]}),
        box_on(1, [60, 5, 9, 9]),
    ]
    flags = small_coco(
        tmp_path, {1: ("", (None, None))}, annotations, [{"id": 1, "name": "baby_buggy"}]
    )
    file = tmp_path / "instances.json"
    content = json.loads(file.read_text())
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/a.png"
    file.write_text(json.dumps(content))
    (record,), problems = convert(tmp_path / "out.jsonl", *flags)
    assert record["image"] == "train2017/a.png"
    edge, ringed, boxed = record["regions"]
    assert edge == {"phrase": "baby buggy", "bbox": [40, 10, 60, 30]}
    assert (labels.decode_rle(ringed["rle"]) == coco_polygon([rings[0], rings[2]], (60, 40))).all()
    assert boxed["bbox"] == [5, 5, 14, 14]
    for own, words in zip(problems, ("1 rings of fewer", "its box is used", "lies outside")):
        assert words in own
    assert len(problems) == 3
    assert "1 regions stick out of their image and are cut" in capsys.readouterr().out


def test_every_image_of_a_folder_is_read_or_listed(tmp_path):
    names = ["a.jpg", "b.jfif", "c.gif", "d.tif", "e.bmp", "f.webp", "g.heic", "h.txt"]
    for name in names[:6]:
        form = {".jfif": "JPEG"}.get(Path(name).suffix)
        Image.new("RGB", (9, 7), "red").save(tmp_path / name, form)
    for name in names[6:]:
        (tmp_path / name).write_bytes(b"no image")
    found, others = image_files(tmp_path)
    assert found == names[:7] and others == [
        f"{tmp_path}: 1 files are no images by their names: .txt (1)"
    ]
    for name in names[:6]:
        assert data.open_image(tmp_path / name, "x").size == (9, 7)
    with pytest.raises(InputError, match="g.heic"):
        data.open_image(tmp_path / "g.heic", "x")


def test_all_captions_of_an_image_are_references(tmp_path):
    flags = coco_files(tmp_path, count=2)
    records, _ = convert(tmp_path / "out.jsonl", *flags, "--to", "caption")
    assert records[0]["task"] == "caption" and len(records[0]["answer"]) > 1
    items = scorer.read_items([tmp_path / "out.jsonl"], tmp_path / "images", 0)
    assert [item["answer"] for item in items] == [r["answer"] for r in records]
    with pytest.raises(InputError, match="--to is not read by --from llava"):
        convert(
            tmp_path / "no.jsonl",
            "--from",
            "llava",
            "--data",
            tmp_path / "out.jsonl",
            "--image-dir",
            tmp_path / "images",
            "--to",
            "caption",
        )


# ---- bad input -----------------------------------------------------------------------------------


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
    annotations[10]["segmentation"] = [[1, 1, 1, 1, 1, 1]]
    annotations[12]["category_id"] = 99
    annotations[15]["segmentation"] = [[1, 2, 3, 4, 5, 6, "x"]]
    annotations[18]["image_id"] = 12345
    (tmp_path / "images" / "8.jpg").unlink()
    photo(tmp_path / "images" / "7.jpg", (41, 53))
    half = (tmp_path / "images" / "6.jpg").read_bytes()[:900]
    (tmp_path / "images" / "6.jpg").write_bytes(half)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    said = json.loads((tmp_path / "captions.json").read_text())
    said["annotations"][0]["caption"] = 5
    said["annotations"].append({"caption": "of no image"})
    (tmp_path / "captions.json").write_text(json.dumps(said))
    (tmp_path / "panoptic" / "1000.png").unlink()
    records, problems = convert(tmp_path / "out.jsonl", *flags)
    assert [len(r.get("regions", [])) for r in records] == [3, 3, 3, 2, 2, 3]
    assert [r["id"] for r in records] == ["3", "10", "17", "24", "31", "38"]
    assert told(records[0]) == "caption 0.1 é"
    expected = [
        '1 of annotations have no "image_id"',
        "1 annotations of image 12345",
        "rle size [41, 52] is not the image's",
        "far outside of its 53 x 41",
        "caption 5: not of",
        "rle counts add up to 7",
        "at least 3 points",
        "bbox [20, 5, 16, 14] is not",
        "annotation 10 of image 24 (3.jpg)",
        "category_id 99 is not among",
        "not a list of finite numbers",
        "cannot read the image",
        "is 41 x 53 pixels, but its annotation says 53 x 41",
        "No such file",
        "1000.png",
        "image 1000: has no caption and no region",
    ]
    assert sum(own.endswith("; its box is used") for own in problems) == 6
    assert len(problems) == len(expected)
    for own, words in zip(problems, expected):
        assert words in own, (words, own)
    assert "covers no pixel" in problems[8]


@pytest.mark.parametrize(
    "form", ["coco", "flickr30k", "flickr30k refer", "grandf", "refcoco", "refcoco refer"]
)
def test_a_region_without_a_phrase_is_listed_since_training_refuses_it(tmp_path, form):
    if "flickr" in form:
        flags, file = flickr_files(tmp_path), tmp_path / "Sentences" / "11.txt"
        file.write_text(file.read_text().replace("a red ball", ""))
    else:
        coco_files(tmp_path, count=1)
    if form == "coco":
        flags, file = coco_flags(tmp_path, "instances"), tmp_path / "instances.json"
        file.write_text(file.read_text().replace('"person"', '" "'))
    if "refcoco" in form:
        flags = refer_files(tmp_path, (0, 3, "val", ["", "man"]))
    if form == "grandf":
        refs = [
            {"segmentation": [[1, 1, 30, 1, 1, 30]], "sentence": text}
            for text in (" ", None, "A dog")
        ]
        entry = {"img_file_name": "0.jpg", "caption": "A dog", "refs": refs}
        (tmp_path / "g.json").write_text(json.dumps([{"9": entry}]))
        flags = [
            "--from",
            "grandf",
            "--data",
            tmp_path / "g.json",
            "--image-dir",
            tmp_path / "images",
        ]
    flags += ["--to", "refer"] if "refer" in form else []
    records, problems = convert(tmp_path / "out.jsonl", *flags)
    assert problems and all('"phrase" is missing, empty' in line for line in problems)
    regions = [region for record in records for region in record.get("regions", [])]
    assert records and all(labels.region_phrase(region, form) for region in regions)
    said = [turn["value"] for record in records for turn in record["conversations"]]
    assert not any(text.endswith((" ", ", ")) or text.startswith(",") for text in said)


def test_text_that_is_not_unicode_costs_its_record(tmp_path):
    """Half of an emoji, as JSON can hold it, in a caption, in a file's name and in an id; a file's
    name in Latin-1."""
    photo(tmp_path / "a.png", (20, 10))
    shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xe9.png")
    given = [
        ("a.png", "whole \U0001f600"),
        ("a.png", "cut \ud83d"),
        ("\udce9.png", "x"),
        ("\ud83d.png", "x"),
        ("a.png", "é"),
    ]
    records = [
        {"id": i, "image": image, "conversations": turns("?", text)}
        for i, (image, text) in enumerate(given)
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    made, problems = convert(
        tmp_path / "out.jsonl",
        "--from",
        "llava",
        "--data",
        tmp_path / "in.json",
        "--image-dir",
        tmp_path,
    )
    assert [(r["id"], told(r)) for r in made] == [(0, "whole \U0001f600"), (4, "é")]
    for own, words in zip(
        problems,
        (
            "record 1: turn 1: character 4 is half",
            "record 2: a text",
            "record 3: cannot read the image",
        ),
    ):
        assert words in own, own
    assert len(problems) == 3
    (tmp_path / "c.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "annotations": [
                    {"image_id": 1, "caption": "x"},
                    {"image_id": "\ud83d", "caption": "y"},
                ],
            }
        )
    )
    made, problems = convert(
        tmp_path / "coco.jsonl",
        "--from",
        "coco",
        "--captions",
        tmp_path / "c.json",
        "--image-dir",
        tmp_path,
    )
    assert len(made) == 1 and "1 annotations of image ?, which is not" in problems[0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"images": [{"id": 1, "file_name": "\xff"}]}', "not UTF-8 text"),
        (b'{"images": [{"id": 1} {"id": 2}]}', "line 1: not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"x": ' + b"[" * 10**5, "nested too deep"),
        (b'[{"id": 1}]', "no list 'images'"),
        (b'{"images": [{"ID": 1}], "annotations": []}', 'has no "id"'),
        (
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
            'no "caption"; is this COCO',
        ),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, here, content, message):
    (tmp_path / "c.json").write_bytes(content)
    done = here(
        "annotate.py",
        "--from",
        "coco",
        "--captions",
        tmp_path / "c.json",
        "--image-dir",
        tmp_path,
        "--out",
        tmp_path / "o.jsonl",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert message in line and "c.json" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--from", "llava", "--data", "x.json", "--split", "val"],
            "--split is not read by --from ll",
        ),
        (["--from", "coco"], "needs one or more"),
        (["--from", "flickr30k", "--data", "."], "Sentences"),
        ([], "--from says"),
        (["--from", "coco", "--panoptic", "x.json"], "x is not a folder; it holds the PNG"),
        (["--from", "refcoco"], "needs --data"),
        (["--from", "grandf"], "needs --data"),
        (["--from", "llava", "--data", "/"], "needs --data"),
        (["--from", "refcoco", "--to", "refer", "--inspect", "1"], "--inspect draws regions"),
        (["--from", "images"], "--tagger caption needs --data"),
        (["--inspect", "1", "--pool", "3"], "--pool is not read without --vision"),
        (
            ["--from", "llava", "--data", "x.json", "--geometry", "pad"],
            "is read by --inspect and --dry-run alone",
        ),
        (["--inspect", "1", "--vision", ROOT / "backbones" / "toy-llama"], "has no patches"),
        (["--inspect", "1", "--coverage", "0"], "--coverage 0.0 is a share"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "out.jsonl", "--image-dir", tmp_path, *flags)


# ---- parts and resuming --------------------------------------------------------------------------


def forked(out, flags, ranks=1, dying=None):
    """annotate.py in forked processes, without seconds of imports -> their exit codes.

    dying: (where, name, n); the n-th call of this function (from 0) kills its process.
    """

    def rank(i):
        os.environ |= {
            "RANK": str(i),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(20000 + os.getppid() % 20000),
        }
        if dying:
            where, name, n = dying
            real, calls = getattr(where, name), itertools.count()

            def killing(*arguments, **options):
                if next(calls) >= n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(where, name, killing)
        annotated("--out", out, *flags)

    several = [
        multiprocessing.get_context("fork").Process(target=rank, args=(i,)) for i in range(ranks)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    return [process.exitcode for process in several]


def same_files(out, other):
    """Records and problems of two runs are equal, byte for byte."""
    return all(
        Path(f"{out}{e}").read_bytes() == Path(f"{other}{e}").read_bytes()
        for e in ("", ".problems")
    )


def test_images_in_no_part_are_told_and_nothing_is_written(tmp_path):
    """As on several machines that do not share the folder."""
    (tmp_path / "out.jsonl.rank-0").write_text('{}\n[0, [{"id": 1}], []]\n')
    with pytest.raises(
        InputError,
        match="1 images are in no part; --out must lie in a folder that all machines share",
    ):
        annotate.merge(Source(2, None), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.rank-0"]


def test_each_process_takes_its_share_of_what_is_not_done(tmp_path, monkeypatch):
    """Batches of 4 in turn; 8 to 12 are in the part of a process that is gone."""
    out, source = tmp_path / "out.jsonl", Source(18, lambda number, problems: [], batch=4)
    (tmp_path / "out.jsonl.rank-7").write_text(
        "{}\n" + "".join(f"[{number}, [], []]\n" for number in (8, 9, 10, 11, 12))
    )
    monkeypatch.setattr(runtime, "world", lambda: 2)
    monkeypatch.setattr(runtime, "barrier", lambda: None)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
        annotate.write_part(source, out, {})
        part = lines(tmp_path / f"out.jsonl.rank-{rank}")
        shares.append([number for number, *_ in part[1:]])
    assert shares == [[0, 1, 2, 3, 16, 17], [4, 5, 6, 7, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """150 images, one of them missing -> the flags, and what an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("long")
    flags, whole = coco_files(folder, count=150), folder / "whole.jsonl"
    (folder / "images" / "70.jpg").unlink()
    records, problems = convert(whole, *flags)
    assert len(records) == 150 and len(problems) == 1
    return flags, whole


def test_two_processes_write_what_one_writes(tmp_path, ranks, long):
    flags, whole = long
    done = ranks("annotate.py", *flags, "--out", tmp_path / "two.jsonl")
    assert done.returncode == 0, done.stderr
    assert "150 records of 151 images; 1 problems" in done.stdout
    assert same_files(tmp_path / "two.jsonl", whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.jsonl", "two.jsonl.problems"]


def test_killed_and_resumed_is_as_if_uninterrupted(tmp_path, long):
    """SIGKILL while converting (after the look at 100 images; a line is torn, then again), before
    OUT is renamed, and while parts are deleted; each time with the same command again."""
    flags, whole = long
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.rank-0"
    assert forked(out, flags, dying=(coco, "photo", 175)) == [-9]
    written = part.read_bytes()
    assert 64 <= written.count(b"\n") < 80
    part.write_bytes(written[:-20])  # the last line is torn
    # the torn batch again, the next one, half of a third
    assert forked(out, flags, dying=(coco, "photo", 180)) == [-9]
    assert part.read_bytes().startswith(written[: written.rindex(b"\n", 0, -20) + 1])
    assert 96 <= part.read_bytes().count(b"\n") < 130
    assert forked(out, flags, dying=(os, "replace", 1)) == [-9] and not out.exists()
    assert forked(out, flags, dying=(Path, "unlink", 1)) == [-9] and out.exists() and part.exists()
    assert forked(out, flags) == [0] and not part.exists()
    assert same_files(out, whole)
    with pytest.raises(InputError, match="exists; delete it"):
        convert(out, *flags)


def test_parts_of_other_flags_are_refused(tmp_path):
    flags = coco_files(tmp_path)
    (tmp_path / "out.jsonl.rank-3").write_text('{"from_": "llava"}\n')
    with pytest.raises(InputError, match="rank-3 is left of a run with other flags"):
        convert(tmp_path / "out.jsonl", *flags)


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_shows_the_labels_that_training_sees(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")  # black
    record = {
        "id": 1,
        "image": "a.png",
        "conversations": [],
        "regions": [
            {"phrase": "a dog", "bbox": [10, 0, 20, 20]},
            {"phrase": "brown dogs", "bbox": [10, 0, 30, 10]},
        ],
    }
    records = [
        record,
        record | {"id": 2, "regions": []},
        record | {"id": 3, "image": "b.png"},
        record | {"id": 4, "regions": ["x"]},
        record | {"id": 5, "image": ["a"]},
    ]
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(picture, "grid_of", lambda args: ((2, 2), 1.0))
    annotated("--inspect", 3, "--out", out, "--image-dir", tmp_path)
    said = capsys.readouterr().out
    assert "5 records, 2 of them with regions; 2 images; 4 regions" in said
    assert "3 records cannot be used: " in said and "b.png" in said
    # the patches: dog + brown dogs, brown dogs, dog, none
    assert "2 x 2, crop, coverage 0.25: 75.0% labelled, with 2.00 words each" in said
    assert "dog 2, brown 2, dogs 2" in said
    assert said.splitlines()[-1] == (
        f"wrote {tmp_path / 'out.png'}; next: python pretrain.py"
        f" --data {out} --image-dir {tmp_path}"
    )
    drawn, left = np.asarray(Image.open(tmp_path / "out.png")), picture.SIDE + picture.LEGEND
    shown = [tuple(drawn[y, left + x]) for y in (100, 330) for x in (150, 380)]
    dog, brown, both, none = (
        tuple(int(0.55 * n) for n in colour) for colour in (*picture.COLOURS[:3], (0, 0, 0))
    )
    assert shown == [both, brown, dog, none]  # as in the image beside it
    assert tuple(drawn[15, 15]) == dog and tuple(drawn[5, 25]) == brown


@pytest.mark.parametrize(
    "size, flags, grid",
    [
        ([36, 96], [], (3, 8)),
        ([96, 36], ["--geometry", "pad"], (8, 3)),
        ([96, 96], ["--image-size", "48", "--coverage", "0.5"], (4, 4)),
        ([60, 96], ["--projector", "c_abstractor", "--pool", "3", "--geometry", "stretch"], (2, 3)),
    ],
)
def test_inspect_takes_the_flags_of_training_for_the_same_labels(
    tmp_path, monkeypatch, size, flags, grid
):
    """The labels of the summary, those drawn and those of a training sample, where the input is no
    square, of another size or pooled."""
    shutil.copytree(
        ROOT / "backbones" / "toy-clip",
        tmp_path / "vision",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    file = tmp_path / "vision" / "preprocessor_config.json"
    crop = {"crop_size": dict(zip(("height", "width"), size))}
    file.write_text(json.dumps(json.loads(file.read_text()) | crop))
    photo(tmp_path / "a.png", (50, 40))
    record = {
        "id": 1,
        "image": "a.png",
        "conversations": turns("?", "a dog"),
        "regions": [
            {"phrase": "a dog", "bbox": [3, 2, 21, 29]},
            {"phrase": "brown cat", "bbox": [14, 16, 43, 37]},
        ],
    }
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(record) + "\n")
    found, rule = [], labels.patch_words
    for module in (picture, data):
        monkeypatch.setattr(module, "patch_words", lambda *g: found.append(rule(*g)) or found[-1])
    flags = ["--vision", str(tmp_path / "vision"), *flags]
    annotated("--inspect", 1, "--out", out, "--image-dir", tmp_path, *flags)
    args = runtime.parse(pretrain.Args, "", flags)
    config = {name: getattr(args, name) for name in pretrain.CONFIG}
    model = PatchAlignedModel(config, weights=False)
    model.records(str(out), str(tmp_path))[0]
    assert model.grid == grid and len(found) == 3
    assert found[0] == found[1] == found[2] != [[]] * (grid[0] * grid[1])
