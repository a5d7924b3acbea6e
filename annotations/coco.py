"""COCO's files: instances, panoptic segments and captions, joined by the images' ids.

Masks are pycocotools' own, pixel for pixel. Of an image that is in both, the panoptic file gives
the stuff alone, since its things are the instances again.
"""
from pathlib import Path

import numpy as np

from annotations import (
    Source,
    checked,
    corners,
    each,
    grouped,
    image_size,
    listed,
    read_lists,
    records_of,
    same_size,
)
from data import image_path, open_image
from labels import decode_rle, encode_edges, encode_rle, region_kind
from runtime import InputError

OWN = {"instances": "category_id", "panoptic": "segments_info", "captions": "caption"}


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


def shape_of(annotation: dict, size: tuple[int, int], where: str) -> dict:
    """An annotation's mask as {"rle"}, or where it has none its {"bbox"}. InputError: unusable."""
    form = annotation.get("segmentation")
    if isinstance(form, list) and form:
        region_kind({"polygon": form}, where)
        if np.abs(np.concatenate(form)).max() > 2 * max(size):      # it is walked point by point
            raise InputError(f"{where}: reaches far outside of its {size[0]} x {size[1]} image")
        rle = polygon_rle(form, size)
        if rle["counts"] == encode_edges([], rle["size"])["counts"]:
            raise InputError(f"{where}: covers no pixel")
        return {"rle": rle}
    if form:
        checked({"rle": form}, size, where)
        packed = isinstance(form["counts"], str)
        return {"rle": form if packed else encode_rle(decode_rle(form, where))}
    return {"bbox": corners(annotation.get("bbox"), size, where)}


def segment_rles(ids: np.ndarray) -> dict[int, dict]:
    """Panoptic ids (height, width) -> {id: RLE of its pixels}."""
    flat = ids.T.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    ends, values = np.append(starts[1:], flat.size), flat[starts]
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    runs = np.split(order, first[1:])               # of each id, in order; two never touch
    edges = (np.stack([starts[run], ends[run]], 1).ravel() for run in runs)
    return {int(value): encode_edges(own[own < flat.size], ids.shape)
            for value, own in zip(found, edges)}


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
    words = [word for word in name.split("-") if word not in ("other", "merged", "stuff")]
    return " ".join(words) or name


def read(args) -> Source:
    """The images of all given files."""
    files = {name: getattr(args, name) for name in OWN if getattr(args, name)}
    if not files:
        raise InputError("--from coco needs one or more of --instances, --panoptic and --captions")
    problems, infos, annotations, categories = [], {}, {}, {}
    for name, path in files.items():
        lists = ("images", "annotations", "categories")[: 2 if name == "captions" else 3]
        value = read_lists(path, f"COCO's {name} file", *lists)
        if value["annotations"] and OWN[name] not in value["annotations"][0]:
            raise InputError(f'{path}: its annotations have no "{OWN[name]}"; is this COCO\'s'
                             f" {name} file?")
        infos[name] = grouped(path, "images", value["images"], "id", problems)
        annotations[name] = grouped(path, "annotations", value["annotations"], "image_id", problems)
        if name != "captions":
            own = grouped(path, "categories", value["categories"], "id", problems)
            categories[name] = {key: several[0] for key, several in own.items()}
    images = list(dict.fromkeys(key for own in infos.values() for key in own))
    for name, path in files.items():
        problems += [f"{path}: image {key} occurs {len(own)} times; the first one counts"
                     for key, own in infos[name].items() if len(own) > 1]
        problems += [f"{path}: {len(own)} annotations of image {key}, which is not among the images"
                     for key, own in annotations[name].items() if key not in infos[name]
                     and not any(key in known for known in infos.values())]
    folder = Path(str(args.panoptic).removesuffix(".json"))
    if "panoptic" in files and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it holds the PNG files of {args.panoptic}")

    def phrase(name: str, annotation: dict, where: str) -> str:
        category = categories[name].get(str(annotation.get("category_id")))
        if category is None:
            raise InputError(f"{where}: category_id {annotation.get('category_id')} is not among"
                             " the categories")
        return category_phrase(category["name"])

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = images[number], []
        info = next(own[key][0] for own in infos.values() if key in own)
        where, name = f"image {key} ({info.get('file_name')})", info.get("file_name")
        size = image_size(image_path({"image": name}, args.image_dir, where), where)
        same_size(info, size, where)
        for a in annotations.get("instances", {}).get(key, []):
            spot = f"{args.instances}: annotation {a.get('id')} of {where}"
            with listed(problems, spot):
                regions.append({"phrase": phrase("instances", a, spot), **shape_of(a, size, spot)})
        both = key in infos.get("instances", {})
        for a in annotations.get("panoptic", {}).get(key, []):
            with listed(problems, f"{args.panoptic}: {where}"):
                rles = segment_rles(panoptic_ids(folder / a["file_name"], size, where))
                for s in a["segments_info"]:
                    category = categories["panoptic"].get(str(s.get("category_id")), {})
                    spot = f"{args.panoptic}: segment {s.get('id')} of {where}"
                    with listed(problems, spot):
                        if both and category.get("isthing"):
                            continue
                        if s.get("id") not in rles:
                            file = folder / a["file_name"]
                            raise InputError(f"{spot}: covers no pixel of {file}")
                        text = phrase("panoptic", s, spot)
                        regions.append({"phrase": text, "rle": rles[s["id"]]})
        captions = [a.get("caption") or "" for a in annotations.get("captions", {}).get(key, [])]
        return records_of(key, name, captions, regions, args.captions_per_image, problems)

    return Source(len(images), each(one), problems)
