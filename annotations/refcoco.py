"""RefCOCO, RefCOCO+ and RefCOCOg in REFER's files: refs(...).p and instances.json; COCO's
captions."""
import io
import pickle
from collections import Counter
from pathlib import Path

from annotations import (
    Source,
    corners,
    each,
    grouped,
    image_size,
    listed,
    read_lists,
    records_of,
    refer_records,
    same_size,
)
from annotations.coco import shape_of
from data import image_path
from runtime import InputError


class PlainUnpickler(pickle.Unpickler):
    """A pickle of lists, dicts, texts and numbers; one that could run code is refused."""

    def find_class(self, module, name):
        """Refuse: it names a function or a class."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_refs(path: str, split: str) -> dict:
    """{image id: [(annotation id, sentences)]} of REFER's pickle, one split or "" for all."""
    try:
        content = io.BytesIO(Path(path).read_bytes())
        refs = PlainUnpickler(content, encoding="utf-8", errors="replace").load()   # by Python 2
        images, splits = {}, Counter(ref["split"] for ref in refs)
        for ref in refs:
            if split in ("", ref["split"]):
                sentences = [s["sent"] for s in ref["sentences"]]
                images.setdefault(ref["image_id"], []).append((ref["ann_id"], sentences))
    except OSError:
        raise
    except Exception as error:                      # a pickle can fail in any way
        raise InputError(f"{path}: not a pickle of REFER's references ({error})") from None
    if not images:
        has = ", ".join(f"{k} ({n})" for k, n in splits.items())
        raise InputError(f"--split {split}: {path} has {has}")
    return images


def read(args) -> Source:
    """The images of the references."""
    if not args.data or not args.instances:
        raise InputError("--from refcoco needs --data, REFER's refs(...).p, and --instances, the"
                         " instances.json beside it")
    images, problems, captions = read_refs(args.data, args.split), [], {}
    value = read_lists(args.instances, "REFER's instances.json", "images", "annotations")
    infos = grouped(args.instances, "images", value["images"], "id", problems)
    masks = grouped(args.instances, "annotations", value["annotations"], "id", problems)
    if args.captions:
        told = read_lists(args.captions, "COCO's captions file", "annotations")["annotations"]
        captions = grouped(args.captions, "annotations", told, "image_id", problems)
    keys = list(images)

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = keys[number], []
        info = infos.get(str(key), [None])[0]
        if info is None:
            raise InputError(f"{args.data}: image {key} is not in {args.instances}")
        name = info["file_name"]
        where = f"image {key} ({name})"
        size = image_size(image_path({"image": name}, args.image_dir, where), where)
        same_size(info, size, where)
        for annotation_id, sentences in images[key]:
            spot = f"{args.instances}: annotation {annotation_id} of {where}"
            with listed(problems, spot):
                annotation = masks.get(str(annotation_id), [None])[0]
                if annotation is None:
                    raise InputError(f"{spot} is not there")
                if args.to == "refer":
                    box = corners(annotation.get("bbox"), size, spot)
                    regions += [{"phrase": sentence, "bbox": box} for sentence in sentences]
                else:
                    shape = shape_of(annotation, size, spot)
                    regions += [{"phrase": text, **shape} for text in dict.fromkeys(sentences)]
        if args.to == "refer":
            return refer_records(str(key), name, regions, problems)
        told = [a.get("caption") or "" for a in captions.get(str(key), [])]
        return records_of(str(key), name, told, regions, args.captions_per_image, problems)

    return Source(len(keys), each(one), problems)
