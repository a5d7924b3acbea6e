"""Records of the comparison on photographs: Flickr8k, with Flickr30k Entities' phrase boxes.

    python docs/flickr8k.py flickr8k.jsonl.gz --out data/flickr8k

reads:  JSONL, gzipped or not, a line per image: {"image", "split": train | dev | test,
        "captions": [..], "regions": [{"phrase", "bbox": [x0, y0, x1, y1] in pixels, "entity"}]};
        and --size, the images' (width, height)
writes: OUT/{train,val,test}.jsonl     with regions, for pretrain.py and probe.py: a record per
                                       training caption, one per other image
        OUT/{train,val}_sft.jsonl      for sft.py, a conversation per image: a caption or what is
                                       there, then boxes of phrases
        OUT/test_{caption,refer,exist}.jsonl      for eval.py: five references each; phrases with
                                       one box; yes or no
"""
import argparse
import gzip
import json
import random
import re
from pathlib import Path

DESCRIBE = "Describe the image."
REFER, EXIST = "Give the bounding box of: {}", "Is there {} in the image?"
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def record(image: str, suffix: str, turns: list[tuple[str, str]], **more) -> dict:
    """A LLaVA record with turns of (request, answer)."""
    said = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)
    ]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return {"id": Path(image).stem + suffix, "image": image, "conversations": said, **more}


def referable(regions: list[dict]) -> dict[str, list[float]]:
    """{phrase: its box}, of the phrases that name one entity with one box."""
    return {
        r["phrase"]: r["bbox"]
        for r in regions
        if len(
            {
                tuple(o["bbox"])
                for o in regions
                if o["entity"] == r["entity"] or o["phrase"].lower() == r["phrase"].lower()
            }
        )
        == 1
    }


def words(text: str) -> list[str]:
    """Its words, in small letters."""
    return re.findall(r"\w+", text.lower())


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
    for image in images:
        name, split, rng = image["image"], SPLITS[image["split"]], random.Random(image["image"])
        for x0, y0, x1, y1 in (r["bbox"] for r in image["regions"]):
            if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
                raise SystemExit(
                    f"error: {args.source}: {name}: box {[x0, y0, x1, y1]} lies outside"
                    f" {width} x {height} pixels; say --size"
                )
        regions = [{"phrase": r["phrase"], "bbox": r["bbox"]} for r in image["regions"]]
        for i, caption in enumerate(
            image["captions"] if split == "train" else image["captions"][:1]
        ):
            lines.setdefault(split, []).append(
                record(name, f"_{i}", [(DESCRIBE, caption)], regions=regions)
            )

        boxes = list(referable(image["regions"]).items())
        rng.shuffle(boxes)
        told = [[x0 / width, y0 / height, x1 / width, y1 / height] for _, (x0, y0, x1, y1) in boxes]
        refer = [
            (REFER.format(phrase), "[" + ", ".join(f"{min(max(n, 0), 1):.2f}" for n in box) + "]")
            for (phrase, _), box in zip(boxes, told)
        ][:3]
        phrases = every[image["split"]]
        there = sorted({r["phrase"] for r in image["regions"]})
        seen = set(words(" ".join(there + image["captions"])))
        drawn = dict.fromkeys(rng.sample(phrases, min(60, len(phrases))))
        # its noun is never said
        absent = [p for p in drawn if (words(p) or [""])[-1] not in seen][:2]
        exist = [(EXIST.format(p), "yes") for p in rng.sample(there, min(2, len(there)))] + [
            (EXIST.format(p), "no") for p in absent
        ]
        if split != "test":
            rng.shuffle(exist)
            # never both: one tells the other
            turns = [(DESCRIBE, rng.choice(image["captions"]))] if rng.random() < 0.5 else exist
            turns += refer
            if not turns:
                continue  # nothing to ask
            lines.setdefault(f"{split}_sft", []).append(record(name, "", turns))
            continue
        lines.setdefault("test_caption", []).append(
            record(
                name,
                "",
                [(DESCRIBE, image["captions"][0])],
                task="caption",
                answer=image["captions"],
            )
        )
        for i, (turn, (_, box)) in enumerate(zip(refer, boxes)):
            lines.setdefault("test_refer", []).append(
                record(name, f"_refer{i}", [turn], task="refer", answer=box)
            )
        for i, turn in enumerate(exist):
            lines.setdefault("test_exist", []).append(
                record(name, f"_exist{i}", [turn], task="vqa", kind=turn[1], answer=turn[1])
            )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, records in lines.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"wrote {', '.join(f'{out / name}.jsonl ({len(r)})' for name, r in lines.items())}")


if __name__ == "__main__":
    main()
