"""What can be said about a scene: captions, questions, referring expressions, conversations."""
import re

import numpy as np

from toy.world import BACKGROUNDS, COLORS, HELD_OUT, SHAPES, SIZE, TEXTURES, Scene, Thing

RELATIONS = {                                       # pixels; true when clearly positive
    "to the left of": lambda a, b: b.x - a.x, "to the right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y, "below": lambda a, b: a.y - b.y}
AXES = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}
SPATIAL = {"relation", "where", "beside", "order", "larger"}     # kinds of questions
REFER = "Give the bounding box of: {}"
SAID = {*COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS}  # words that an answer may give away


def article(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(scene: Scene, rng) -> str:
    """One sentence that names every object and the background; it may relate two objects."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    names = [article(t.phrase) for t in things]
    relations = [r for r, gap in RELATIONS.items() if len(things) > 1 and gap(*things[:2]) > 16]
    if relations and rng.random() < 0.6:
        names[:2] = [f"{names[0]} {rng.choice(relations)} {names[1]}"]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    opening = rng.choice(["", "there is ", "a picture of "])
    return f"{opening}{listed} on {scene.light} {scene.background}."


def questions(scene: Scene, rng) -> list[tuple[str, str, str]]:
    """(kind, question, answer), one per kind that has an unambiguous question here."""
    things = scene.things
    out = [("background", "What is the background?", scene.background)]
    shapes, colors = [t.shape for t in things], [t.color for t in things]
    unique = [t for t in things if shapes.count(t.shape) == 1]
    if unique:
        t = unique[rng.integers(len(unique))]
        out.append(("color", f"What color is the {t.shape}?", t.color))
        t = unique[rng.integers(len(unique))]
        out.append(("texture", f"What texture does the {t.shape} have?", t.texture))
    by_color = [t for t in things if colors.count(t.color) == 1]
    if by_color:
        t = by_color[rng.integers(len(by_color))]
        out.append(("shape", f"What shape is the {t.color} object?", t.shape))
    kind = rng.integers(3)
    if kind == 0:
        out.append(("count", "How many objects are there?", str(len(things))))
    else:                                   # mostly about what is there: 0 is not the usual answer
        values, every = ((colors, list(COLORS)), (shapes, list(SHAPES)))[kind - 1]
        value, noun = rng.choice(values if rng.random() < 0.7 else every), ("objects", "shapes")
        count = str(values.count(value))
        out.append(("count", f"How many {value} {noun[kind - 1]} are there?", count))
    t = things[rng.integers(len(things))]
    color, shape = t.color, t.shape
    if rng.random() < 0.5:                                      # a near miss: one attribute anew
        if rng.random() < 0.5:
            color = str(rng.choice(list(COLORS)))
        else:
            shape = str(rng.choice(SHAPES))
    there = (color, shape) in zip(colors, shapes)
    if there or (color, shape) not in HELD_OUT:                 # else always no, until `hard`
        question = f"Is there {article(f'{color} {shape}')}?"
        out.append(("existence", question, "yes" if there else "no"))
    if len(unique) >= 2:
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        relation = str(rng.choice(list(RELATIONS)))
        gap = RELATIONS[relation](a, b)
        if abs(gap) > 12:
            question = f"Is the {a.shape} {relation} the {b.shape}?"
            out.append(("relation", question, "yes" if gap > 0 else "no"))
    return out + places(scene, rng)


def by_pixels(a: Thing, b: Thing, relation: str) -> float:
    """How far a stands in a relation to b, in pixels; 0 where the eye may doubt it."""
    gap = RELATIONS[relation](a, b)
    return gap if abs(gap) > 12 else 0


def by_cells(a: Thing, b: Thing, relation: str) -> int:
    """The same in cells of the 3 x 3 grid, which places in words tell."""
    axis, sign = AXES[relation]
    return sign * (b.cell[axis] - a.cell[axis])


def places(scene: Scene, rng, gap=by_pixels) -> list[tuple[str, str, str]]:
    """(kind, question, answer) about where things are and how large, one per kind that has an
    unambiguous question here: what is at a place, beside a thing, above it, larger."""
    things, out = scene.things, []

    def one(found):
        return found[rng.integers(len(found))] if found else None

    cells, names = [t.cell for t in things], [f"{t.color} {t.shape}" for t in things]
    third = SIZE / 3
    inner = [t for t in things if cells.count(t.cell) == 1
             and all(min(v % third, -v % third) > 3 for v in (t.x, t.y))]
    if t := one(inner):
        out.append(("where", f"What shape is at the {t.place}?", t.shape))
    known = [t for t, name in zip(things, names) if names.count(name) == 1]
    pairs = [(a, b) for a in known for b in known if a is not b]
    sides = [(relation, b) for relation in RELATIONS for b in known
             if [gap(a, b, relation) > 0 for a in things if a is not b].count(True) == 1
             and all(gap(a, b, relation) for a in things if a is not b)]
    if (found := one(sides)) and len(things) > 2:
        relation, b = found
        t = next(a for a in things if a is not b and gap(a, b, relation) > 0)
        question = f"What color is the object {relation} the {b.color} {b.shape}?"
        out.append(("beside", question, t.color))
    relation = str(rng.choice(list(RELATIONS)))
    if found := one([pair for pair in pairs if gap(*pair, relation)]):
        a, b = found
        question = f"Is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?"
        out.append(("order", question, "yes" if gap(a, b, relation) > 0 else "no"))
    sizes = [(a, b) for a, b in pairs if a.shape != b.shape and a.size != b.size
             and max(a.radius, b.radius) > 1.2 * min(a.radius, b.radius)]
    if found := one(sizes):
        a, b = found
        question = f"Which is larger, the {a.color} {a.shape} or the {b.color} {b.shape}?"
        out.append(("larger", question, max(found, key=lambda t: t.radius).shape))
    return out


def referring(scene: Scene, rng) -> list[tuple[int, str]]:
    """(object index, expression with that referent alone): few attributes rather than many."""
    out = []
    every = (("color",), ("shape",), ("texture", "shape"), ("color", "shape"), ("texture", "color"),
             ("texture", "color", "shape"))
    for i, t in enumerate(scene.things):
        others = [o for o in scene.things if o is not t]
        for keys in every:
            shared = any(all(getattr(o, k) == getattr(t, k) for k in keys) for o in others)
            if not shared and (len(keys) == 3 or rng.random() < 0.5):
                noun = [getattr(t, k) for k in keys] + ["object"] * ("shape" not in keys)
                out.append((i, "the " + " ".join(noun)))
                break
    return out


def referred(scene: Scene, masks: list, rng) -> dict[int, tuple[str, list[int]]]:
    """{object: (expression, pixel box of its visible part)}, of those in sight."""
    boxes = {}
    for index, expression in referring(scene, rng):
        ys, xs = np.nonzero(masks[index])
        if len(xs) >= 40:
            corners = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            boxes[index] = (expression, [int(n) for n in corners])
    return boxes


def box_text(box) -> str:
    """A pixel box in words: [.12 .30 .45 .62], relative to the image's side.

    Short, without leading zeros: a small model need not tell four equal beginnings apart.
    """
    return "[" + " ".join(f".{min(99, round(100 * v / SIZE)):02d}" for v in box) + "]"


def full_box(t: Thing) -> list[float]:
    """Roughly the object's box before others hide it, for texts about scenes never drawn."""
    return [max(0, t.x - t.radius), max(0, t.y - t.radius),
            min(SIZE, t.x + t.radius), min(SIZE, t.y + t.radius)]


def description(scene: Scene, rng, boxes: bool = False, sizes: bool = False) -> str:
    """The scene in words: objects in random order with places or boxes, then the background."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    where = [box_text(full_box(t)) if boxes else f"at the {t.place}" for t in things]
    parts = [f"{article(f'{t.size} ' * sizes + t.phrase)} {place}"
             for t, place in zip(things, where)]
    return ", ".join(parts) + f", on {scene.light} {scene.background}."


def instructions(scene: Scene, rng) -> list[tuple[str, list[tuple[str, str]]]]:
    """(kind, turns of (request, answer)) that ask for a form of answer or refer back.

    The last answer is the one to be judged.
    """
    out, things = [], scene.things
    asked = {kind: (question, answer) for kind, question, answer in questions(scene, rng)}
    said = {k: asked[k] for k in ("color", "texture", "shape", "background") if k in asked}
    kinds = list(said)
    question, answer = said[kinds[rng.integers(len(kinds))]]
    out.append(("one_word", [(f"{question} Answer with one word.", answer)]))
    kind = kinds[rng.integers(len(kinds))]
    question, answer = said[kind]
    subject = "background"
    if kind != "background":
        subject = question.split(" the ")[1].removesuffix("?").removesuffix(" have")
    told = article(answer) if kind == "shape" else answer
    request = f"{question} Answer with a sentence."
    out.append(("sentence", [(request, f"The {subject} is {told}.")]))
    kind = kinds[rng.integers(len(kinds))]
    question, answer = said[kind]
    values = {"color": list(COLORS), "texture": list(TEXTURES), "shape": list(SHAPES),
              "background": list(BACKGROUNDS)}[kind]
    options = [answer, *rng.permutation([v for v in values if v != answer])[:3]]
    options = [str(options[i]) for i in rng.permutation(4)]
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options))
    letter = "ABCD"[options.index(answer)]
    out.append(("choice", [(f"{question}{listed}\nAnswer with the letter.", letter)]))
    shapes = [t.shape for t in things]
    unique = [t for t in things if shapes.count(t.shape) == 1]
    if unique:
        t = unique[rng.integers(len(unique))]
        first = [(f"What color is the {t.shape}?", t.color),
                 (f"What texture does the {t.shape} have?", t.texture)]
        then = [("What texture does it have?", t.texture), ("What color is it?", t.color)]
        i = rng.integers(2)
        out.append(("follow_up", [first[i], then[i]]))
        t = unique[rng.integers(len(unique))]
        out.append(("describe", [(f"Describe the {t.shape}.", article(t.phrase))]))
    across = sorted(things, key=lambda t: t.x)
    if all(b.x - a.x > 8 for a, b in zip(across, across[1:])):
        request = "List the colors of the objects from left to right."
        out.append(("list", [(request, ", ".join(t.color for t in across))]))
    return out


def conversation(scene: Scene, boxes: list[tuple[str, list]], rng) -> list[tuple[str, str]]:
    """Up to eight turns about one scene, in random order. boxes: (expression, its box in pixels).

    No answer has been said in an earlier turn, unless it is a yes, a no or a number: answers are to
    be seen in the image, not read in the conversation.
    """
    pool = [[(question, answer)] for _, question, answer in questions(scene, rng)]
    pool += [turns for _, turns in instructions(scene, rng)]
    refers = [[(REFER.format(expression), box_text(box))] for expression, box in boxes]
    pool += refers * 2                                          # the hardest, so the most often
    if rng.random() < 0.5:
        pool.append([("Describe the image.", caption(scene, rng))])
    turns, said = [], set()
    for asked in (pool[i] for i in rng.permutation(len(pool))):
        text = " ".join(part for turn in asked for part in turn)
        told = " ".join(answer for _, answer in asked)
        answers = set(re.findall("[a-z]+", told)) & SAID
        new = all(question not in dict(turns) for question, _ in asked)
        if len(turns) + len(asked) <= 8 and not answers & said and new:
            turns += asked
            said |= set(re.findall("[a-z]+", text))
    return turns
