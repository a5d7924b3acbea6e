"""The toy world's data, and its backbones.

    python -m toy                        # writes data/toy: images, records, questions (a minute)
    python -m toy --train-backbones      # makes backbones/ from scratch (two hours of one core)

reads:  nothing (backbones/ is committed; --train-backbones rewrites it)
writes: data/toy/images/*.png
        data/toy/{train,val,test,hard}.jsonl       captions and regions           (pretrain, probe)
        data/toy/{train,val}_sft.jsonl             conversations of several turns (sft)
        data/toy/{test,hard}_{vqa,refer,instruct}.jsonl, distract_refer.jsonl     (eval)
        backbones/toy-clip, backbones/toy-llama    Hugging Face folders, half precision
        backbones/report.json                      what they reach on unseen scenes
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import runtime
import toy
from runtime import InputError


@dataclass
class Args:
    """Flags of python -m toy."""

    out: str = ""
    """folder for the data; none: data/toy, where the stages look for it"""
    train_backbones: bool = False
    """train the backbones from scratch instead of writing the data"""
    part: str = field(default="all", metadata={"choices": ["all", "vision", "llm"]})
    """with --train-backbones: which of them"""


def make(args: Args) -> None:
    """Write the data, or train the backbones."""
    if args.out and args.train_backbones or args.part != "all" and not args.train_backbones:
        raise InputError("--out names the folder of the data, --part goes with --train-backbones:"
                         " they do not go together")
    if args.train_backbones:
        from toy.train import train

        print(json.dumps(train(args.part), indent=1))
        return runtime.finished(toy.VISION.parent, "torchrun pretrain.py")
    folder = Path(args.out) if args.out else toy.DATA
    toy.clear(folder)
    toy.build(folder)
    runtime.finished(folder, "torchrun pretrain.py")


def main() -> None:
    """The command line."""
    runtime.run(make, Args, __doc__)


if __name__ == "__main__":
    main()
