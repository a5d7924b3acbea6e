"""Differences between two variants of reproduce.py, with intervals over seeds and images together.

    python docs/intervals.py runs/photographs [--base caption-only --other patch-aligned]

An interval over seeds alone takes the test images for all there are, one over images alone takes
one training run for the method. Here both are drawn: in each of 10,000 draws as many seeds and as
many images as there are, with replacement, every drawn seed on every drawn image (the pigeonhole
bootstrap, Owen, 2007). The interval is the middle 95% of the differences. With few seeds it is too
narrow: of three that are drawn with replacement a draw often repeats one. A claim about training
then needs the t-interval over seeds that reproduce.py prints.

reads:  OUT/VARIANT-SEED/{pretrain,sft}/predictions.jsonl
prints: a table in markdown
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

DRAWS = 10_000
METRICS = {  # task: {name: of a record's score}
    "caption": {"CIDEr": float},
    "refer": {"Acc@0.5": lambda iou: float(iou >= 0.5), "mIoU": float},
    "vqa": {"accuracy": float},
    "choice": {"choice": float},
}


def read(file: Path) -> dict[str, dict[str, list[float]]]:
    """{file/metric/kind: {image: scores}} of one predictions.jsonl."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        image = re.sub(r"_[a-z]{5,}\d*$", "", line["id"])  # 12_refer0 -> 12
        for name, score in METRICS[line["task"]].items():
            for kind in {None, line["kind"]}:
                key = f"{line['file']}/{name}" + (f"/{kind}" if kind else "")
                found.setdefault(key, {}).setdefault(image, []).append(score(line["score"]))
    return found


def interval(base: np.ndarray, other: np.ndarray, counts: np.ndarray) -> tuple[float, ...]:
    """Sums of scores (seeds, images) of both, and records of each image -> both means, and the
    difference with the ends of its interval."""
    rng, (seeds, images) = np.random.default_rng(0), base.shape
    gain = other - base
    drawn = []
    for _ in range(DRAWS):
        chosen = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds) / seeds
        seen = np.bincount(rng.integers(images, size=images), minlength=images)
        drawn.append(chosen @ gain @ seen / (counts @ seen))
    total = seeds * counts.sum()
    low, high = np.percentile(drawn, (2.5, 97.5))
    return base.sum() / total, other.sum() / total, gain.sum() / total, low, high


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--base", default="caption-only")
    parser.add_argument("--other", default="patch-aligned")
    args = parser.parse_args()
    print(f"| | n | seeds | {args.base} | {args.other} | change | difference [95%] |")
    print("|---|---|---|---|---|---|---|")
    for stage in ("pretrain", "sft"):
        cells = {
            variant: {
                path.parent.parent.name: read(path)
                for path in sorted(
                    Path(args.out).glob(f"{variant}-[0-9]*/{stage}/predictions.jsonl")
                )
            }
            for variant in (args.base, args.other)
        }
        numbers = [{name.rpartition("-")[2] for name in own} for own in cells.values()]
        seeds = sorted(set.intersection(*numbers))
        if not seeds:
            continue
        pairs = [[cells[v][f"{v}-{seed}"] for seed in seeds] for v in (args.base, args.other)]
        for key in pairs[0][0]:
            images = sorted(pairs[0][0][key])
            counts = np.array([len(pairs[0][0][key][image]) for image in images])
            sums = [
                np.array([[sum(own[key][image]) for image in images] for own in cell])
                for cell in pairs
            ]
            base, other, gain, low, high = interval(*sums, counts)
            percent = f"{100 * gain / base:+.1f}%" if base else ""
            print(
                f"| {stage}: {key} | {counts.sum()} | {len(seeds)} | {base:.3f} | {other:.3f} |"
                f" {percent} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )


if __name__ == "__main__":
    main()
