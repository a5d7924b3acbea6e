"""Does plain transformers answer as eval.py does? Some questions through its pipeline.

    python -m hf export runs/sft/ckpt.pt exported
    python docs/answers.py exported runs/sft/predictions.jsonl --data test_vqa.jsonl \\
           --image-dir images

reads:  an exported folder; eval.py's predictions, and the records that they answer
prints: each question with both answers, and how many are the same to the letter
"""

import argparse
import json
from pathlib import Path

from transformers import logging, pipeline


def lines(path: str) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("predictions")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--image-dir", required=True)
    parser.add_argument("--questions", type=int, default=20)
    args = parser.parse_args()
    said = {(line["file"], line["id"]): line["prediction"] for line in lines(args.predictions)}
    records = [(Path(file).stem, record) for file in args.data for record in lines(file)]
    records = [records[i * len(records) // args.questions] for i in range(args.questions)]
    logging.set_verbosity_error()
    answer = pipeline("image-text-to-text", model=args.folder)
    same = 0
    for file, record in records:
        image, question = record["image"], record["conversations"][0]["value"]
        question = question.removeprefix("<image>\n")
        asked = [{"role": "user", "content": [
            {"type": "image", "path": str(Path(args.image_dir, image))},
            {"type": "text", "text": question}]}]  # fmt: skip
        (found,) = answer(text=asked, max_new_tokens=64, do_sample=False, return_full_text=False)
        theirs, ours = found["generated_text"].strip(), said[file, record["id"]]
        same += theirs == ours
        print(f"{image}  {question}\n    transformers: {theirs}\n    eval.py:      {ours}")
    print(f"{same} of {args.questions} answers are the same to the letter")


if __name__ == "__main__":
    main()
