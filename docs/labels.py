"""What annotation and patch labels cost: annotate.py over many records, and the labels of a sample beside the rest of it.

    python docs/labels.py --count 100000 --data coco.jsonl --image-dir images --llm HuggingFaceTB/SmolLM2-135M --size 224 --grid 16 16

Processor seconds of one core, so that what else runs matters little.

reads:  --data, records with regions, and their images; the tokenizer of --llm
writes: nothing that stays: --count synthetic COCO images (64 JPEGs of 640 x 480 that many entries name, with six polygons and a crowd each)
        go through annotate.py in a temporary folder, a tenth of them first
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from model import find_model, load_backbone  # noqa: E402

FILES, SIZE = 64, (640, 480)
# A script in a process that at last prints its peak of memory in KiB; what wait4 says may be this process's own, which it was forked from.
RUN = """import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def coco(folder: Path, count: int) -> None:
    """instances.json of so many images, written as it is made."""
    rng = random.Random(0)
    crowd = {"size": [480, 640], "counts": [10_000, 3_000] * 20}                # and the rest
    crowd["counts"].append(640 * 480 - sum(crowd["counts"]))
    with open(folder / "instances.json", "w") as file:
        names = ",".join(json.dumps({"id": i, "file_name": f"{i % FILES}.jpg", "width": 640, "height": 480}) for i in range(count))
        file.write('{"categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "traffic light"}], "images": [' + names)
        file.write('], "annotations": [')
        for i in range(count):
            for j in range(7):
                x, y = rng.randrange(440), rng.randrange(280)
                ring = [round(c, 2) for k in range(40) for c in (x + 100 + 99 * rng.random(), y + 100 + 99 * rng.random() - k % 2)]
                shape = crowd if j == 6 else [ring]
                file.write(",\n" * (i + j > 0) + json.dumps({"id": 7 * i + j, "image_id": i, "category_id": 1 + j % 2,
                                                             "segmentation": shape, "iscrowd": int(j == 6)}))
        file.write("]}")


def convert(folder: Path, count: int) -> float:
    """Run annotate.py over them, and print its peak of memory. -> processor seconds."""
    coco(folder, count)
    command = [sys.executable, "-c", RUN, str(ROOT / "annotate.py"), "--from", "coco", "--instances", str(folder / "instances.json"),
               "--image-dir", str(folder), "--out", str(folder / f"{count}.jsonl")]
    before = os.times()
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=settings)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed")
    print(f"annotate.py, {count} records of 7 regions: peak {int(done.stdout.split()[-1]) / 1024:.0f} MiB", flush=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def labels(args: argparse.Namespace) -> None:
    """Print what the labels of a sample cost, and what all of it does."""
    records = data.read_records(args.data)[:args.records]
    tokenizer = load_backbone(AutoTokenizer, find_model(args.llm, "--llm"), "--llm")
    dataset = data.Records(records, args.image_dir, tokenizer, image_size=args.size, geometry=args.geometry, grid=args.grid,
                           mean=(0.5,) * 3, std=(0.5,) * 3, source=args.data)
    torch.set_num_threads(1)
    for _ in range(2):                                          # words' tokens are looked up once: the second round counts
        spent = dict(sample=0.0, labels=0.0)
        for i in range(len(records)):
            started = time.process_time()
            size = dataset[i]["image_size"]
            middle = time.process_time()
            words = data.patch_words(records[i].get("regions") or [], size, args.geometry, args.grid)
            data.patch_targets(words, dataset._lookup)
            spent["labels"] += time.process_time() - middle
            spent["sample"] += middle - started
    spent = {name: 1e3 * seconds / len(records) for name, seconds in spent.items()}
    regions = sum(len(record.get("regions") or []) for record in records) / len(records)
    print(f"{args.data}: {len(records)} records, {regions:.1f} regions each, {args.grid[0]} x {args.grid[1]} patches, {args.geometry}: "
          f"labels {spent['labels']:.1f} ms of the {spent['sample']:.1f} ms that a whole sample takes")


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="synthetic images to convert; 0: none")
    parser.add_argument("--data", help="records whose labels are timed; none: none")
    parser.add_argument("--image-dir", default=".")
    parser.add_argument("--records", type=int, default=500, help="of them, at most")
    parser.add_argument("--llm", default=str(ROOT / "backbones" / "toy-llama"), help="language model, for its tokenizer")
    parser.add_argument("--size", type=int, default=224, help="side of the encoder's input, in pixels")
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="rows and columns of patches")
    parser.add_argument("--geometry", default="crop", choices=list(data.GEOMETRIES))
    args = parser.parse_args()
    if not args.data and args.count < 2:
        parser.error("--count of 2 images or more, or --data")
    if args.count:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(FILES):
                noise = torch.randint(256, (60, 80, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).resize(SIZE).save(Path(folder, f"{i}.jpg"), quality=90)
            few = args.count // 10 or 1
            seconds = [convert(Path(folder), count) for count in (few, args.count)]
            print(f"{1e3 * (seconds[1] - seconds[0]) / (args.count - few):.1f} ms a record, without the start")
    if args.data:
        try:
            labels(args)
        except data.InputError as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
