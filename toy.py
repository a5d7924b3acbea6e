"""The toy world: an embedded default that needs no download, in the same files as a real data set and real backbones.

    python toy.py                        # writes data/toy: images, records with regions, questions, referring expressions (seconds)
    python toy.py --train-backbones      # recreates backbones/ from scratch with fixed seeds (two hours of one core)

A scene is a named background with two to four objects, each of one colour, one texture and one shape, that may hide parts of each
other; so every patch is named by two or more words. Images are 96 x 96 pixels, masks are exact, splits come from disjoint seeds.
Every scene of `hard` holds a combination of colour and shape that no other split has; in `distract`, what an expression refers to
overlaps an object that shares a word with it.

reads:  nothing (backbones/ is committed; --train-backbones rewrites it)
writes: data/toy/images/*.png
        data/toy/{train,val,test,hard}.jsonl        captions and regions               (pretrain.py, probe.py)
        data/toy/{train,val}_sft.jsonl              conversations of several turns     (sft.py)
        data/toy/{test,hard}_{vqa,refer,instruct}.jsonl, distract_refer.jsonl          (eval.py; with "task", "kind", "answer")
        backbones/toy-clip, backbones/toy-llama     Hugging Face folders, half precision; backbones/report.json, what they reach
"""
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

try:
    import fcntl
except ImportError:                                                      # on Windows
    fcntl = None

import data
import runtime

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data" / "toy"
VISION, LLM = ROOT / "backbones" / "toy-clip", ROOT / "backbones" / "toy-llama"
VERSION = 5                                        # of the data: a folder of another version is rebuilt
SPLITS = {"train": 8192, "val": 256, "test": 300, "hard": 300, "distract": 300}                    # images
PRETRAIN = {"steps": 500, "batch_size": 32}       # of pretrain.py when it is started without --data
SFT = {"steps": 600, "batch_size": 32, "lr": 1e-3, "projector_lr": 1e-3, "prompt": "chat"}         # of sft.py, likewise
SEEDS = {"train": 0, "val": 1 << 24, "test": 1 << 25, "hard": 3 << 24, "distract": 5 << 24}        # scene i of a split: seed + i


@dataclass
class Args:
    """Flags of toy.py."""

    out: str = ""
    """folder to write the data to; none: data/toy of this project, where the stages look for it"""
    train_backbones: bool = False
    """train the tokenizer, the vision encoder and the language model from scratch instead of writing the data"""
    part: str = field(default="all", metadata={"choices": ["all", "vision", "llm"]})
    """with --train-backbones: all, vision or llm"""


# ------------------------------------------------------------------------------------------------------------------ the world

SIZE = 96                                          # pixels, both sides
COLORS = {"red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (240, 220, 50), "green": (30, 150, 60), "blue": (40, 80, 215),
          "purple": (130, 50, 180), "pink": (245, 150, 190), "white": (243, 243, 243), "black": (28, 28, 28)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "snow", "stones", "carpet")
HELD_OUT = set(zip(COLORS, SHAPES))                # colour and shape: together in `hard` alone
LIGHTS = {"bright": 1.15, "dark": 0.55}            # a background's brightness
OUTLINE = (15, 15, 15)                             # every object's, so that its shape does not drown in textures


@dataclass
class Thing:
    """One object: centre and radius in pixels, tilt in radians."""

    color: str
    texture: str
    shape: str
    x: float
    y: float
    radius: float
    tilt: float

    @property
    def phrase(self) -> str:
        """The noun phrase that names it, without article."""
        return f"{self.texture} {self.color} {self.shape}"

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row of its centre on a 3 x 3 grid."""
        return int(self.x * 3 / SIZE), int(self.y * 3 / SIZE)

    @property
    def place(self) -> str:
        """Its cell of a 3 x 3 grid, in words."""
        column, row = self.cell
        return " ".join(w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w) or "center"


@dataclass
class Scene:
    """A background such as "dark grass", and objects in drawing order: later ones hide earlier ones."""

    light: str
    background: str
    things: list


def sample_scene(rng, fits=lambda scene: True) -> Scene:
    """A random scene that `fits`, whose objects overlap a little and stay inside the image."""
    while True:
        things = []
        for _ in range(rng.integers(3, 7)):
            r = rng.uniform(16, 26)
            x, y = rng.uniform(r, SIZE - r, 2)
            if all(math.hypot(x - t.x, y - t.y) > 0.75 * (r + t.radius) for t in things):
                things.append(Thing(str(rng.choice(list(COLORS))), str(rng.choice(TEXTURES)), str(rng.choice(SHAPES)), x, y, r,
                                    rng.uniform(-0.35, 0.35)))
        if 2 <= len(things) <= 4:
            scene = Scene(str(rng.choice(list(LIGHTS))), str(rng.choice(BACKGROUNDS)), things)
            if fits(scene):
                return scene


def unheard_of(scene: Scene) -> bool:
    """Whether the scene holds a combination that only `hard` may show."""
    return any((t.color, t.shape) in HELD_OUT for t in scene.things)


def distracted(scene: Scene, thing: Thing) -> bool:
    """Whether an object that shares a colour or a shape with `thing` overlaps it."""
    return any(o is not thing and (o.color == thing.color or o.shape == thing.shape)
               and math.hypot(o.x - thing.x, o.y - thing.y) < 0.9 * (o.radius + thing.radius) for o in scene.things)


FITS = {"hard": unheard_of, "distract": lambda s: not unheard_of(s) and any(distracted(s, t) for t in s.things)}


def shape_mask(thing: Thing) -> np.ndarray:
    """(SIZE, SIZE) bool: the pixels of the object, before others hide it."""
    image = Image.new("1", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    x, y, r = thing.x, thing.y, thing.radius

    def polygon(points):
        c, s = math.cos(thing.tilt), math.sin(thing.tilt)
        draw.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in points], fill=1)

    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
        if thing.shape == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
    elif thing.shape == "square":
        polygon([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)])
    elif thing.shape == "triangle":
        polygon([(0, -1), (.95, .8), (-.95, .8)])
    elif thing.shape == "diamond":
        polygon([(0, -1), (.65, 0), (0, 1), (-.65, 0)])
    elif thing.shape == "cross":
        polygon([(-.3, -1), (.3, -1), (.3, 1), (-.3, 1)])
        polygon([(-1, -.3), (1, -.3), (1, .3), (-1, .3)])
    elif thing.shape == "star":
        polygon([((1 if i % 2 == 0 else .45) * math.sin(i * math.pi / 5), -(1 if i % 2 == 0 else .45) * math.cos(i * math.pi / 5))
                 for i in range(10)])
    else:                                                                # heart: a classic parametric curve
        polygon([(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
                 for a in np.linspace(0, 2 * math.pi, 40)])
    return np.array(image)


ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE]


def texture_mask(texture: str, rng) -> np.ndarray:
    """(SIZE, SIZE) bool: where the texture's second tone lies."""
    dx, dy = rng.integers(0, 12, 2)
    x, y = COLUMNS + dx, ROWS + dy
    if texture == "striped":
        return (y if rng.random() < 0.5 else x) % 6 < 3
    if texture == "dotted":
        return ((x % 6 - 2.5) ** 2 + (y % 6 - 2.5) ** 2) < 4.5
    if texture == "checkered":
        return (x // 4 + y // 4) % 2 == 0
    return np.zeros((SIZE, SIZE), bool)


def background_pixels(name: str, rng) -> np.ndarray:
    """(SIZE, SIZE, 3) float: one of the named backgrounds, with its own random phase and noise."""
    dx, dy = rng.integers(0, 24, 2)
    x, y, fine = COLUMNS + dx, ROWS + dy, rng.normal(0, 1, (SIZE, SIZE))
    coarse = np.kron(rng.normal(0, 1, (SIZE // 4, SIZE // 4)), np.ones((4, 4)))
    base, tone = {
        "grass": ((90, 150, 70), 22 * np.repeat(rng.normal(0, 1, (SIZE // 6, SIZE)), 6, 0)),    # blades
        "sand": ((214, 190, 140), 14 * fine),
        "water": ((90, 150, 190), 22 * np.sin(y / 2.5 + 2 * np.sin(x / 9))),
        "bricks": ((160, 90, 75), np.where((y % 12 < 2) | ((x + 12 * (y // 12 % 2)) % 24 < 2), 60, 6 * fine)),
        "wood": ((150, 110, 70), 16 * np.sin(x / 3 + 1.5 * np.sin(y / 14)) + 4 * fine),
        "snow": ((195, 202, 215), 7 * coarse),
        "stones": ((130, 130, 130), 24 * coarse),
        "carpet": ((120, 70, 100), 24 * (((x + y) % 12 < 2) | ((x - y) % 12 < 2))),
    }[name]
    return np.array(base, float) + tone[..., None]


def outline(mask: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: the mask's pixels within two of its border, in rows and columns."""
    padded = np.pad(mask, 2)
    inner = mask.copy()
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[dy: dy + SIZE, dx: dx + SIZE]
    return mask & ~inner


def visible(scene: Scene) -> list[np.ndarray]:
    """What is to be seen of each object, then of the background: masks (SIZE, SIZE) bool, each pixel in one of them."""
    owner = np.full((SIZE, SIZE), len(scene.things))
    for i, thing in enumerate(scene.things):
        owner[shape_mask(thing)] = i
    return [owner == i for i in range(len(scene.things) + 1)]


def render(scene: Scene, rng) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pixels (SIZE, SIZE, 3) uint8 and the visible masks (SIZE, SIZE) bool: one per object, then the background's."""
    pixels = background_pixels(scene.background, rng) * LIGHTS[scene.light]
    for thing in scene.things:
        mask, color = shape_mask(thing), np.array(COLORS[thing.color], float)
        second = color * 0.45 if color.mean() > 60 else color + 110
        pixels[mask] = np.where(texture_mask(thing.texture, rng)[..., None], second, color)[mask]
        pixels[outline(mask)] = OUTLINE
    pixels += rng.normal(0, 4, pixels.shape) + rng.normal(0, 6, 3)                          # sensor noise, white balance
    return pixels.clip(0, 255).astype(np.uint8), visible(scene)


# ------------------------------------------------------------------------------------------------------------------- language

RELATIONS = {"to the left of": lambda a, b: b.x - a.x, "to the right of": lambda a, b: a.x - b.x,
             "above": lambda a, b: b.y - a.y, "below": lambda a, b: a.y - b.y}               # pixels; true when clearly positive


def article(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(scene: Scene, rng) -> str:
    """One sentence that names every object and the background; the first two objects are related when they are clearly apart."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    names = [article(t.phrase) for t in things]
    relations = [r for r, gap in RELATIONS.items() if len(things) > 1 and gap(things[0], things[1]) > 16]
    if relations and rng.random() < 0.6:
        names[:2] = [f"{names[0]} {rng.choice(relations)} {names[1]}"]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return f"{rng.choice(['', 'there is ', 'a picture of '])}{listed} on {scene.light} {scene.background}."


def questions(scene: Scene, rng) -> list[tuple[str, str, str]]:
    """(kind, question, answer) for a scene, one per kind where the kind has an unambiguous question."""
    things, out = scene.things, [("background", "What is the background?", scene.background)]
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
    else:                                                                # mostly about what is there: 0 is not the usual answer
        values, every = ((colors, list(COLORS)), (shapes, list(SHAPES)))[kind - 1]
        value = rng.choice(values if rng.random() < 0.7 else every)
        out.append(("count", f"How many {value} objects are there?" if kind == 1 else f"How many {value} shapes are there?",
                    str(values.count(value))))
    t = things[rng.integers(len(things))]
    color, shape = t.color, t.shape
    if rng.random() < 0.5:                                               # a near miss: one attribute drawn anew
        color, shape = (str(rng.choice(list(COLORS))), shape) if rng.random() < 0.5 else (color, str(rng.choice(SHAPES)))
    if (color, shape) in zip(colors, shapes) or (color, shape) not in HELD_OUT:                         # else always no, until `hard`
        out.append(("existence", f"Is there {article(f'{color} {shape}')}?", "yes" if (color, shape) in zip(colors, shapes) else "no"))
    if len(unique) >= 2:
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        relation = str(rng.choice(list(RELATIONS)))
        if abs(RELATIONS[relation](a, b)) > 12:
            out.append(("relation", f"Is the {a.shape} {relation} the {b.shape}?", "yes" if RELATIONS[relation](a, b) > 0 else "no"))
    return out


def referring(scene: Scene, rng) -> list[tuple[int, str]]:
    """(object index, expression) with a unique referent: attributes that single it out, few rather than many; no entry where none do."""
    out = []
    for i, t in enumerate(scene.things):
        others = [o for o in scene.things if o is not t]
        for keys in (("color",), ("shape",), ("texture", "shape"), ("color", "shape"), ("texture", "color"), ("texture", "color", "shape")):
            if not any(all(getattr(o, k) == getattr(t, k) for k in keys) for o in others) and (len(keys) == 3 or rng.random() < 0.5):
                noun = [getattr(t, k) for k in keys] + (["object"] if "shape" not in keys else [])
                out.append((i, "the " + " ".join(noun)))
                break
    return out


def referred(scene: Scene, masks: list, rng) -> dict[int, tuple[str, list[int]]]:
    """{object: (expression, pixel box of its visible part)} for `referring`'s objects that are not all but hidden."""
    boxes = {}
    for index, expression in referring(scene, rng):
        ys, xs = np.nonzero(masks[index])
        if len(xs) >= 40:
            boxes[index] = (expression, [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1])
    return boxes


def box_text(box) -> str:
    """A pixel box as language: the four numbers relative to the image's side, two decimals, [.12 .30 .45 .62]: short and without a
    leading 0, so that a small model need not tell four equal beginnings apart."""
    return "[" + " ".join(f".{min(99, round(100 * v / SIZE)):02d}" for v in box) + "]"


REFER = "Give the bounding box of: {}"


def full_box(t: Thing) -> list[float]:
    """Roughly the object's box before others hide it, for texts about scenes that are never drawn."""
    return [max(0, t.x - t.radius), max(0, t.y - t.radius), min(SIZE, t.x + t.radius), min(SIZE, t.y + t.radius)]


def description(scene: Scene, rng, boxes: bool = False) -> str:
    """The scene in words: objects in random order with their places or boxes, then the background."""
    parts = [f"{article(t.phrase)} {box_text(full_box(t)) if boxes else f'at the {t.place}'}"
             for t in (scene.things[i] for i in rng.permutation(len(scene.things)))]
    return ", ".join(parts) + f", on {scene.light} {scene.background}."


def instructions(scene: Scene, rng) -> list[tuple[str, list[tuple[str, str]]]]:
    """(kind, turns of (request, answer)) that ask for a form of answer or refer back; the last answer is the one to be judged."""
    out, things, asked = [], scene.things, {kind: (question, answer) for kind, question, answer in questions(scene, rng)}
    said = {kind: asked[kind] for kind in ("color", "texture", "shape", "background") if kind in asked}
    kinds = list(said)
    question, answer = said[kinds[rng.integers(len(kinds))]]
    out.append(("one_word", [(f"{question} Answer with one word.", answer)]))
    kind = kinds[rng.integers(len(kinds))]
    question, answer = said[kind]
    subject = "background" if kind == "background" else question.split(" the ")[1].removesuffix("?").removesuffix(" have")
    told = article(answer) if kind == "shape" else answer
    out.append(("sentence", [(f"{question} Answer with a sentence.", f"The {subject} is {told}.")]))
    kind = kinds[rng.integers(len(kinds))]
    question, answer = said[kind]
    values = {"color": list(COLORS), "texture": list(TEXTURES), "shape": list(SHAPES), "background": list(BACKGROUNDS)}[kind]
    options = [answer, *rng.permutation([v for v in values if v != answer])[:3]]
    options = [str(options[i]) for i in rng.permutation(4)]
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options))
    out.append(("choice", [(f"{question}{listed}\nAnswer with the letter.", "ABCD"[options.index(answer)])]))
    shapes = [t.shape for t in things]
    unique = [t for t in things if shapes.count(t.shape) == 1]
    if unique:
        t = unique[rng.integers(len(unique))]
        first = [(f"What color is the {t.shape}?", t.color), (f"What texture does the {t.shape} have?", t.texture)]
        then = [("What texture does it have?", t.texture), ("What color is it?", t.color)]
        i = rng.integers(2)
        out.append(("follow_up", [first[i], then[i]]))
        t = unique[rng.integers(len(unique))]
        out.append(("describe", [(f"Describe the {t.shape}.", article(t.phrase))]))
    across = sorted(things, key=lambda t: t.x)
    if all(b.x - a.x > 8 for a, b in zip(across, across[1:])):
        out.append(("list", [("List the colors of the objects from left to right.", ", ".join(t.color for t in across))]))
    return out


SAID = {*COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS}                       # words that an answer may give away


def conversation(scene: Scene, boxes: list[tuple[str, list]], rng) -> list[tuple[str, str]]:
    """Up to eight turns about one scene, in random order. None whose answer an earlier turn has already said, unless it is a yes, a no or a
    number: the answers are to be seen in the image, not read in the conversation. boxes: (expression, its box in pixels)."""
    pool = [[(question, answer)] for _, question, answer in questions(scene, rng)]
    pool += [turns for _, turns in instructions(scene, rng)]
    pool += [[(REFER.format(expression), box_text(box))] for expression, box in boxes] * 2             # the hardest, so the most often
    if rng.random() < 0.5:
        pool.append([("Describe the image.", caption(scene, rng))])
    turns, said = [], set()
    for asked in (pool[i] for i in rng.permutation(len(pool))):
        text = " ".join(part for turn in asked for part in turn)
        answers = set(re.findall("[a-z]+", " ".join(answer for _, answer in asked))) & SAID
        if len(turns) + len(asked) <= 8 and not answers & said and all(q not in dict(turns) for q, _ in asked):
            turns += asked
            said |= set(re.findall("[a-z]+", text))
    return turns


# --------------------------------------------------------------------------------------------------------------------- the data

def record(name: str, suffix: str, turns: list[tuple[str, str]], image: bool = True, **more) -> dict:
    """A LLaVA record about the image `name`, with turns of (request, answer)."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = "<image>\n" * image + said[0]["value"]
    return {"id": name + suffix, **({"image": f"{name}.png"} if image else {}), "conversations": said, **more}


def scene_records(name: str, split: str, scene: Scene, masks: list, rng) -> dict[str, list]:
    """All records of one image, by suffix of their file: its caption with regions; its conversation, and one about another scene that is
    only told in words; its questions, referring expressions and instructions one by one."""
    names = [article(t.phrase) for t in scene.things] + [f"{scene.light} {scene.background}"]
    regions = [{"phrase": p, "rle": data.encode_rle(m)} for p, m in zip(names, masks) if m.any()]
    boxes = referred(scene, masks, rng)
    refers = [record(name, f"_refer{i}", [(REFER.format(expression), box_text(box))], task="refer", answer=box)
              for i, (expression, box) in boxes.items() if split != "distract" or distracted(scene, scene.things[i])]
    if split == "distract":
        return {"_refer": refers}
    out = {"": [record(name, "", [("Describe the image.", caption(scene, rng))], regions=regions)]}
    if split in ("train", "val"):
        out["_sft"] = [record(name, "_talk", conversation(scene, list(boxes.values()), rng))]
        if rng.random() < 0.25:                                          # text alone, so that the language model stays one
            told = sample_scene(rng, lambda scene: not unheard_of(scene))
            turns = [(q, a) for kind, q, a in questions(told, rng) if kind != "relation"]
            turns[0] = (f"{description(told, rng)} {turns[0][0]}", turns[0][1])
            out["_sft"].append(record(name, "_text", turns, image=False))
        if split == "val":
            out["_refer"] = refers
    else:
        out["_refer"] = refers
        out["_vqa"] = [record(name, f"_{kind}", [(question, answer)], task="vqa", kind=kind, answer=answer)
                       for kind, question, answer in questions(scene, rng)]
        out["_instruct"] = [record(name, f"_{kind}", turns, task="choice" if kind == "choice" else "vqa", kind=kind, answer=turns[-1][1])
                            for kind, turns in instructions(scene, rng)]
    return out


def build(folder: Path) -> None:
    """Write the whole data folder, which must not exist; it gets its name only when complete, so half of it is never taken for all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        temporary = Path(parent) / folder.name
        (temporary / "images").mkdir(parents=True)
        for split, count in SPLITS.items():
            lines = defaultdict(list)
            for i in range(count):
                rng = np.random.default_rng(SEEDS[split] + i)
                scene = sample_scene(rng, FITS.get(split, lambda scene: not unheard_of(scene)))
                pixels, masks = render(scene, rng)
                name = f"{split}_{i:05d}"
                Image.fromarray(pixels).save(temporary / "images" / f"{name}.png", compress_level=1)
                for suffix, records in scene_records(name, split, scene, masks, rng).items():
                    lines[suffix] += [json.dumps(r) + "\n" for r in records]
            for suffix, text in lines.items():
                (temporary / f"{split}{suffix}.jsonl").write_text("".join(text))
        (temporary / "version").write_text(str(VERSION))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "version").exists():                        # else another rank was first, with the same data
                raise


def clear(folder: Path) -> None:
    """Remove an earlier toy world from `folder`. InputError when something else is there."""
    if folder.exists():
        if not (folder / "version").is_file():
            raise data.InputError(f"{folder} exists and is not a toy world; remove it or name another folder with --out")
        shutil.rmtree(folder)


def ensure(folder: Path = DATA) -> Path:
    """The data folder, built first when it is missing or of another version. Of several that come at once, one builds, the others wait."""
    def built():
        return (folder / "version").exists() and (folder / "version").read_text() == str(VERSION)

    if not built():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not built():
                began = time.time()
                clear(folder)
                build(folder)
                runtime.log(f"toy world: wrote {sum(SPLITS.values())} scenes to {folder} in {time.time() - began:.0f} s")
    return folder


def ensure_once() -> Path:
    """`ensure` for all processes of a torchrun: the first of each machine builds the folder while the others wait."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        ensure()
    runtime.barrier()
    return ensure()


# ------------------------------------------------------------------------------------------------------------------------- main

def main(args: Args) -> None:
    """Write the data, or train the backbones."""
    if args.out and args.train_backbones or args.part != "all" and not args.train_backbones:
        raise data.InputError("--out names the folder of the data, --part goes with --train-backbones: they do not go together")
    if not args.train_backbones:
        folder = Path(args.out) if args.out else DATA
        clear(folder)
        build(folder)
        print(f"wrote {folder}; next: torchrun pretrain.py")
        return
    from backbones.train import train

    print(json.dumps(train(args.part), indent=1))
    print(f"wrote {VISION.parent}; next: torchrun pretrain.py")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, data.InputError)
