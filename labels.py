"""Patch labels: from the regions of a photograph to the words that each patch should resemble.

    an image and its regions     phrases, each with a box, a polygon or a mask, in its own pixels
      -> the encoder's input     view_box: the part of the image that the encoder sees
      -> coverage                region_coverage: which share of each patch a region covers
      -> words                   patch_words: content words of the phrases that cover a patch
      -> targets                 patch_targets: words -> tokens -> Y, for the patch loss

Pixels (`transform_image`) and regions (`region_coverage`) go through the same `view_box`, so labels
follow the image into whatever size, shape and grid of patches a model has. They are made when a
record is loaded. One annotation file serves every backbone.

Sizes of images are (width, height), grids (rows, columns). P = rows x columns patches, row by row;
V words in the vocabulary; at most K tokens name a patch; R regions. Legend: model.py.
"""
import functools
import re

import numpy as np
import torch
from PIL import Image

from runtime import InputError

GEOMETRIES = ("pad", "crop", "stretch")

# ---- geometry: what of an image the encoder sees -------------------------------------------------


def sides(size):
    """(height, width) of an encoder's input, given as such a pair or as the side of a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def view_box(image_size, geometry, aspect=1.0):
    """The part of an image that becomes the encoder's input: (x0, y0, x1, y1) in whole pixels.

    image_size: (width, height); aspect: width / height of the encoder's input, 1 for a square.
    pad: the smallest such box around the image, which sticks out of it (LLaVA-1.5's stage 2); crop:
    the largest inside it (CLIP's processor, LLaVA's stage 1); both centred; stretch: all of it.
    InputError: another geometry.
    """
    width, height = image_size
    if geometry == "stretch":
        return 0, 0, width, height
    if geometry not in GEOMETRIES:
        raise InputError(f"geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    if (width > height * aspect) == (geometry == "pad"):    # the image's width is the box's
        size = width, max(1, round(width / aspect))
    else:
        size = max(1, round(height * aspect)), height
    x0, y0 = (-((full - own) // 2) if geometry == "pad" else (own - full) // 2
              for full, own in zip(size, image_size))
    return x0, y0, x0 + size[0], y0 + size[1]


def transform_image(image, size, geometry, mean, std, resample=Image.Resampling.BICUBIC):
    """RGB image -> the encoder's input, float32 (3, height, width): cut, resized, normalised.

    size: the side of a square, or (height, width); mean, std: per channel, for values in [0, 1];
    resample: PIL's filter. Padding has the mean colour, cut to whole numbers as LLaVA does.
    """
    height, width = sides(size)
    box = view_box(image.size, geometry, width / height)
    if geometry == "pad":
        colour = tuple(int(255 * m) for m in mean)
        canvas = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), colour)
        canvas.paste(image, (-box[0], -box[1]))
        image = canvas
    else:
        image = image.crop(box)             # first: no pixel beyond the box has a part
    image = image.resize((width, height), resample)
    pixels = np.asarray(image, np.float32) / 255                                # (height, width, 3)
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


# ---- regions -> the share of each patch that they cover ------------------------------------------


def region_kind(region, where):
    """"bbox", "polygon" or "rle", once the region's form is checked (without its image)."""
    own = [k for k in ("bbox", "polygon", "rle") if isinstance(region, dict) and k in region]
    if len(own) != 1:
        raise InputError(f"{where}: a region has exactly one of bbox, polygon and rle, here"
                         f" {' and '.join(own) or 'none'}")
    kind, value = own[0], region[own[0]]
    if kind == "bbox":
        box = _numbers(value, f"{where}: bbox")
        if len(box) != 4 or box[2] <= box[0] or box[3] <= box[1]:
            raise InputError(f"{where}: bbox {value} is not [x0, y0, x1, y1]"
                             " with x0 < x1 and y0 < y1")
    elif kind == "polygon":
        rings = value if isinstance(value, list | tuple) else []
        if not rings or not all(isinstance(ring, list | tuple) for ring in rings):
            raise InputError(f"{where}: a polygon is a list of rings [[x, y, x, y, ...], ...]")
        for ring in rings:
            if len(_numbers(ring, f"{where}: polygon")) < 6 or len(ring) % 2:
                raise InputError(f"{where}: a polygon's ring needs at least 3 points,"
                                 f" x and y of each, not {len(ring)} numbers")
    elif not (isinstance(value, dict) and isinstance(value.get("size"), list | tuple)
              and "counts" in value):
        raise InputError(f'{where}: an rle is {{"size": [height, width], "counts": ...}}')
    return kind


def _numbers(values, where):
    """A list of finite numbers -> float64 array."""
    try:
        array = np.asarray(values)
    except ValueError:                      # a ragged list
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"{where} is not a list of finite numbers")
    return array.astype(np.float64)


def _check_inside(x, y, image_size, where):
    """Regions end at the image's edge; up to one pixel beyond is rounding, and is clipped."""
    width, height = image_size
    if min(x.min(), y.min()) < -1 or x.max() > width + 1 or y.max() > height + 1:
        raise InputError(
            f"{where}: reaches from ({x.min():g}, {y.min():g}) to ({x.max():g}, {y.max():g}),"
            f" outside its {width} x {height} image; coordinates are pixels of the original image")


def _overlap(cells, others):
    """Lengths shared by two rows of intervals, given by edges: (m + 1,), (n + 1,) -> (m, n)."""
    lower = np.maximum(cells[:-1, None], others[None, :-1])
    upper = np.minimum(cells[1:, None], others[None, 1:])
    return (upper - lower).clip(0).astype(np.float32)


def _box_areas(box, image_size, edges_y, edges_x, where):
    """Area that a box shares with each cell of a grid, given by its edges -> (m, n)."""
    x, y = np.float64(box)[[0, 2]], np.float64(box)[[1, 3]]
    _check_inside(x, y, image_size, where)
    return np.outer(_overlap(edges_y, y.clip(0, image_size[1])),
                    _overlap(edges_x, x.clip(0, image_size[0])))


def region_coverage(regions, image_size, geometry, grid, where="regions", aspect=1.0):
    """The share of each patch's area that each region covers: float32 (R, rows, columns) in [0, 1].

    regions: dicts with one of bbox, polygon, rle, in pixels of the image; image_size: (width,
    height); grid: (rows, columns). `view_box` is divided evenly into the grid's cells; outside the
    image nothing is covered. The shares are exact. With A_y (rows, height) the share of each
    cell's height that lies in each pixel row, and A_x likewise, coverage = A_y mask A_x^T.
    InputError: a malformed region, or one outside the image.
    """
    (width, height), (rows, columns) = image_size, grid
    x0, y0, x1, y1 = view_box(image_size, geometry, aspect)
    edges_y, edges_x = np.linspace(y0, y1, rows + 1), np.linspace(x0, x1, columns + 1)
    A_y = _overlap(edges_y, np.arange(height + 1.0)) * (rows / (y1 - y0))       # (rows, height)
    A_x = _overlap(edges_x, np.arange(width + 1.0)) * (columns / (x1 - x0))     # (columns, width)
    per_cell = rows / (y1 - y0) * columns / (x1 - x0)                           # 1 / area of a cell
    coverage = np.empty((len(regions), rows, columns), np.float32)
    for i, region in enumerate(regions):
        name = f"{where}: regions[{i}]"
        if region_kind(region, name) == "bbox":                                 # needs no mask
            areas = _box_areas(region["bbox"], image_size, edges_y, edges_x, name)
            coverage[i] = areas * per_cell
        else:
            coverage[i] = A_y @ region_mask(region, image_size, name) @ A_x.T
    return coverage


def region_mask(region, image_size, where):
    """The share of each pixel that a region covers: float32 (height, width) in [0, 1].

    Boxes: exact, fractions at the edges. Polygons: 1 where the pixel's centre is inside a ring by
    the even-odd rule; rings are united. InputError: malformed, outside the image by more than a
    pixel, or an RLE of another size than the image.
    """
    kind, (width, height) = region_kind(region, where), image_size
    if kind == "bbox":
        edges_y, edges_x = np.arange(height + 1.0), np.arange(width + 1.0)
        return _box_areas(region["bbox"], image_size, edges_y, edges_x, where)
    if kind == "polygon":
        mask = np.zeros((height, width), bool)
        for ring in region["polygon"]:
            points = np.asarray(ring, np.float64).reshape(-1, 2)
            _check_inside(points[:, 0], points[:, 1], image_size, where)
            mask |= _inside_ring(points, width, height)
    else:
        if list(region["rle"]["size"]) != [height, width]:
            raise InputError(f"{where}: rle size {region['rle']['size']} is not the image's"
                             f" [height, width] = [{height}, {width}]")
        mask = decode_rle(region["rle"], where)
    return mask.astype(np.float32)


def _inside_ring(points, width, height):
    """Pixels whose centres lie inside a closed ring: points (n, 2) -> bool (height, width).

    Along a row of pixel centres, inside and outside alternate at each crossing with an edge. Mark
    the first pixel after every crossing: a pixel is inside if the marks up to it are odd in number.
    """
    (x0, y0), (x1, y1) = points.T[:, :, None], np.roll(points, -1, axis=0).T[:, :, None]    # edges
    y = np.arange(height) + 0.5
    edge, row = np.nonzero((y0 <= y) != (y1 <= y))        # half-open: a vertex counts once
    x0, y0, x1, y1 = x0[edge, 0], y0[edge, 0], x1[edge, 0], y1[edge, 0]
    crossing = x0 + (y[row] - y0) * (x1 - x0) / (y1 - y0)
    column = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)
    marks = np.zeros((height, width + 1), bool)             # the last column: right of the image
    np.logical_xor.at(marks, (row, column), True)
    return np.logical_xor.accumulate(marks, axis=1)[:, :width]


# ---- COCO's run-length encoding ------------------------------------------------------------------
#
# Lengths of alternating runs of 0 and 1 (the first of 0, maybe empty), column by column.
# Compressed: each count from the fourth on minus the one two before it, written in 5-bit groups,
# lowest first, as characters 48 + group + 32 if more follow; bit 4 of the last group is the sign.
# (maskApi.c of cocoapi)


def decode_rle(rle, where="rle"):
    """{"size": [height, width], "counts": list or text} -> bool (height, width). InputError."""
    size, counts = _numbers(rle["size"], f"{where}: rle size"), rle["counts"]
    counts = _counts_from_string(counts, where) if isinstance(counts, str | bytes) else counts
    counts = _numbers(counts, f"{where}: rle counts").astype(np.int64)
    if len(size) != 2 or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise InputError(f"{where}: rle counts add up to {counts.sum()}, not to height x width"
                         f" of its size {rle['size']}")
    height, width = size.astype(int)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def encode_rle(mask, compressed=True):
    """bool (height, width) -> {"size": [height, width], "counts": text, or a list}."""
    flat = np.asarray(mask, bool).T.ravel()
    return encode_edges(np.flatnonzero(np.diff(flat, prepend=False)), np.shape(mask), compressed)


def encode_edges(edges, size, compressed=True):
    """The same of a mask (height, width) given by where along its columns it changes, ascending."""
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
            value -= (group & 16) << (shift - 4)                                # sign extension
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError(f"{where}: rle counts end within a number")
    return counts


def _counts_to_string(counts):
    groups = []
    for i, value in enumerate(counts):
        value -= counts[i - 2] if i > 2 else 0
        while not -16 <= value < 16:                    # more than 4 bits and a sign
            groups.append((value & 31) + 32)
            value >>= 5
        groups.append(value & 31)
    return "".join(chr(48 + group) for group in groups)


# ---- phrases -> the words of each patch ----------------------------------------------------------

STOP_WORDS = frozenset("""
    a an the this that these those some any each every either neither both all several many much few
    more most other another such no one two three four five six seven eight nine ten eleven twelve
    about above across after against along among amid around at before behind below beneath beside
    besides between beyond by down during for from in inside into near next of off on onto out
    outside over past per through to toward towards under underneath up upon via with within without
    i me my mine we us our ours you your yours he him his he she her hers it its they them their
    theirs itself himself herself themselves who whom whose which what where when there here someone
    something and or but nor so yet as than if while because though although not very too also just
    only am is are was were be been being have has had having do does did doing will would shall
    should could may might must
""".split())    # English; "can", "round" and "like" are missing: they are nouns or adjectives too


def content_words(phrase):
    """The words of a phrase that name something seen: lower case, in order, each once.

    Stop words, numbers, "'s", "n't" forms drop out. "Two of the man's T-shirts" -> man, t-shirts.
    """
    words = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", phrase.lower().replace("\u2019", "'"))
    words = [word.removesuffix("'s") for word in words if not word.endswith("n't")]
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


def region_phrase(region, where):
    """The region's phrase. InputError: it has none."""
    phrase = region.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        raise InputError(f'{where}: "phrase" is missing, empty or not text')
    return phrase


def patch_words(regions, image_size, geometry, grid, threshold=0.25, where="regions", aspect=1.0):
    """The words of each patch: those of all regions that cover at least `threshold` of it.

    -> P lists, row by row, each word once, in the order of the regions; [] is an unlabelled patch.
    Arguments as in `region_coverage`. InputError: as there, or a region without a phrase.
    """
    coverage = region_coverage(regions, image_size, geometry, grid, where, aspect)
    phrases = [content_words(region_phrase(region, f"{where}: regions[{i}]"))
               for i, region in enumerate(regions)]

    @functools.cache                        # neighbouring patches lie in the same regions
    def words(covering):
        both = zip(covering, phrases)
        return list(dict.fromkeys(word for covers, own in both if covers for word in own))

    covered = coverage.reshape(len(regions), grid[0] * grid[1]).T >= threshold - 1e-6       # (P, R)
    return [words(tuple(row)) for row in covered.tolist()]


# ---- words -> tokens -> the target distribution Y ------------------------------------------------


def encode_text(tokenizer, text):
    """Token ids of a piece of text as it reads after other text.

    Llama's tokenizer puts a space in front of whatever it encodes; a text that brings its own would
    get two, which the same words never have within a sentence.
    """
    if text.startswith(" "):
        first = tokenizer.encode(" a", add_special_tokens=False)[0]
        text = text[1:] if _is_blank(tokenizer, first) else text
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def _is_blank(tokenizer, token):
    return not tokenizer.decode([token]).strip()


def word_ids(tokenizer, word):
    """Tokens of a word within a sentence, those of " word". Blank and unknown ones drop out: [] for
    a word that the tokenizer cannot write."""
    return [token for token in encode_text(tokenizer, " " + word)
            if token != tokenizer.unk_token_id and not _is_blank(tokenizer, token)]


def patch_targets(words, lookup):
    """The words of each patch -> its target distribution Y, sparse: ids and weights, (P, K) each.

    Y is uniform over the patch's words; each word's share is split evenly over its tokens, and a
    token of two words gets the sum. lookup: word -> list of token ids; words without tokens do not
    count. Padding has id 0 and weight 0; an unlabelled patch is a row of zeros. int64 and float32.
    """
    rows, index = {}, []                    # neighbouring patches have the same words
    for patch in map(tuple, words):
        index.append(rows.setdefault(patch, len(rows)))
    targets = [_target([tokens for tokens in map(lookup, patch) if tokens]) for patch in rows]
    longest = max([1, *map(len, targets)])                                                  # K
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    weights = torch.zeros(len(rows), longest)
    for i, target in enumerate(targets):
        ids[i, : len(target)] = torch.tensor(list(target), dtype=torch.int64)
        weights[i, : len(target)] = torch.tensor(list(target.values()))
    return ids[index], weights[index]


def _target(words):
    """Token lists of one patch's words -> {token: weight}, weights adding up to 1."""
    target = {}
    for tokens in words:
        for token in tokens:
            target[token] = target.get(token, 0.0) + 1 / (len(words) * len(tokens))
    return target
