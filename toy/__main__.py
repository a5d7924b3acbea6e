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

from transformers import AutoTokenizer

import runtime
import toy
from runtime import InputError
from toy import records


@dataclass
class Args:
    """Flags of python -m toy."""

    out: str = ""
    """folder for the data; none: data/toy, where the stages look for it"""
    train_backbones: bool = False
    """train the backbones from scratch instead of writing the data"""
    part: str = field(default="all", metadata={"choices": ["all", "vision", "llm"]})
    """with --train-backbones: which of them"""


def make_toy(args: Args) -> None:
    """Write the data, or train the backbones."""
    if args.out and args.train_backbones or args.part != "all" and not args.train_backbones:
        raise InputError("--out names the folder of the data, --part goes with --train-backbones:"
                         " they do not go together")
    if args.train_backbones:
        print(json.dumps(train_backbones(args.part), indent=1))
        return runtime.finished(toy.VISION.parent, "torchrun pretrain.py")
    folder = Path(args.out) if args.out else toy.DATA
    toy.clear(folder)
    toy.build(folder)
    runtime.finished(folder, "torchrun pretrain.py")


def train_backbones(part: str = "all") -> dict:
    """Train vision, llm (and its tokenizer) or all -> what they reach."""
    from toy.train import train_llm, train_tokenizer
    from toy.vision import train_vision

    if part == "vision":
        tokenizer = AutoTokenizer.from_pretrained(records.LLM)
    else:
        tokenizer = train_tokenizer()
    path = records.VISION.parent / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name, make in (("vision", train_vision), ("llm", train_llm)):
        if part in ("all", name):
            report[name] = make(tokenizer)
            path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    """The command line."""
    runtime.run(make_toy, Args, __doc__)


if __name__ == "__main__":
    main()
