"""Patch labels: from the regions of a photograph to the words that each patch should resemble.

    an image and its regions     phrases, each with a box, a polygon or a mask, in its own pixels
      -> the encoder's input     view_box: the part of the image that the encoder sees
      -> coverage                region_coverage: which share of each patch a region covers
      -> words                   content_words of the phrases that cover a patch: patch_words
      -> targets                 patch_targets: words -> tokens -> Y, for the patch loss

Pixels (`transform_image`) and regions (`region_coverage`) go through the same `view_box`, so labels
follow the image into whatever size, shape and grid of patches a model has. They are made when a
record is loaded. One annotation file serves every backbone.

Sizes of images are (width, height), grids (rows, columns). P = rows x columns patches, row by row;
V words in the vocabulary; at most K tokens name a patch; R regions. Legend: model.py.
"""
import functools
import unicodedata
from pathlib import Path

import numpy as np
import regex
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
            raise InputError(f"{where}: bbox {value} is not [x0, y0, x1, y1] with x0 < x1 and"
                             " y0 < y1; write [x, y, width, height] as"
                             " [x, y, x + width, y + height]")
    elif kind == "polygon":
        usable_rings(value, where)
    elif not (isinstance(value, dict) and isinstance(value.get("size"), list | tuple)
              and "counts" in value):
        raise InputError(f'{where}: an rle is {{"size": [height, width], "counts": ...}}')
    return kind


def usable_rings(polygon, where):
    """The rings of a polygon with 3 or more points; a bad one costs itself. InputError: none."""
    rings = polygon if isinstance(polygon, list | tuple) else []
    if not rings or not all(isinstance(ring, list | tuple) for ring in rings):
        raise InputError(f"{where}: a polygon is a list of rings [[x, y, x, y, ...], ...]")
    usable = []
    for ring in rings:
        try:
            if len(_numbers(ring, f"{where}: polygon")) < 6 or len(ring) % 2:
                raise InputError(f"{where}: a polygon's ring needs at least 3 points, x and y of"
                                 f" each, not {len(ring)} numbers")
            usable.append(ring)
        except InputError as error:
            reason = error
    if not usable:
        raise reason
    return usable


def _numbers(values, where):
    """A list of finite numbers -> float64 array."""
    try:
        array = np.asarray(values)
    except ValueError:                      # a ragged list
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"{where} is not a list of finite numbers")
    return array.astype(np.float64)


def region_bounds(region, where):
    """[x0, y0, x1, y1] round a box or a polygon, as float64; None of an RLE, which has a size."""
    kind = region_kind(region, where)
    if kind == "rle":
        return None
    if kind == "bbox":
        return np.float64(region["bbox"])
    points = np.concatenate([np.float64(r).reshape(-1, 2)
                             for r in usable_rings(region["polygon"], where)])
    return np.concatenate([points.min(0), points.max(0)])


def check_region(region, image_size, where):
    """-> its bounds. InputError: a region malformed, of another frame, or wholly off its image.

    Of what sticks out the part inside counts, as everywhere in the field. No pixel is looked at.
    """
    (width, height), bounds = image_size, region_bounds(region, where)
    if bounds is None:
        rle_counts(region["rle"], where, image_size)
        return None
    shown = f"[{', '.join(f'{n:g}' for n in bounds)}]"
    shares = bounds.min() > -0.1 and bounds.max() < 1.1 and (bounds[2:] > bounds[:2]).any()
    if shares and min(image_size) > 8:
        raise InputError(f"{where}: {shown} looks divided by the image size; coordinates are pixels"
                         f" of the original image, here {width} x {height}")
    if min(bounds[2:]) <= 0 or bounds[0] >= width or bounds[1] >= height:
        thousand = bounds.min() >= 0 and bounds.max() <= 1000
        looks = "; it looks like 0 .. 1000" if thousand else ""
        raise InputError(f"{where}: {shown} lies outside its {width} x {height} image{looks};"
                         " coordinates are pixels of the original image")
    return bounds


def check_frame(names, boxes, sizes, corners=True):
    """Refuse boxes that, all together, look like another unit or order than pixel corners.

    One box may be odd; a file of them tells. names (n): of the boxes; boxes (n, 4), as they were
    given, [x0, y0, x1, y1]; sizes (n, 2): (width, height) of their images. corners False: boxes
    were [x, y, width, height] in their file. InputError: the first of them and what it looks like.
    """
    if not len(boxes):
        return
    boxes, (w, h) = np.asarray(boxes, np.float64), np.asarray(sizes, np.float64).T
    (x0, y0, x1, y1), n, low, high = boxes.T, len(boxes), boxes.min(1), boxes.max(1)
    shares = (low > -0.1) & (high < (1.1 if corners else 2.1)) & (np.minimum(w, h) > 8)
    turned = (x1 < x0) | (y1 < y0)
    over = np.maximum(np.maximum(x1 / w, y1 / h), 1 + np.maximum(-x0 / w, -y0 / h))
    far, small = over > (1.25 if n > 1 else 1.5), (low.min() >= 0) & (high.max() <= 1000)
    looks, odd, many = None, far, 0.1 if n >= 20 else 0.5       # of a few, one may be odd by itself
    if shares.mean() >= 0.5:
        looks, odd = "divided by the image size", shares
    elif corners and turned.mean() >= many:
        fits = ((x0 + x1 <= w + 1) & (y0 + y1 <= h + 1)).mean() > 0.95
        looks, odd = "like [x, y, width, height]" if fits else "to have its corners turned", turned
    elif not corners and n > 2 and (over > 1.02).mean() >= 0.2 and (
            (x1 - x0 > x0) & (x1 - x0 <= w + 1) & (y1 - y0 > y0) & (y1 - y0 <= h + 1)).all():
        looks, odd = "like corners [x0, y0, x1, y1] in place of [x, y, width, height]", over > 1.02
    elif small and far.mean() >= many:
        looks = "like 0 .. 1000, not pixels"
    elif n >= 20 and far.mean() >= 0.2:
        looks = "as if made for an image of another size"
    else:
        for unit in (100, 1000):            # images are larger, yet no box goes beyond
            if n >= 50 and 0.9 * unit < high.max() <= unit and 1.2 * unit < min(w.min(), h.min()):
                looks, odd = f"like 0 .. {unit}, not pixels", high == high.max()
    if looks:
        i = int(odd.argmax())
        out = f"reaches outside its {w[i]:g} x {h[i]:g} image; it " * (odd is far)
        looks = f"{out}looks {looks}"
        box = boxes[i] if corners else [x0[i], y0[i], x1[i] - x0[i], y1[i] - y0[i]]
        raise InputError(
            f"{names[i]}: [{', '.join(f'{v:g}' for v in box)}] {looks}, as do {odd.sum()} of {n}"
            f" boxes; boxes are pixels of the original image, here {w[i]:g} x {h[i]:g}")


def _overlap(cells, others):
    """Lengths shared by two rows of intervals, given by edges: (m + 1,), (n + 1,) -> (m, n)."""
    lower = np.maximum(cells[:-1, None], others[None, :-1])
    upper = np.minimum(cells[1:, None], others[None, 1:])
    return (upper - lower).clip(0).astype(np.float32)


def _box_areas(box, image_size, edges_y, edges_x):
    """Area that a box shares with each cell of a grid, given by its edges -> (m, n)."""
    x, y = np.float64(box)[[0, 2]], np.float64(box)[[1, 3]]
    return np.outer(_overlap(edges_y, y.clip(0, image_size[1])),
                    _overlap(edges_x, x.clip(0, image_size[0])))


def region_coverage(regions, image_size, geometry, grid, where="regions", aspect=1.0):
    """The share of each patch's area that each region covers: float32 (R, rows, columns) in [0, 1].

    regions: dicts with one of bbox, polygon, rle, in pixels of the image; image_size: (width,
    height); grid: (rows, columns). `view_box` is divided evenly into the grid's cells; outside the
    image nothing is covered. The shares are exact. With A_y (rows, height) the share of each
    cell's height that lies in each pixel row, and A_x likewise, coverage = A_y mask A_x^T.
    InputError: see `check_region`.
    """
    (width, height), (rows, columns) = image_size, grid
    x0, y0, x1, y1 = view_box(image_size, geometry, aspect)
    edges_y, edges_x = np.linspace(y0, y1, rows + 1), np.linspace(x0, x1, columns + 1)
    A_y = _overlap(edges_y, np.arange(height + 1.0)) * (rows / (y1 - y0))       # (rows, height)
    A_x = _overlap(edges_x, np.arange(width + 1.0)) * (columns / (x1 - x0))     # (columns, width)
    A_y, A_x = torch.from_numpy(A_y), torch.from_numpy(A_x)     # torch has one thread in a loader
    per_cell = rows / (y1 - y0) * columns / (x1 - x0)                           # 1 / area of a cell
    coverage = np.empty((len(regions), rows, columns), np.float32)
    for i, region in enumerate(regions):
        name = f"{where}: regions[{i}]"
        if region_kind(region, name) == "bbox":                                 # needs no mask
            check_region(region, image_size, name)
            areas = _box_areas(region["bbox"], image_size, edges_y, edges_x)
            coverage[i] = areas * per_cell
        else:
            mask = torch.from_numpy(region_mask(region, image_size, name))
            coverage[i] = (A_y @ mask @ A_x.T).numpy()
    return coverage


def region_mask(region, image_size, where):
    """The share of each pixel that a region covers: float32 (height, width) in [0, 1].

    Boxes: exact, fractions at the edges. Polygons: 1 where the pixel's centre is inside a ring by
    the even-odd rule; rings are united. InputError: see `check_region`.
    """
    width, height = image_size
    if region_kind(region, where) == "rle":
        return decode_rle(region["rle"], where, image_size).astype(np.float32)
    check_region(region, image_size, where)
    if "bbox" in region:
        edges_y, edges_x = np.arange(height + 1.0), np.arange(width + 1.0)
        return _box_areas(region["bbox"], image_size, edges_y, edges_x)
    mask = np.zeros((height, width), bool)
    for ring in usable_rings(region["polygon"], where):
        mask |= _inside_ring(np.asarray(ring, np.float64).reshape(-1, 2), width, height)
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


def decode_rle(rle, where="rle", image_size=None):
    """{"size": [height, width], "counts": list or text} -> bool (height, width). InputError."""
    counts, (height, width) = rle_counts(rle, where, image_size), map(int, rle["size"])
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def rle_counts(rle, where="rle", image_size=None):
    """The lengths of its runs, int64. InputError: malformed, or not of an image's size."""
    size, counts = _numbers(rle["size"], f"{where}: rle size"), rle["counts"]
    if image_size is not None and size.tolist() != list(image_size[::-1]):
        raise InputError(f"{where}: rle size {rle['size']} is not the image's [height, width] ="
                         f" [{image_size[1]}, {image_size[0]}]")
    if isinstance(counts, str | bytes):
        counts = _counts_from_string(counts, where)
    counts = _numbers(counts, f"{where}: rle counts").astype(np.int64)
    if len(size) != 2 or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise InputError(f"{where}: rle counts add up to {counts.sum()}, not to height x width"
                         f" of its size {rle['size']}")
    return counts


def encode_rle(mask, compressed=True):
    """bool (height, width) -> {"size": [height, width], "counts": text, or a list}."""
    flat = np.asarray(mask, bool).T.ravel()
    return encode_edges(np.flatnonzero(np.diff(flat, prepend=False)), np.shape(mask), compressed)


def encode_edges(edges, size, compressed=True):
    """The same of a mask (height, width) given by where along its columns it changes, ascending."""
    counts = np.diff(np.asarray(edges, np.int64), prepend=0, append=size[0] * size[1]).tolist()
    return {"size": list(size), "counts": _counts_to_string(counts) if compressed else counts}


def _counts_from_string(text, where):
    if not text.isascii():
        raise InputError(f"{where}: rle counts are not a compressed COCO string")
    group = np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)
    group = group.astype(np.int64) - 48
    last = group & 32 == 0                              # of a number
    if (group < 0).any() or (group > 63).any():
        raise InputError(f"{where}: rle counts are not a compressed COCO string")
    if not last[-1:].all():
        raise InputError(f"{where}: rle counts end within a number")
    ends = np.flatnonzero(last)
    begins = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(group)) - np.repeat(begins, ends - begins + 1)
    if (place > 6).any():
        raise InputError(f"{where}: rle counts are not a compressed COCO string")
    if not len(ends):
        return ends
    counts = np.add.reduceat((group & 31) << (5 * place), begins)
    counts -= np.where(group[ends] & 16, 32 << (5 * place[ends]), 0)            # sign extension
    for first in (1, 2):                                # each minus the one two before it
        counts[first::2] = counts[first::2].cumsum()
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
    never non none nobody nothing cannot lacks lacking missing absent minus except excluding instead
""".split())    # English; "can", "round" and "like" are missing: they are nouns or adjectives too

# Letters with their marks, and digits, are one word; a word may hold hyphens and apostrophes.
WORD = r"[\p{L}\p{M}\p{N}\u200c\u200d]+(?:[-'\u00b7\u05f3\u05f4][\p{L}\p{M}\p{N}\u200c\u200d]+)*"
PIECE = regex.compile(WORD + r"|[^\s_]")                 # a word or a sign
LETTER = regex.compile(r"\p{L}")
SPACELESS = regex.compile(                              # scripts that put no spaces between words
    r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
ALIKE = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'")       # apostrophes, hyphens
                      | dict.fromkeys("\u2010\u2011\u2012\u2212", "-")
                      | dict.fromkeys("\u00ad\u200b\u2060\ufeff"))    # what nobody sees


def lowered(text):
    """Lower case in NFC, with plain hyphens and apostrophes: one spelling of a word."""
    text = unicodedata.normalize("NFC", text).lower()
    return unicodedata.normalize("NFC", text).translate(ALIKE)


def read_stop_words(name):
    """--stop-words: "" (English), none, or a UTF-8 file -> sorted list, None for English."""
    if not name:
        return None
    if name == "none":
        return []
    try:
        return sorted(set(lowered(Path(name).read_text(encoding="utf-8-sig")).split()))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"--stop-words {name}: cannot be read ({reason}); name a file of words, or"
                         " none") from None


def content_words(phrase, stop_words=STOP_WORDS):
    """The words of a phrase that name something seen: lower case, in order, each once.

    Stop words, numbers, "'s" drop out, and what is said not to be there: see `pieces`.
    "Two of the man's T-shirts" -> man, t-shirts. "A man without a hat" -> man. What a script writes
    without spaces (Chinese, Japanese, Thai) is one word; the tokenizer divides it (`word_ids`).
    """
    words = [word.removesuffix("'s") for word, said in pieces(phrase, stop_words) if said]
    return list(dict.fromkeys(w for w in words if LETTER.search(w) and w not in stop_words))


# What begins the naming of things that are not there, if it is among the stop words: so a list for
# another language brings its own, or none.
NEGATORS = frozenset("no not non without never neither nor none nobody nothing cannot lacks lacking"
                     " missing absent minus except excluding".split())
PAIRS = {("instead", "of"), ("free", "of"), ("devoid", "of"), ("absence", "of"), ("lack", "of"),
         ("rather", "than"), ("other", "than")}
SEEN = frozenset("worn visible present there found shown seen".split())         # "mask not worn"
# What is not there ends at a place ("not in the house") and, once named, where the phrase goes on
# to something else.
PLACES = frozenset("""
    in on at by near next behind beside between beyond below beneath above under underneath over
    inside outside against along around across through to toward towards from onto into""".split())
GOES_ON = PLACES | frozenset("""
    with who whom whose which that where when while as because since though although is are was were
    has have wearing holding carrying riding sitting standing walking running jumping playing
    looking watching talking eating drinking leaning lying laying pulling pushing throwing catching
    hitting kicking using facing crossing driving flying hanging climbing feeding""".split())
DEGREES = frozenset("very so too quite really fully yet that".split())       # "a not very big dog"
SIGNS = frozenset("sign signs symbol symbols zone".split())         # "a no parking sign" is there


@functools.lru_cache(2**14)
def pieces(text, stop_words=STOP_WORDS):
    """Words and signs of a text, lower case -> ((piece, said), ...); said: not named as missing.

    A small English rule, ours. What follows a negator is not there, up to a sign (but for a comma
    before an "or") or a word that goes on to something else: "no helmet", "without_mask", "not
    wearing a hat", "a man with no shirt on a horse" (the horse is there). "Missing", "no" and "not
    worn" at the end negate what stands before them.
    """
    text = regex.sub(r"\b([Nn]on?|[Ww]ithout)(?=\p{Lu}\p{Ll})", r"\1 ", text)     # "NoHelmet"
    text = regex.sub(r"\bw/o(ut)?\b", "without", lowered(text))
    text = regex.sub(r"(?<=\p{L})-(no|not|without)-(?=\p{L})", r" \1 ", text)     # "man-no-hat"
    text = regex.sub(r"\b(no|not|without)-(?=\p{L}+\b(?!-))", r"\1 ", text)      # "no-mask"
    found, active = PIECE.findall(text), NEGATORS & set(stop_words)
    said, negated, named, degree, clauses = [True] * len(found), False, False, False, [0]
    for i, piece in enumerate(found):
        rest = found[i + 1:]
        after = rest[0] if rest else ""
        if not LETTER.search(piece):
            listed = piece == "," and not {"or", "nor"}.isdisjoint(rest)
            joins = piece in ("':/=([\u2013-" if negated and not named else "'\"-")  # "no:mask"
            if not listed and not joins and not (piece.isdecimal() and named):
                negated = False                                         # "no. 5" negates nothing
                clauses += [] if piece.isdecimal() else [i + 1]
        elif active and (piece in active or piece.endswith("n't") or (piece, after) in PAIRS):
            last = piece in ("missing", "absent", "no", "none", "without") or after in SEEN
            if last and not any(map(LETTER.search, rest[after in SEEN:])):
                own = [c for c in clauses if any(map(LETTER.search, found[c:i]))] or [i]
                said[own[-1]:] = [False] * (len(found) - own[-1])       # "helmet: no"
                break
            said[i], negated, named = False, after not in ("only", "just", "merely"), False
            degree = after in DEGREES
        else:
            ends = GOES_ON if named else PLACES
            if piece == "but" or piece in ends or (piece in SIGNS and after != "of"):
                negated = False
            compound = regex.fullmatch(r"(non|no|not|without)-.*|.*-(free|less)", piece)
            said[i] = not negated and not (active and compound)         # not "sugar-free"
            named = named or piece not in stop_words
            negated = negated and not (degree and named)
    return tuple(zip(found, said))


def region_phrase(region, where):
    """The region's phrase. InputError: it has none."""
    phrase = region.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        raise InputError(f'{where}: "phrase" is missing, empty or not text')
    check_unicode(phrase, f"{where}: phrase")
    return phrase


def check_unicode(text, where):
    """InputError: half of a surrogate pair (an emoji cut in two), which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is half of a surrogate pair") from None


def patch_words(regions, image_size, geometry, grid, threshold=0.25, where="regions", aspect=1.0,
                stop_words=None):
    """The words of each patch: those of all regions that cover at least `threshold` of it.

    -> P lists, row by row, each word once, in the order of the regions; [] is an unlabelled patch.
    Arguments as in `region_coverage`; stop_words: None for English. InputError: as there, or a
    region without a phrase.
    """
    coverage = region_coverage(regions, image_size, geometry, grid, where, aspect)
    stop_words = STOP_WORDS if stop_words in (None, "") else frozenset(stop_words)
    phrases = [content_words(region_phrase(region, f"{where}: regions[{i}]"), stop_words)
               for i, region in enumerate(regions)]

    @functools.cache                        # neighbouring patches lie in the same regions
    def words(covering):
        both = zip(covering, phrases)
        return list(dict.fromkeys(word for covers, own in both if covers for word in own))

    covered = coverage.reshape(len(regions), grid[0] * grid[1]).T >= threshold - 1e-6       # (P, R)
    return [words(tuple(row)) for row in covered.tolist()]


# ---- words -> tokens -> the target distribution Y ------------------------------------------------


def encode_text(tokenizer, text, plain=True):
    """Token ids of a piece of text as it reads after other text.

    plain: special tokens in it, such as "</s>" in a question about HTML, are text like any other.
    Llama's tokenizer puts a space in front of whatever it encodes; a text that brings its own would
    get two, which the same words never have within a sentence.
    """
    if text.startswith(" "):
        first = tokenizer.encode(" a", add_special_tokens=False)[0]
        text = text[1:] if _is_blank(tokenizer, first) else text
    options = dict(add_special_tokens=False, split_special_tokens=plain, verbose=False)
    return tokenizer(text, **options).input_ids if text else []


def _is_blank(tokenizer, token):
    return not tokenizer.decode([token]).strip()


def word_ids(tokenizer, word):
    """Tokens of a word within a sentence: those of " word", or of the word alone in a script that
    writes no spaces. Blank and unknown ones drop out: [] for one that the tokenizer cannot write.
    """
    blank = "" if SPACELESS.search(word) else " "
    return [token for token in encode_text(tokenizer, blank + word)
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
    nothing = [[0] * (longest - len(target)) for target in targets]
    ids = [[*target, *rest] for target, rest in zip(targets, nothing)]
    weights = [[*target.values(), *rest] for target, rest in zip(targets, nothing)]
    return (torch.tensor(ids, dtype=torch.int64)[index],
            torch.tensor(weights, dtype=torch.float32)[index])


def _target(words):
    """Token lists of one patch's words -> {token: weight}, weights adding up to 1."""
    target = {}
    for tokens in words:
        for token in tokens:
            target[token] = target.get(token, 0.0) + 1 / (len(words) * len(tokens))
    return target
