"""What the toy language model reads: captions, scenes in words or as grids of words, questions."""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toy.language import (
    REFER, RELATIONS, SPATIAL, article, box_text, by_cells, caption, description, full_box,
    instructions, places, questions, referred, referring)
from toy.world import COLORS, SHAPES, SIZE, TEXTURES, Scene, sample_scene, visible



@dataclass
class Text:
    """A text to learn from: what comes first, and the turns (kind, question, answer) that follow.

    Turns that see each other give answers away: an earlier answer names what a later question asks.
    So most texts keep them apart: every question must be answered from the description, and a dozen
    of them cost one reading of it.
    """

    first: str
    turns: list
    apart: bool = True
    """each turn follows `first` as if the others were not there; else they are one conversation"""


def relations(scene: Scene, rng) -> Iterator[tuple[str, str, str]]:
    """Spatial questions that the described places answer: unique shapes in different cells."""
    shapes = [t.shape for t in scene.things]
    unique = [t for t in scene.things if shapes.count(t.shape) == 1]
    for a, b in itertools.permutations(unique, 2):
        name = str(rng.choice(list(RELATIONS)))
        if gap := by_cells(a, b, name):
            yield "relation", f"Is the {a.shape} {name} the {b.shape}?", "yes" if gap > 0 else "no"


def asked(scene: Scene, rng, boxes: bool, sizes: bool = False) -> list[tuple[str, str, str]]:
    """(kind, question, answer) that the description answers: six of `questions`, ten others."""
    own = {question: (kind, question, answer) for _ in range(4)
           for kind, question, answer in questions(scene, rng) if kind not in SPATIAL}
    more = list(relations(scene, rng))
    more += {question: (kind, question, answer) for _ in range(4)
             for kind, question, answer in places(scene, rng, by_cells)
             if kind != "larger" or sizes}.values()
    if boxes:                                       # in place of places
        more = [("box", REFER.format(expression), box_text(full_box(scene.things[i])))
                for i, expression in referring(scene, rng)]
    else:
        for key, noun in (("shape", "the {}"), ("color", "the {} object")):
            values = [getattr(t, key) for t in scene.things]
            for t, value in zip(scene.things, values):
                if values.count(value) == 1:
                    name = noun.format(value)
                    more += [("phrase", f"Describe {name}.", article(t.phrase)),
                             ("place", f"Where is {name}?", t.place)]
    return [group[i] for group, most in ((list(own.values()), 6), (more, 10))
            for i in rng.permutation(len(group))[:most]]


def drill(rng, count: int, boxes: bool) -> Text:
    """A list of objects, and the same again in another order: its first word tells the others.

    So nearly every word of the second half is a look-up. Questions hold so few of them that a model
    of this size does not begin to look anything up within thousands of texts; some hundred batches
    of drills, and it does.
    """
    color_first = rng.random() < 0.5
    colors = rng.permutation(list(COLORS))[:count]
    shapes, textures = rng.permutation(list(SHAPES))[:count], rng.choice(TEXTURES, count)
    listed, turns = [], []
    for color, shape, texture in zip(colors, shapes, textures):
        box = box_text(np.sort(rng.uniform(0, SIZE, (2, 2)), 0).flatten())
        listed.append(f" {texture} {color} {shape}" + f" {box}" * boxes)
        key, other = (color, shape) if rng.random() < 0.5 else (shape, color)
        rest = f" {other} {texture}" if color_first else f" {texture} {other}"
        turns.append(("drill", f", {key}", f" {box}" if boxes else rest))
    return Text(",".join(listed), [turns[i] for i in rng.permutation(count)], apart=False)


def grid(scene: Scene, masks: list, rng) -> str:
    """The scene as 8 x 8 words, row by row: each names what covers a quarter of its cell."""
    share = np.stack([m.reshape(8, 12, 8, 12).mean((1, 3)) for m in masks])     # (things + 1, 8, 8)
    names = [t.phrase.split() for t in scene.things] + [[scene.light, scene.background]]
    cells = [[w for i in np.nonzero(share[:, y, x] >= 0.25)[0] for w in names[i]]
             for y in range(8) for x in range(8)]
    return " ".join(str(rng.choice(words)) for words in cells)


def shortened(text: Text, rng, most: int = 10) -> Text:
    """At most so many of the turns that stand apart, up to six of them about places: where things
    are takes the longest to learn, and a short text a third of the time."""
    if text.apart and len(text.turns) > most:
        order = rng.permutation(len(text.turns)).tolist()
        spatial = [i for i in order if text.turns[i][0].removeprefix("grid ") in SPATIAL][:6]
        rest = [i for i in order if text.turns[i][0].removeprefix("grid ") not in SPATIAL]
        text.turns = [text.turns[i] for i in sorted(spatial + rest[: most - len(spatial)])]
    return text


def beside(turns: list[tuple[str, str]], opening: str = " ") -> tuple[str, str]:
    """Turns of one request: what is asked, up to where the last answer begins, and that answer."""
    *earlier, (request, answer) = turns
    before = "".join(f"{q} ASSISTANT: {a}</s>USER: " for q, a in earlier)
    return f"{opening}{before}{request} ASSISTANT:", f" {answer}</s>"


def sample_text(rng) -> Text:
    """A caption alone, or a scene in words or as a grid, with questions, requests and a caption."""
    scene, share = sample_scene(rng), rng.random()
    if share < 0.1:
        return Text("", [("caption", "", caption(scene, rng) + "</s>")])
    said = []
    if rng.random() < 0.4:
        said = [("caption", [("Describe the image.", caption(scene, rng))])]
    if share < 0.55:
        masks = visible(scene)
        boxes = {expression: box for _ in range(4)  # where things are is the hardest
                 for expression, box in referred(scene, masks, rng).values()}
        said += [(f"grid {kind}", [(q, a)]) for kind, q, a in questions(scene, rng)]
        said += [("grid box", [(REFER.format(e), box_text(box))]) for e, box in boxes.items()]
        said += [(f"grid {kind}", turns) for kind, turns in instructions(scene, rng)]
        first = f"USER: {grid(scene, masks, rng)}"
        return Text(first, [(kind, *beside(turns, "\n")) for kind, turns in said])
    boxes, sizes = rng.random() < 0.3, rng.random() < 0.5
    turns = [(kind, [(q, a)]) for kind, q, a in asked(scene, rng, boxes, sizes)] + said
    if apart := rng.random() < 0.8:
        turns += [(kind, own) for kind, own in instructions(scene, rng) if kind != "list"]
        turns = [(kind, *beside(own)) for kind, own in turns]
    else:
        turns = [turns[i] for i in rng.permutation(len(turns))[:4]]
        turns = [(kind, *beside(own, "USER: " if i else " "))
                 for i, (kind, own) in enumerate(turns)]
    return Text(f"USER: {description(scene, rng, boxes, sizes)}", turns, apart)
