"""The toy world says only true things about its scenes, and its backbones are what the README says they are."""
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import toy


def scenes(count, seed=0):
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        yield toy.sample_scene(rng), rng


def test_masks_are_what_is_drawn():
    """Each pixel has one owner, later objects hide earlier ones, and a plain object's pixels have its colour and no others do."""
    hidden = 0
    for scene, rng in scenes(60):
        pixels, masks = toy.render(scene, rng)
        assert (np.sum(masks, 0) == 1).all()
        for i, thing in enumerate(scene.things):
            whole = toy.shape_mask(thing)
            above = np.any([toy.shape_mask(t) for t in scene.things[i + 1:]], axis=0) if scene.things[i + 1:] else np.zeros_like(whole)
            assert (masks[i] == (whole & ~above)).all()
            hidden += (whole & above).sum()
            if thing.texture == "plain":
                assert abs(pixels[masks[i]].mean(0) - toy.COLORS[thing.color]).max() < 30
    assert hidden > 1000                                                # there is occlusion to speak of


def test_questions_have_one_true_answer():
    """Every answer agrees with one computed from the question's own words."""
    kinds = set()
    for scene, rng in scenes(300):
        things = scene.things
        for kind, question, answer in toy.questions(scene, rng):
            kinds.add(kind)
            words = question.rstrip("?").split()
            named = [t for t in things if t.shape in words]
            if kind in ("color", "texture"):
                assert [getattr(t, kind) for t in named] == [answer]
            elif kind == "shape":
                assert [t.shape for t in things if t.color in words] == [answer]
            elif kind == "count":
                assert int(answer) == sum(words[2] in (t.color, t.shape) for t in things) if words[2] != "objects" else len(things)
            elif kind == "existence":
                assert (answer == "yes") == any(t.color == words[-2] and t.shape == words[-1] for t in things)
            elif kind == "relation":
                a, b = (next(t for t in named if t.shape == w) for w in (words[2], words[-1]))
                side = next(w for w in ("left", "right", "above", "below") if w in words)
                assert (answer == "yes") == {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[side]
            else:
                assert kind == "background" and answer == scene.background
    assert kinds == {"background", "color", "texture", "shape", "count", "existence", "relation"}


def test_expressions_and_captions():
    """A referring expression fits its referent and nothing else; a caption names every object and the background."""
    for scene, rng in scenes(300):
        for index, expression in toy.referring(scene, rng):
            words = set(expression.split()) - {"the", "object"}
            assert [i for i, t in enumerate(scene.things) if words <= set(t.phrase.split())] == [index]
        caption = toy.caption(scene, rng)
        assert all(t.phrase in caption for t in scene.things) and caption.endswith(f"on {scene.light} {scene.background}.")


def test_built_folder(world):
    """Records are readable by data.py, boxes enclose masks, splits share no scene, and a second build is the same."""
    captions = {}
    for split, count in (("train", 48), ("val", 6), ("test", 6)):
        records = data.read_records(world / f"{split}.jsonl")
        masks = {r["image"]: [data.decode_rle(g["rle"]) for g in r["regions"]] for r in records}
        captions[split] = {json.dumps(r["regions"]) for r in records}
        assert len(records) == len(captions[split]) == count
        for record in data.read_records(world / f"{split}_refer.jsonl"):
            ys, xs = np.nonzero(masks[record["image"]][int(record["id"].rsplit("refer")[1])])
            assert record["answer"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert {r["task"] for r in data.read_records(world / f"{split}_vqa.jsonl")} == {"vqa"}
    assert all(not a & b for a, b in itertools.combinations(captions.values(), 2))
    scene = toy.sample_scene(rng := np.random.default_rng(toy.SEEDS["val"] + 3))
    assert (np.asarray(Image.open(world / "images" / "val_00003.png")) == toy.render(scene, rng)[0]).all()


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "caption", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.ensure(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder_is_not_replaced(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(data.InputError, match="not a toy world"):
        toy.main(toy.Args(out=str(tmp_path)))
    assert (tmp_path / "precious").exists()


def test_backbones():
    """Small, with each content word one token, and a language model that reads a background off a scene in words."""
    files = [f for folder in (toy.VISION, toy.LLM) for f in folder.iterdir()]
    assert sum(f.stat().st_size for f in files) < 8e6
    tokenizer, model = AutoTokenizer.from_pretrained(toy.LLM), AutoModelForCausalLM.from_pretrained(toy.LLM)
    for word in (*toy.COLORS, *toy.TEXTURES, *toy.SHAPES, *toy.BACKGROUNDS, *toy.LIGHTS):
        assert len(data.word_ids(tokenizer, word)) == 1, word
    text = ("USER: a striped red circle at the top left, a plain blue star at the bottom right, on dark {}."
            " What is the background? ASSISTANT:")
    for background in toy.BACKGROUNDS:
        ids = tokenizer(text.format(background), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == background
