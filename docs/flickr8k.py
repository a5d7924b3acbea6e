"""Records of the comparison on photographs: Flickr8k, with Flickr30k Entities' phrase boxes.

    python docs/flickr8k.py flickr8k.jsonl.gz --out data/flickr8k

reads:  JSONL, gzipped or not, a line per image: {"image", "split": train | dev | test,
        "captions": [..], "regions": [{"phrase", "bbox": [x0, y0, x1, y1] in pixels, "entity"}]};
        and --size, the images' (width, height)
writes: OUT/{train,val,test}.jsonl     with regions, for pretrain.py and probe.py: a record per
                                       training caption, one per other image
        OUT/{train,val}_sft.jsonl      for sft.py, a conversation per image: a caption or what is
                                       there, other questions, boxes of phrases
        OUT/{val,test}_{caption,refer,vqa}.jsonl      for eval.py: five references each; phrases
                                       with one box; questions

Questions come from phrases and their boxes alone, no model: is it there; which colour ("a pink
dress"); where across and where up or down; which of two is further left; how many ("two dogs").
Each kind's answers are balanced, and no answer is given away by an earlier turn.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from annotations.conversations import DESCRIBE, balanced, conversation, record, words

REFER, EXIST = "Give the bounding box of: {}", "Is there {} in the image?"
SPLITS = {"train": "train", "dev": "val", "test": "test"}
COLOURS = set("red orange yellow green blue purple pink white black brown gray grey tan".split())
NUMBERS = "two three four five".split()
MARGIN = 0.08  # of a side: how far from a border of halves or thirds an answer is clear


def referable(regions: list[dict]) -> dict[str, list[float]]:
    """{phrase: its box}, of the phrases that name one entity with one box."""
    found = {}
    for region in regions:
        same = [
            other
            for other in regions
            if other["entity"] == region["entity"]
            or other["phrase"].lower() == region["phrase"].lower()
        ]
        if len({tuple(other["bbox"]) for other in same}) == 1:
            found[region["phrase"]] = region["bbox"]
    return found


def noun(phrase: str) -> str:
    """The last word of a phrase, which names what it is about."""
    return (words(phrase) or [""])[-1]


def said_of(regions: list[dict], among: set[str]) -> dict[str, str]:
    """{noun: the one word of `among` that its phrases say}, where the noun means one entity."""
    entities: dict[str, set] = {}
    told: dict[str, set] = {}
    for region in regions:
        name = noun(region["phrase"])
        entities.setdefault(name, set()).add(region["entity"])
        told.setdefault(region["entity"], set()).update(among & set(words(region["phrase"])))
    found = {}
    for name, own in entities.items():
        values = set().union(*(told[entity] for entity in own))
        if len(own) == 1 and len(values) == 1 and name not in COLOURS | {*NUMBERS, ""}:
            found[name] = values.pop()
    return found


def questions(regions: list[dict], size: tuple[int, int], rng) -> list[tuple[str, ...]]:
    """(kind, question, answer, the word that would give it away) of an image, but existence."""
    (width, height), out = size, []
    for name, value in said_of(regions, COLOURS).items():
        out.append(("colour", f"What color is the {name}?", value.replace("grey", "gray"), value))
    for name, value in said_of(regions, set(NUMBERS)).items():
        out.append(("count", f"How many {name} are there?", str(NUMBERS.index(value) + 2), value))
    named = {tuple(box): phrase for phrase, box in referable(regions).items()}  # each thing once
    places = {
        phrase: ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
        for (x0, y0, x1, y1), phrase in named.items()
        if x1 - x0 < width / 2 and y1 - y0 < height / 2
    }
    for phrase, (x, y) in places.items():
        if min(abs(x - 1 / 3), abs(x - 2 / 3)) > MARGIN / 2:
            answer = ("left", "middle", "right")[min(2, int(x * 3))]
            ask = f"Is {phrase} on the left, in the middle or on the right?"
            out.append(("across", ask, answer, ""))
        if abs(y - 0.5) > MARGIN:
            ask = f"Is {phrase} at the top or at the bottom?"
            out.append(("height", ask, ("top", "bottom")[y > 0.5], ""))
    pairs = [
        (a, b)
        for a in places
        for b in places
        if noun(a) != noun(b) and places[a][0] + 2 * MARGIN < places[b][0]
    ]
    for pair in rng.sample(pairs, min(2, len(pairs))):
        a, b = rng.sample(pair, 2)
        ask = f"Which is further left, first {a} or second {b}? Say first or second."
        out.append(("order", ask, "first" if a == pair[0] else "second", ""))
    return out


def existence(image: dict, phrases: list[str], rng) -> list[tuple[str, ...]]:
    """Two phrases that are there, and two of other images whose noun nobody says of this one."""
    there = sorted({r["phrase"] for r in image["regions"]})
    seen = set(words(" ".join(there + image["captions"])))
    drawn = dict.fromkeys(rng.sample(phrases, min(60, len(phrases))))
    answers = dict.fromkeys(rng.sample(there, min(2, len(there))), "yes")
    answers |= dict.fromkeys([p for p in drawn if noun(p) not in seen][:2], "no")
    return [("exist", EXIST.format(p), answer, noun(p)) for p, answer in answers.items()]


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--out", default="data/flickr8k")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(224, 224),
        help="width and height of every image, in pixels",
    )
    args = parser.parse_args()
    opened = gzip.open(args.source, "rt") if args.source.endswith(".gz") else open(args.source)
    with opened as file:
        images = [json.loads(line) for line in file]
    width, height = args.size
    every = {
        split: [r["phrase"] for i in images if i["split"] == split for r in i["regions"]]
        for split in SPLITS
    }
    lines: dict[str, list] = {}
    asked: dict[str, list] = {name: [] for name in SPLITS.values()}
    refers: dict[str, list] = {}
    for image in images:
        name, split, rng = image["image"], SPLITS[image["split"]], random.Random(image["image"])
        for x0, y0, x1, y1 in (r["bbox"] for r in image["regions"]):
            if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
                raise SystemExit(
                    f"error: {args.source}: {name}: box {[x0, y0, x1, y1]} lies outside"
                    f" {width} x {height} pixels; say --size"
                )
        regions = [{"phrase": r["phrase"], "bbox": r["bbox"]} for r in image["regions"]]
        captions = image["captions"] if split == "train" else image["captions"][:1]
        for i, caption in enumerate(captions):
            told = [(DESCRIBE, caption)]
            lines.setdefault(split, []).append(record(name, f"_{i}", told, regions=regions))

        boxes = list(referable(image["regions"]).items())
        rng.shuffle(boxes)
        for phrase, box in boxes[:3]:
            shares = [min(max(n / s, 0), 1) for n, s in zip(box, (width, height) * 2)]
            answer = "[" + ", ".join(f"{share:.2f}" for share in shares) + "]"
            refers.setdefault(name, []).append((REFER.format(phrase), answer, box))
        own = questions(image["regions"], args.size, rng)
        own += existence(image, every[image["split"]], rng)
        asked[split] += [(name, *question) for question in own]
        if split != "train":
            told = [(DESCRIBE, image["captions"][0])]
            lines.setdefault(f"{split}_caption", []).append(
                record(name, "", told, task="caption", answer=image["captions"])
            )
            for i, (request, answer, box) in enumerate(refers.get(name, [])):
                lines.setdefault(f"{split}_refer", []).append(
                    record(name, f"_refer{i}", [(request, answer)], task="refer", answer=box)
                )

    rng = random.Random(0)
    for split, every_question in asked.items():
        kept: dict[str, list] = {}
        for name, *question in balanced(every_question, rng, {"colour": 4}):
            kept.setdefault(name, []).append(tuple(question))
        for image in (i for i in images if SPLITS[i["split"]] == split):
            name = image["image"]
            own = kept.get(name, [])
            if split != "train":
                for i, (kind, request, answer, _) in enumerate(own):
                    told = dict(task="vqa", kind=kind, answer=answer)
                    lines.setdefault(f"{split}_vqa", []).append(
                        record(name, f"_{kind}{i}", [(request, answer)], **told)
                    )
            if split != "test" and (
                turns := conversation(image["captions"], own, refers.get(name, []), rng)
            ):
                lines.setdefault(f"{split}_sft", []).append(record(name, "", turns))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, records in lines.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"wrote {', '.join(f'{out / name}.jsonl ({len(r)})' for name, r in lines.items())}")


if __name__ == "__main__":
    main()
