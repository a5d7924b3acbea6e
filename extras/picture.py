"""The still picture of probe.py: photographs, each area of patches under the word nearest to them.

Neighbouring patches of one nearest word, right or wrong alike, are one area. It has an outline,
green if the word names the patches, red if it does not, grey without a label, and its word once.
"""
import textwrap

from PIL import Image, ImageDraw, ImageFont

import runtime

PANEL, GAP, LINE = 448, 12, 20              # pixels: side of a panel, space between, line of text
FONT, SMALL = (ImageFont.load_default(size) for size in (14, 12))
INK, PAPER = (240, 240, 240), (24, 24, 28)
FRAME = {True: (60, 255, 90), False: (255, 50, 50), None: (150, 150, 150)}
LEGEND = ("areas of patches under their nearest word; green: it names the patches, red: it does "
          "not, grey: they have no label")


def areas(texts, columns):
    """Patches of one text that touch along edges: a sorted list of patch numbers per area."""
    area = {i: {i} for i in range(len(texts))}
    for i in area:
        for j in [i - columns] * (i >= columns) + [i - 1] * (i % columns > 0):
            if texts[j] == texts[i] and area[j] is not area[i]:
                area[j] |= area[i]
                area |= dict.fromkeys(area[i], area[j])
    return [sorted(one) for one in {id(one): one for one in area.values()}.values()]


def overlap(a, b):
    """The area that two boxes (x0, y0, x1, y1) share; 0 where they do not touch."""
    return (max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1])))


def place(text, boxes, taken):
    """Where an area's word stands, as a box: within the panel, mostly on the area's own patches
    (boxes), on no other word (taken). None: nowhere. -> (box, font)."""
    middle = [sum((box[i] + box[i + 2]) / 2 for box in boxes) / len(boxes) for i in (0, 1)]
    for font in (FONT, SMALL):
        width, height, found = font.getlength(text) + 6, font.size + 5, []
        for x0, y0, x1, y1 in boxes:
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            left = min(max(x - width / 2, 0), PANEL - width)
            top = min(max(y - height / 2, 0), PANEL - height)
            own = left, top, left + width, top + height
            inside = sum(overlap(own, box) for box in boxes) / (width * height)
            if inside > 0.55 and not any(overlap(own, other) for other in taken):
                far = (x - middle[0]) ** 2 + (y - middle[1]) ** 2
                found.append((-round(inside, 2), far, own))
        if found:
            return min(found)[2], font
    return None


def panel(view, grid, texts, right):
    """The view (PANEL x PANEL) with its areas: texts[i] is the nearest word of patch i, right[i]
    whether it names the patch, None without a label. Words that find no place are left out."""
    rows, columns = grid
    x, y = ([i * PANEL // n for i in range(n + 1)] for n in (columns, rows))
    boxes = [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)]
    image = view.copy()
    draw, taken = ImageDraw.Draw(image), []
    found = areas(list(zip(texts, right)), columns)
    for area in sorted(found, key=lambda area: right[area[0]] is False):    # red ones last
        own, colour = set(area), FRAME[right[area[0]]]
        for i in area:
            (x0, y0, x1, y1), c = boxes[i], i % columns
            for there, line in ((i - columns in own, (x0, y0, x1 - 1, y0 + 1)),
                                (i + columns in own, (x0, y1 - 2, x1 - 1, y1 - 1)),
                                (c > 0 and i - 1 in own, (x0, y0, x0 + 1, y1 - 1)),
                                (c < columns - 1 and i + 1 in own, (x1 - 2, y0, x1 - 1, y1 - 1))):
                if not there:
                    draw.rectangle(line, colour)
    veil = Image.new("RGBA", image.size)
    for area in sorted(found, key=len, reverse=True):
        text = texts[area[0]]
        if spot := place(text, [boxes[i] for i in area], taken):
            box, font = spot
            taken.append(box)
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            ImageDraw.Draw(veil).rounded_rectangle(box, 4, (0, 0, 0, 170))
            ImageDraw.Draw(veil).text(middle, text, INK, font, "mm")
    image.paste(veil, mask=veil.getchannel("A"))
    return image


def sheet(captions, columns, names):
    """The picture: a row per image, a panel per checkpoint, the image's caption below.

    columns: for each checkpoint a list of (view, grid, texts, right), see `panel`.
    """
    height, step = PANEL + 2 * LINE + GAP, PANEL + GAP
    size = len(columns) * step + GAP, 2 * LINE + 2 * GAP + len(captions) * height
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for n, title in enumerate(names):
        draw.text((GAP + n * step, 6), title, INK, FONT)
    for n, caption in enumerate(captions):
        top = LINE + GAP + n * height
        for c, column in enumerate(columns):
            image.paste(panel(*column[n]), (GAP + c * step, top))
        lines = textwrap.wrap(caption, image.width // 7, max_lines=2, placeholder=" ...")
        draw.text((GAP, top + PANEL + 2), "\n".join(lines), INK, SMALL)
    legend = textwrap.wrap(LEGEND, image.width // 6)
    draw.text((GAP, image.height - 2 * LINE), "\n".join(legend), INK, SMALL)
    return image


def write(path, names, captions, looks, shown):
    """Write the picture of the images `shown`, with a panel for each checkpoint.

    looks: of each checkpoint, as of probe.looks; small images grow with sharp edges.
    """
    def column(look):
        for image in (look["images"][i] for i in shown):
            small = 2 * image["view"].width <= PANEL
            how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            texts = [look["texts"][i] for i in image["near"][:, 0].tolist()]
            yield image["view"].resize((PANEL, PANEL), how), image["grid"], texts, image["right"]

    columns = [list(column(look)) for look in looks]
    with runtime.atomic(path) as temporary:
        sheet([captions[i] for i in shown], columns, names).save(temporary, format="PNG")
