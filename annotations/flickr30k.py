"""Flickr30k Entities: the phrases of an image's five sentences, with the boxes of their entities.

Entity 0 and entities without a box (scenes) give no region. To refer: the phrases that name one
entity, which has one box.
"""
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from annotations import (
    SUFFIXES, Source, caption_records, checked, listed, photo, records_of, refer_records)
from data import read_text
from runtime import InputError

PHRASE = re.compile(r"\[/EN#(\d+)/\S+\s+(.*?)\s*\]")         # [/EN#entity/type words]


def read_boxes(tree, where: str, size, scale, problems: list[str]) -> dict[str, list]:
    """{entity: its boxes [x0, y0, x1, y1], None for one that is not good}."""
    entities = {}
    for item in tree.iter("object"):
        if item.find("bndbox") is None:
            continue
        box, spot = None, f"{where}: entity {item.findtext('name')}"
        with listed(problems, spot):
            # the files count pixels from 1, up to and with the last one
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}"))
                              for key in ("xmin", "ymin", "xmax", "ymax"))
            corners = max(x0 - 1, 0), max(y0 - 1, 0), x1, y1
            scaled = [round(n * by, 2) for n, by in zip(corners, scale * 2)]
            box = checked({"bbox": scaled}, size, spot, problems)["bbox"]
        for entity in {name.text for name in item.findall("name")}:
            entities.setdefault(entity, []).append(box)
    return entities


def read(args) -> Source:
    """The images that --split lists, or all."""
    sentences, boxes = Path(args.data) / "Sentences", Path(args.data) / "Annotations"
    if not args.data or not sentences.is_dir() or not boxes.is_dir():
        raise InputError(f"--data {args.data!r}: expected Flickr30k Entities' folder of Sentences/"
                         " and Annotations/")
    names = sorted(path.stem for path in sentences.glob("*.txt"))
    names = read_text(args.split).split() if args.split else names
    files = {path.stem.split("_")[0]: path.name     # ID.jpg; Flickr8k's are named ID_more.jpg
             for path in sorted(Path(args.image_dir).iterdir(), reverse=True)
             if path.suffix.lower() in SUFFIXES}

    def one(number: int, problems: list[str]) -> list[dict]:
        name = names[number]
        image, path = files.get(name, f"{name}.jpg"), boxes / f"{name}.xml"
        try:
            tree = ET.fromstring(read_text(path))
        except ET.ParseError as error:
            raise InputError(f"{path}: not valid XML ({error})") from None
        said = {key: int(tree.findtext(f"size/{key}")) for key in ("width", "height")}
        seen = photo(image, args, f"image {image}", "stored", problems,
                     None if args.resized else said)
        size = seen.size
        scale = (size[0] / said["width"], size[1] / said["height"]) if args.resized else (1, 1)
        entities = read_boxes(tree, str(path), size, scale, problems)
        lines = read_text(sentences / f"{name}.txt").splitlines()
        pairs = [(words.lower(), entity) for line in lines
                 for entity, words in PHRASE.findall(line)]
        if args.to == "refer":
            meant, regions = {}, []                 # {phrase: its entities}
            for phrase, entity in pairs:
                meant.setdefault(phrase, set()).add(entity)
            for phrase, own in meant.items():
                found = [box for entity in own for box in entities.get(entity, [None])]
                if len(found) == 1 and found[0]:
                    regions.append({"phrase": phrase, "bbox": found[0]})
            return refer_records(name, image, seen.regions(regions), problems)
        if args.to == "caption":
            return caption_records(name, image, [PHRASE.sub(r"\2", line) for line in lines])
        found = dict.fromkeys((phrase, tuple(box)) for phrase, entity in pairs
                              for box in entities.get(entity, []) if box)
        regions = seen.regions([{"phrase": p, "bbox": list(box)} for p, box in found])
        captions = [PHRASE.sub(r"\2", line) for line in lines]
        return records_of(name, image, captions, regions, args.captions_per_image, problems)

    inputs = [sentences, boxes, *([args.split] if args.split else [])]
    return Source(len(names), one, inputs=inputs)
