"""Flickr30k Entities: the phrases of an image's five sentences, with the boxes of their entities.

Entity 0 and entities without a box (scenes) give no region. To refer: the phrases that name one
entity, which has one box.
"""
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from annotations import (
    SUFFIXES,
    Source,
    checked,
    each,
    image_size,
    listed,
    records_of,
    refer_records,
    same_size,
)
from data import image_path, read_text
from runtime import InputError

PHRASE = re.compile(r"\[/EN#(\d+)/\S+\s+(.*?)\s*\]")         # [/EN#entity/type words]


def read_boxes(tree, path: Path, size, scale, problems: list[str]) -> tuple[dict, set]:
    """-> ({entity: boxes}, entities of which a box is not good)."""
    entities, refused = {}, set()
    for item in tree.iter("object"):
        if item.find("bndbox") is None:
            continue
        where = f"{path}: entity {item.findtext('name')}"
        names = {entity.text for entity in item.findall("name")}
        with listed(problems, where):
            # the files count pixels from 1, up to and with the last one
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}"))
                              for key in ("xmin", "ymin", "xmax", "ymax"))
            corners = max(x0 - 1, 0), max(y0 - 1, 0), x1, y1
            box = [round(n * by, 2) for n, by in zip(corners, scale)]
            checked({"bbox": box}, size, where)
            for entity in names:
                entities.setdefault(entity, []).append(box)
            names = set()
        refused |= names
    return entities, refused


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
        where = f"image {image}"
        size = image_size(image_path({"image": image}, args.image_dir, where), where)
        lines = read_text(sentences / f"{name}.txt").splitlines()
        try:
            tree = ET.fromstring(read_text(path))
        except ET.ParseError as error:
            raise InputError(f"{path}: not valid XML ({error})") from None
        said = {key: int(tree.findtext(f"size/{key}")) for key in ("width", "height")}
        scale = (1,) * 4
        if args.resized:
            scale = (size[0] / said["width"], size[1] / said["height"]) * 2
        else:
            same_size(said, size, where)
        entities, refused = read_boxes(tree, path, size, scale, problems)
        said = [(words.lower(), entity) for line in lines for entity, words in PHRASE.findall(line)]
        if args.to == "refer":
            entities_of = {}
            for phrase, entity in said:
                entities_of.setdefault(phrase, {})[entity] = True
            one_each = [(phrase, *own) for phrase, own in entities_of.items() if len(own) == 1]
            regions = [{"phrase": phrase, "bbox": entities[entity][0]}
                       for phrase, entity in one_each
                       if entity not in refused and len(entities.get(entity, [])) == 1]
            return refer_records(name, image, regions, problems)
        pairs = dict.fromkeys((phrase, tuple(box)) for phrase, entity in said
                              for box in entities.get(entity, []))
        regions = [{"phrase": phrase, "bbox": list(box)} for phrase, box in pairs]
        captions = [PHRASE.sub(r"\2", line) for line in lines]
        return records_of(name, image, captions, regions, args.captions_per_image, problems)

    return Source(len(names), each(one))
