"""Other people's annotations -> records with regions: what the readers share.

    coco.py, flickr30k.py, grandf.py, refcoco.py, llava.py      files of annotations
    images.py       photographs alone, through the open models of detectors.py
    picture.py      what --inspect draws
    conversations.py            conversations and questions for stage 2, from COCO

A reader is `read(args) -> Source`, with the flags of annotate.py. What is wrong with an image, an
annotation or a region costs that alone, and becomes a line among the problems. A file that cannot
be read at all, or whose boxes look like another unit, is an `InputError`.
"""
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import runtime
from data import id_of, image_header, image_path, open_image
from labels import (
    check_frame, decode_rle, encode_rle, region_bounds, region_coverage, region_phrase,
    usable_rings)
from runtime import InputError

# Of images: those that Pillow reads, or may with a plug-in; one that it cannot read is listed.
SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .heic .heif .jp2 .ppm"
               " .pgm".split())
LOOKED_AT = 100                     # images whose boxes tell the unit of a file
# LLaVA-1.5's words
REFER = "Please provide the bounding box coordinate of the region this sentence describes: "


class Problems(list):
    """Lines about what was left out; counts, of what was mended; boxes, as their file has them."""

    def __init__(self):
        super().__init__()
        self.counts, self.boxes = Counter(), []


@dataclass
class Source:
    """`count` images in order; `one(number, problems)` makes the records of one of them.

    problems: of the files as a whole. batch: how many images are converted at a time. corners:
    whether boxes are [x0, y0, x1, y1] in the files, not [x, y, width, height]. inputs: the files
    that all is made of. things, captions: COCO's, for conversations.py.
    """

    count: int
    one: Callable[[int, Problems], list[dict]] | None
    problems: list[str] = field(default_factory=list)
    batch: int = 32
    corners: bool = True
    inputs: list = field(default_factory=list)
    things: set[str] = field(default_factory=set)
    captions: dict[str, list[str]] = field(default_factory=dict)

    def check_units(self) -> None:
        """InputError: the boxes of a sample of images look like another unit or order."""
        seen = Problems()
        for number in runtime.spread(range(self.count), LOOKED_AT) if self.one else []:
            with listed([], ""):
                self.one(number, seen)
        check_frame(*([box[i] for box in seen.boxes] for i in range(3)), corners=self.corners)

    def convert(self, numbers: range) -> list[tuple[list[dict], Problems]]:
        """(records, problems) of each image of a batch."""
        results = []
        for number in numbers:
            records, problems = [], Problems()
            with listed(problems, f"image {number} of the source"):
                records = self.one(number, problems)
            results.append((records, problems))
        return results


@contextlib.contextmanager
def listed(problems: list[str], where: str):
    """What is wrong inside is noted, and only what is inside is left out.

    A key or a type that the format does not have is the file's fault.
    """
    try:
        yield
    except InputError as error:
        problems.append(str(error))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        problems.append(f"{where}: not of the expected form ({type(error).__name__}: {error})")


def tables(value, path: str, what: str, problems: list[str], **keys: str) -> list[dict[str, list]]:
    """Lists of a JSON file's value: tables(..., images="id") -> [{an id, as text: its images}].

    Items without the key are told. InputError: no such list, or none of its items has the key.
    """
    found = []
    for name, key in keys.items():
        items, own = value.get(name) if isinstance(value, dict) else None, {}
        if not isinstance(items, list):
            raise InputError(f"{path}: has no list {name!r}; is this {what}?")
        for item in items:
            if isinstance(item, dict) and isinstance(item.get(key), int | float | str):
                own.setdefault(id_of(item[key]), []).append(item)
        missing = len(items) - sum(map(len, own.values()))
        if missing and not own:
            raise InputError(f'{path}: {name}[0] has no "{key}"; is this {what}?')
        if missing:
            problems.append(f'{path}: {missing} of {name} have no "{key}"')
        found.append(own)
    return found


def only_once(found: dict[str, list], path: str, what: str) -> None:
    """InputError: an id that two items of a file have."""
    for key, own in found.items():
        if len(own) > 1:
            raise InputError(f"{path}: {what} {key} occurs {len(own)} times; give each its own id")


def image_files(folder: Path) -> tuple[list[str], list[str]]:
    """(names of all images in a folder and those below, a line about its other files)."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = Counter(path.suffix.lower() or "no ending" for path in files) - Counter(
        path.suffix.lower() for path in images)
    kinds = ", ".join(f"{ending} ({n})" for ending, n in others.most_common(8))
    told = [f"{folder}: {others.total()} files are no images by their names: {kinds}"]
    return sorted(str(path.relative_to(folder)) for path in images), told * bool(others)


class Photo(NamedTuple):
    """An image: its size upright; its EXIF orientation; the size of the frame of its boxes."""

    upright: tuple[int, int]
    turn: int
    size: tuple[int, int]
    stored: bool                    # whether boxes are on the stored pixels

    def regions(self, regions: list[dict]) -> list[dict]:
        """The regions on the upright image, as records have them."""
        if not self.stored or self.turn == 1:
            return regions
        return [turned(region, self.size, self.turn) for region in regions]


def photo(name: str, args, where: str, frame: str, problems: Problems,
          said: dict | None = None) -> Photo:
    """An image, which is read whole, since a broken one would stop training.

    frame: upright or stored, which the format's own tools take; --boxes-on says otherwise.
    InputError: broken, or not of the size that its annotation `said`.
    """
    path = image_path({"image": name}, args.image_dir, where)
    upright, (_, turn) = open_image(path, where).size, image_header(path, where)
    frame = args.boxes_on or frame
    frames = {"upright": upright, "stored": upright[::-1] if turn > 4 else upright}
    size = frames[frame]
    if turn > 1:
        problems.counts[f"images are turned by EXIF; boxes are taken on their {frame} pixels"] += 1
    told = tuple((said or {}).get(key) or own for key, own in zip(("width", "height"), size))
    if told != size:
        fits = next((name for name, own in frames.items() if own == told), None)
        raise InputError(
            f"{where} is {size[0]} x {size[1]} pixels, but its annotation says {told[0]} x"
            f" {told[1]}"
            + f"; it is turned (EXIF orientation {turn}): use --boxes-on {fits}" * bool(fits))
    return Photo(upright, turn, size, frame == "stored")


def turned(region: dict, size: tuple[int, int], turn: int) -> dict:
    """A region on stored pixels (width, height) -> on the image turned upright, by orientation."""
    (w, h), own = size, dict(region)
    if "rle" in region:
        mask = decode_rle(region["rle"])
        mask = {2: mask[:, ::-1], 3: mask[::-1, ::-1], 4: mask[::-1], 5: mask.T,
                6: np.rot90(mask, -1), 7: mask[::-1, ::-1].T, 8: np.rot90(mask)}[turn]
        return own | {"rle": encode_rle(mask)}

    def move(points):
        x, y = np.float64(points).reshape(-1, 2).T
        both = {2: (w - x, y), 3: (w - x, h - y), 4: (x, h - y), 5: (y, x), 6: (h - y, x),
                7: (h - y, w - x), 8: (y, w - x)}[turn]
        return np.stack(both, 1)

    if "bbox" in region:
        corners = move(region["bbox"])
        return own | {"bbox": [*corners.min(0).tolist(), *corners.max(0).tolist()]}
    rings = usable_rings(region["polygon"], "polygon")
    return own | {"polygon": [move(ring).ravel().tolist() for ring in rings]}


def checked(region: dict, size: tuple[int, int], where: str, problems: Problems) -> dict:
    """The region, its box cut to the image of (width, height). InputError: malformed, or it covers
    nothing of it."""
    try:
        bounds = region_bounds(region, where)
    except InputError:
        box = region.get("bbox") if isinstance(region, dict) else None
        if isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) for n in box):
            problems.boxes.append((where, box, size))   # it may be in another order
        raise
    if bounds is not None:
        problems.boxes.append((where, bounds.tolist(), size))
    if not region_coverage([region], size, "stretch", (1, 1), where).any():
        raise InputError(f"{where}: covers no pixel")
    if bounds is None:
        return region
    cut = np.concatenate([bounds[:2].clip(0), np.minimum(bounds[2:], size)])
    if np.abs(cut - bounds).max() > 1:                  # less is rounding
        problems.counts["regions stick out of their image and are cut to it"] += 1
    if "bbox" in region and (cut != bounds).any():
        return region | {"bbox": cut.tolist()}
    return region


def named(regions: list[dict], where: str, problems: list[str]) -> list[dict]:
    """The regions that have a phrase; training refuses others."""
    kept = []
    for i, region in enumerate(regions):
        with listed(problems, where):
            region_phrase(region, f"{where}: regions[{i}]")
            kept.append(region)
    return kept


def records_of(name: str, image: str, captions: list[str], regions: list[dict], limit: int,
               problems: list[str]) -> list[dict]:
    """The records of an image: one for each of its first `limit` captions (0: all of them).

    Each has all regions. The phrases describe an image without captions. InputError: neither.
    """
    regions, told = named(regions, f"image {name}", problems), []
    for text in captions:
        with listed(problems, f"image {name}: caption {text!r}"):
            told += [text.strip()] if text.strip() else []
    told = told or [", ".join(dict.fromkeys(region["phrase"] for region in regions))]
    if not told[0]:
        raise InputError(f"image {name}: has no caption and no region")
    told, more = told[: limit or None], {"regions": regions} if regions else {}
    return [{"id": name if len(told) == 1 else f"{name}_{i}", "image": image, "conversations": [
        {"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": text}],
        **more} for i, text in enumerate(told)]


def caption_records(name: str, image: str, captions: list[str]) -> list[dict]:
    """The evaluation record of an image's captions, all of which are references."""
    told = [text.strip() for text in captions if text.strip()]
    if not told:
        raise InputError(f"image {name}: has no caption")
    asked = [{"from": "human", "value": "<image>\nDescribe the image."}]
    return [{"id": name, "image": image, "task": "caption", "answer": told, "conversations": asked}]


def refer_records(name: str, image: str, regions: list[dict], problems: list[str]) -> list[dict]:
    """Evaluation records of an image's referring expressions, the phrases of its boxes."""
    return [{"id": f"{name}_{i}", "image": image, "task": "refer", "answer": region["bbox"],
             "conversations": [{"from": "human", "value": f"<image>\n{REFER}{region['phrase']}"}]}
            for i, region in enumerate(named(regions, f"image {name}", problems))]
