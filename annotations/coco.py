"""COCO's files: instances, panoptic segments and captions, joined by the images' ids.

Masks are pycocotools' own, pixel for pixel. Of an image that is in both, the panoptic file gives
the stuff alone, since its things are the instances again.
"""
from pathlib import Path

import numpy as np

from annotations import (
    Source, caption_records, checked, listed, only_once, photo, records_of, tables)
from data import id_of, open_image, read_json
from labels import decode_rle, encode_edges, encode_rle, usable_rings
from runtime import InputError

OWN = {"instances": "category_id", "panoptic": "segments_info", "captions": "caption"}

# ---- shapes and names ----------------------------------------------------------------------------


def ring_edges(ring: list[float], width: int, height: int) -> np.ndarray:
    """Where a polygon's ring switches pixels on and off, along the image's columns, ascending.

    By COCO's rule (rleFrPoly in maskApi.c of cocoapi). The outline is walked on a grid five times
    as fine, edge by edge. Where it steps from one fine column to the next at the middle of a
    pixel's column, it switches this column from there down.
    """
    x, y = (5 * np.float64(ring).reshape(-1, 2).T + 0.5).astype(np.int64)       # towards 0, as in C
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    dx, dy = np.abs(x1 - x), np.abs(y1 - y)
    steep, steps = dx < dy, np.maximum(dx, dy)
    back = np.where(steep, y > y1, x > x1)  # walked left to right or down, then turned round
    x, x1 = np.where(back, x1, x), np.where(back, x, x1)
    y, y1 = np.where(back, y1, y), np.where(back, y, y1)
    slope = np.where(steep, x1 - x, y1 - y) / np.maximum(steps, 1)
    edge = np.repeat(np.arange(len(x)), steps + 1)
    t = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    t = np.where(back[edge], steps[edge] - t, t)
    along = t + np.where(steep, y, x)[edge]
    across = (np.where(steep, x, y)[edge] + slope[edge] * t + 0.5).astype(np.int64)
    u = np.where(steep[edge], across, along)
    v = np.where(steep[edge], along, across)

    step = np.flatnonzero(u[1:] != u[:-1])
    column = (np.minimum(u[1:], u[:-1])[step] + 0.5) / 5 - 0.5
    row = np.ceil(((np.minimum(v[1:], v[:-1])[step] + 0.5) / 5 - 0.5).clip(0, height))
    inside = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    switches = (column[inside] * height + row[inside]).astype(np.int64)
    edges, times = np.unique(switches, return_counts=True)
    return edges[(times % 2 == 1) & (edges < width * height)]


def polygon_rle(rings: list[list[float]], size: tuple[int, int]) -> dict:
    """Polygon -> RLE of the mask that pycocotools makes of it; rings are united."""
    width, height = size
    edges = [ring_edges(ring, width, height) for ring in rings]
    if len(edges) == 1:
        return encode_edges(edges[0], (height, width))
    mask = np.zeros(width * height, bool)
    for own in edges:
        switch = np.zeros(width * height, bool)
        switch[own] = True
        mask |= np.logical_xor.accumulate(switch)
    return encode_rle(mask.reshape(width, height).T)


def box_of(annotation: dict, size: tuple[int, int], where: str, problems) -> list[float]:
    """COCO's [x, y, width, height] -> [x0, y0, x1, y1]. InputError: no such box in the image."""
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and all(isinstance(n, int | float) for n in box)
    if not numbers or len(box) != 4:
        raise InputError(f"{where}: bbox {box} is not [x, y, width, height]")
    box = [round(n, 2) for n in (box[0], box[1], box[0] + box[2], box[1] + box[3])]
    return checked({"bbox": box}, size, where, problems)["bbox"]


def shape_of(annotation: dict, size: tuple[int, int], where: str, problems) -> dict:
    """An annotation's mask as {"rle"}; its {"bbox"} where it has none, or one that cannot be used.

    InputError: neither can be used.
    """
    if not annotation.get("segmentation"):
        return {"bbox": box_of(annotation, size, where, problems)}
    try:
        return {"rle": mask_of(annotation["segmentation"], size, where, problems)}
    except InputError as error:
        try:
            box = {"bbox": box_of(annotation, size, where, problems)}
        except InputError:
            raise error from None
        problems.append(f"{error}; its box is used")
        return box


def mask_of(form, size: tuple[int, int], where: str, problems) -> dict:
    """COCO's segmentation, a polygon or an RLE -> compressed RLE. InputError: unusable."""
    if isinstance(form, list):
        region = {"polygon": form}
        rings = usable_rings(form, where)
        if len(rings) < len(form):
            problems.append(f"{where}: {len(form) - len(rings)} rings of fewer than 3 points are"
                            " left out")
        if np.abs(np.concatenate(rings)).max() > 2 * max(size):     # it is walked point by point
            raise InputError(f"{where}: reaches far outside of its {size[0]} x {size[1]} image")
        checked(region, size, where, problems)
        rle = polygon_rle(rings, size)
        if rle == encode_edges([], rle["size"]):
            raise InputError(f"{where}: covers no pixel")
        return rle
    checked({"rle": form}, size, where, problems)
    return form if isinstance(form["counts"], str) else encode_rle(decode_rle(form, where))


def panoptic_ids(path: Path, size: tuple[int, int], where: str) -> np.ndarray:
    """A panoptic PNG -> the ids of its pixels, R + 256 G + 65536 B: int64 (height, width)."""
    colours = np.asarray(open_image(path, where), np.int64)
    if colours.shape[:2] != size[::-1]:
        raise InputError(f"{where}: {path} is {colours.shape[1]} x {colours.shape[0]} pixels, the"
                         f" image {size[0]} x {size[1]}")
    return colours @ np.int64([1, 256, 65536])


def category_phrase(name: str) -> str:
    """A category as a phrase: "sky-other-merged" -> "sky", "wall-brick" -> "wall brick".

    The endings say only how classes of stuff were put together.
    """
    name = name.replace("_", " ")                       # LVIS's "baby_buggy"
    words = [word for word in name.split("-") if word not in ("other", "merged", "stuff")]
    return " ".join(words) or name


def phrase_of(annotation: dict, categories: dict[str, list[dict]], where: str) -> str:
    """The name of its category. InputError: it has none."""
    category = annotation.get("category_id")
    if id_of(category) not in categories:
        raise InputError(f"{where}: category_id {category} is not among the categories")
    return category_phrase(categories[id_of(category)][0]["name"])


def crowd(annotation: dict) -> dict:
    """{"crowd": True} of a region of many that COCO did not count, else nothing."""
    return {"crowd": True} if annotation.get("iscrowd") else {}


def name_of(image: dict, image_dir: str) -> str | None:
    """An image's file: its file_name, or as LVIS has it the end of its coco_url."""
    if image.get("file_name") or not isinstance(image.get("coco_url"), str):
        return image.get("file_name")
    parts = image["coco_url"].split("/")
    split = "/".join(parts[-2:])                        # train2017/000000000009.jpg
    return split if (Path(image_dir) / split).is_file() else parts[-1]


# ---- the files -----------------------------------------------------------------------------------


def read(args) -> Source:
    """The images of all given files."""
    files = {name: getattr(args, name) for name in OWN if getattr(args, name)}
    folder = Path(args.panoptic.removesuffix(".json"))
    if not files:
        raise InputError("--from coco needs one or more of --instances, --panoptic and --captions")
    if args.panoptic and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it holds the PNG files of {args.panoptic}")
    problems, infos, annotations, categories = [], {}, {}, {}
    for name, path in files.items():
        keys = {"images": "id", "annotations": "image_id"}
        keys |= {} if name == "captions" else {"categories": "id"}
        infos[name], annotations[name], *more = tables(
            read_json(path), path, f"COCO's {name} file", problems, **keys)
        categories[name] = more[0] if more else {}
        if any(OWN[name] not in own[0] for own in list(annotations[name].values())[:1]):
            raise InputError(f'{path}: its annotations have no "{OWN[name]}"; is this COCO\'s'
                             f" {name} file?")
    images = {}
    files_of = {}                                       # file: the id of its image
    for name, path in files.items():
        only_once(infos[name], path, "image id")
        only_once(categories[name], path, "category id")
        for key, own in infos[name].items():
            image = name_of(own[0], args.image_dir)
            if name_of(images.setdefault(key, own[0]), args.image_dir) != image:
                raise InputError(f"{path}: image id {key} is {image}, but in another file"
                                 f" {name_of(images[key], args.image_dir)}; they do not belong"
                                 " together")
            if image is not None and files_of.setdefault(image, key) != key:
                raise InputError(f"{path}: {image} has two ids, {files_of[image]} and {key}")
    for name, path in files.items():
        problems += [f"{path}: {len(own)} annotations of image {key}, which is not among the images"
                     for key, own in annotations[name].items() if key not in images]
    keys = list(images)

    def segments(annotation: dict, things: bool, size, where: str, problems: list[str]) -> list:
        """Regions of a panoptic annotation, with its things or without."""
        path, regions = folder / annotation["file_name"], []
        ids = panoptic_ids(path, size, where)
        for s in annotation["segments_info"]:
            with listed(problems, f"{args.panoptic}: {where}"):
                spot = f"{args.panoptic}: segment {s.get('id')} of {where}"
                category = categories["panoptic"].get(id_of(s.get("category_id")), [{}])[0]
                if category.get("isthing") and not things:
                    continue
                mask = ids == s.get("id")
                if not mask.any():
                    raise InputError(f"{spot}: covers no pixel of {path}")
                phrase = phrase_of(s, categories["panoptic"], spot)
                regions.append({"phrase": phrase, "rle": encode_rle(mask), **crowd(s)})
        return regions

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = keys[number], []
        own = {name: several.get(key, []) for name, several in annotations.items()}
        name = name_of(images[key], args.image_dir)
        where = f"image {key} ({name})"
        image = photo(name, args, where, "stored", problems, images[key])
        size = image.size
        for a in own.get("instances", []):
            spot = f"{args.instances}: annotation {a.get('id')} of {where}"
            with listed(problems, spot):
                phrase = phrase_of(a, categories["instances"], spot)
                shape = shape_of(a, size, spot, problems)
                regions.append({"phrase": phrase, **shape, **crowd(a)})
        things = key not in infos.get("instances", {})
        for a in own.get("panoptic", []):
            with listed(problems, f"{args.panoptic}: {where}"):
                regions += segments(a, things, size, where, problems)
        captions = [a.get("caption") or "" for a in own.get("captions", [])]
        if args.to == "caption":
            return caption_records(key, name, captions)
        regions = image.regions(regions)
        return records_of(key, name, captions, regions, args.captions_per_image, problems)

    inputs = [*files.values(), *([folder] if args.panoptic else [])]
    source = Source(len(keys), one, problems, corners=False, inputs=inputs)
    source.things = {category_phrase(own[0]["name"]) for found in categories.values()
                     for own in found.values() if own[0].get("isthing", 1)}
    source.captions = {name_of(own, args.image_dir): [
        a["caption"].strip() for a in annotations.get("captions", {}).get(key, [])
        if isinstance(a.get("caption"), str) and a["caption"].strip()]
        for key, own in images.items()}
    return source
