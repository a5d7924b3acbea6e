"""A folder of images, or LLaVA records: regions by open models (detectors.py).

Records without an image, or with regions, stay as they are. An image of a folder gets Florence-2's
caption, or its phrases.
"""
from pathlib import Path

import torch

import runtime
from annotations import Problems, Source, image_files, listed, records_of
from annotations.detectors import Annotator
from annotations.llava import answer_of, cleaned
from data import image_path, open_image, read_records
from labels import read_stop_words
from runtime import InputError


def read(args) -> Source:
    """The images of the folder, or of the records."""
    if not args.data and args.tagger == "caption":
        raise InputError("--tagger caption needs --data, records with captions; for a folder of"
                         " images name a Florence-2 or a file of tags")
    others = []
    if args.data:
        records = read_records(args.data)
    else:
        names, others = image_files(Path(args.image_dir))
        records = [{"image": name} for name in names]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", runtime.rank() % torch.cuda.device_count())
    dtype = runtime.precision(device, args.dtype)
    annotator = Annotator(args.tagger, args.detector, args.segmenter, device, dtype, args.threshold,
                          read_stop_words(args.stop_words))

    def annotated(waiting: list[tuple]) -> list[tuple[str, list[dict]] | None]:
        """Of each (image, caption, name, where, problems): its caption and regions.

        None where the models fail.
        """
        try:
            return annotator(*([own[i] for own in waiting] for i in range(3)))
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size {args.batch_size}: out of GPU memory at"
                             f" {waiting[0][3]}; lower it and start again") from None
        except torch.AcceleratorError:              # after it the GPU answers nothing more
            raise
        except Exception as error:                  # of the models, on one of these images
            if len(waiting) > 1:                    # which one: each is tried alone
                return [annotated([alone])[0] for alone in waiting]
            *_, where, problems = waiting[0]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"{where}: the models fail on it ({reason})")
            return [None]

    def convert(numbers: range) -> list[tuple[list[dict], Problems]]:
        results, waiting, whose = [([], Problems()) for _ in numbers], [], []
        for (own, problems), number in zip(results, numbers):
            record = records[number]
            name = record.get("image")
            where = f"{args.data}: record {number}" if args.data else f"image {name}"
            with listed(problems, where):
                if name is None or record.get("regions"):
                    own.append(cleaned(record, args, where, problems))
                    continue
                caption = answer_of(record, where) if args.data else ""
                image = open_image(image_path(record, args.image_dir, where), where)
                if annotator.tags_of is not None and name not in annotator.tags_of:
                    problems.append(f"{where}: no line for {name} in {args.tagger}")
                waiting.append((image, caption, name, where, problems))
                whose.append((record, own))
        made = annotated(waiting) if waiting else []
        for (*_, name, where, problems), (record, own), result in zip(waiting, whose, made):
            if result:
                with listed(problems, where):
                    caption, regions = result
                    own += [record | {"regions": regions}] if args.data else records_of(
                        name, name, [caption], regions, 1, problems)
        return results

    inputs = [name for name in (args.data, args.tagger) if Path(name).is_file()]
    source = Source(len(records), None, others, args.batch_size, inputs=inputs or [args.image_dir])
    source.convert = convert                        # the models take a batch at once
    return source
