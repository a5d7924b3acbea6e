"""Annotations as people have them -> records with regions: a reader per format, for annotate.py.

    coco.py        instances, panoptic segments, captions     flickr30k.py   Flickr30k Entities
    grandf.py      GranD-f's three forms                      refcoco.py     REFER's files
    llava.py       LLaVA records                              images.py      images alone, through
                                                              detectors.py   open models
    picture.py     what --inspect draws

Each reader has `read(args) -> Source`; args are annotate.py's flags. What is wrong with an image,
an annotation or a region becomes a line among its problems and costs that alone. A file that cannot
be read at all is an `InputError`. A JSON file is read whole: about 7 times its size in memory.
"""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data import open_image, read_json
from labels import region_coverage, region_phrase
from runtime import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}       # of images


@dataclass
class Source:
    """`count` images in order; `convert(numbers)` -> (records, problems) for each of them.

    problems: of the files as a whole; batch: how many images are converted at a time.
    """

    count: int
    convert: Callable[[range], list[tuple[list[dict], list[str]]]]
    problems: list[str] = field(default_factory=list)
    batch: int = 32


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


def each(one: Callable[[int, list[str]], list[dict]]) -> Callable:
    """`convert` of a source that makes one image's records at a time: one(number, problems)."""
    def convert(numbers):
        results = []
        for number in numbers:
            records, problems = [], []
            with listed(problems, f"image {number} of the source"):
                records = one(number, problems)
            results.append((records, problems))
        return results
    return convert


# ---- files ---------------------------------------------------------------------------------------


def read_lists(path: str, what: str, *names: str) -> dict[str, list]:
    """A JSON object with the lists of these names. InputError: it has none; what: the file's."""
    value = read_json(path)
    for name in names:
        if not isinstance(value, dict) or not isinstance(value.get(name), list):
            raise InputError(f"{path}: has no list {name!r}; is this {what}?")
    return value


def grouped(path: str, name: str, items: list, key: str, problems: list[str]) -> dict[str, list]:
    """{value of `key`, as text: its items}. Items without it are told; InputError: all are."""
    found, bad = {}, 0
    for item in items:
        value = item.get(key) if isinstance(item, dict) else None
        if isinstance(value, int | str):
            found.setdefault(str(value), []).append(item)
        else:
            bad += 1
    if bad and bad == len(items):
        raise InputError(f'{path}: {name}[0] has no "{key}"; is this the right file?')
    if bad:
        problems.append(f'{path}: {bad} of {name} have no "{key}"')
    return found


def image_size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) of an image as `data.open_image` gives it. InputError: missing or broken.

    All of the file is read, a JPEG at an eighth of its size: several times faster, and a broken one
    is found as well.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(274) in (5, 6, 7, 8)       # orientations that swap sides
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:                               # whatever is broken: open_image names it
        return open_image(path, where).size
    return (height, width) if turned else (width, height)


def same_size(info: dict, size: tuple[int, int], where: str) -> None:
    """Refuse an image of another size than its annotation says."""
    said = info.get("width", size[0]), info.get("height", size[1])
    if said != size:
        raise InputError(f"{where} is {size[0]} x {size[1]} pixels, but its annotation says"
                         f" {said[0]} x {said[1]}")


# ---- regions and records -------------------------------------------------------------------------


def checked(region: dict, size: tuple[int, int], where: str) -> dict:
    """The region. InputError: malformed, or it covers nothing of an image of (width, height)."""
    if not region_coverage([region], size, "stretch", (1, 1), where).any():
        raise InputError(f"{where}: covers no pixel")
    return region


def corners(box, size: tuple[int, int], where: str) -> list[float]:
    """COCO's [x, y, width, height] -> [x0, y0, x1, y1]. InputError: no such box in the image."""
    numbers = isinstance(box, list) and all(isinstance(n, int | float) for n in box)
    if not numbers or len(box) != 4:
        raise InputError(f"{where}: bbox {box} is not [x, y, width, height]")
    box = [round(n, 2) for n in (box[0], box[1], box[0] + box[2], box[1] + box[3])]
    return checked({"bbox": box}, size, where)["bbox"]


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

    Each has all regions. An image without captions is described by its phrases. InputError:
    neither.
    """
    regions, told = named(regions, f"image {name}", problems), []
    for text in captions:
        with listed(problems, f"image {name}: caption {text!r}"):
            told += [text.strip()] if text.strip() else []
    captions = told or [", ".join(dict.fromkeys(r["phrase"] for r in regions))]
    if not captions[0]:
        raise InputError(f"image {name}: has no caption and no region")
    captions, more = captions[: limit or None], {"regions": regions} if regions else {}
    return [{"id": name if len(captions) == 1 else f"{name}_{i}", "image": image, "conversations": [
        {"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": text}],
        **more} for i, text in enumerate(captions)]


# LLaVA-1.5's words
REFER = "Please provide the bounding box coordinate of the region this sentence describes: "


def refer_records(name: str, image: str, regions: list[dict], problems: list[str]) -> list[dict]:
    """Evaluation records of an image's referring expressions, the phrases of its boxes."""
    return [{"id": f"{name}_{i}", "image": image, "task": "refer", "answer": region["bbox"],
             "conversations": [{"from": "human", "value": f"<image>\n{REFER}{region['phrase']}"}]}
            for i, region in enumerate(named(regions, f"image {name}", problems))]
