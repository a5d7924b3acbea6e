"""Conversations about photographs, and questions to ask of them, made of annotations alone.

    python annotate.py --from coco --instances instances.json --captions captions.json \\
           --image-dir images --out coco.jsonl --conversations coco

writes, each image in one split (8 of 10 train, 1 val, 1 test, in the order of a hash of its name):

    DIR/{train,val,test}.jsonl                    the records of OUT, for pretrain.py and probe.py
    DIR/{train,val}_sft.jsonl                     for sft.py, a conversation per image
    DIR/{val,test}_{caption,refer,vqa}.jsonl      for eval.py

A conversation has a caption or not, boxes of what occurs once, and questions: is there one, how
many, which of two is further left. Whether there is one is asked of each category as often where it
is as where it is not; of counts, no answer comes more often than the second most frequent. What
forms a crowd, which COCO does not count, is not counted, pointed at or compared. Nothing is asked
of what an earlier turn has spoken of, but for its box.
"""
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

import runtime
from annotations import REFER
from data import image_header, image_path, read_records
from labels import decode_rle, view_box
from runtime import InputError

DESCRIBE = "Describe the image."
APART, MOST, VISIBLE = 0.16, 5, 0.9     # share of the width between two things; largest count asked
#                                         for; share of a box that the encoder must see
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis",
           "scissors": "scissors", "broccoli": "broccoli"}

# ---- texts ---------------------------------------------------------------------------------------


def record(image: str, suffix: str, turns: list[tuple[str, str]], **more) -> dict:
    """A LLaVA record with turns of (request, answer)."""
    said = [{"from": who, "value": text}
            for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": str(Path(image).with_suffix("")) + suffix, "image": image, "conversations": said,
            **more}


def words(text: str) -> list[str]:
    """Its words, in small letters."""
    return re.findall(r"\w+", text.lower())


def plural(name: str) -> str:
    """"wine glass" -> "wine glasses"."""
    rest, _, last = name.rpartition(" ")
    several = last + ("es" if last.endswith(("s", "x", "ch", "sh")) else "s")
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        several = last[:-1] + "ies"
    return f"{rest} {PLURALS.get(last, several)}".strip()


def both(name: str) -> str:
    """Its words, of one and of several."""
    return f"{name} {plural(name)}"


def article(name: str) -> str:
    """"apple" -> "an apple"; what has one form alone has none."""
    if PLURALS.get(name) == name:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# ---- which questions, in which order -------------------------------------------------------------


def balanced(asked: list, rng, places: dict[str, int]) -> list:
    """Without the surplus of frequent answers: (image, kind, question, answer, ..) of which no
    answer comes more often than its kind's second most frequent, or the one at places[kind]."""
    totals = Counter((kind, answer) for _, kind, _, answer, _ in asked)
    kept, count, limits = [], Counter(), {}
    for kind in {kind for kind, _ in totals}:
        own = sorted((n for (k, _), n in totals.items() if k == kind), reverse=True)
        limits[kind] = own[min(places.get(kind, 2), len(own)) - 1]
    for item in rng.sample(asked, len(asked)):
        count[item[1], item[3]] += 1
        if count[item[1], item[3]] <= limits[item[1]]:
            kept.append(item)
    return kept


def conversation(captions: list[str], asked: list, refer: list, rng) -> list[tuple[str, str]]:
    """At most six turns in random order, of which none gives a later answer away: one question of
    each kind (two of existence), boxes of phrases.

    asked: (kind, question, answer, the words that would give it away); refer: (request, answer,
    ..).
    """
    asked = rng.sample(asked, len(asked))
    pool = [q for i, q in enumerate(asked)
            if [p[0] for p in asked[:i]].count(q[0]) <= (q[0] == "exist")]
    pool += [("refer", request, answer, "") for request, answer, *_ in refer]
    turns = [(DESCRIBE, rng.choice(captions))] if rng.random() < 0.5 else []
    heard = set(words(" ".join(text for turn in turns for text in turn)))
    for _, question, answer, told in rng.sample(pool, len(pool)):
        if len(turns) < 6 and not heard & set(words(told)):
            turns.append((question, answer))
            heard |= set(words(f"{question} {told}"))
    return turns


# ---- COCO ----------------------------------------------------------------------------------------


def box_of(region: dict) -> list[float]:
    """[x0, y0, x1, y1] of a region with a box or a mask."""
    if "bbox" in region:
        return region["bbox"]
    rows, columns = (np.flatnonzero(decode_rle(region["rle"]).any(axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def things_of(regions: list[dict], things: set[str]) -> dict[str, list]:
    """{category: its boxes, None for a crowd} of the regions that are things."""
    found: dict[str, list] = {}
    for region in regions:
        if region["phrase"] in things:
            box = None if region.get("crowd") else box_of(region)
            found.setdefault(region["phrase"], []).append(box)
    return found


def questions(found: dict[str, list], width: int, rng) -> list[tuple[str, ...]]:
    """(kind, question, answer, the words that would give it away): how many, which is left."""
    asked = [("count", f"How many {plural(name)} are there?", str(len(boxes)), both(name))
             for name, boxes in found.items()
             if None not in boxes and len(boxes) <= MOST and plural(name) != name]
    middles = {name: (boxes[0][0] + boxes[0][2]) / 2 / width
               for name, boxes in found.items() if len(boxes) == 1 and None not in boxes}
    pairs = [(a, b) for a, b in itertools.permutations(middles, 2)
             if middles[a] + APART < middles[b]]
    for pair in rng.sample(pairs, min(2, len(pairs))):
        a, b = rng.sample(pair, 2)
        ask, told = f"Which is further left, the {a} or the {b}?", f"{both(a)} {both(b)}"
        asked.append(("left", ask, pair[0], told))
    return asked


def existence(seen: dict[str, dict], captions: dict[str, list[str]], rng) -> dict[str, list]:
    """{image: questions}: of each image at most two things that are there, and for each of them the
    same question of an image that has none and whose captions do not speak of it."""
    asked: dict[str, list] = {image: [] for image in seen}
    for image, found in seen.items():
        for name in rng.sample(sorted(found), min(2, len(found))):
            told, ask = set(words(both(name))), f"Is there {article(name)} in the image?"
            without = [other for other in seen if name not in seen[other]
                       and not told & set(words(" ".join(captions[other])))
                       and ask not in [question for _, question, *_ in asked[other]]]
            if without:
                other = min(rng.sample(without, min(8, len(without))), key=lambda i: len(asked[i]))
                for where, answer in ((image, "yes"), (other, "no")):
                    asked[where].append(("exist", ask, answer, both(name)))
    return asked


def boxes_in_view(found: dict[str, list], size, geometry: str) -> list[tuple]:
    """(request, answer, box in pixels) of what occurs once. The answer is relative to the square
    that the encoder sees, as shares of its sides."""
    x, y, right, bottom = view_box(size, geometry)
    told = []
    for name, boxes in found.items():
        if len(boxes) > 1 or None in boxes:
            continue
        x0, y0, x1, y1 = boxes[0]
        cut = max(x0, x), max(y0, y), min(x1, right), min(y1, bottom)
        inside = max(0, cut[2] - cut[0]) * max(0, cut[3] - cut[1])
        if inside >= VISIBLE * (x1 - x0) * (y1 - y0):
            shares = [(n - low) / (high - low) for n, low, high in
                      zip(cut, (x, y) * 2, (right, bottom) * 2)]
            x0, y0, x1, y1 = shown = [f"{share:.2f}" for share in shares]
            if x0 != x1 and y0 != y1:                   # else it is too small to be pointed at
                told.append((f"{REFER}the {name}", f"[{', '.join(shown)}]", boxes[0]))
    return told


def enough(images: int) -> None:
    """InputError: too few for three splits."""
    if images < 10:
        raise InputError(f"--conversations: {images} images are too few for three splits; give ten"
                         " or more")


def write(out: Path, folder: Path, source, image_dir: str, geometry: str) -> list[str]:
    """Write all files of `folder` from the records of OUT. -> lines that say what is in them.

    source: of annotations.coco. InputError: fewer than ten images.
    """
    images: dict[str, list] = {}
    for own in read_records(out):
        images.setdefault(own["image"], []).append(own)
    enough(len(images))
    order = sorted(images, key=lambda image: hashlib.sha256(image.encode()).digest())
    ends = len(order) * 8 // 10, len(order) * 9 // 10
    captions = {image: source.captions.get(image) or [own[0]["conversations"][1]["value"]]
                for image, own in images.items()}
    files: dict[str, list] = {}
    for split, own in zip(("train", "val", "test"),
                          (order[:ends[0]], order[ends[0]: ends[1]], order[ends[1]:])):
        rng, names = random.Random(split), sorted(own)
        seen = {i: things_of(images[i][0].get("regions") or [], source.things) for i in names}
        seen = {i: found for i, found in seen.items() if found}
        sizes = {i: image_header(image_path({"image": i}, image_dir, i), i)[0] for i in seen}
        asked = existence(seen, captions, rng)
        others = [(i, *q) for i in seen for q in questions(seen[i], sizes[i][0], rng)]
        for image, *question in balanced(others, rng, {"left": 4}):
            asked[image].append(tuple(question))
        for image in names:
            files.setdefault(split, []).extend(images[image])
            refer = boxes_in_view(seen[image], sizes[image], geometry) if image in seen else []
            refer = rng.sample(refer, min(3, len(refer)))
            if split != "test":
                turns = conversation(captions[image], asked.get(image, []), refer, rng)
                turns = turns or [(DESCRIBE, captions[image][0])]
                files.setdefault(f"{split}_sft", []).append(record(image, "", turns))
            if split == "train":
                continue
            if source.captions.get(image):
                files.setdefault(f"{split}_caption", []).append(
                    record(image, "", [(DESCRIBE, captions[image][0])], task="caption",
                           answer=captions[image]))
            for i, (request, answer, box) in enumerate(refer):
                files.setdefault(f"{split}_refer", []).append(
                    record(image, f"_refer{i}", [(request, answer)], task="refer", answer=box))
            for i, (kind, question, answer, _) in enumerate(asked.get(image, [])):
                told = dict(task="vqa", kind=kind, answer=answer)
                files.setdefault(f"{split}_vqa", []).append(
                    record(image, f"_{kind}{i}", [(question, answer)], **told))
    for name, records in files.items():
        with runtime.atomic(folder / f"{name}.jsonl") as temporary:
            lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            temporary.write_text("".join(lines), encoding="utf-8")
    return [f"{folder / name}.jsonl: {len(records)} records" for name, records in files.items()]
