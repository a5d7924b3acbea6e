"""What --inspect shows: regions beside the patch labels that training will see, and a summary."""
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoConfig

import backbones.loading as backbone
import runtime
from annotations import listed
from data import image_header, image_path, open_image, read_records
from labels import (
    STOP_WORDS, check_frame, content_words, patch_words, read_stop_words, region_bounds,
    region_mask, region_phrase, sides, view_box)
from projector import output_grid
from runtime import InputError

COLOURS = [(230, 60, 60), (60, 140, 230), (60, 180, 90), (240, 160, 40), (160, 90, 220),
           (40, 190, 190), (230, 100, 180), (130, 130, 40), (120, 60, 30), (30, 60, 160),
           (170, 220, 60), (250, 220, 80)]
FONT = ImageFont.load_default(13)
SIDE, LEGEND, LINES = 448, 260, 26      # pixels of a panel, of a list beside it; lines of the list
SAMPLE = 1000                           # records whose patches are counted


def grid_of(args) -> tuple[tuple[int, int], float]:
    """(rows, columns) of the patches, and width / height of the encoder's input, as in training.

    Without --vision 16 x 16 on a square. InputError: no encoder with patches, or a misfit.
    """
    if not args.vision:
        return (16, 16), 1.0
    name = backbone.find_model(args.vision, "--vision")
    settings = backbone.load_backbone(AutoConfig, name, "--vision")
    settings = backbone.check_encoder(getattr(settings, "vision_config", settings), args.vision)
    processor = backbone.read_processor(name)
    size, grid = backbone.encoder_input(args.image_size, processor, settings)
    height, width = sides(size)
    try:
        grid = output_grid(args.projector, grid, args.pool)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if isinstance(grid, int):
        raise InputError(f"--projector {args.projector}: its outputs have no places in the image")
    return grid, width / height


def stop_words_of(args) -> frozenset[str]:
    """Those of --stop-words."""
    own = read_stop_words(args.stop_words)
    return STOP_WORDS if own is None else frozenset(own)


# ---- the picture ---------------------------------------------------------------------------------


def overlay(image: Image.Image, masks: list[tuple[int, np.ndarray]]) -> Image.Image:
    """The image with masks (height, width) laid over it, each in the colour of its number."""
    pixels = np.asarray(image, np.float32)
    for number, mask in masks:
        share = 0.55 * mask[..., None]
        pixels = pixels * (1 - share) + share * np.float32(COLOURS[number % len(COLOURS)])
    return Image.fromarray(pixels.astype(np.uint8))


def legend(names: dict[int, str]) -> Image.Image:
    """A list of names, each behind its number and a square of its colour."""
    panel = Image.new("RGB", (LEGEND, SIDE), "white")
    draw = ImageDraw.Draw(panel)
    for i, (number, name) in enumerate(list(names.items())[:LINES]):
        y = 6 + 17 * i
        draw.rectangle((6, y, 18, y + 12), fill=COLOURS[number % len(COLOURS)])
        last = i == LINES - 1 and len(names) > LINES
        text = f"and {len(names) - i} more" if last else f"{number} {name}"
        draw.text((24, y - 2), text, fill="black", font=FONT)
    return panel


def look(record: dict, image: Image.Image, args, grid: tuple[int, int],
         aspect: float) -> Image.Image:
    """A row of the picture: the image with its regions, the encoder's view with its patch labels.

    Beside each is a list. The same words have the same number and colour in both.
    """
    regions, where = record["regions"], f"record {record.get('id')}"
    stop, view = stop_words_of(args), (args.geometry, grid, args.coverage)
    named = [tuple(content_words(region["phrase"], stop)) for region in regions]
    words = patch_words(regions, image.size, *view, where, aspect, stop)
    sets = [own for own, _ in Counter(map(tuple, filter(None, words))).most_common()]
    number = {own: i for i, own in enumerate(dict.fromkeys([*named, *sets]))}

    masks = [region_mask(region, image.size, where) for region in regions]
    whole = overlay(image, [(number[own], mask) for own, mask in zip(named, masks)])
    whole.thumbnail((SIDE, SIDE))
    count, said = Counter(named), {}
    for own, region in reversed(list(zip(named, regions))):
        said[number[own]] = region["phrase"] + f" x {count[own]}" * (count[own] > 1)

    width, height = round(SIDE * min(aspect, 1)), round(SIDE / max(aspect, 1))
    view = image.crop(view_box(image.size, args.geometry, aspect))      # black outside of the image
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    cells = np.array([number[tuple(own)] if own else -1 for own in words]).reshape(grid)
    cells = cells[rows][:, columns]                                     # (height, width)
    masks = [(number[own], cells == number[own]) for own in sets]
    view = overlay(view.resize((width, height)), masks)
    draw = ImageDraw.Draw(view)
    tall, wide = height / grid[0], width / grid[1]
    for i, own in enumerate(words):
        top, left = i // grid[1] * tall, i % grid[1] * wide
        draw.rectangle((left, top, left + wide, top + tall), outline="white")
        if own:
            draw.text((left + 2, top + 1), str(number[tuple(own)]), fill="white", font=FONT)

    row = Image.new("RGB", (2 * (SIDE + LEGEND), SIDE), "white")
    row.paste(whole, (0, 0))
    row.paste(legend(dict(sorted(said.items()))), (SIDE, 0))
    row.paste(view, (SIDE + LEGEND, 0))
    row.paste(legend({number[own]: " + ".join(own) for own in sets}), (2 * SIDE + LEGEND, 0))
    return row


# ---- the summary ---------------------------------------------------------------------------------


def inspect(args, grid: tuple[int, int], aspect: float) -> bool:
    """Print a summary of OUT, and draw some of its images; -> whether there is a picture.

    Regions and words are counted in all records, patches in SAMPLE of them at even steps.
    """
    records, annotated, problems = read_records(args.out), [], []
    images, frequency, boxes, stop = set(), Counter(), [], stop_words_of(args)
    for i, record in enumerate(records):
        where = f"{args.out}: record {i}"
        with listed(problems, where):
            images |= {record["image"]} if record.get("image") else set()
            phrases = [region_phrase(r, where) for r in record.get("regions") or []]
            frequency.update(word for phrase in phrases for word in content_words(phrase, stop))
            annotated += [(where, record)] if phrases else []
    sizes = Counter()                               # of patches: how many have so many words
    for where, record in runtime.spread(annotated, SAMPLE):
        with listed(problems, where):
            size, _ = image_header(image_path(record, args.image_dir, where), where)
            boxes += [(where, region_bounds(r, where), size) for r in record["regions"]]
            words = patch_words(record["regions"], size, args.geometry, grid, args.coverage, where,
                                aspect, stop)
            sizes.update(map(len, words))
    boxes = [box for box in boxes if box[1] is not None]
    check_frame(*([box[i] for box in boxes] for i in range(3)))
    if problems:
        print(f"{len(problems)} records cannot be used: " + "; ".join(problems[:3]))
    if not sizes:
        print(f"{args.out}: none of {len(records)} records has regions that can be drawn")
        return False
    regions = sum(len(record["regions"]) for _, record in annotated)
    labelled = sizes.total() - sizes[0]
    words = sum(n * k for n, k in sizes.items()) / max(labelled, 1)
    print(f"{len(records)} records, {len(annotated)} of them with regions; {len(images)} images;"
          f" {regions} regions, {regions / len(annotated):.1f} a record; {len(frequency)} different"
          f" words\npatches, {grid[0]} x {grid[1]}, {args.geometry}, coverage {args.coverage:g}:"
          f" {labelled / sizes.total():.1%} labelled, with {words:.2f} words each\nmost frequent"
          " words: " + ", ".join(f"{word} {n}" for word, n in frequency.most_common(12)))

    rows = []
    for where, record in runtime.spread(annotated, args.inspect):
        with listed(problems, where):
            image = open_image(image_path(record, args.image_dir, where), where)
            rows.append(look(record, image, args, grid, aspect))
    if not rows:
        print("of the images to draw none can be drawn: " + problems[-1])
        return False
    picture = Image.new("RGB", (rows[0].width, (SIDE + 8) * len(rows)), "white")
    for i, row in enumerate(rows):
        picture.paste(row, (0, (SIDE + 8) * i))
    with runtime.atomic(Path(args.out).with_suffix(".png")) as temporary:
        picture.save(temporary, "png")
    return True
