"""RefCOCO, RefCOCO+ and RefCOCOg: REFER's refs(...).p and instances.json, with COCO's captions."""
import io
import pickle
from collections import Counter
from pathlib import Path

from annotations import (
    Source, caption_records, listed, only_once, photo, records_of, refer_records, tables)
from annotations.coco import box_of, shape_of
from data import id_of, read_json
from runtime import InputError


class PlainUnpickler(pickle.Unpickler):
    """A pickle of lists, dicts, texts and numbers; one that could run code is refused."""

    def find_class(self, module, name):
        """Refuse: it names a function or a class."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_refs(path: str, split: str) -> dict:
    """{image id: [(annotation id, sentences)]} of REFER's pickle, one split or "" for all."""
    content = io.BytesIO(Path(path).read_bytes())
    try:
        refs = PlainUnpickler(content, encoding="utf-8", errors="replace").load()   # by Python 2
        images, splits = {}, Counter(ref["split"] for ref in refs)
        for ref in refs:
            if split in ("", ref["split"]):
                sentences = [s["sent"] for s in ref["sentences"]]
                images.setdefault(ref["image_id"], []).append((ref["ann_id"], sentences))
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
    infos, masks = tables(read_json(args.instances), args.instances, "REFER's instances.json",
                          problems, images="id", annotations="id")
    only_once(infos, args.instances, "image id")
    only_once(masks, args.instances, "annotation id")
    if args.captions:
        captions, = tables(read_json(args.captions), args.captions, "COCO's captions file",
                           problems, annotations="image_id")
    keys = list(images)

    def one(number: int, problems: list[str]) -> list[dict]:
        key, regions = id_of(keys[number]), []
        if key not in infos:
            raise InputError(f"{args.data}: image {key} is not in {args.instances}")
        name = infos[key][0]["file_name"]
        where = f"image {key} ({name})"
        seen = photo(name, args, where, "stored", problems, infos[key][0])
        size = seen.size
        for annotation, sentences in images[keys[number]]:
            spot = f"{args.instances}: annotation {annotation} of {where}"
            with listed(problems, spot):
                if id_of(annotation) not in masks:
                    raise InputError(f"{spot} is not there")
                own = masks[id_of(annotation)][0]
                if args.to == "refer":
                    box = box_of(own, size, spot, problems)
                    regions += [{"phrase": text, "bbox": box} for text in sentences]
                else:
                    shape = shape_of(own, size, spot, problems)
                    regions += [{"phrase": text, **shape} for text in dict.fromkeys(sentences)]
        regions = seen.regions(regions)
        if args.to == "refer":
            return refer_records(key, name, regions, problems)
        told = [a.get("caption") or "" for a in captions.get(key, [])]
        if args.to == "caption":
            return caption_records(key, name, told)
        return records_of(key, name, told, regions, args.captions_per_image, problems)

    inputs = [args.data, args.instances, *([args.captions] if args.captions else [])]
    return Source(len(keys), one, problems, corners=False, inputs=inputs)
