"""Other people's annotations -> records with regions: what the readers share.

    coco.py, flickr30k.py, grandf.py, refcoco.py, llava.py      files of annotations
    images.py       photographs alone, through the open models of detectors.py
    picture.py      what --inspect draws

A reader is `read(args) -> Source`, with the flags of annotate.py. What is wrong with an image, an
annotation or a region costs that alone, and becomes a line among the problems. A file that cannot
be read at all is an `InputError`.
"""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from data import image_path, open_image
from labels import region_coverage, region_phrase
from runtime import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}       # of images
# LLaVA-1.5's words
REFER = "Please provide the bounding box coordinate of the region this sentence describes: "


@dataclass
class Source:
    """`count` images in order; `one(number, problems)` makes the records of one of them.

    problems: of the files as a whole. batch: how many images are converted at a time.
    """

    count: int
    one: Callable[[int, list[str]], list[dict]] | None
    problems: list[str] = field(default_factory=list)
    batch: int = 32

    def convert(self, numbers: range) -> list[tuple[list[dict], list[str]]]:
        """(records, problems) of each image of a batch."""
        results = []
        for number in numbers:
            records, problems = [], []
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
            if isinstance(item, dict) and isinstance(item.get(key), int | str):
                own.setdefault(str(item[key]), []).append(item)
        missing = len(items) - sum(map(len, own.values()))
        if missing and not own:
            raise InputError(f'{path}: {name}[0] has no "{key}"; is this {what}?')
        if missing:
            problems.append(f'{path}: {missing} of {name} have no "{key}"')
        found.append(own)
    return found


def image_size(name: str, image_dir: str, where: str, said: dict | None = None) -> tuple[int, int]:
    """(width, height) of an image, which is read whole, since a broken one would stop training.

    InputError: broken, or not of the size that its annotation `said`.
    """
    size = open_image(image_path({"image": name}, image_dir, where), where).size
    width, height = size
    told = (said.get("width", width), said.get("height", height)) if said else size
    if told != size:
        raise InputError(f"{where} is {width} x {height} pixels, but its annotation says"
                         f" {told[0]} x {told[1]}")
    return size


def checked(region: dict, size: tuple[int, int], where: str) -> dict:
    """The region. InputError: malformed, or it covers nothing of an image of (width, height)."""
    if not region_coverage([region], size, "stretch", (1, 1), where).any():
        raise InputError(f"{where}: covers no pixel")
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


def refer_records(name: str, image: str, regions: list[dict], problems: list[str]) -> list[dict]:
    """Evaluation records of an image's referring expressions, the phrases of its boxes."""
    return [{"id": f"{name}_{i}", "image": image, "task": "refer", "answer": region["bbox"],
             "conversations": [{"from": "human", "value": f"<image>\n{REFER}{region['phrase']}"}]}
            for i, region in enumerate(named(regions, f"image {name}", problems))]
