"""Photographs, or the annotations that people have of them -> records with regions, for training.

    python annotate.py --from coco --instances instances.json --panoptic panoptic.json \\
           --captions captions.json --image-dir train2017 --out coco.jsonl       # any of the three
    ... --instances i.json --captions c.json ... --conversations coco   # and stage 2's records
    python annotate.py --from flickr30k --data flickr30k_entities --image-dir images --out f.jsonl
    python annotate.py --from grandf --data OpenPsgGCG_train.json --image-dir images --out g.jsonl
    python annotate.py --from refcoco --data "refs(unc).p" --instances instances.json --split val \\
           --to refer --image-dir train2014 --out val.jsonl                      # for eval.py
    python annotate.py --from llava --data llava.json --image-dir images --out llava.jsonl
    torchrun --nproc_per_node 8 annotate.py --from images --image-dir photos \\
             --tagger florence-community/Florence-2-large \\
             --detector IDEA-Research/grounding-dino-base \\
             --segmenter facebook/sam2.1-hiera-large --out photos.jsonl
    python annotate.py --inspect 4 --out coco.jsonl --image-dir train2017 \\
           --vision facebook/dinov2-small                            # what training will see

Each process writes what it has done to a part file beside OUT, line by line; the first one puts the
parts together, in order. An interrupted run goes on from its parts, with the same flags and inputs.
What is wrong with an image or a region costs that alone, is counted, and is listed in OUT.problems.
Boxes that look like another unit end the run. A JSON file is read whole, about 7 times its size in
memory, by each process.

reads:  the annotation files, and every image once, since a broken one would stop training
writes: OUT, records as JSONL; OUT.problems; with --inspect also OUT with the ending .png;
        with --conversations a folder (annotations/conversations.py)
"""
import contextlib
import dataclasses
import datetime
import glob
import hashlib
import importlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runtime
from labels import GEOMETRIES
from projector import PROJECTORS
from runtime import InputError

# ---- Args ----------------------------------------------------------------------------------------

USES = {                                            # the flags that each source reads
    "coco": {"instances", "panoptic", "captions", "captions_per_image", "to", "boxes_on",
             "conversations"},
    "flickr30k": {"data", "split", "captions_per_image", "to", "resized", "boxes_on"},
    "grandf": {"data", "boxes_on"},
    "refcoco": {"data", "instances", "captions", "captions_per_image", "split", "to", "boxes_on"},
    "llava": {"data", "boxes_on"}, "": set(),
    "images": {"data", "tagger", "detector", "segmenter", "threshold", "batch_size", "dtype",
               "boxes_on", "stop_words"}}


@dataclass
class Args:
    """Flags of annotate.py."""

    from_: str = field(default="", metadata={"choices": list(USES)})
    """what the source is"""
    data: str = ""
    """annotations: a file; flickr30k: a folder; images: records, or none"""
    image_dir: str = ""
    """folder that image names are relative to"""
    out: str = ""
    """file to write, .jsonl"""
    to: str = field(default="records", metadata={"choices": ["records", "refer", "caption"]})
    """refer, caption: for eval.py"""
    split: str = ""
    """refcoco: of references; flickr30k: file of image ids"""
    captions_per_image: int = 1
    """records per image, one for each of its first captions; 0: all"""
    inspect: int = 0
    """draw this many images with their labels, and print a summary"""
    # --- files of annotations
    boxes_on: str = field(default="", metadata={"choices": ["", "upright", "stored"]})
    """which pixels boxes of turned images are on; as the format's tools"""
    instances: str = ""
    """COCO's instances file"""
    panoptic: str = ""
    """COCO's panoptic file, beside the folder of its PNG files"""
    captions: str = ""
    """COCO's captions file"""
    conversations: str = ""
    """coco: folder for stage 2's records too, in splits of the images"""
    resized: bool = False
    """flickr30k: images were resized; boxes are scaled to them"""
    # --- images
    tagger: str = "caption"
    """what may be there: the record's answer, a file of tags, a Florence-2"""
    detector: str = ""
    """a Grounding DINO, for boxes"""
    segmenter: str = ""
    """a SAM 2, for masks of the boxes; or a SAM 3 without --detector"""
    threshold: float = 0.35
    """lowest score of a region"""
    batch_size: int = 8
    """images at a time"""
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]})
    """auto: bfloat16 on a GPU that has it"""
    # --- images, inspect
    stop_words: str = ""
    """words that name nothing: a file, or none; else English"""
    # --- inspect, dry run: the encoder's input, as for pretrain.py
    dry_run: int = 0
    """only draw the labels of this many images, and say how long all would take"""
    vision: str = ""
    """encoder; none: a grid of 16 x 16"""
    image_size: int = 0
    """side of its input, pixels; 0: its image processor's"""
    projector: str = field(default="mlp2x_gelu", metadata={"choices": list(PROJECTORS)})
    """kind"""
    pool: int = 2
    """pixel_shuffle, c_abstractor: one patch of pool x pool"""
    geometry: str = field(default="", metadata={"choices": ["", *GEOMETRIES]})
    """how an image becomes a square; none: crop, of conversations pad"""
    coverage: float = 0.25
    """share of a patch that a region must cover to label it"""


SEEN = {"image_size", "projector", "pool"}          # of the encoder of --vision
LOOK = {"inspect", "vision", "geometry", "coverage", "dry_run"} | SEEN      # do not change OUT
TO = {"refer": ("flickr30k", "refcoco"), "caption": ("coco", "flickr30k", "refcoco")}


def check(args: Args) -> None:
    """Refuse flags that make no sense, or that the source would ignore."""
    if not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out!r}: name the file to write, ending in .jsonl")
    if not args.from_ and not args.inspect:
        raise InputError("--from says what to convert; without it, --inspect 4 looks at an OUT that"
                         " is there")
    for f in dataclasses.fields(args):
        flag = f"--{f.name.replace('_', '-')}"
        if getattr(args, f.name) == f.default:
            continue
        if f.name == "stop_words" and args.inspect or f.name == "geometry" and args.conversations:
            continue
        if f.name in LOOK and not (args.inspect or args.dry_run):
            raise InputError(f"{flag} is read by --inspect and --dry-run alone")
        if f.name not in USES[args.from_] | LOOK | {"from_", "out", "image_dir"}:
            source = f"by --from {args.from_}" if args.from_ else "without --from"
            raise InputError(f"{flag} is not read {source}")
        if f.name in SEEN and not args.vision:
            raise InputError(f"{flag} is not read without --vision, an encoder")
    for flag in ("inspect", "dry_run"):
        if getattr(args, flag) and args.to in TO:
            raise InputError(f"--{flag.replace('_', '-')} draws regions, which records of --to"
                             f" {args.to} do not have")
    if args.dry_run and not args.from_:
        raise InputError("--dry-run needs --from, what to convert")
    if args.conversations and (args.to in TO or not (args.instances or args.panoptic)):
        raise InputError("--conversations are made of --instances or --panoptic, and not with --to")
    if args.to in TO and args.from_ not in TO[args.to]:
        raise InputError(f"--to {args.to} is made of {', '.join(TO[args.to])} alone")
    if args.from_ in ("grandf", "llava") and not Path(args.data).is_file():
        raise InputError(f"--from {args.from_} needs --data, a file; {args.data!r} is none")
    if not Path(args.image_dir or "/dev/null").is_dir():
        raise InputError(f"--image-dir {args.image_dir!r} is not a folder")
    made = args.from_ and not args.dry_run and Path(args.out).exists()
    if made and not parts_of(Path(args.out)):
        raise InputError(f"{args.out} exists; delete it to make it again, or look at it with"
                         " --inspect and without --from")
    if not 0 < args.coverage <= 1:
        raise InputError(f"--coverage {args.coverage} is a share of a patch, above 0 and at most 1")
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold} is a score, from 0 to 1")
    runtime.check_lowest(args, batch_size=1, captions_per_image=0, inspect=0, dry_run=0,
                         pool=1)


# ---- parts, then the whole -----------------------------------------------------------------------
#
# A part file: a line with flags and inputs, then a line per image, [its number, records, problems,
# counts of what was mended].


def part_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, line) of a part's whole lines; a killed process may leave half of one."""
    at = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield at, line
            at += len(line)


def found_in(parts: list[Path], count: int) -> np.ndarray:
    """Of each image (count, 2): the number of its part and where its line begins there, or -1."""
    where = np.full((count, 2), -1, np.int64)
    for i, part in enumerate(parts):
        for at, line in itertools.islice(part_lines(part), 1, None):
            where[int(line[1: line.index(b",")])] = i, at
    return where


def part_line(number: int, records: list[dict], problems) -> bytes:
    """The line of an image. A text with half of a surrogate pair (an emoji cut in two) cannot be
    written, and costs its record.
    """
    kept, counts = [], problems.counts
    for record in records:
        try:
            json.dumps(record, ensure_ascii=False).encode()
            kept.append(record)
        except UnicodeEncodeError:
            problems = [*problems, f"record {record.get('id')}: a text or file name is not Unicode"
                        " (half of a surrogate pair)"]
    line = json.dumps([number, kept, problems, counts], ensure_ascii=False) + "\n"
    return line.encode(errors="replace")


def parts_of(out: Path) -> list[Path]:
    """The part files beside OUT."""
    found = out.parent.glob(glob.escape(out.name) + ".rank-*")
    return sorted(path for path in found if path.suffix.removeprefix(".rank-").isdigit())


def delete(parts: list[Path]) -> None:
    """Of parts whose records are in OUT, or not wanted."""
    for part in parts:
        part.unlink()


def fingerprint(inputs: list) -> str:
    """A hash of what OUT is made of: files by their bytes, folders by names, sizes and times."""
    code = hashlib.sha256()
    for path in map(Path, inputs):
        if path.is_file():
            with open(path, "rb") as file:
                code.update(hashlib.file_digest(file, "sha256").digest())
        else:
            stats = [(str(p), p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
            code.update(repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats]).encode())
    return code.hexdigest()


def same_run(out: Path, header: dict) -> None:
    """Keep parts that were made of the same inputs with the same flags; else start anew, and say
    why. InputError: other flags."""
    for part in parts_of(out):
        _, line = next(part_lines(part), (0, b""))
        try:
            found = json.loads(line) if line else header
        except ValueError:
            found = {}
        if found | {"inputs": 0} != header | {"inputs": 0}:
            raise InputError(f"{part} is left of a run with other flags or files; delete"
                             f" {out}.rank-* to start again")
        if found.get("inputs") != header.get("inputs"):
            runtime.log(f"{out}: its annotations have changed since the run that was interrupted;"
                        " starting anew")
            return delete(parts_of(out))


def write_part(source, out: Path, header: dict) -> None:
    """Convert this rank's share of what no part has yet, and append it to its own part.

    Images are converted in the same batches, whatever the number of processes and wherever a run
    stopped: a model's scores depend on what else is in the batch. InputError: parts of another run.
    """
    if runtime.rank() == 0:
        same_run(out, header)
    runtime.barrier()
    rank, world, batch = runtime.rank(), runtime.world(), source.batch
    first_line = (json.dumps(header) + "\n").encode()
    done = found_in(parts_of(out), source.count)[:, 0] >= 0
    runtime.barrier()                               # all have read before any writes
    own = out.parent / f"{out.name}.rank-{rank}"
    keep = max((at + len(line) for at, line in part_lines(own)), default=0) if own.exists() else 0
    starts = [start for start in range(rank * batch, source.count, world * batch)
              if not done[start: start + batch].all()]
    if done.any():
        runtime.log(f"going on: {done.sum()} of {source.count} images were done")
    rest = "what was done is kept, the same command goes on"
    with runtime.writing(own, rest), open(own, "ab") as file:
        file.truncate(keep)
        file.write(b"" if keep else first_line)
        for start in tqdm(starts, desc="annotate", unit=f" x {batch} images", disable=rank > 0):
            numbers = range(start, min(start + batch, source.count))
            for number, (records, problems) in zip(numbers, source.convert(numbers)):
                file.write(part_line(number, records, problems))
            file.flush()


def merge(source, out: Path) -> tuple[int, list[str], Counter]:
    """Put all parts together into OUT, in order, and the problems into OUT.problems.

    The parts are deleted. -> (number of records, problems, counts of what was mended).
    """
    parts = parts_of(out)
    where = found_in(parts, source.count)
    if (where < 0).any():
        raise InputError(f"{out}: {(where[:, 0] < 0).sum()} images are in no part; --out must lie"
                         " in a folder that all machines share")
    problems = [text.encode(errors="replace").decode() for text in source.problems]
    count, counts, listing = 0, Counter(), Path(f"{out}.problems")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(runtime.atomic(out))    # last, so an OUT there is complete
        file = stack.enter_context(open(temporary, "w", encoding="utf-8"))
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        for part, at in where.tolist():
            files[part].seek(at)
            _, records, own, mended = json.loads(files[part].readline())
            counts.update(mended)
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            problems += own
            count += len(records)
        listing.unlink(missing_ok=True)
        if problems:
            with runtime.atomic(listing) as noted:
                noted.write_text("".join(p + "\n" for p in problems), encoding="utf-8")
        if not count:
            delete(parts)
            reason = f": {problems[0]} (all: {listing})" if problems else ""
            raise InputError(f"no record could be made of {source.count} images{reason}")
    delete(parts)
    return count, problems, counts


# ---- main ----------------------------------------------------------------------------------------


def read(args: Args):
    """The source. InputError: of no images, or of boxes in another unit."""
    source = importlib.import_module(f"annotations.{args.from_}").read(args)
    if not source.count:
        raise InputError(f"--from {args.from_}: no images")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    source.check_units()
    runtime.log(f"--from {args.from_}: {source.count} images")
    if args.conversations:
        from annotations.conversations import enough

        enough(source.count)
    return source


def dry_run(args: Args) -> list[Path]:
    """Convert a few images, to files beside OUT, and say how long all would take."""
    source, out, rows = read(args), Path(args.out).with_suffix(".dry-run.jsonl"), []
    numbers = runtime.spread(list(range(source.count)), args.dry_run)
    took = -time.monotonic()
    for some in tqdm(runtime.split(numbers, source.batch), desc="annotate"):
        rows += source.convert(some)
    took += time.monotonic()
    records, problems = ([one for row in rows for one in row[i]] for i in (0, 1))
    for problem in problems[:10]:
        print("  " + problem)
    if not records:
        raise InputError(f"no record could be made of {len(numbers)} images")
    with runtime.atomic(out) as temporary:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")
    each = took / len(numbers)
    print(f"{len(records)} records of {len(numbers)} images, {len(problems)} problems; {each:.2g} s"
          f" an image: all {source.count} take about {each * source.count / 60:.1f} minutes in one"
          " process")
    return [out]


def convert(args: Args, out: Path) -> None:
    """Make OUT: each process its part, the first one the whole."""
    source = read(args)
    runtime.lock(out)
    flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in LOOK}
    write_part(source, out, flags | dict(images=source.count, inputs=fingerprint(source.inputs)))
    runtime.barrier()
    if runtime.rank() == 0:
        count, problems, counts = merge(source, out)
        listing = f", all in {out}.problems:" * bool(problems)
        print(f"{count} records of {source.count} images; {len(problems)} problems{listing}")
        for what, n in counts.items():
            print(f"  {n} {what}")
        for problem in problems[:10]:
            print("  " + problem)
        if args.conversations:
            from annotations.conversations import write

            folder = Path(args.conversations)
            for line in write(out, folder, source, args.image_dir, args.geometry or "pad"):
                print(line)


def main(args: Args) -> None:
    """Convert, put together, report, inspect."""
    check(args)
    seen, out, drawn = (), Path(args.out), False
    view = dataclasses.replace(args, geometry=args.geometry or "crop")
    if args.inspect or args.dry_run:                # what is wrong there is said before the work
        from annotations.picture import grid_of, inspect

        seen = grid_of(view)
    if args.dry_run and runtime.rank():
        return
    if args.dry_run:
        wrote = dry_run(args)
        shown = dataclasses.replace(view, out=str(wrote[0]), inspect=args.dry_run)
        if inspect(shown, *seen):
            wrote.append(wrote[0].with_suffix(".png"))
        return runtime.finished(wrote, f"look at {wrote[-1]}, then the same without --dry-run")
    complete = out.exists()                         # maybe with parts, if it was not all deleted
    if args.from_ and runtime.world() > 1:          # ranks only wait for each other, maybe for days
        wait = datetime.timedelta(days=30)
        torch.distributed.init_process_group("gloo", timeout=wait)
    runtime.barrier()                               # all have checked whether OUT is there
    if args.from_ and not complete:
        convert(args, out)
    elif args.from_ and runtime.rank() == 0:
        delete(parts_of(out))
    if args.inspect and runtime.rank() == 0:
        drawn = inspect(view, *seen)
    wrote = [out] * bool(args.from_) + [out.with_suffix(".png")] * bool(drawn)
    stage = ["eval.py", "runs/sft/ckpt.pt"] if args.to in TO else ["pretrain.py"]
    encoder = ["--vision", args.vision] * bool(args.vision)
    encoder += ["--geometry", view.geometry] * bool(args.vision or args.geometry)
    data = Path(args.conversations) / "train.jsonl" if args.conversations else out
    runtime.finished(wrote or "nothing", ["python", *stage, "--data", data, "--image-dir",
                                          args.image_dir, *encoder])


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
