"""A folder of images, or LLaVA records: regions by open models (detectors.py).

Records without an image, or with regions, stay as they are. An image of a folder gets Florence-2's
caption, or its phrases.
"""
from pathlib import Path

import torch

import runtime
from annotations import SUFFIXES, Source, listed, records_of
from annotations.detectors import Annotator
from annotations.llava import answer_of, cleaned
from data import image_path, open_image, read_records
from runtime import InputError


def read(args) -> Source:
    """The images of the folder, or of the records."""
    records, folder = read_records(args.data) if args.data else None, Path(args.image_dir)
    if records is None:
        if args.tagger == "caption":
            raise InputError("--tagger caption needs --data, records with captions; for a folder of"
                             " images name a Florence-2 or a file of tags")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        names = sorted(str(path.relative_to(folder)) for path in files)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", runtime.rank() % torch.cuda.device_count())
    dtype = runtime.precision(device, args.dtype)
    annotator = Annotator(args.tagger, args.detector, args.segmenter, device, dtype, args.threshold)

    def annotate(waiting):
        made, reason = [], ""
        try:
            images, captions, files = zip(*((w[4], w[5], w[2]["image"]) for w in waiting))
            made = annotator(list(images), list(captions), list(files))
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size {args.batch_size}: out of GPU memory at"
                             f" {waiting[0][3]}; lower it and start again") from None
        except torch.AcceleratorError:              # after it the GPU answers nothing more
            raise
        except Exception as error:                  # of the models, on one of these images
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        if reason and len(waiting) > 1:             # which one: each is tried alone
            for alone in waiting:
                annotate([alone])
        elif reason:
            waiting[0][1].append(f"{waiting[0][3]}: the models fail on it ({reason})")
        for (own, problems, record, where, *_), (caption, regions) in zip(waiting, made):
            with listed(problems, where):
                if records is not None:
                    own.append(record | {"regions": regions})
                else:
                    image = record["image"]
                    own += records_of(image, image, [caption], regions, 1, problems)

    def convert(numbers):
        results, waiting = [([], []) for _ in numbers], []
        for (own, problems), number in zip(results, numbers):
            where = f"{args.data}: record {number}" if args.data else f"image {names[number]}"
            with listed(problems, where):
                record = records[number] if args.data else {"image": names[number]}
                if record.get("image") is None or record.get("regions"):
                    own.append(cleaned(record, args.image_dir, where, problems))
                    continue
                caption = answer_of(record, where) if args.data else ""
                image = open_image(image_path(record, folder, where), where)
                if annotator.tags_of is not None and record["image"] not in annotator.tags_of:
                    problems.append(f"{where}: no line for {record['image']} in {args.tagger}")
                waiting.append((own, problems, record, where, image, caption))
        if waiting:
            annotate(waiting)
        return results

    return Source(len(records if args.data else names), convert, batch=args.batch_size)
