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
    if not args.data and args.tagger == "caption":
        raise InputError("--tagger caption needs --data, records with captions; for a folder of"
                         " images name a Florence-2 or a file of tags")
    if args.data:
        records = read_records(args.data)
    else:
        folder = Path(args.image_dir)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                       if path.suffix.lower() in SUFFIXES)
        records = [{"image": name} for name in names]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", runtime.rank() % torch.cuda.device_count())
    dtype = runtime.precision(device, args.dtype)
    annotator = Annotator(args.tagger, args.detector, args.segmenter, device, dtype, args.threshold)

    def annotated(asked: list[tuple], places: list[tuple[str, list[str]]]) -> list:
        """(image, caption, name) of several -> (caption, regions) of each, None if models fail."""
        try:
            return annotator(*map(list, zip(*asked)))
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size {args.batch_size}: out of GPU memory at"
                             f" {places[0][0]}; lower it and start again") from None
        except torch.AcceleratorError:              # after it the GPU answers nothing more
            raise
        except Exception as error:                  # of the models, on one of these images
            if len(asked) > 1:                      # which one: each is tried alone
                return [annotated([a], [p])[0] for a, p in zip(asked, places)]
            (where, problems), = places
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"{where}: the models fail on it ({reason})")
            return [None]

    def convert(numbers: range) -> list[tuple[list[dict], list[str]]]:
        results, asked, places, waiting = [([], []) for _ in numbers], [], [], []
        for (own, problems), number in zip(results, numbers):
            record = records[number]
            name = record.get("image")
            where = f"{args.data}: record {number}" if args.data else f"image {name}"
            with listed(problems, where):
                if name is None or record.get("regions"):
                    own.append(cleaned(record, args.image_dir, where, problems))
                    continue
                caption = answer_of(record, where) if args.data else ""
                image = open_image(image_path(record, args.image_dir, where), where)
                if annotator.tags_of is not None and name not in annotator.tags_of:
                    problems.append(f"{where}: no line for {name} in {args.tagger}")
                asked.append((image, caption, name))
                places.append((where, problems))
                waiting.append((record, own))
        made = annotated(asked, places) if asked else []
        for (record, own), (where, problems), result in zip(waiting, places, made):
            with listed(problems, where):
                if result and args.data:
                    own.append(record | {"regions": result[1]})
                elif result:
                    name, (caption, regions) = record["image"], result
                    own += records_of(name, name, [caption], regions, 1, problems)
        return results

    source = Source(len(records), None, batch=args.batch_size)
    source.convert = convert                        # the models take a batch at once
    return source
