"""Annotations in the formats that people have them in -> records with regions: the readers of annotate.py, apart so that each reads in one
sitting.

    masks               COCO's polygons, panoptic ids -> RLE                                            polygon_rle, segment_rles
    sources             COCO, Flickr30k Entities, GranD-f, RefCOCO, LLaVA -> records, image by image    from_coco, ..., from_llava

A source has a number of images and converts some of them when asked (`Source`); `args` are the flags of annotate.py. What is wrong with one
image, annotation or region becomes a line among its problems and costs that alone; a file that cannot be read at all is an `InputError`.
"""
import codecs
import contextlib
import io
import pickle
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import InputError
from large_json import Objects

# ------------------------------------------------------------------------------------------------------------- images and masks

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}           # of images


def image_size(path: Path, where: str) -> tuple[int, int]:
    """(width, height) of an image as `data.open_image` gives it, after reading all of the file: a JPEG at an eighth of its size, which is
    several times faster and finds a broken one as well. InputError: missing or broken."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(274) in (5, 6, 7, 8)   # the EXIF orientations that swap the sides
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:                                           # whatever a broken file brings about; open_image names it
        width, height = data.open_image(path, where).size
        turned = False
    return (height, width) if turned else (width, height)


def checked(region: dict, size: tuple[int, int], where: str) -> dict:
    """The region, if it is well formed and covers something of an image of this (width, height). InputError otherwise."""
    if not data.region_coverage([region], size, "stretch", (1, 1), where).any():
        raise InputError(f"{where}: covers no pixel")
    return region


def ring_edges(ring: list[float], width: int, height: int) -> np.ndarray:
    """Where a polygon's ring switches pixels on and off, along the columns of the image, ascending. By COCO's rule (rleFrPoly in maskApi.c
    of cocoapi), so that masks are those that everybody has.

    The outline is walked on a grid five times as fine, edge by edge. Where it steps from one fine column to the next at the middle of a
    pixel's column, it switches this column from there down.
    """
    x, y = (5 * np.float64(ring).reshape(-1, 2).T + 0.5).astype(np.int64)                       # towards 0, as in C
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    dx, dy = np.abs(x1 - x), np.abs(y1 - y)
    steep, steps = dx < dy, np.maximum(dx, dy)
    back = np.where(steep, y > y1, x > x1)                      # edges are walked left to right, or downwards, then turned round
    x, x1, y, y1 = np.where(back, x1, x), np.where(back, x, x1), np.where(back, y1, y), np.where(back, y, y1)
    slope = np.where(steep, x1 - x, y1 - y) / np.maximum(steps, 1)
    edge = np.repeat(np.arange(len(x)), steps + 1)
    t = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    t = np.where(back[edge], steps[edge] - t, t)
    along = t + np.where(steep, y, x)[edge]
    across = (np.where(steep, x, y)[edge] + slope[edge] * t + 0.5).astype(np.int64)
    u, v = np.where(steep[edge], across, along), np.where(steep[edge], along, across)

    step = np.flatnonzero(u[1:] != u[:-1])
    column = (np.minimum(u[1:], u[:-1])[step] + 0.5) / 5 - 0.5
    row = np.ceil(((np.minimum(v[1:], v[:-1])[step] + 0.5) / 5 - 0.5).clip(0, height))
    inside = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    edges, times = np.unique((column[inside] * height + row[inside]).astype(np.int64), return_counts=True)
    return edges[(times % 2 == 1) & (edges < width * height)]


def polygon_rle(rings: list[list[float]], size: tuple[int, int]) -> dict:
    """Polygon -> RLE of the mask that pycocotools makes of it; several rings are united. size: (width, height)."""
    width, height = size
    edges = [ring_edges(ring, width, height) for ring in rings]
    if len(edges) == 1:
        return data.encode_edges(edges[0], (height, width))
    mask = np.zeros(width * height, bool)
    for own in edges:
        switch = np.zeros(width * height, bool)
        switch[own] = True
        mask |= np.logical_xor.accumulate(switch)
    return data.encode_rle(mask.reshape(width, height).T)


def segment_rles(ids: np.ndarray) -> dict[int, dict]:
    """Panoptic ids (height, width) -> {id: RLE of its pixels}."""
    flat = ids.T.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    ends, values = np.append(starts[1:], flat.size), flat[starts]
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    runs = np.split(order, first[1:])                           # of each id, in order; two runs of one id never touch
    edges = (np.stack([starts[run], ends[run]], 1).ravel() for run in runs)
    return {int(value): data.encode_edges(own[own < flat.size], ids.shape) for value, own in zip(found, edges)}


def category_phrase(name: str) -> str:
    """A COCO category as a phrase: "sky-other-merged" -> "sky", "wall-brick" -> "wall brick"; the endings that only say how classes of
    stuff were put together name nothing that is seen."""
    return " ".join(word for word in name.split("-") if word not in ("other", "merged", "stuff")) or name


# --------------------------------------------------------------------------------------------------------------------- sources


@dataclass
class Source:
    """`count` images, in order; `convert` takes the numbers of some of them and gives (records, problems) for each; `problems` are those of
    the files as a whole. `batch` images are converted at a time."""

    count: int
    convert: Callable[[range], list[tuple[list[dict], list[str]]]]
    problems: list[str] = field(default_factory=list)
    batch: int = 32


@contextlib.contextmanager
def listed(problems: list[str], where: str):
    """What is wrong inside is noted, and only what is inside is left out. A key or a type that the format does not have is the
    file's fault."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        problems.append(f"{where}: not of the expected form ({type(error).__name__}: {error})")


def each(one: Callable[[int, list[str]], list[dict]]) -> Callable:
    """`convert` of a source that makes the records of one image at a time: one(number, problems) -> records, or InputError."""
    def convert(numbers):
        results = []
        for number in numbers:
            problems = []
            records = []
            with listed(problems, f"image {number} of the source"):
                records = one(number, problems)
            results.append((records, problems))
        return results
    return convert


def named(regions: list[dict], where: str, problems: list[str]) -> list[dict]:
    """The regions that have a phrase; training refuses others."""
    kept = []
    for i, region in enumerate(regions):
        with listed(problems, where):
            data.region_phrase(region, f"{where}: regions[{i}]")
            kept.append(region)
    return kept


def records_of(name: str, image: str, captions: list[str], regions: list[dict], limit: int, problems: list[str]) -> list[dict]:
    """The records of an image: one for each of its first `limit` captions (0: all), each with all regions. An image without captions is
    described by its phrases. InputError: neither."""
    regions, told = named(regions, f"image {name}", problems), []
    for text in captions:
        with listed(problems, f"image {name}: caption {text!r}"):
            told += [text.strip()] if text.strip() else []
    captions = told or [", ".join(dict.fromkeys(r["phrase"] for r in regions))]
    if not captions[0]:
        raise InputError(f"image {name}: has no caption and no region")
    captions = captions[: limit or None]
    return [{"id": name if len(captions) == 1 else f"{name}_{i}", "image": image,
             "conversations": [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": text}],
             **({"regions": regions} if regions else {})} for i, text in enumerate(captions)]


def refer_records(name: str, image: str, regions: list[dict], request: str, problems: list[str]) -> list[dict]:
    """Evaluation records of an image's referring expressions, the phrases of regions that are boxes."""
    return [{"id": f"{name}_{i}", "image": image, "task": "refer", "answer": region["bbox"],
             "conversations": [{"from": "human", "value": "<image>\n" + request.replace("{}", region["phrase"])}]}
            for i, region in enumerate(named(regions, f"image {name}", problems))]


def corners(box, size: tuple[int, int], where: str) -> list[float]:
    """COCO's [x, y, width, height] -> [x0, y0, x1, y1]. InputError: no such box in an image of this size."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(n, int | float) for n in box):
        raise InputError(f"{where}: bbox {box} is not [x, y, width, height]")
    box = [round(n, 2) for n in (box[0], box[1], box[0] + box[2], box[1] + box[3])]
    return checked({"bbox": box}, size, where)["bbox"]


def shape_of(annotation: dict, size: tuple[int, int], where: str) -> dict:
    """The mask of a COCO annotation as {"rle"}, or where it has none its {"bbox"}. InputError: malformed, or it covers no pixel."""
    form = annotation.get("segmentation")
    if isinstance(form, list) and form:
        data.region_kind({"polygon": form}, where)
        if np.abs(np.concatenate(form)).max() > 2 * max(size):  # its outline is walked point by point
            raise InputError(f"{where}: reaches far outside of its {size[0]} x {size[1]} image")
        form = polygon_rle(form, size)
        if form["counts"] == data.encode_edges([], form["size"])["counts"]:
            raise InputError(f"{where}: covers no pixel")
        return {"rle": form}
    if form:
        return {"rle": packed(form, size, where)}
    return {"bbox": corners(annotation.get("bbox"), size, where)}


def packed(rle: dict, size: tuple[int, int], where: str) -> dict:
    """An RLE, checked, in the compressed form."""
    checked({"rle": rle}, size, where)
    return rle if isinstance(rle["counts"], str) else data.encode_rle(data.decode_rle(rle, where))


def same_size(info: dict, size: tuple[int, int], where: str) -> None:
    """Refuse an image of another size than its annotation says."""
    said = info.get("width", size[0]), info.get("height", size[1])
    if said != size:
        raise InputError(f"{where} is {size[0]} x {size[1]} pixels, but its annotation says {said[0]} x {said[1]}")


def from_coco(args) -> Source:
    """COCO: instances, panoptic segments and captions, joined by the images' ids. Of an image that is in both, the panoptic file gives the
    stuff alone, since its things are the instances again."""
    by_image = {"images": "id", "annotations": "image_id"}
    files = {name: Objects(getattr(args, name), by_image | ({} if name == "captions" else {"categories": "id"}), f"COCO's {name} file")
             for name in ("instances", "panoptic", "captions") if getattr(args, name)}
    if not files:
        raise InputError("--from coco needs one or more of --instances, --panoptic and --captions")
    for name, own in (("instances", "category_id"), ("panoptic", "segments_info"), ("captions", "caption")):
        for key in list(files[name].spans["annotations"])[:1] if name in files else []:
            if own not in files[name].get("annotations", key)[0]:
                raise InputError(f'{files[name].path}: its annotations have no "{own}"; is this COCO\'s {name} file?')
    folder = Path(args.panoptic_dir or str(args.panoptic).removesuffix(".json"))
    if "panoptic" in files and not folder.is_dir():
        raise InputError(f"--panoptic-dir {folder} is not a folder; it holds the PNG files of {args.panoptic}")
    categories = {name: {key: file.get("categories", key)[0] for key in file.spans["categories"]}
                  for name, file in files.items() if name != "captions"}
    images = list(dict.fromkeys(key for file in files.values() for key in file.spans["images"]))
    known, problems = set(images), []
    for file in files.values():
        problems += file.problems
        problems += [f"{file.path}: image {key} occurs {len(spans) // 2} times; the first one counts"
                     for key, spans in file.spans["images"].items() if len(spans) > 2]
        problems += [f"{file.path}: {len(spans) // 2} annotations of image {key}, which is not among the images"
                     for key, spans in file.spans["annotations"].items() if key not in known]

    def region(name: str, annotation: dict, shape: Callable[[], dict], where: str) -> dict:
        category = categories[name].get(str(annotation.get("category_id")))
        if category is None:
            raise InputError(f"{where}: category_id {annotation.get('category_id')} is not among the categories")
        return {"phrase": category_phrase(category["name"]), **shape()}

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = images[number], []
        info = next(file.get("images", key)[0] for file in files.values() if key in file.spans["images"])
        where = f"image {key} ({info.get('file_name')})"
        size = image_size(data.image_path({"image": info.get("file_name")}, args.image_dir, where), where)
        same_size(info, size, where)
        for a in files["instances"].get("annotations", key) if "instances" in files else []:
            spot = f"{args.instances}: annotation {a.get('id')} of {where}"
            with listed(problems, spot):
                regions.append(region("instances", a, lambda a=a, spot=spot: shape_of(a, size, spot), spot))
        both = "instances" in files and key in files["instances"].spans["images"]
        for a in files["panoptic"].get("annotations", key) if "panoptic" in files else []:
            with listed(problems, f"{args.panoptic}: {where}"):
                ids = panoptic_ids(folder / a["file_name"], size, where)
                rles = segment_rles(ids)
                for s in a["segments_info"]:
                    if not both or not categories["panoptic"].get(str(s.get("category_id")), {}).get("isthing"):
                        spot = f"{args.panoptic}: segment {s.get('id')} of {where}"
                        with listed(problems, spot):
                            if s.get("id") not in rles:
                                raise InputError(f"{spot}: covers no pixel of {folder / a['file_name']}")
                            regions.append(region("panoptic", s, lambda s=s, rles=rles: {"rle": rles[s["id"]]}, spot))
        captions = [a.get("caption") or "" for a in files["captions"].get("annotations", key)] if "captions" in files else []
        return records_of(str(key), info["file_name"], captions, regions, args.captions_per_image, problems)

    return Source(len(images), each(one), problems)


def panoptic_ids(path: Path, size: tuple[int, int], where: str) -> np.ndarray:
    """A panoptic PNG -> the ids of its pixels, R + 256 G + 65536 B: int64 (height, width). InputError: unreadable, or of another size."""
    colours = np.asarray(data.open_image(path, where), np.int64)
    if colours.shape[:2] != size[::-1]:
        raise InputError(f"{where}: {path} is {colours.shape[1]} x {colours.shape[0]} pixels, the image {size[0]} x {size[1]}")
    return colours @ np.int64([1, 256, 65536])


PHRASE = re.compile(r"\[/EN#(\d+)/\S+\s+(.*?)\s*\]")             # Flickr30k Entities: [/EN#entity/type words]


def read_text(path: Path) -> str:
    """A text file. InputError: not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def from_flickr30k(args) -> Source:
    """Flickr30k Entities: the phrases of an image's five sentences, each with the boxes of the entity that it names. Entity 0 and entities
    without a box (scenes) give no region. To refer: the phrases that name one entity, which has one box."""
    sentences, boxes = Path(args.data) / "Sentences", Path(args.data) / "Annotations"
    if not args.data or not sentences.is_dir() or not boxes.is_dir():
        raise InputError(f"--data {args.data!r}: expected Flickr30k Entities' folder of Sentences/ and Annotations/")
    names = read_text(Path(args.split)).split() if args.split else sorted(path.stem for path in sentences.glob("*.txt"))
    files = {path.stem.split("_")[0]: path.name for path in sorted(Path(args.image_dir).iterdir(), reverse=True)
             if path.suffix.lower() in SUFFIXES}                # ID.jpg; Flickr8k's are named ID_more.jpg

    def one(number: int, problems: list[str]) -> list[dict]:
        name = names[number]
        image = files.get(name, f"{name}.jpg")
        where = f"image {image}"
        size = image_size(data.image_path({"image": image}, args.image_dir, where), where)
        try:
            lines = read_text(sentences / f"{name}.txt").splitlines()
            tree = ET.fromstring(read_text(boxes / f"{name}.xml"))
        except OSError as error:
            raise InputError(f"{where}: no {error.filename}") from None
        except ET.ParseError as error:
            raise InputError(f"{boxes / name}.xml: not valid XML ({error})") from None
        said = {key: int(tree.findtext(f"size/{key}")) for key in ("width", "height")}
        scale = (size[0] / said["width"], size[1] / said["height"]) * 2 if args.resized else (1,) * 4
        if not args.resized:
            same_size(said, size, where)
        entities, refused = {}, set()                           # refused: entities of which a box is not good
        for item in tree.iter("object"):
            if item.find("bndbox") is not None:
                spot = f"{boxes / name}.xml: entity {item.findtext('name')}"
                names_of = {entity.text for entity in item.findall("name")}
                with listed(problems, spot):
                    # the files count pixels from 1, up to and with the last one
                    x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                    box = [round(n * by, 2) for n, by in zip((max(x0 - 1, 0), max(y0 - 1, 0), x1, y1), scale)]
                    checked({"bbox": box}, size, spot)
                    for entity in names_of:
                        entities.setdefault(entity, []).append(box)
                    names_of = set()
                refused |= names_of
        said = [(phrase.lower(), entity) for line in lines for entity, phrase in PHRASE.findall(line)]
        if args.to == "refer":
            entities_of = {}
            for phrase, entity in said:
                entities_of.setdefault(phrase, {})[entity] = True
            found = [(phrase, entities.get(entity, [])) for phrase, (entity, *others) in entities_of.items()
                     if not others and entity not in refused]
            regions = [{"phrase": phrase, "bbox": own[0]} for phrase, own in found if len(own) == 1]
            return refer_records(name, image, regions, args.request, problems)
        regions = dict.fromkeys((phrase, tuple(box)) for phrase, entity in said for box in entities.get(entity, []))
        captions = [PHRASE.sub(r"\2", line) for line in lines]
        regions = [{"phrase": phrase, "bbox": list(box)} for phrase, box in regions]
        return records_of(name, image, captions, regions, args.captions_per_image, problems)

    return Source(len(names), each(one))


def from_grandf(args) -> Source:
    """GLaMM's GranD-f, in its three published forms: {file_name, caption, groundings: {phrase: {token_positives, rle_masks}}} (OpenPSG and
    the human annotations), {id: {img_file_name, caption, refs: [{sentence, segmentation}]}} (RefCOCOg), and COCO's with a caption in each
    image and {tokens_positive, sam_mask} in each annotation (Flickr30k). Token positions are characters of the caption."""
    with open(args.data, "rb") as file:
        coco = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"
    file = Objects(args.data, {"images": "id", "annotations": "image_id"} if coco else {None: None}, "a file of GranD-f")
    keys = list(file.spans["images" if coco else None])

    def one(number: int, problems: list[str]) -> list[dict]:
        key = name = keys[number]
        item = file.get("images" if coco else None, key)[0]
        if isinstance(item, dict) and len(item) == 1:
            (name, item), = item.items()                        # RefCOCOg: its id is the key
        if not isinstance(item, dict) or not isinstance(item.get("caption"), str):
            raise InputError(f'{args.data}: entry {key} has no "caption"')
        image = item.get("file_name") or item.get("img_file_name")
        where = f"{args.data}: entry {key} ({image})"
        size = image_size(data.image_path({"image": image}, args.image_dir, where), where)
        if coco:
            same_size(item, size, where)
        caption, shapes = item["caption"].strip('"').strip(), []
        for phrase, grounding in (item.get("groundings") or {}).items():
            with listed(problems, f"{where}: {phrase!r}"):
                shapes += [(phrase, {"segmentation": rle}) for rle in grounding["rle_masks"]]
        for i, ref in enumerate(item.get("refs") or []):
            with listed(problems, f"{where}: refs[{i}]"):
                shapes.append((ref["sentence"], ref))
        for a in file.get("annotations", key) if coco else []:
            with listed(problems, f"{where}: annotation {a.get('id')}"):
                first, last = a["tokens_positive"][0]
                shapes.append((item["caption"][first:last], {"segmentation": a["sam_mask"]}))
        regions = []
        for phrase, shape in shapes:
            with listed(problems, f"{where}: {phrase!r}"):
                regions.append({"phrase": phrase, **shape_of(shape, size, f"{where}: {phrase!r}")})
        return records_of(str(item.get("image_id", item.get("id", name))), image, [caption], regions, 1, problems)

    return Source(len(keys), each(one))


class PlainUnpickler(pickle.Unpickler):
    """A pickle of lists, dicts, texts and numbers; one that names any function or class, and so could run code, is refused."""

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def from_refcoco(args) -> Source:
    """RefCOCO, RefCOCO+ and RefCOCOg in REFER's files: refs(...).p and instances.json; captions, if wanted, from COCO's captions file."""
    if not args.data or not args.instances:
        raise InputError("--from refcoco needs --data, REFER's refs(...).p, and --instances, the instances.json beside it")
    try:
        refs = PlainUnpickler(io.BytesIO(Path(args.data).read_bytes()), encoding="utf-8", errors="replace").load()      # by Python 2
        images, splits = {}, Counter(ref["split"] for ref in refs)
        for ref in refs:
            if args.split in ("", ref["split"]):
                images.setdefault(ref["image_id"], []).append((ref["ann_id"], [s["sent"] for s in ref["sentences"]]))
    except OSError:
        raise
    except Exception as error:                                  # a pickle can fail in any way
        raise InputError(f"{args.data}: not a pickle of REFER's references ({error})") from None
    if not images:
        raise InputError(f"--split {args.split}: {args.data} has {', '.join(f'{k} ({n})' for k, n in splits.items())}")
    file = Objects(args.instances, {"images": "id", "annotations": "id"}, "REFER's instances.json")
    told = Objects(args.captions, {"images": "id", "annotations": "image_id"}, "COCO's captions file") if args.captions else None
    keys = list(images)

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = keys[number], []
        info = next(iter(file.get("images", key)), None)
        if info is None:
            raise InputError(f"{args.data}: image {key} is not in {args.instances}")
        where = f"image {key} ({info['file_name']})"
        size = image_size(data.image_path({"image": info["file_name"]}, args.image_dir, where), where)
        same_size(info, size, where)
        for annotation_id, sentences in images[key]:
            spot = f"{args.instances}: annotation {annotation_id} of {where}"
            with listed(problems, spot):
                annotation = next(iter(file.get("annotations", annotation_id)), None)
                if annotation is None:
                    raise InputError(f"{spot} is not there")
                if args.to == "refer":
                    box = corners(annotation.get("bbox"), size, spot)
                    regions += [{"phrase": sentence, "bbox": box} for sentence in sentences]
                else:
                    shape = shape_of(annotation, size, spot)
                    regions += [{"phrase": sentence, **shape} for sentence in dict.fromkeys(sentences)]
        if args.to == "refer":
            return refer_records(str(key), info["file_name"], regions, args.request, problems)
        captions = [a.get("caption") or "" for a in told.get("annotations", key)] if told else []
        return records_of(str(key), info["file_name"], captions, regions, args.captions_per_image, problems)

    return Source(len(keys), each(one))


def answer_of(record: dict, where: str) -> str:
    """What the assistant first says in a LLaVA record. InputError: not a conversation that training takes."""
    return data.check_turns(record.get("conversations"), record.get("image") is not None, where)[1][1]


def llava_record(record: dict, args, where: str, problems: list[str]) -> dict:
    """A LLaVA record as it is, without the regions that do not fit its image. InputError: its image is broken, or it is no conversation."""
    answer_of(record, where)
    if record.get("image") is None:
        if record.get("regions"):
            raise InputError(f'{where}: "image" is missing, which its regions are about')
        return record
    size, regions = image_size(data.image_path(record, args.image_dir, where), where), []
    for i, region in enumerate(record.get("regions") or []):
        with listed(problems, f"{where}: regions[{i}]"):
            data.region_phrase(region, f"{where}: regions[{i}]")
            regions.append(checked(region, size, f"{where}: regions[{i}]"))
    return record | {"regions": regions} if "regions" in record else record


def from_llava(args) -> Source:
    """LLaVA records as they are, see `llava_record`."""
    file = Objects(args.data, {None: None}, "a file of records")

    def one(number: int, problems: list[str]) -> list[dict]:
        record = file.get(None, number)[0]
        return [llava_record(record, args, f"{args.data}: record {record.get('id', number)}", problems)]

    return Source(len(file.spans[None]), each(one))
