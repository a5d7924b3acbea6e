"""Checkpoints to and from LLaVA folders of transformers.

    python -m hf export runs/sft/ckpt.pt OUT        # for plain transformers, which needs no more
    python -m hf import llava-hf/llava-1.5-7b-hf runs/llava/ckpt.pt     # for eval.py and sft.py

reads:  a checkpoint and its backbones; or a folder or hub name
writes: the new folder OUT; or a checkpoint, with the folders vision/ and llm/ beside it
"""
import sys
from dataclasses import dataclass, field

import runtime
from hf import export, import_folder


@dataclass
class Export:
    """Flags of python -m hf export."""

    checkpoint: str = field(metadata={"positional": True})
    """checkpoint of pretrain.py or sft.py"""
    out: str = field(metadata={"positional": True})
    """folder to write, new"""
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    """of the weights; float32 loses nothing"""


@dataclass
class Import:
    """Flags of python -m hf import."""

    folder: str = field(metadata={"positional": True})
    """folder or hub name of a LlavaForConditionalGeneration"""
    checkpoint: str = field(metadata={"positional": True})
    """checkpoint to write; the backbones go into vision/ and llm/ beside it"""


def write_folder(args: Export) -> None:
    """Checkpoint -> folder."""
    export(args.checkpoint, args.out, args.dtype)
    runtime.finished(args.out, ["python", "probe.py", args.out])


def write_checkpoint(args: Import) -> None:
    """Folder or hub name -> checkpoint."""
    import_folder(args.folder, args.checkpoint)
    runtime.finished(args.checkpoint, ["python", "eval.py", args.checkpoint])


def main() -> None:
    """The command line."""
    commands = {"export": (write_folder, Export), "import": (write_checkpoint, Import)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in commands:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        runtime.run(*commands[name], __doc__)
    elif name in ("-h", "--help"):
        print(__doc__)
    else:
        print(f"error: {name}: export or import; --help explains them", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
