"""Photographs, or the annotations that people have of them -> records with regions, the file that training reads.

    python annotate.py --from coco --instances instances_train2017.json --panoptic panoptic_train2017.json \\
                       --captions captions_train2017.json --image-dir train2017 --out coco.jsonl                   # any of the three files
    python annotate.py --from flickr30k --data flickr30k_entities --split train.txt --image-dir flickr30k-images --out flickr.jsonl
    python annotate.py --from grandf --data OpenPsgGCG_train.json --image-dir train2017 --out grandf.jsonl
    python annotate.py --from refcoco --data "refs(unc).p" --instances instances.json --split val --to refer --image-dir train2014 \\
                       --out refcoco_val.jsonl                                      # records for eval.py
    python annotate.py --from llava --data llava.json --image-dir images --out llava.jsonl
    torchrun --nproc_per_node 8 annotate.py --from images --image-dir photos --tagger florence-community/Florence-2-large \\
             --detector IDEA-Research/grounding-dino-base --segmenter facebook/sam2.1-hiera-large --out photos.jsonl
    python annotate.py --inspect 4 --out coco.jsonl --image-dir train2017 --vision facebook/dinov2-small      # what training will see

Every process writes what it has done to a part file beside OUT, line by line; the first one puts the parts together, in order, when all are
done. A run that was interrupted goes on from its parts, with the same flags and any number of processes. What is wrong with an image or a
region costs that image or region alone, is counted, and is listed in OUT.problems.

reads:   the annotation files, and every image once, since a broken one would stop training
writes:  OUT, records as JSONL (by --to refer, records for eval.py); OUT.problems; with --inspect OUT.png
"""
import contextlib
import dataclasses
import datetime
import glob
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import formats
import runtime
from data import GEOMETRIES, InputError
from formats import SUFFIXES, Source, answer_of, image_size, listed, llava_record, records_of
from large_json import Objects
from projector import PROJECTORS, output_grid

# ------------------------------------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Flags of annotate.py."""

    from_: str = field(default="", metadata={"choices": ["coco", "flickr30k", "grandf", "refcoco", "llava", "images"]})
    """what the source is; without it, --inspect looks at OUT as it is"""
    out: str = ""
    """file to write, .jsonl"""
    image_dir: str = ""
    """folder that image names are relative to"""
    to: str = field(default="records", metadata={"choices": ["records", "refer"]})
    """records to train on, or referring expressions for eval.py (flickr30k, refcoco)"""
    data: str = ""
    """the annotations: a file, for flickr30k the folder of Sentences/ and Annotations/; for images, records without regions"""
    instances: str = ""
    """COCO's instances file"""
    panoptic: str = ""
    """COCO's panoptic file"""
    panoptic_dir: str = ""
    """folder of its PNG files; none: named like the file, without .json"""
    captions: str = ""
    """COCO's captions file"""
    captions_per_image: int = 1
    """records per image, one for each of its first captions; 0 = for all of them"""
    split: str = ""
    """refcoco: only references of this split; flickr30k: file that lists the images to take, an id per line"""
    resized: bool = False
    """flickr30k: images are not as large as annotated, since they were resized; boxes are scaled to them"""
    request: str = "Please provide the bounding box coordinate of the region this sentence describes: {}"
    """with --to refer, what is asked; {} is the expression. The default is LLaVA-1.5's"""
    tagger: str = "caption"
    """images: what may be there; caption: noun phrases of the record's answer, a file of tags, or a Florence-2"""
    detector: str = ""
    """images: a Grounding DINO, for boxes"""
    segmenter: str = ""
    """images: a SAM 2, for masks of the boxes; or a SAM 3 without --detector"""
    threshold: float = 0.35
    """images: lowest score of a region"""
    text_threshold: float = 0.25
    """images: lowest score of a word of the phrase that Grounding DINO gives a box"""
    nms: float = 0.7
    """images: intersection over union above which the weaker of two boxes of one phrase is dropped"""
    batch_size: int = 8
    """images: how many at a time"""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """images: of the models' matrix products; auto: bfloat16 on a GPU that has it, else float32"""
    inspect: int = 0
    """draw this many images with their regions and patch labels, and print a summary"""
    vision: str = ""
    """--inspect: an encoder, for its grid; this and the next four flags as for pretrain.py"""
    image_size: int = 0
    """--inspect: side of the encoder's square input in pixels; 0: what its image processor says"""
    projector: str = field(default="mlp2x_gelu", metadata={"choices": list(PROJECTORS)})
    """--inspect: kind of projector"""
    pool: int = 2
    """--inspect: pixel_shuffle and c_abstractor make one patch of pool x pool"""
    geometry: str = field(default="crop", metadata={"choices": list(GEOMETRIES)})
    """--inspect: how an image becomes a square"""
    grid: list[str] = field(default_factory=list)
    """--inspect: rows and columns of the grid on a square, without --vision; none: 16 16"""
    coverage: float = 0.25
    """--inspect: share of a patch that a region must cover to label it"""
    llm: str = ""
    """--inspect: a language model, to count the words that its tokenizer splits"""


USES = {"coco": {"instances", "panoptic", "panoptic_dir", "captions", "captions_per_image"},
        "flickr30k": {"data", "split", "captions_per_image", "to", "request", "resized"},
        "grandf": {"data"}, "refcoco": {"data", "instances", "captions", "captions_per_image", "split", "to", "request"},
        "llava": {"data"}, "": set(),                           # the flags that a source reads,
        "images": {"data", "tagger", "detector", "segmenter", "threshold", "text_threshold", "nms", "batch_size", "dtype"}}
SEEN = {"image_size", "projector", "pool"}                      # those about the encoder of --vision,
LOOK = {"inspect", "vision", "grid", "geometry", "coverage", "llm"} | SEEN                       # and those that do not change OUT


def check(args: Args) -> None:
    """Refuse flags that make no sense, or that the source would ignore."""
    if not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out!r}: name the file to write, ending in .jsonl")
    if not args.from_ and not args.inspect:
        raise InputError("--from says what to convert; without it, --inspect 4 looks at an OUT that is there")
    for f in dataclasses.fields(args):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        given, flag = getattr(args, f.name) != default, f"--{f.name.replace('_', '-')}"
        if given and f.name in LOOK and not args.inspect:
            raise InputError(f"{flag} is read by --inspect alone")
        if given and f.name not in USES[args.from_] | LOOK | {"from_", "out", "image_dir"}:
            raise InputError(f"{flag} is not read " + (f"by --from {args.from_}" if args.from_ else "without --from"))
        if given and f.name in (SEEN if not args.vision else {"grid"}):
            raise InputError(f"{flag} is not read with{'' if args.vision else 'out'} --vision, an encoder")
    if args.inspect and args.to == "refer":
        raise InputError("--inspect draws regions, which the records of --to refer do not have")
    if args.from_ in ("grandf", "llava") and not Path(args.data).is_file():
        raise InputError(f"--from {args.from_} needs --data, a file; {args.data!r} is none")
    if not Path(args.image_dir or "/dev/null").is_dir():
        raise InputError(f"--image-dir {args.image_dir!r} is not a folder")
    if args.from_ and Path(args.out).exists() and not parts_of(Path(args.out)):
        raise InputError(f"{args.out} exists; delete it to make it again, or look at it with --inspect and without --from")
    if not 0 < args.coverage <= 1:
        raise InputError(f"--coverage {args.coverage} is a share of a patch, above 0 and at most 1")
    if args.grid and not (len(args.grid) == 2 and all(n.isdecimal() and int(n) for n in args.grid)):
        raise InputError(f"--grid {' '.join(args.grid)}: expected two positive numbers, rows and columns")
    if args.batch_size < 1 or not all(0 <= share <= 1 for share in (args.threshold, args.text_threshold, args.nms)):
        raise InputError("--batch-size is at least 1; --threshold, --text-threshold and --nms are from 0 to 1")
    if min(args.captions_per_image, args.inspect, args.pool - 1) < 0 or "{}" not in args.request:
        raise InputError("--captions-per-image and --inspect are not negative, --pool is at least 1, and --request has a {}")


# ------------------------------------------------------------------------------------------------------------ parts, then the whole

# A part file: a line with the flags, then a line [number of the image, its records, its problems] for each image done.


def part_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, line) of a part's whole lines; a killed process may leave half of one at the end."""
    at = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield at, line
            at += len(line)


def part_line(number: int, records: list[dict], problems: list[str]) -> bytes:
    """The line of an image. A text with half of a surrogate pair (an emoji cut in two, a file name in another encoding) cannot be
    written, nor read in training: it costs its record."""
    kept = []
    for record in records:
        text = json.dumps(record, ensure_ascii=False)
        if text.isascii() or text == text.encode(errors="replace").decode():
            kept.append(record)
        else:
            problems = [*problems, f"record {record.get('id')}: a text or file name is not Unicode (half of a surrogate pair)"]
    return (json.dumps([number, kept, problems], ensure_ascii=False) + "\n").encode(errors="replace")


def parts_of(out: Path) -> list[Path]:
    """The part files beside OUT."""
    return sorted(path for path in out.parent.glob(glob.escape(out.name) + ".rank-*") if path.suffix.removeprefix(".rank-").isdigit())


def write_part(source: Source, out: Path, header: dict) -> None:
    """Convert this rank's share of what no part has yet, and append it to its own part. Images are converted in the same batches whatever
    the number of processes and wherever a run stopped, since a model's scores depend on what else is in the batch. InputError: parts of
    another run."""
    done, rank, world = np.zeros(source.count, bool), runtime.rank(), runtime.world()
    first_line = (json.dumps(header) + "\n").encode()
    for part in parts_of(out):
        for at, line in part_lines(part):
            if at:
                done[int(line[1: line.index(b",")])] = True
            elif line != first_line:
                raise InputError(f"{part} is left of a run with other flags or files; delete {out}.rank-* to start again")
    runtime.barrier()                                           # all have read before any writes
    own = out.parent / f"{out.name}.rank-{rank}"
    keep = max((at + len(line) for at, line in part_lines(own)), default=0) if own.exists() else 0
    starts = [s for s in range(rank * source.batch, source.count, world * source.batch) if not done[s: s + source.batch].all()]
    if done.any():
        runtime.log(f"going on: {done.sum()} of {source.count} images were done")
    with open(own, "ab") as file:
        file.truncate(keep)
        file.write(b"" if keep else first_line)
        for start in tqdm(starts, desc="annotate", unit=f" x {source.batch} images", disable=rank > 0, mininterval=1):
            numbers = range(start, min(start + source.batch, source.count))
            for number, (records, problems) in zip(numbers, source.convert(numbers)):
                if not done[number]:
                    file.write(part_line(number, records, problems))
            file.flush()


def merge(source: Source, out: Path) -> tuple[int, list[str]]:
    """Put all parts together into OUT, in the order of the images, and the problems into OUT.problems; the parts are deleted.
    -> (records, problems)."""
    parts = parts_of(out)
    where = np.full((source.count, 2), -1, np.int64)            # of each image: its part, and the position of its line
    for i, part in enumerate(parts):
        for at, line in part_lines(part):
            if at:
                where[int(line[1: line.index(b",")])] = i, at
    if (where < 0).any():
        raise InputError(f"{out}: {(where[:, 0] < 0).sum()} images are in no part; --out must lie in a folder that all machines share")
    problems, count, listing = [text.encode(errors="replace").decode() for text in source.problems], 0, Path(f"{out}.problems")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(runtime.atomic(out))    # renamed last, so an OUT that is there is complete
        file = stack.enter_context(open(temporary, "w", encoding="utf-8"))
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        for part, at in where.tolist():
            files[part].seek(at)
            _, records, own = json.loads(files[part].readline())
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            problems += own
            count += len(records)
        listing.unlink(missing_ok=True)
        if problems:
            with runtime.atomic(listing) as noted:
                noted.write_text("".join(problem + "\n" for problem in problems), encoding="utf-8")
        if not count:
            for part in parts:
                part.unlink()
            reason = f": {problems[0]} (all: {listing})" if problems else ""
            raise InputError(f"no record could be made of {source.count} images{reason}")
    for part in parts:
        part.unlink()
    return count, problems


# ------------------------------------------------------------------------------------------- images without regions, through models


def from_images(args: Args) -> Source:
    """The images of a folder, or LLaVA records: regions by open models (detect.py). Records without an image, or with regions, stay as they
    are, see `llava_record`; an image of a folder gets Florence-2's caption, or its phrases."""
    from detect import Annotator  # here, since no other source needs transformers

    file = Objects(args.data, {None: None}, "a file of records") if args.data else None
    folder = Path(args.image_dir)
    names = [] if file else sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not file and args.tagger == "caption":
        raise InputError("--tagger caption needs --data, records with captions; for a folder of images name a Florence-2 or a file of tags")
    device = torch.device("cuda", runtime.rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    annotator = Annotator(args.tagger, args.detector, args.segmenter, device, runtime.precision(device, args.dtype), args.threshold,
                          args.text_threshold, args.nms)

    def annotate(waiting):
        made, reason = [], ""
        try:
            made = annotator([w[4] for w in waiting], [w[5] for w in waiting], [w[2]["image"] for w in waiting])
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size {args.batch_size}: out of GPU memory at {waiting[0][3]}; lower it and start again") from None
        except torch.AcceleratorError:                          # after it the GPU answers nothing more, whatever the image
            raise
        except Exception as error:                              # of the models, on one of these images
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        if reason and len(waiting) > 1:                         # which one: each is tried alone
            for alone in waiting:
                annotate([alone])
        elif reason:
            waiting[0][1].append(f"{waiting[0][3]}: the models fail on it ({reason})")
        for (records, problems, record, where, *_), (caption, regions) in zip(waiting, made):
            with listed(problems, where):
                records += [record | {"regions": regions}] if file else records_of(
                    record["image"], record["image"], [caption], regions, 1, problems)

    def convert(numbers):
        results, waiting = [([], []) for _ in numbers], []
        for (records, problems), number in zip(results, numbers):
            where = f"{args.data}: record {number}" if file else f"image {names[number]}"
            with listed(problems, where):
                record = file.get(None, number)[0] if file else {"image": names[number]}
                if record.get("image") is None or record.get("regions"):
                    records.append(llava_record(record, args, where, problems))
                    continue
                caption = answer_of(record, where) if file else ""
                image = data.open_image(data.image_path(record, folder, where), where)
                if annotator.tags_of is not None and record["image"] not in annotator.tags_of:
                    problems.append(f"{where}: no line for {record['image']} in {args.tagger}")
                waiting.append((records, problems, record, where, image, caption))
        if waiting:
            annotate(waiting)
        return results

    return Source(len(file.spans[None]) if file else len(names), convert, batch=args.batch_size)


# ------------------------------------------------------------------------------------------------------------------------- inspect

COLOURS = [(230, 60, 60), (60, 140, 230), (60, 180, 90), (240, 160, 40), (160, 90, 220), (40, 190, 190), (230, 100, 180), (130, 130, 40),
           (120, 60, 30), (30, 60, 160), (170, 220, 60), (250, 220, 80)]
FONT = ImageFont.load_default(13)
SIDE, LEGEND, SAMPLE = 448, 260, 1000                           # pixels of a panel, of a list beside it; records whose patches are counted


def grid_of(args: Args) -> tuple[tuple[int, int], float]:
    """(rows, columns) of the patches, and width / height of the encoder's input, as in training with these flags; of a square with --grid.
    InputError: not an encoder with patches, or sizes that do not fit them."""
    if not args.vision:
        return tuple(map(int, args.grid)) or (16, 16), 1.0
    from transformers import AutoConfig

    from model import encoder_input, find_model, load_backbone, read_processor

    name = find_model(args.vision, "--vision")
    settings = load_backbone(AutoConfig, name, "--vision")
    settings = getattr(settings, "vision_config", settings)
    if not hasattr(settings, "patch_size"):
        raise InputError(f"--vision {args.vision}: a {settings.model_type} has no patches; use a vision transformer such as CLIP")
    size, grid = encoder_input(args.image_size, read_processor(name), settings)
    height, width = data.sides(size)
    try:
        return output_grid(args.projector, grid, args.pool), width / height
    except ValueError as error:
        raise InputError(f"--{error}") from None


def overlay(image: Image.Image, masks: list[tuple[int, np.ndarray]]) -> Image.Image:
    """The image with masks (height, width) in [0, 1] laid over it, each in the colour of its number."""
    pixels = np.asarray(image, np.float32)
    for number, mask in masks:
        share = 0.55 * mask[..., None]
        pixels = pixels * (1 - share) + share * np.float32(COLOURS[number % len(COLOURS)])
    return Image.fromarray(pixels.astype(np.uint8))


def legend(names: dict[int, str], lines: int = 26) -> Image.Image:
    """A list of names, each behind its number and a square of its colour."""
    panel = Image.new("RGB", (LEGEND, SIDE), "white")
    draw = ImageDraw.Draw(panel)
    for i, (number, name) in enumerate(list(names.items())[:lines]):
        draw.rectangle((6, 6 + 17 * i, 18, 18 + 17 * i), fill=COLOURS[number % len(COLOURS)])
        last = i == lines - 1 and len(names) > lines
        draw.text((24, 4 + 17 * i), f"and {len(names) - i} more" if last else f"{number} {name}", fill="black", font=FONT)
    return panel


def look(record: dict, image: Image.Image, args: Args, grid: tuple[int, int], aspect: float) -> Image.Image:
    """One row of the picture: the image with its regions, their phrases, the encoder's view with the words of each patch, these words. The
    same words have the same number and colour in both."""
    regions = record["regions"]
    masks = [data.region_mask(region, image.size, f"record {record.get('id')}") for region in regions]
    named = [tuple(data.content_words(region["phrase"])) for region in regions]

    words = data.patch_words(regions, image.size, args.geometry, grid, args.coverage, f"record {record.get('id')}", aspect)
    sets = [own for own, _ in Counter(map(tuple, filter(None, words))).most_common()]
    number = {own: i for i, own in enumerate(dict.fromkeys([*named, *sets]))}
    whole = overlay(image, [(number[own], mask) for own, mask in zip(named, masks)])
    whole.thumbnail((SIDE, SIDE))
    width, height = round(SIDE * min(aspect, 1)), round(SIDE / max(aspect, 1))
    view = image.crop(data.view_box(image.size, args.geometry, aspect)).resize((width, height))         # outside of the image it is black
    cell_y, cell_x = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    cells = np.array([number[tuple(own)] if own else -1 for own in words]).reshape(grid)[cell_y][:, cell_x]            # (height, width)
    view = overlay(view, [(number[own], cells == number[own]) for own in sets])
    draw = ImageDraw.Draw(view)
    for i, own in enumerate(words):
        top, left = (i // grid[1]) * height / grid[0], (i % grid[1]) * width / grid[1]
        draw.rectangle((left, top, left + width / grid[1], top + height / grid[0]), outline=(255, 255, 255))
        if own:
            draw.text((left + 2, top + 1), str(number[tuple(own)]), fill="white", font=FONT)
    phrases = Counter(named)
    said = {number[own]: r["phrase"] + f" x {phrases[own]}" * (phrases[own] > 1) for own, r in reversed(list(zip(named, regions)))}
    row = Image.new("RGB", (2 * (SIDE + LEGEND), SIDE), "white")
    for panel, left in ((whole, 0), (legend(dict(sorted(said.items()))), SIDE), (view, SIDE + LEGEND),
                        (legend({number[own]: " + ".join(own) for own in sets}), 2 * SIDE + LEGEND)):
        row.paste(panel, (left, 0))
    return row


def tokenizer_of(args: Args):
    """The tokenizer of --llm, or None."""
    if not args.llm:
        return None
    from transformers import AutoTokenizer

    from model import find_model, load_backbone

    return load_backbone(AutoTokenizer, find_model(args.llm, "--llm"), "--llm")


def inspect(args: Args, grid: tuple[int, int], aspect: float, tokenizer) -> bool:
    """Print the summary of OUT, and write the picture of args.inspect of its images, if any has regions (->). Images, regions and words are
    counted in all of it, patches in SAMPLE records at even steps."""
    file = Objects(args.out, {None: None}, "a file of records")
    images, regions, frequency, annotated, problems = set(), 0, Counter(), [], []
    for number in file.spans[None]:
        with listed(problems, f"{args.out}: record {number}"):
            record = file.get(None, number)[0]
            images |= {record["image"]} if record.get("image") else set()
            own = record.get("regions") or []
            frequency.update(word for r in own for word in data.content_words(data.region_phrase(r, f"{args.out}: record {number}")))
            if own:
                regions += len(own)
                annotated.append(number)

    def spread(count: int) -> list[int]:
        return [annotated[i * len(annotated) // min(count, len(annotated))] for i in range(min(count, len(annotated)))]

    sizes = Counter()                                           # of patches: how many have so many words
    for number in tqdm(spread(SAMPLE), desc="inspect", leave=False):
        record, where = file.get(None, number)[0], f"{args.out}: record {number}"
        with listed(problems, where):
            size = image_size(data.image_path(record, args.image_dir, where), where)
            sizes.update(map(len, data.patch_words(record["regions"], size, args.geometry, grid, args.coverage, where, aspect)))
    if problems:
        print(f"{len(problems)} records cannot be used: " + "; ".join(problems[:3]))
    if not sizes:
        print(f"{args.out}: none of {len(file.spans[None])} records has regions that can be drawn")
        return False
    labelled = sizes.total() - sizes[0]
    print(f"{len(file.spans[None])} records, {len(annotated)} of them with regions; {len(images)} images; {regions} regions, "
          f"{regions / len(annotated):.1f} a record; {len(frequency)} different words")
    print(f"patches, {grid[0]} x {grid[1]}, {args.geometry}, coverage {args.coverage:g}: {labelled / sizes.total():.1%} labelled, "
          f"with {sum(n * k for n, k in sizes.items()) / max(labelled, 1):.2f} words each")
    print("most frequent words: " + ", ".join(f"{word} {n}" for word, n in frequency.most_common(12)))
    if tokenizer:
        split = [(word, len(data.word_ids(tokenizer, word))) for word, _ in frequency.most_common()]
        split = [(word, tokens) for word, tokens in split if tokens != 1]
        print(f"{len(split)} words are not one token: " + ", ".join(f"{word} {tokens}" for word, tokens in split[:12]))

    rows = []
    for number in spread(args.inspect):
        record, where = file.get(None, number)[0], f"{args.out}: record {number}"
        with listed(problems, where):
            rows.append(look(record, data.open_image(data.image_path(record, args.image_dir, where), where), args, grid, aspect))
    if not rows:
        print("of the images to draw none can be drawn: " + problems[-1])
        return False
    picture = Image.new("RGB", (rows[0].width, (SIDE + 8) * len(rows)), "white")
    for i, row in enumerate(rows):
        picture.paste(row, (0, (SIDE + 8) * i))
    with runtime.atomic(Path(args.out).with_suffix(".png")) as temporary:
        picture.save(temporary, "png")
    return True


# ------------------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Convert, put together, report, inspect."""
    check(args)
    seen = (*grid_of(args), tokenizer_of(args)) if args.inspect else ()         # what is wrong there ends the run before the work
    out = Path(args.out)
    complete = out.exists()                                     # and maybe parts of it, where a run was stopped while it deleted them
    if args.from_ and runtime.world() > 1:                      # ranks only wait for each other, maybe for days
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    runtime.barrier()                                           # all have checked whether OUT is there
    if args.from_ and complete and runtime.rank() == 0:
        for part in parts_of(out):
            part.unlink()
    elif args.from_ and not complete:
        source = from_images(args) if args.from_ == "images" else getattr(formats, f"from_{args.from_}")(args)
        if not source.count:
            raise InputError(f"--from {args.from_}: no images")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_part(source, out, {k: v for k, v in dataclasses.asdict(args).items() if k not in LOOK} | {"images": source.count})
        runtime.barrier()
        if runtime.rank() == 0:
            count, problems = merge(source, out)
            print(f"{count} records of {source.count} images; {len(problems)} problems" + (f", all in {out}.problems:" if problems else ""))
            for problem in problems[:10]:
                print("  " + problem)
    drawn = args.inspect and runtime.rank() == 0 and inspect(args, *seen)
    wrote = " and ".join([str(out)] * bool(args.from_) + [str(out.with_suffix(".png"))] * bool(drawn))
    following = "eval.py runs/sft/ckpt.pt" if args.to == "refer" else "pretrain.py"
    encoder = f" --vision {args.vision} --geometry {args.geometry}" * bool(args.vision) + f" --llm {args.llm}" * bool(args.llm)
    runtime.log(f"wrote {wrote or 'nothing'}; next: python {following} --data {out} --image-dir {args.image_dir}{encoder}")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, InputError)
