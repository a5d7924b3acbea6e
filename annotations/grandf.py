"""GLaMM's GranD-f, in its three published forms. Token positions are characters of the caption.

    {file_name, caption, groundings: {phrase: {rle_masks}}}            OpenPSG, human annotations
    {id: {img_file_name, caption, refs: [{sentence, segmentation}]}}   RefCOCOg
    COCO's, a caption in each image, {tokens_positive, sam_mask} in each annotation        Flickr30k
"""
from annotations import Source, listed, photo, records_of, tables
from annotations.coco import shape_of
from data import read_json
from runtime import InputError


def read(args) -> Source:
    """The images of the file."""
    value, masks, problems = read_json(args.data), {}, []
    coco = isinstance(value, dict)
    if coco:
        masks, images = tables(value, args.data, "a file of GranD-f", problems,
                               annotations="image_id", images="id")
        entries = [(key, own[0]) for key, own in images.items()]
    else:
        items = value if isinstance(value, list) else []
        entries = [(str(i), item) for i, item in enumerate(items)]

    def one(number: int, problems: list[str]) -> list[dict]:
        key, item = entries[number]
        name = key
        if isinstance(item, dict) and len(item) == 1:
            (name, item), = item.items()            # RefCOCOg: its id is the key
        if not isinstance(item, dict) or not isinstance(item.get("caption"), str):
            raise InputError(f'{args.data}: entry {key} has no "caption"')
        image = item.get("file_name") or item.get("img_file_name")
        where = f"{args.data}: entry {key} ({image})"
        seen = photo(image, args, where, "upright", problems, item if coco else None)
        shapes, regions = [], []                    # (phrase, an annotation as COCO's)
        for phrase, grounding in (item.get("groundings") or {}).items():
            with listed(problems, f"{where}: {phrase!r}"):
                shapes += [(phrase, {"segmentation": rle}) for rle in grounding["rle_masks"]]
        for i, ref in enumerate(item.get("refs") or []):
            with listed(problems, f"{where}: refs[{i}]"):
                shapes.append((ref["sentence"], ref))
        for a in masks.get(key, []):
            with listed(problems, f"{where}: annotation {a.get('id')}"):
                first, last = a["tokens_positive"][0]       # and there may be more
                spans = [item["caption"][first:last] for first, last in a["tokens_positive"]]
                shapes.append((" ".join(spans), {"segmentation": a["sam_mask"]}))
        for phrase, shape in shapes:
            spot = f"{where}: {phrase!r}"
            with listed(problems, spot):
                regions.append({"phrase": phrase, **shape_of(shape, seen.size, spot, problems)})
        regions = seen.regions(regions)
        name = str(item.get("image_id", item.get("id", name)))
        return records_of(name, image, [item["caption"].strip('"')], regions, 1, problems)

    return Source(len(entries), one, problems, inputs=[args.data])
