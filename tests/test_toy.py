"""The toy world says only true things about its scenes, and its backbones are what the README says
they are."""

import collections
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import toy
import toy.__main__ as toy_main
from labels import decode_rle
from model import PatchAlignedModel
from toy import language, texts, train
from toy import records as made
from toy import world as scenery


def scenes(count, seed=0):
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        yield scenery.sample_scene(rng), rng


def test_masks_are_what_is_drawn():
    """Each pixel has one owner, later objects hide earlier ones, and a plain object's pixels have
    its colour and no others do."""
    hidden = 0
    for scene, rng in scenes(60):
        pixels, masks = scenery.render(scene, rng)
        assert (np.sum(masks, 0) == 1).all()
        for i, thing in enumerate(scene.things):
            whole = scenery.shape_mask(thing)
            above = (
                np.any([scenery.shape_mask(t) for t in scene.things[i + 1 :]], axis=0)
                if scene.things[i + 1 :]
                else np.zeros_like(whole)
            )
            assert (masks[i] == (whole & ~above)).all()
            hidden += (whole & above).sum()
            if thing.texture == "plain":
                assert (
                    abs(
                        pixels[masks[i] & ~scenery.outline(whole)].mean(0)
                        - scenery.COLORS[thing.color]
                    ).max()
                    < 30
                )
    assert hidden > 1000  # there is occlusion to speak of


def test_questions_have_one_true_answer():
    """Every answer agrees with one computed from the question's own words."""
    kinds = set()
    for scene, rng in scenes(300):
        things = scene.things
        for kind, question, answer in language.questions(scene, rng):
            kinds.add(kind)
            words = question.rstrip("?").split()
            named = [t for t in things if t.shape in words]
            if kind in ("color", "texture"):
                assert [getattr(t, kind) for t in named] == [answer]
            elif kind == "shape":
                assert [t.shape for t in things if t.color in words] == [answer]
            elif kind == "count":
                assert (
                    int(answer) == sum(words[2] in (t.color, t.shape) for t in things)
                    if words[2] != "objects"
                    else len(things)
                )
            elif kind == "existence":
                assert (answer == "yes") == any(
                    t.color == words[-2] and t.shape == words[-1] for t in things
                )
            elif kind == "relation":
                a, b = (next(t for t in named if t.shape == w) for w in (words[2], words[-1]))
                assert (answer == "yes") == beyond(a, b, words)
            elif kind == "order":
                a, b = called(things, words[2:4]), called(things, words[-2:])
                assert (answer == "yes") == beyond(a, b, words)
            elif kind == "beside":
                b = called(things, words[-2:])
                assert [t.color for t in things if t is not b and beyond(t, b, words)] == [answer]
                assert len(things) > 2
            elif kind == "where":
                place = question.split(" at the ")[1].rstrip("?")
                assert [t.shape for t in things if t.place == place] == [answer]
            elif kind == "larger":
                a, b = called(things, words[4:6]), called(things, words[-2:])
                assert answer == (a if a.radius > b.radius else b).shape and words[3] == "the"
            else:
                assert kind == "background" and answer == scene.background
    old = {"background", "color", "texture", "shape", "count", "existence", "relation"}
    assert kinds == old | {"where", "beside", "order", "larger"}


def called(things, words):
    """The one thing of a colour and a shape."""
    color, shape = (word.rstrip(",") for word in words)
    (thing,) = [t for t in things if (t.color, t.shape) == (color, shape)]
    return thing


def beyond(a, b, words):
    """Whether a lies on the side of b that is among the words."""
    side = next(w for w in ("left", "right", "above", "below") if w in words)
    found = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
    return found[side]


def test_expressions_and_captions():
    """A referring expression fits its referent and nothing else; a caption names every object and
    the background."""
    for scene, rng in scenes(300):
        for index, expression in language.referring(scene, rng):
            words = set(expression.split()) - {"the", "object"}
            assert [i for i, t in enumerate(scene.things) if words <= set(t.phrase.split())] == [
                index
            ]
        caption = language.caption(scene, rng)
        assert all(t.phrase in caption for t in scene.things) and caption.endswith(
            f"on {scene.light} {scene.background}."
        )


def words_of(phrases):
    """All words of some phrases."""
    return {w for p in phrases for w in p.split()}


def test_built_folder(world):
    """Records are readable by data.py, boxes enclose masks, splits share no scene, `hard` alone
    shows what is held out."""
    captions, every = {}, {f.stem: data.read_records(f) for f in world.glob("*.jsonl")}
    assert set(every) == {
        "train",
        "train_sft",
        "val",
        "val_sft",
        "val_refer",
        "test",
        "test_vqa",
        "test_refer",
        "test_instruct",
        "hard",
        "hard_vqa",
        "hard_refer",
        "hard_instruct",
        "distract_refer",
    }
    for split, count in (("train", 48), ("val", 6), ("test", 6), ("hard", 4)):
        records = every[split]
        masks = {r["image"]: [decode_rle(g["rle"]) for g in r["regions"]] for r in records}
        captions[split] = {json.dumps(r["regions"]) for r in records}
        assert len(records) == len(captions[split]) == count
        for record in every.get(f"{split}_refer", []):
            ys, xs = np.nonzero(masks[record["image"]][int(record["id"].rsplit("refer")[1])])
            assert record["answer"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        for record in records:
            objects = [set(region["phrase"].split()) for region in record["regions"]]
            assert any({c, s} <= o for o in objects for c, s in scenery.HELD_OUT) == (
                split == "hard"
            )
    assert {r["task"] for r in every["test_vqa"]} == {"vqa"} and {
        r["task"] for r in every["hard_instruct"]
    } == {"vqa", "choice"}
    assert {r["image"].split("_")[0] for r in every["distract_refer"]} == {"distract"}
    assert all(not a & b for a, b in itertools.combinations(captions.values(), 2))
    scene = scenery.sample_scene(
        rng := np.random.default_rng(made.SEEDS["val"] + 3),
        lambda scene: not scenery.unheard_of(scene),
    )
    assert (
        np.asarray(Image.open(world / "images" / "val_00003.png")) == scenery.render(scene, rng)[0]
    ).all()


def test_instructions_are_followed_by_their_answers():
    """Each kind of request has the answer that its own words ask for; four of the letters' options
    differ, one of them right."""
    seen = collections.Counter()
    for scene, rng in scenes(300):
        for kind, turns in language.instructions(scene, rng):
            seen[kind] += 1
            request, answer = turns[-1]
            named = [
                t
                for t in scene.things
                if t.shape in re.findall("[a-z]+", turns[0][0].split("\n")[0])
            ]
            if kind == "choice":
                question, *options, last = request.split("\n")
                assert [o[:3] for o in options] == ["A. ", "B. ", "C. ", "D. "] and len(
                    set(o[3:] for o in options)
                ) == 4
                right = options["ABCD".index(answer)][3:]
                truth = (
                    scene.background
                    if "background" in question
                    else next(
                        getattr(t, w)
                        for w in ("color", "texture", "shape")
                        if w in question
                        for t in (named or [t for t in scene.things if t.color in question.split()])
                    )
                )
                assert right == truth and last == "Answer with the letter."
            elif kind == "one_word":
                assert " " not in answer and request.endswith("Answer with one word.")
            elif kind == "sentence":
                assert answer.endswith(".") and any(
                    words_of([answer.rstrip(".")])
                    - {"The", "is", "a", "an", "object", "background"}
                    <= words_of([t.phrase, scene.background])
                    for t in scene.things
                )
            elif kind == "follow_up":
                assert (
                    len(turns) == 2
                    and {turns[0][1], answer} == {named[0].color, named[0].texture}
                    and " it" in request
                )
            elif kind == "describe":
                assert answer == language.article(named[0].phrase)
            else:
                assert kind == "list" and answer.split(", ") == [
                    t.color for t in sorted(scene.things, key=lambda t: t.x)
                ]
    assert len(seen) == 6 and min(seen.values()) > 100


def test_conversations_do_not_give_answers_away():
    """Up to eight different turns, and no answer's word was said before, but for those told by
    their own request."""
    lengths = []
    for scene, rng in scenes(200):
        boxes = [(expression, [1, 2, 30, 40]) for _, expression in language.referring(scene, rng)]
        turns, said = language.conversation(scene, boxes, rng), set()
        lengths.append(len(turns))
        assert len({q for q, _ in turns}) == len(turns)
        previous = set()
        for request, answer in turns:
            words = set(re.findall("[a-z]+", answer)) & language.SAID
            assert not words & (said - previous if " it" in request else said), (turns, request)
            previous = set(re.findall("[a-z]+", f"{request} {answer}"))
            said |= previous
    assert max(lengths) == 8 and min(lengths) > 1 and sum(lengths) / len(lengths) > 5


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "caption", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.ensure(tmp_path / "toy")
    assert [f.name for f in tmp_path.iterdir()] == [".toy.lock"]


def test_of_several_that_come_at_once_one_builds(tmp_path):
    """An older folder is replaced once, whoever else finds it old meanwhile."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "version").write_text("0")
    code = (
        "import pathlib, toy; toy.SPLITS.update(dict.fromkeys(toy.SPLITS, 3));"
        f" toy.ensure(pathlib.Path({str(tmp_path / 'toy')!r}))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=made.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(3)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 3 and sum(
        "wrote" in text for text in said
    ) == 1, said
    assert (tmp_path / "toy" / "version").read_text() == str(toy.VERSION)


def test_somebody_elses_folder_is_not_replaced(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(data.InputError, match="not a toy world"):
        toy_main.make_toy(toy_main.Args(out=str(tmp_path)))
    assert (tmp_path / "precious").exists()


def test_backbones():
    """Small, with each content word one token, and a language model that looks answers up in a
    scene described in words."""
    files = [f for folder in (toy.VISION, toy.LLM) for f in folder.iterdir()]
    assert sum(f.stat().st_size for f in files) < 8e6
    tokenizer, model = (
        AutoTokenizer.from_pretrained(toy.LLM),
        AutoModelForCausalLM.from_pretrained(toy.LLM, dtype=torch.float32),
    )
    for word in (
        *scenery.COLORS,
        *scenery.TEXTURES,
        *scenery.SHAPES,
        *scenery.BACKGROUNDS,
        *scenery.LIGHTS,
    ):
        assert len(data.word_ids(tokenizer, word)) == 1, word
    right, count = collections.Counter(), collections.Counter()
    for scene, rng in scenes(60, seed=1 << 30):
        described = language.description(scene, rng, boxes=False)
        for kind, question, answer in language.questions(scene, rng):
            ids = tokenizer(f"USER: {described} {question} ASSISTANT:", return_tensors="pt")[
                "input_ids"
            ]
            with torch.no_grad():
                right[kind] += tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == answer
            count[kind] += 1
    for kind in ("background", "color", "texture", "shape", "existence"):
        assert right[kind] / count[kind] > 0.9, kind


def test_what_the_texts_ask_is_true_and_told_by_them():
    """Spatial answers agree with the places in the description; a drill's first word tells its
    rest; boxes are those described."""
    columns, rows = {"left": -1, "right": 1}, {"top": -1, "bottom": 1}
    answers = collections.Counter()
    for scene, rng in scenes(200):
        described = language.description(scene, rng, boxes=True)
        for kind, _, answer in texts.asked(scene, rng, boxes=True):
            assert kind != "box" or answer in described
        described = language.description(scene, rng, sizes=True)
        for kind, question, answer in texts.asked(scene, rng, False, sizes=True):
            assert kind not in ("phrase", "place", "where", "beside", "larger") or (
                answer.split()[-1] in described
            )
            if kind == "larger":  # told by the words
                words = question.rstrip("?").split()
                a, b = called(scene.things, words[4:6]), called(scene.things, words[-2:])
                larger, smaller = (a, b) if answer == a.shape else (b, a)
                for size, t in (("large", larger), ("small", smaller)):
                    assert f"a {size} {t.phrase}" in described
            if kind == "order":
                words = question.rstrip("?").split()
                a, b = called(scene.things, words[2:4]), called(scene.things, words[-2:])
                assert a.cell != b.cell and (answer == "yes") == beyond(a, b, words)
        for _, question, answer in texts.relations(scene, rng):
            words = question.rstrip("?").split()
            a, b = (
                next(t.place.split() for t in scene.things if t.shape == w)
                for w in (words[2], words[-1])
            )
            names = columns if {"left", "right"} & set(words) else rows
            gap = sum(names.get(w, 0) for w in a) - sum(names.get(w, 0) for w in b)
            assert gap and (answer == "yes") == ((gap < 0) == bool({"left", "above"} & set(words)))
            answers[answer] += 1
        masks = scenery.visible(scene)
        cells = texts.grid(scene, masks, rng).split()
        assert len(cells) == 64
        for i, word in enumerate(cells):  # each names something that its cell shows
            y, x = 12 * (i // 8), 12 * (i % 8)
            shown = [
                name
                for name, mask in zip(
                    [t.phrase for t in scene.things] + [f"{scene.light} {scene.background}"], masks
                )
                if mask[y : y + 12, x : x + 12].mean() >= 0.25
            ]
            assert word in words_of(shown)
        text = texts.drill(rng, 4, boxes=bool(rng.random() < 0.5))
        for _, key, rest in text.turns:
            told = [thing for thing in text.first.split(", ") if key.strip(", ") in thing.split()]
            assert len(told) == 1 and set(rest.split()) <= set(told[0].split())
    assert min(answers.values()) > 0.4 * sum(answers.values())


def test_turns_apart_do_not_see_each_other():
    """A turn beside others, in a padded batch, gives what it gives alone; turns of one conversation
    do see each other."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(toy.LLM),
        AutoModelForCausalLM.from_pretrained(toy.LLM, dtype=torch.float32),
    )
    turns = [
        ("color", " What color is the star? ASSISTANT:", " blue</s>"),
        ("shape", " What shape is the red object? ASSISTANT:", " ring</s>"),
    ]
    first = "USER: a plain red ring at the top, a dotted blue star at the left, on dark sand."

    def logits(text):
        inputs, _, kinds = train.encode(tokenizer, [text, texts.Text(first * 3, turns)])
        with torch.no_grad():
            return model(**inputs).logits[0][
                torch.tensor(
                    [k == "shape" for k in kinds[0]]
                    + [False] * (inputs["input_ids"].shape[1] - len(kinds[0]))
                )
            ]

    alone = logits(texts.Text(first, turns[1:]))
    torch.testing.assert_close(logits(texts.Text(first, turns)), alone, atol=2e-4, rtol=1e-4)
    assert (logits(texts.Text(first, turns, apart=False)) - alone).abs().max() > 1e-2


def test_backbones_are_made_from_scratch(tmp_path, monkeypatch):
    """All parts run, and what they write makes a model."""
    monkeypatch.setattr(made, "VISION", tmp_path / "toy-clip")
    monkeypatch.setattr(made, "LLM", tmp_path / "toy-llama")
    small = dict(tokenizer=600, images=128, vision=2, drills=2, texts=2, places=2)
    small |= {"unseen images": 256, "unseen texts": 80}
    for name, budget in small.items():
        monkeypatch.setitem(train.BUDGET, name, budget)
    report = toy_main.train_backbones("all")
    assert {"own_above_near_miss", "patch_color", "patch_shape"} <= set(report["vision"])
    assert report == json.loads((tmp_path / "report.json").read_text()) and {
        "vision",
        "llm",
    } == set(report)
    assert {
        "background",
        "color",
        "texture",
        "shape",
        "count",
        "existence",
        "relation",
        "box",
        "choice",
        "grid box",
        "grid relation",
    } <= set(report["llm"])
    model = PatchAlignedModel(
        dict(
            vision=str(made.VISION),
            llm=str(made.LLM),
            projector="linear",
            image_size=0,
            geometry="crop",
            feature_layer=-2,
            prompt="plain",
            coverage=0.25,
            tau=0.07,
            patch_weight=1.0,
            patch_loss="softmax",
        )
    )
    assert model.encode(torch.zeros(1, 3, toy.SIZE, toy.SIZE)).shape == (
        1,
        64,
        128,
    ) and model.grid == (8, 8)
