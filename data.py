"""From files to batches: everything that happens before the model sees a tensor.

    records        a JSON or JSONL file of LLaVA records, some with "regions"        read_records
    images         a file -> an upright RGB image -> the encoder's input             open_image, transform_image
    regions        box, polygon or RLE -> share of each patch covered -> words       region_coverage, patch_words
    patch labels   words -> tokens -> the target distribution Y                      word_ids, patch_targets
    conversations  turns -> token ids, and labels on what the assistant says         tokenize, tokenize_prompt
    batches        records -> samples -> padded batches; which records, when         Records, collate, StepSampler

Images and regions pass through one geometry: `view_box` names the part of the original image that the encoder sees,
nearly always a square, `transform_image` cuts it out, and `region_coverage` divides that same part into patches. Labels
are therefore made when a record is loaded, for whatever image size and patch grid the model has.

Symbols (B, P, T, K = most tokens of a patch, Y) are those of model.py. Whatever is wrong with the user's files is an
`InputError`: one line that names the file and the record.
"""

import functools
import json
import re
import struct
from pathlib import Path, PurePath

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps

IMAGE_TOKEN = -200  # stands for one patch among the token ids; model.splice puts a row of H in its place
IGNORE = -100       # label without loss
IMAGE_MARKER = "<image>"
GEOMETRIES = ("pad", "crop", "stretch")
PROMPTS = ("plain", "v1", "chat")


class InputError(ValueError):
    """Bad user input. The message is one line: where (file, record, region), what is wrong, what to do."""


# -------------------------------------------------------------------------------------------------------------- records


def read_records(path, regions=None):
    """Records of a .json file (one list) or a .jsonl file (one object per line) -> list of dicts.

    regions: optional second file, of objects {"id", "regions"}; each record gets the regions of its id (replacing its
    own), a record whose id is not there stays as it is. InputError: unreadable or malformed file, no record, an id
    twice in `regions`, or no id in common.
    """
    records = _read_objects(path)
    if regions is None:
        return records
    found = {}
    for i, entry in enumerate(_read_objects(regions)):
        if "id" not in entry or not isinstance(entry.get("regions"), list):
            raise InputError(f'{regions}: entry {i} needs "id" and a list "regions"')
        if str(entry["id"]) in found:
            raise InputError(f'{regions}: id {entry["id"]} occurs twice; put all its regions into one entry')
        found[str(entry["id"])] = entry["regions"]
    matched = [record for record in records if "id" in record and str(record["id"]) in found]
    if not matched:
        raise InputError(f"{regions}: none of its ids occurs in {path}; were the two files made for each other?")
    for record in matched:
        record["regions"] = found[str(record["id"])]
    return records


def _read_objects(path):
    """The objects of a .json or .jsonl file."""
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: expected a file named .json (one list) or .jsonl (one object per line)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None

    if path.suffix == ".json":
        objects = _parse_json(text, path, 1)
        if not isinstance(objects, list):
            raise InputError(f"{path}: expected a list of records; for one object per line name the file .jsonl")
        names = [f"record {i}" for i in range(len(objects))]
    else:
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        objects = [_parse_json(line, path, i) for i, line in lines]
        names = [f"line {i}" for i, _ in lines]
    if not objects:
        raise InputError(f"{path}: holds no records")
    for name, value in zip(names, objects):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name} is not an object but {type(value).__name__}")
    return objects


def _parse_json(text, path, first_line):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {first_line + error.lineno - 1}: not valid JSON ({error.msg})") from None


# -------------------------------------------------------------------------------------------------- images and geometry


def image_path(record, image_dir, where):
    """The file of a record's image. InputError for a path that leaves image_dir: by its name alone, since links that the user put into
    the folder may lead anywhere, but a record may not."""
    image = record["image"]
    if not isinstance(image, str) or not image or PurePath(image).is_absolute() or ".." in PurePath(image).parts:
        raise InputError(f"{where}: image {image!r} is not a path inside the image folder")
    return Path(image_dir) / image


def open_image(path, where):
    """The image at `path`, upright (EXIF orientation applied), as RGB. Transparent pixels show white, 16-bit grey is
    scaled to 8 bits. Region coordinates refer to this image. InputError: missing, truncated or not an image."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)  # OSError repeats the path in its message
        raise InputError(f"{where}: cannot read the image {path} ({reason})") from None


def view_box(image_size, geometry, aspect=1.0):
    """The part of the original image that becomes the encoder's input: (x0, y0, x1, y1) in whole pixels.

    image_size: (width, height); aspect: width / height of the encoder's input, 1 for a square. "pad": the smallest such
    box around the image, centred, which sticks out of it (LLaVA-1.5's stage 2); "crop": the largest inside of it, centred
    (CLIP's processor, LLaVA's stage 1); "stretch": all of the image, whatever its shape.
    """
    width, height = image_size
    if geometry == "stretch":
        return 0, 0, width, height
    if geometry not in GEOMETRIES:
        raise InputError(f"geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    if (width > height * aspect) == (geometry == "pad"):            # a side of the image is a side of the box
        size = width, max(1, round(width / aspect))
    else:
        size = max(1, round(height * aspect)), height
    x0, y0 = (-((full - own) // 2) if geometry == "pad" else (own - full) // 2 for full, own in zip(size, image_size))
    return x0, y0, x0 + size[0], y0 + size[1]


def transform_image(image, size, geometry, mean, std, resample=Image.Resampling.BICUBIC):
    """RGB image -> the encoder's input, float32 (3, height, width): `view_box` resized, (value - mean) / std.

    size: the side of a square, or (height, width); mean, std: one number per channel for values in [0, 1]; resample: PIL's
    filter. Padding has the mean colour, cut to whole numbers as LLaVA does, so it is nearly 0 here.
    """
    height, width = sides(size)
    box = view_box(image.size, geometry, width / height)
    if geometry == "pad":
        canvas = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), tuple(int(255 * m) for m in mean))
        canvas.paste(image, (-box[0], -box[1]))
        image = canvas
    else:
        image = image.crop(box)                                     # before the resizing: no pixel beyond the box has a part in it
    image = image.resize((width, height), resample)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)     # (height, width, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def sides(size):
    """(height, width) of an encoder's input, which is given as such a pair or as the side of a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------- regions: box, polygon or RLE -> share of each patch covered


def region_kind(region, where):
    """"bbox", "polygon" or "rle", after checking the region's form (all that can be checked without its image)."""
    kinds = [kind for kind in ("bbox", "polygon", "rle") if isinstance(region, dict) and kind in region]
    if len(kinds) != 1:
        raise InputError(f"{where}: a region has exactly one of bbox, polygon and rle, here {' and '.join(kinds) or 'none'}")
    kind, value = kinds[0], region[kinds[0]]
    if kind == "bbox":
        box = _numbers(value, f"{where}: bbox")
        if len(box) != 4 or box[2] <= box[0] or box[3] <= box[1]:
            raise InputError(f"{where}: bbox {value} is not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    elif kind == "polygon":
        if not isinstance(value, list | tuple) or not value or not all(isinstance(ring, list | tuple) for ring in value):
            raise InputError(f"{where}: a polygon is a list of rings [[x, y, x, y, ...], ...]")
        for ring in value:
            if len(_numbers(ring, f"{where}: polygon")) < 6 or len(ring) % 2:
                raise InputError(f"{where}: a polygon's ring needs at least 3 points, x and y of each, not {len(ring)} numbers")
    elif not isinstance(value, dict) or not isinstance(value.get("size"), list | tuple) or "counts" not in value:
        raise InputError(f'{where}: an rle is {{"size": [height, width], "counts": ...}}')
    return kind


def _numbers(values, where):
    """A list of finite numbers -> float64 array."""
    try:
        array = np.asarray(values)
    except ValueError:  # a ragged list
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"{where} is not a list of finite numbers")
    return array.astype(np.float64)


def _check_inside(x, y, image_size, where):
    """Regions end at the image's edge; up to one pixel beyond is rounding, and is clipped where it is used."""
    width, height = image_size
    if min(x.min(), y.min()) < -1 or x.max() > width + 1 or y.max() > height + 1:
        raise InputError(
            f"{where}: reaches from ({x.min():g}, {y.min():g}) to ({x.max():g}, {y.max():g}), outside its {width} x {height} image;"
            " coordinates are pixels of the original image"
        )


def _overlap(cells, others):
    """Lengths shared by two rows of adjacent intervals, given by their edges: (m + 1,), (n + 1,) -> (m, n)."""
    lower = np.maximum(cells[:-1, None], others[None, :-1])
    upper = np.minimum(cells[1:, None], others[None, 1:])
    return (upper - lower).clip(0).astype(np.float32)


def region_coverage(regions, image_size, geometry, grid, where="regions", aspect=1.0):
    """Share of each patch's area that each region covers: float32 (R, grid_h, grid_w).

    regions: dicts with one of bbox, polygon, rle, in pixels of the original image; image_size: (width, height);
    grid: (rows, columns). The part named by `view_box` is divided evenly into rows x columns cells; what lies outside
    the image (padding) is uncovered. Exact for masks: with A_y (rows, height) the share of each cell's height that
    lies in each pixel row, and A_x likewise, coverage = A_y mask A_x^T. A box needs no mask: it shares a height with each
    row of cells and a width with each column, and their products are areas. InputError: see `region_kind` and `region_mask`.
    """
    (width, height), (rows, columns) = image_size, grid
    x0, y0, x1, y1 = view_box(image_size, geometry, aspect)
    edges_y, edges_x = np.linspace(y0, y1, rows + 1), np.linspace(x0, x1, columns + 1)
    A_y = _overlap(edges_y, np.arange(height + 1.0)) * (rows / (y1 - y0))                   # (grid_h, height)
    A_x = _overlap(edges_x, np.arange(width + 1.0)) * (columns / (x1 - x0))                 # (grid_w, width)
    coverage = np.empty((len(regions), rows, columns), np.float32)
    for i, region in enumerate(regions):
        name = f"{where}: regions[{i}]"
        if region_kind(region, name) == "bbox":
            coverage[i] = _box_areas(region["bbox"], image_size, edges_y, edges_x, name) * (rows / (y1 - y0) * columns / (x1 - x0))
        else:
            coverage[i] = A_y @ region_mask(region, image_size, name) @ A_x.T
    return coverage


def region_mask(region, image_size, where):
    """Share of each pixel that the region covers: float32 (height, width) in [0, 1].

    Boxes: exact, fractions at the edges. Polygons: 1 where the pixel's centre is inside a ring by the even-odd rule;
    rings are united. InputError: a malformed region, one that sticks out of the image by more than a pixel, or an RLE
    of another size than the image.
    """
    kind, (width, height) = region_kind(region, where), image_size
    if kind == "bbox":
        return _box_areas(region["bbox"], image_size, np.arange(height + 1.0), np.arange(width + 1.0), where)
    if kind == "polygon":
        mask = np.zeros((height, width), bool)
        for ring in region["polygon"]:
            points = np.asarray(ring, np.float64).reshape(-1, 2)
            _check_inside(points[:, 0], points[:, 1], image_size, where)
            mask |= _inside_ring(points, width, height)
    else:
        if list(region["rle"]["size"]) != [height, width]:
            raise InputError(f"{where}: rle size {region['rle']['size']} is not the image's [height, width] = [{height}, {width}]")
        mask = decode_rle(region["rle"], where)
    return mask.astype(np.float32)


def _box_areas(box, image_size, edges_y, edges_x, where):
    """Area that a box, clipped to the image, shares with each cell of the grid with these edges: (m + 1,), (n + 1,) -> (m, n)."""
    x, y = np.float64(box)[[0, 2]], np.float64(box)[[1, 3]]
    _check_inside(x, y, image_size, where)
    return np.outer(_overlap(edges_y, y.clip(0, image_size[1])), _overlap(edges_x, x.clip(0, image_size[0])))


def _inside_ring(points, width, height):
    """Pixels whose centres lie inside a closed ring by the even-odd rule: points (n, 2) -> bool (height, width).

    Along a row of pixel centres, inside and outside alternate at each crossing with an edge: mark the first pixel
    after every crossing, and a pixel is inside if the number of marks up to it is odd.
    """
    (x0, y0), (x1, y1) = points.T[:, :, None], np.roll(points, -1, axis=0).T[:, :, None]    # each (n, 1): edges
    y = np.arange(height) + 0.5
    edge, row = np.nonzero((y0 <= y) != (y1 <= y))                  # a half-open test, so that a vertex counts once
    x0, y0, x1, y1 = x0[edge, 0], y0[edge, 0], x1[edge, 0], y1[edge, 0]
    crossing = x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)
    marks = np.zeros((height, width + 1), bool)                     # the last column: crossings right of the image
    np.logical_xor.at(marks, (row, column), True)
    return np.logical_xor.accumulate(marks, axis=1)[:, :width]


# COCO's run-length encoding: lengths of alternating runs of 0 and 1 (the first of 0, maybe empty) of the mask read
# column by column. Compressed: each count from the fourth on minus the one two before it, written in 5-bit groups,
# lowest first, as characters 48 + group + 32 if more follow; bit 4 of the last group is the sign (maskApi.c of cocoapi).


def decode_rle(rle, where="rle"):
    """{"size": [height, width], "counts": list, str or bytes} -> bool (height, width). InputError: malformed."""
    size = _numbers(rle["size"], f"{where}: rle size")
    counts = rle["counts"]
    counts = _counts_from_string(counts, where) if isinstance(counts, str | bytes) else counts
    counts = _numbers(counts, f"{where}: rle counts").astype(np.int64)
    if len(size) != 2 or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise InputError(f"{where}: rle counts add up to {counts.sum()}, not to height x width of its size {rle['size']}")
    height, width = size.astype(int)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def encode_rle(mask, compressed=True):
    """bool (height, width) -> {"size": [height, width], "counts": str if compressed else list}."""
    flat = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))            # a mask that begins with 1 begins with a run of no 0
    return encode_edges(edges, np.shape(mask), compressed)


def encode_edges(edges, size, compressed=True):
    """A mask of this size (height, width), given by where along its columns it changes, ascending -> its RLE, as in `encode_rle`."""
    counts = np.diff(np.asarray(edges, np.int64), prepend=0, append=size[0] * size[1]).tolist()
    return {"size": list(size), "counts": _counts_to_string(counts) if compressed else counts}


def _counts_from_string(text, where):
    counts, value, shift = [], 0, 0
    for group in text if isinstance(text, bytes) else text.encode():
        group -= 48
        if not 0 <= group < 64 or shift > 30:
            raise InputError(f"{where}: rle counts are not a compressed COCO string")
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) << (shift - 4)                    # sign extension
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError(f"{where}: rle counts end within a number")
    return counts


def _counts_to_string(counts):
    groups = []
    for i, value in enumerate(counts):
        value -= counts[i - 2] if i > 2 else 0
        while not -16 <= value < 16:                                # what remains does not fit 4 bits and a sign
            groups.append((value & 31) + 32)
            value >>= 5
        groups.append(value & 31)
    return "".join(chr(48 + group) for group in groups)


# ---------------------------------------------------------- patch labels: phrases -> words -> the target distribution Y

_NOT_CONTENT = """
    a an the this that these those some any each every either neither both all several many much few more most other another such no
    one two three four five six seven eight nine ten eleven twelve
    about above across after against along among amid around at before behind below beneath beside besides between beyond by down
    during for from in inside into near next of off on onto out outside over past per through to toward towards under underneath up
    upon via with within without
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs itself himself herself
    themselves who whom whose which what where when there here someone something
    and or but nor so yet as than if while because though although not very too also just only
    am is are was were be been being have has had having do does did doing will would shall should could may might must
"""  # "can", "round" and "like" are missing on purpose: elsewhere they are nouns and adjectives
STOP_WORDS = frozenset(_NOT_CONTENT.split())


def content_words(phrase):
    """The words of a phrase that name something seen: lower case, in order, each once, plurals kept; stop words,
    numbers, "'s" and "n't" forms dropped. "Two of the man's T-shirts" -> ["man", "t-shirts"]."""
    words = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", phrase.lower().replace("\u2019", "'"))
    words = [word.removesuffix("'s") for word in words if not word.endswith("n't")]
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


def region_phrase(region, where):
    """The region's phrase; InputError if it has none."""
    phrase = region.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        raise InputError(f'{where}: "phrase" is missing, empty or not text')
    return phrase


def patch_words(regions, image_size, geometry, grid, threshold=0.25, where="regions", aspect=1.0):
    """Words of each patch: those of all regions that cover at least `threshold` of it.

    -> list of P = rows x columns lists (row by row), each word once, in the order of the regions; [] is an unlabelled
    patch. Arguments as in `region_coverage`; InputError also for a region without a phrase.
    """
    coverage = region_coverage(regions, image_size, geometry, grid, where, aspect)
    phrases = [content_words(region_phrase(region, f"{where}: regions[{i}]")) for i, region in enumerate(regions)]

    @functools.cache  # neighbouring patches lie in the same regions
    def words(covering):
        return list(dict.fromkeys(word for covers, phrase in zip(covering, phrases) if covers for word in phrase))

    covered = coverage.reshape(len(regions), grid[0] * grid[1]).T >= threshold - 1e-6       # (P, R); float32 rounding
    return [words(tuple(row)) for row in covered.tolist()]


def _encode(tokenizer, text):
    """Token ids of a piece of text as it reads after other text. Llama's tokenizer puts a space in front of whatever it
    encodes; a text that brings its own would get two, which the same words never have within a sentence."""
    if text.startswith(" ") and _is_blank(tokenizer, tokenizer.encode(" a", add_special_tokens=False)[0]):
        text = text[1:]
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def _is_blank(tokenizer, token):
    return not tokenizer.decode([token]).strip()


def word_ids(tokenizer, word):
    """Tokens of a word as they occur within a sentence, so those of " word"; blank and unknown tokens are dropped, hence
    [] for a word that the tokenizer cannot write."""
    return [t for t in _encode(tokenizer, " " + word) if t != tokenizer.unk_token_id and not _is_blank(tokenizer, t)]


def patch_targets(words, lookup):
    """Words of each patch -> target distribution Y, sparse: ids (P, K) int64, weights (P, K) float32.

    lookup: word -> list of token ids. Uniform over the patch's words, each word's share split evenly over its tokens;
    a token of two words gets the sum. Words without tokens do not count. K >= 1 is the longest row; padding (id 0) has
    weight 0, an unlabelled patch is a row of zeros.
    """
    rows, index = {}, []                                            # neighbouring patches share their words
    for patch in map(tuple, words):
        index.append(rows.setdefault(patch, len(rows)))
    targets = [_target([tokens for tokens in map(lookup, patch) if tokens]) for patch in rows]
    longest = max([1, *map(len, targets)])
    ids, weights = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
    for i, target in enumerate(targets):
        ids[i, : len(target)] = torch.tensor(list(target), dtype=torch.int64)
        weights[i, : len(target)] = torch.tensor(list(target.values()))
    return ids[index], weights[index]                                                       # (P, K) each


def _target(words):
    """Token lists of one patch's words -> {token: weight}, weights adding up to 1."""
    target = {}
    for tokens in words:
        for token in tokens:
            target[token] = target.get(token, 0.0) + 1 / (len(words) * len(tokens))
    return target


# -------------------------------------------------------------------------------- conversations -> token ids and labels

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
V1_SYSTEM = (  # Vicuna v1.1's, word for word: the language model was trained with it
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def tokenize(conversations, tokenizer, prompt, image_tokens, max_length, where):
    """Turns of one record -> (input_ids, labels), two lists of the same length; labels are not shifted.

    conversations: [{"from": "human" | "gpt", "value": text}, ...], by turns, human first; image_tokens: patches of the
    record's image, 0 without one. "<image>" becomes that many IMAGE_TOKEN; without the marker the image comes first.
    Labels are IGNORE except on the assistant's text and the token that ends it. Cut on the right to max_length, patches
    included. prompt: see `_segments`. InputError: not a conversation, marker and image disagree, or max_length cuts off
    the image or leaves nothing to learn from.
    """
    turns = check_turns(conversations, image_tokens > 0, where)
    input_ids, labels = _encode_segments(_segments(turns, tokenizer, prompt, where), tokenizer, image_tokens)
    input_ids, labels = input_ids[:max_length], labels[:max_length]
    if input_ids.count(IMAGE_TOKEN) != image_tokens or all(label == IGNORE for label in labels[1:]):
        raise InputError(f"{where}: max_length {max_length} cuts off the image ({image_tokens} tokens) or the whole answer; raise it")
    return input_ids, labels


def tokenize_prompt(conversations, tokenizer, prompt, image_tokens, where="question"):
    """Token ids up to where the assistant begins to speak, for generation; arguments as in `tokenize`, a last turn of the assistant's
    is left out."""
    asked = conversations
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict) and ROLES.get(asked[-1].get("from")) == "assistant":
        asked = asked[:-1]
    turns = check_turns(asked and [*asked, {"from": "gpt", "value": ""}], image_tokens > 0, where)[:-1]
    return _encode_segments(_segments(turns, tokenizer, prompt, where), tokenizer, image_tokens)[0]


def check_turns(conversations, has_image, where):
    """-> [(role, text), ...], user and assistant alternating, the marker of an image in exactly one user turn."""
    if not isinstance(conversations, list) or not conversations:
        raise InputError(f'{where}: "conversations" is missing or not a list of turns')
    turns = []
    for i, turn in enumerate(conversations):
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) and isinstance(turn.get("from"), str) else None
        if role != ("user", "assistant")[i % 2] or not isinstance(turn.get("value"), str):
            raise InputError(f'{where}: turn {i} is not {{"from": "{("human", "gpt")[i % 2]}", "value": text}}')
        turns.append((role, turn["value"]))
    if len(turns) % 2:
        raise InputError(f"{where}: the last turn is the human's; there is no answer to it")
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    if markers > has_image:
        raise InputError(f"{where}: {markers} {IMAGE_MARKER} markers but {'one image' if has_image else 'no image'}")
    if has_image and not markers:
        turns[0] = ("user", f"{IMAGE_MARKER}\n{turns[0][1]}")
    return turns


def _segments(turns, tokenizer, prompt, where):
    """The text of a conversation in order, as (text or token ids, whether the model is trained to say it) segments.

    turns: [(role, text), ...]; after a last user turn the segments end where the assistant begins.
    plain  LLaVA's stage 1: the image, then the caption; what the user says is dropped. Ours: the caption ends with the
           end-of-sequence token (LLaVA: a line break), so that generation knows where to stop.
    v1     Vicuna v1.1 as in LLaVA-1.5: SYSTEM USER: ... ASSISTANT: answer</s>USER: ... ASSISTANT: answer</s>
    chat   the tokenizer's own template.
    """
    if prompt == "chat":
        return _chat_segments(turns, tokenizer, where)
    if prompt not in PROMPTS:
        raise InputError(f"--prompt {prompt!r}: choose one of {', '.join(PROMPTS)}")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{where}: the tokenizer has no end-of-sequence token, which --prompt {prompt} needs")
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    segments = [([tokenizer.bos_token_id], False)] if begins else []
    end = ([tokenizer.eos_token_id], True)
    if prompt == "plain":
        segments += [(IMAGE_MARKER, False)]
        return segments + [segment for _, text in turns[1:] for segment in ((text, True), end)]
    opening = V1_SYSTEM + " "
    for role, text in turns:
        if role == "user":
            segments += [(f"{opening}USER: {text} ASSISTANT:", False)]
        else:
            segments += [(f" {text}", True), end]
        opening = ""
    return segments


@functools.lru_cache(maxsize=64)
def chat_frame(tokenizer, template, answers):
    """What a chat template writes around the texts of a conversation with so many answers -> (the 2 answers + 1 pieces of text before,
    between and after its turns, the token that ends an answer). InputError: a template that leaves texts out, repeats or reorders them.

    The template is rendered once, with marks for texts. So an answer stands in training just where generation begins, whatever the
    template does with earlier turns or adds to the last one (the empty thoughts of Qwen3). It ends with the first special token after it,
    or, where there is none before the next text, with the end-of-sequence token.
    """
    marks = [f"@{i}@" for i in range(2 * answers)]
    roles = ("user", "assistant") * answers
    for content in (str, lambda text: [{"type": "text", "text": text}]):        # templates made for a processor want lists
        messages = [{"role": role, "content": content(mark)} for role, mark in zip(roles, marks)]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            continue
        if [mark for mark in re.findall(r"@\d+@", text) if mark in marks] == marks:
            break
    else:
        raise InputError("this tokenizer's chat template does not write each text of a conversation once and in order; use --prompt v1")
    pieces = re.split("|".join(marks), text)
    special = [re.escape(token) for token in sorted(_special_tokens(tokenizer), key=len, reverse=True)]
    found = re.search("|".join(special), pieces[2]) if special else None
    return pieces, found[0] if found else tokenizer.eos_token


def _special_tokens(tokenizer):
    """The texts of all tokens that a tokenizer never makes from ordinary text."""
    return {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}


def _chat_segments(turns, tokenizer, where):
    """Segments of the tokenizer's chat template; see `chat_frame`."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}: the tokenizer has no chat template for --prompt chat; use --prompt v1")
    try:
        pieces, end = chat_frame(tokenizer, tokenizer.chat_template, (len(turns) + 1) // 2)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if end is None:
        raise InputError(f"{where}: neither the chat template nor the tokenizer has a token that ends an answer; use --prompt v1")
    segments, opening = [], pieces[0]
    for i, (role, text) in enumerate(turns):
        if role == "user":                                          # up to where the assistant begins, which is not learnt
            head = pieces[i + 1].removesuffix(" ")                  # a blank there belongs to the answer's first word
            segments.append((opening + text + head, False))
            blank = pieces[i + 1][len(head):]
        else:                                                       # nor is what the template writes before and after the end token
            before, found, after = pieces[i + 1].partition(end)
            segments += [(blank + text, True), (before if found else "", False), ([tokenizer.convert_tokens_to_ids(end)], True)]
            opening = after if found else pieces[i + 1]
    return segments if turns[-1][0] == "user" else [*segments, (opening, False)]


def end_ids(tokenizer, prompt):
    """The tokens at which generation stops: the end of sequence, and what ends an answer in the tokenizer's chat template. InputError: no
    chat template, see `_chat_segments`."""
    ends = [tokenizer.eos_token_id]
    if prompt == "chat":
        ends += [ids[0] for ids, learnt in _chat_segments([("user", ""), ("assistant", "")], tokenizer, "generation")
                 if learnt and isinstance(ids, list)]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _encode_segments(segments, tokenizer, image_tokens):
    """Encode each segment on its own -> (input_ids, labels)."""
    input_ids, labels = [], []
    for text, learnt in segments:
        if isinstance(text, list):
            ids = text
        elif learnt:
            ids = _encode(tokenizer, text)
        else:
            first, *rest = text.split(IMAGE_MARKER)
            ids = _encode(tokenizer, first)
            for part in rest:
                ids = ids + [IMAGE_TOKEN] * image_tokens + _encode(tokenizer, part)
        input_ids += ids
        labels += ids if learnt else [IGNORE] * len(ids)
    return input_ids, labels


# ---------------------------------------------------------------------------------------- records -> samples -> batches


class Records(torch.utils.data.Dataset):
    """Records as samples. The form of all records is checked here; what needs the image (the file itself, regions within its bounds)
    and what needs the tokens (something to learn within max_length) in `__getitem__`.

    image_dir: folder of the records' images; image_size: side of the encoder's input, or its (height, width); resample: see
    `transform_image`; grid: (rows, columns) of the patches after the projector; coverage: threshold of `patch_words`; source:
    the file's name, for messages.
    A sample: id, image_size (width, height of the original), pixel_values (3, height, width), input_ids and labels (lists),
    patch_ids and patch_weights (P, K); without an image its size and the tensors are None.
    """

    def __init__(self, records, image_dir, tokenizer, *, image_size, geometry, grid, mean, std, resample=Image.Resampling.BICUBIC,
                 prompt="plain", max_length=2048, coverage=0.25, require_image=True, source="records"):
        self.records, self.image_dir, self.tokenizer = records, image_dir and Path(image_dir), tokenizer
        self.geometry, self.grid = geometry, tuple(grid)
        self.image_form = image_size, geometry, mean, std, resample             # of `transform_image`
        self.aspect = sides(image_size)[1] / sides(image_size)[0]
        self.prompt, self.max_length, self.coverage = prompt, max_length, coverage
        self.require_image, self.source = require_image, source
        self.tokens_of = {}                                         # word -> token ids, filled as words occur
        view_box((1, 1), geometry)                                # an unknown geometry is an error now, not in a worker
        _segments([("user", "question"), ("assistant", "answer")], tokenizer, prompt, source)               # so is an unusable prompt
        if not records:
            raise InputError(f"{source}: holds no records")
        for index in range(len(records)):
            self._check(index)

    def _where(self, index):
        record = self.records[index]
        return f"{self.source}: record {record.get('id', index) if isinstance(record, dict) else index}"

    def _check(self, index):
        record, where = self.records[index], self._where(index)
        if not isinstance(record, dict):
            raise InputError(f"{where} is not an object")
        image, regions = record.get("image"), record.get("regions")
        if image is None and (self.require_image or regions):
            raise InputError(f'{where}: "image" is missing' + ("" if self.require_image else ", which its regions are about"))
        if image is not None:
            image_path(record, self.image_dir or "", where)
            if self.image_dir is None or not self.image_dir.is_dir():
                raise InputError(f"{where}: --image-dir {self.image_dir} is not a folder, but the record has an image")
            if not image_path(record, self.image_dir, where).is_file():
                raise InputError(f"{where}: no image {image_path(record, self.image_dir, where)}")
        if not isinstance(regions or [], list):
            raise InputError(f'{where}: "regions" is not a list')
        for i, region in enumerate(regions or []):
            region_kind(region, f"{where}: regions[{i}]")
            region_phrase(region, f"{where}: regions[{i}]")
        turns = check_turns(record.get("conversations"), image is not None, where)
        if self.prompt == "plain" and len(turns) > 2:
            raise InputError(f"{where}: --prompt plain takes one caption, not {len(turns) // 2} answers; use --prompt v1 or chat")

    def _lookup(self, word):
        if word not in self.tokens_of:
            self.tokens_of[word] = word_ids(self.tokenizer, word)
        return self.tokens_of[word]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record, where = self.records[index], self._where(index)
        if record.get("image") is None:
            return self.sample(index)
        image = open_image(image_path(record, self.image_dir, where), where)
        return self.sample(index, image.size, transform_image(image, *self.image_form))

    def sample(self, index, image_size=None, pixel_values=None):
        """The sample of a record, given what needs its image decoded: the image's (width, height), None without one, and its pixels,
        None where features.py has their features."""
        record, where = self.records[index], self._where(index)
        image_tokens, patch_ids, patch_weights = 0, None, None
        if image_size is not None:
            words = patch_words(record.get("regions") or [], image_size, self.geometry, self.grid, self.coverage, where, self.aspect)
            patch_ids, patch_weights = patch_targets(words, self._lookup)
            image_tokens = self.grid[0] * self.grid[1]
        input_ids, labels = tokenize(record["conversations"], self.tokenizer, self.prompt, image_tokens, self.max_length, where)
        return {
            "id": str(record.get("id", index)), "image_size": image_size, "pixel_values": pixel_values, "input_ids": input_ids,
            "labels": labels, "patch_ids": patch_ids, "patch_weights": patch_weights,
        }


def collate(samples, pad_id):
    """Samples -> a batch: text padded on the right to the longest T, patch targets to the largest K.

    ids list of B; input_ids, labels (B, T) int64; for the N samples with an image, in order: pixel_values (N, 3, height, width),
    patch_ids (N, P, K) int64, patch_weights (N, P, K). Without any image N = 0.
    Read off here, on the host, so that a step need not wait for a GPU to tell: places (N P,), where input_ids.flatten() holds
    IMAGE_TOKEN, and first_label, the first position from 1 on at which any sample has a label.
    """
    def pad_text(rows, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], True, value)

    def pad_patches(key):
        longest = max(sample[key].shape[1] for sample in images)
        return torch.stack([torch.nn.functional.pad(sample[key], (0, longest - sample[key].shape[1])) for sample in images])

    images = [sample for sample in samples if sample["image_size"] is not None]
    pixels = [sample["pixel_values"] for sample in images if sample["pixel_values"] is not None]
    input_ids = pad_text([sample["input_ids"] for sample in samples], pad_id)
    labels = pad_text([sample["labels"] for sample in samples], IGNORE)
    return {
        "ids": [sample["id"] for sample in samples],
        "input_ids": input_ids,
        "labels": labels,
        "places": (input_ids.flatten() == IMAGE_TOKEN).nonzero().squeeze(1),
        "first_label": max(1, int((labels != IGNORE).any(0).int().argmax())),
        "pixel_values": torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
        "patch_ids": pad_patches("patch_ids") if images else torch.empty(0, 0, 1, dtype=torch.int64),
        "patch_weights": pad_patches("patch_weights") if images else torch.empty(0, 0, 1),
    }


class StepSampler:
    """Which records a step trains on, as a function of the step alone: resuming is asking for a later step.

    Epochs are seeded permutations of the records laid end to end, and step s is the s-th run of batch_size of them (it
    may span two epochs). A rank takes a contiguous share: the shares of ranks 0, 1, ... in order are the batch that one
    process would see, so the number of processes does not change the data.
    """

    def __init__(self, length, batch_size, seed, rank=0, world=1):
        if length < 1:
            raise InputError("there are no records to sample from")
        if batch_size < 1 or batch_size % world:
            raise InputError(f"--batch-size {batch_size} is not a positive multiple of the {world} processes")
        if seed < 0:
            raise InputError(f"--seed {seed} is negative")
        self.length, self.batch_size, self.seed, self.share, self.rank = length, batch_size, seed, batch_size // world, rank
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def indices(self, step):
        """Record indices of this rank's share of the global batch `step` -> list of batch_size / world."""
        first = step * self.batch_size + self.rank * self.share
        return [int(self._permutation(i // self.length)[i % self.length]) for i in range(first, first + self.share)]
