"""Scenes -> data/toy, in the files of a real data set. Splits come from disjoint seeds.

Every scene of `hard` holds a combination of colour and shape that no other split has. In `distract`
what an expression refers to overlaps an object that shares a word with it.
"""
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # on Windows
    fcntl = None

import runtime
from labels import encode_rle
from runtime import InputError
from toy.language import (
    REFER, SPATIAL, article, box_text, caption, conversation, description, instructions, questions,
    referred)
from toy.world import Scene, distracted, render, sample_scene, unheard_of

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "toy"
VISION, LLM = ROOT / "backbones" / "toy-clip", ROOT / "backbones" / "toy-llama"
VERSION = 6                                         # of the data: another version is rebuilt
SPLITS = {"train": 8192, "val": 256, "test": 300, "hard": 300, "distract": 300}     # images
SEEDS = {"train": 0, "val": 1 << 24, "test": 1 << 25, "hard": 3 << 24, "distract": 5 << 24}
PRETRAIN = {"steps": 500, "batch_size": 32}         # of pretrain.py when it starts without --data
SFT = {"steps": 600, "batch_size": 32, "lr": 1e-3, "projector_lr": 1e-3, "prompt": "chat"}


def fits(split: str, scene: Scene) -> bool:
    """Whether a scene belongs to a split."""
    if split == "hard" or unheard_of(scene):
        return split == "hard" and unheard_of(scene)
    return split != "distract" or any(distracted(scene, t) for t in scene.things)


def record(name: str, suffix: str, turns: list[tuple[str, str]], image: bool = True,
           **more) -> dict:
    """A LLaVA record about the image `name`, with turns of (request, answer)."""
    said = [{"from": who, "value": text} for turn in turns
            for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = "<image>\n" * image + said[0]["value"]
    shown = {"image": f"{name}.png"} if image else {}
    return {"id": name + suffix, **shown, "conversations": said, **more}


def scene_records(name: str, split: str, scene: Scene, masks: list, rng) -> dict[str, list]:
    """All records of one image, by suffix of their file.

    Its caption with regions; its conversation, and one about another scene that is only told in
    words; its questions, referring expressions and instructions one by one.
    """
    names = [article(t.phrase) for t in scene.things] + [f"{scene.light} {scene.background}"]
    regions = [{"phrase": p, "rle": encode_rle(m)} for p, m in zip(names, masks) if m.any()]
    boxes = referred(scene, masks, rng)
    refers = [record(name, f"_refer{i}", [(REFER.format(expression), box_text(box))], task="refer",
                     answer=box) for i, (expression, box) in boxes.items()
              if split != "distract" or distracted(scene, scene.things[i])]
    if split == "distract":
        return {"_refer": refers}
    told = [("Describe the image.", caption(scene, rng))]
    out = {"": [record(name, "", told, regions=regions)]}
    if split in ("train", "val"):
        out["_sft"] = [record(name, "_talk", conversation(scene, list(boxes.values()), rng))]
        if rng.random() < 0.25:             # text alone, so that the language model stays one
            other = sample_scene(rng, lambda scene: not unheard_of(scene))
            turns = [(q, a) for kind, q, a in questions(other, rng) if kind not in SPATIAL]
            turns[0] = (f"{description(other, rng)} {turns[0][0]}", turns[0][1])
            out["_sft"].append(record(name, "_text", turns, image=False))
        if split == "val":
            out["_refer"] = refers
        return out
    out["_refer"] = refers
    out["_vqa"] = [record(name, f"_{kind}", [(question, answer)], task="vqa", kind=kind,
                          answer=answer) for kind, question, answer in questions(scene, rng)]
    out["_instruct"] = [
        record(name, f"_{kind}", turns, task="choice" if kind == "choice" else "vqa", kind=kind,
               answer=turns[-1][1]) for kind, turns in instructions(scene, rng)]
    return out


def make_scene(images: Path, split: str, i: int) -> dict[str, str]:
    """Draw and save the i-th image of a split -> lines of JSON, by suffix of their file."""
    rng = np.random.default_rng(SEEDS[split] + i)
    scene = sample_scene(rng, lambda scene: fits(split, scene))
    pixels, masks = render(scene, rng)
    name = f"{split}_{i:05d}"
    Image.fromarray(pixels).save(images / f"{name}.png", compress_level=1)
    return {suffix: "".join(json.dumps(r) + "\n" for r in own)
            for suffix, own in scene_records(name, split, scene, masks, rng).items()}


def build(folder: Path) -> None:
    """Write the whole data folder, which must not exist; it gets its name when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(SPLITS.values()), desc="scenes", leave=False, mininterval=1)
    with (tempfile.TemporaryDirectory(dir=folder.parent) as parent, ProcessPoolExecutor() as pool,
          bar):
        temporary = Path(parent) / folder.name
        (temporary / "images").mkdir(parents=True)
        for split, count in SPLITS.items():
            lines = defaultdict(list)
            make = partial(make_scene, temporary / "images", split)
            for scene in pool.map(make, range(count), chunksize=32):
                bar.update()
                for suffix, own in scene.items():
                    lines[suffix].append(own)
            for suffix, text in lines.items():
                (temporary / f"{split}{suffix}.jsonl").write_text("".join(text))
        (temporary / "version").write_text(str(VERSION))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "version").exists():   # else another was first, with the same data
                raise


def clear(folder: Path) -> None:
    """Remove an earlier toy world from `folder`. InputError: something else is there."""
    if folder.exists():
        if not (folder / "version").is_file():
            raise InputError(f"{folder} exists and is not a toy world; remove it or name another"
                             " folder with --out")
        shutil.rmtree(folder)


def ensure(folder: Path = DATA) -> Path:
    """The data folder, built if missing or of another version; others wait for the builder."""
    def built():
        version = folder / "version"
        return version.exists() and version.read_text() == str(VERSION)

    if not built():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not built():
                began = time.time()
                runtime.log(f"toy world: draws {sum(SPLITS.values())} scenes, once, in about half a"
                            " minute")
                clear(folder)
                build(folder)
                runtime.log(f"toy world: wrote {sum(SPLITS.values())} scenes to {folder} in"
                            f" {time.time() - began:.0f} s")
    return folder


def ensure_once() -> Path:
    """`ensure` for all processes of a torchrun: the first of each machine builds."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        ensure()
    runtime.barrier()
    return ensure()
