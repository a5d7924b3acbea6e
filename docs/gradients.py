"""Do the caption loss and the patch loss pull the projector the same way? Along one pretraining.

    python pretrain.py --keep-every 50 --out runs/kept
    python docs/gradients.py runs/kept/ckpt-*.pt runs/kept/ckpt.pt

For each checkpoint of stage 1: the gradients of both mean losses in the projector's weights, over
the same records, their norms and their cosine. Below 0 a step for one undoes the other.

reads:  checkpoints of a run with a patch loss; records with regions (the toy world's validation)
prints: a line per checkpoint
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime
from model import load_checkpoint


def gradients(path: str, data: str, images: str, limit: int) -> tuple[float, float, float]:
    """-> (cosine, norm of the captions' gradient, norm of the patches')."""
    try:
        model, _ = load_checkpoint(path)
    except runtime.InputError as error:
        raise SystemExit(f"error: {error}") from None
    model.config["patch_weight"] = 1  # or the patch loss would have no gradient
    records = model.records(data, images)
    parameters = list(model.projector.parameters())
    totals, counts = [torch.zeros(()) for _ in range(2)], [0, 0]
    for numbers in runtime.split(runtime.spread(range(len(records)), limit), 16):
        sums = model(records.collate([records[i] for i in numbers]))
        for i, (loss, count) in enumerate(
            (("caption_loss", "caption_tokens"), ("patch_loss", "patches"))
        ):
            own = torch.autograd.grad(sums[loss], parameters, retain_graph=True)
            totals[i] = totals[i] + torch.cat([g.flatten() for g in own])
            counts[i] += int(sums[count])
    caption, patch = (total / count for total, count in zip(totals, counts))
    cosine = torch.nn.functional.cosine_similarity(caption, patch, dim=0)
    return cosine.item(), caption.norm().item(), patch.norm().item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", default="data/toy/val.jsonl")
    parser.add_argument("--image-dir", default="data/toy/images")
    parser.add_argument("--limit", type=int, default=128, help="records")
    args = parser.parse_args()
    print(f"{'cosine':>8} {'|captions|':>11} {'|patches|':>10}")
    for path in args.checkpoints:
        cosine, caption, patch = gradients(path, args.data, args.image_dir, args.limit)
        print(f"{cosine:8.3f} {caption:11.4f} {patch:10.4f}  {path}", flush=True)


if __name__ == "__main__":
    main()
