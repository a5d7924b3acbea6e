"""The toy world: an embedded default that needs no download, in the same files as a real data set and real backbones.

    python toy.py                        # writes data/toy: images, records with regions, questions, referring expressions (seconds)
    python toy.py --train-backbones      # recreates backbones/ from scratch with fixed seeds (about 45 minutes of one core)

A scene is a named background with two to four objects, each of one colour, one texture and one shape, that may hide parts of each
other; so most patches are named by two or more words. Images are 96 x 96 pixels, masks are exact, splits come from disjoint seeds.

reads:  nothing (backbones/ is committed; --train-backbones rewrites it)
writes: data/toy/images/*.png
        data/toy/{train,val,test}.jsonl             captions and regions                (the records of data.py)
        data/toy/{train,val,test}_vqa.jsonl         questions, one kind each            (with "task", "kind", "answer")
        data/toy/{train,val,test}_refer.jsonl       referring expressions, their boxes  (with "task", "answer" in pixels)
        backbones/toy-clip, backbones/toy-llama     Hugging Face folders, half precision; backbones/report.json, what they reach
"""
import dataclasses
import itertools
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import data
import runtime

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data" / "toy"
VISION, LLM = ROOT / "backbones" / "toy-clip", ROOT / "backbones" / "toy-llama"
VERSION = 1                                        # of the data: a folder of another version is rebuilt
SPLITS = {"train": 4096, "val": 256, "test": 300}  # images
PRETRAIN = {"steps": 500, "batch_size": 32}       # of pretrain.py when it is started without --data
SEEDS = {"train": 0, "val": 1 << 24, "test": 1 << 25, "backbones": 1 << 26, "backbones_test": 1 << 27}  # scene i of a split: seed + i


@dataclass
class Args:
    """Flags of toy.py."""

    out: str = ""
    """folder to write; none: data/toy of this project, where the stages look for it"""
    train_backbones: bool = False
    """train the tokenizer, the vision encoder and the language model from scratch instead of writing the data"""
    part: str = field(default="all", metadata={"choices": ["all", "vision", "llm"]})
    """with --train-backbones: all, vision or llm"""
    vision_steps: int = 1400
    """contrastive steps of 128 images, their captions and as many near misses"""
    llm_steps: int = 1400
    """language model steps of 48 texts"""


# ------------------------------------------------------------------------------------------------------------------ the world

SIZE = 96                                          # pixels, both sides
COLORS = {"red": (215, 40, 40), "orange": (245, 140, 30), "yellow": (240, 220, 50), "green": (30, 150, 60), "blue": (40, 80, 215),
          "purple": (130, 50, 180), "pink": (245, 150, 190), "white": (243, 243, 243), "black": (28, 28, 28)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "snow", "stones", "carpet")
LIGHTS = {"bright": 1.15, "dark": 0.55}            # a background's brightness


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
    def place(self) -> str:
        """Its cell of a 3 x 3 grid, in words."""
        column, row = min(int(self.x * 3 / SIZE), 2), min(int(self.y * 3 / SIZE), 2)
        return " ".join(w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w) or "center"


@dataclass
class Scene:
    """A background such as "dark grass", and objects in drawing order: later ones hide earlier ones."""

    light: str
    background: str
    things: list


def sample_scene(rng) -> Scene:
    """A random scene whose objects overlap a little and stay inside the image."""
    while True:
        things = []
        for _ in range(rng.integers(3, 7)):
            r = rng.uniform(16, 26)
            x, y = rng.uniform(r, SIZE - r, 2)
            if all(math.hypot(x - t.x, y - t.y) > 0.75 * (r + t.radius) for t in things):
                things.append(Thing(str(rng.choice(list(COLORS))), str(rng.choice(TEXTURES)), str(rng.choice(SHAPES)), x, y, r,
                                    rng.uniform(-0.35, 0.35)))
        if 2 <= len(things) <= 4:
            return Scene(str(rng.choice(list(LIGHTS))), str(rng.choice(BACKGROUNDS)), things)


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


def render(scene: Scene, rng) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pixels (SIZE, SIZE, 3) uint8 and the visible masks (SIZE, SIZE) bool: one per object, then the background's."""
    pixels, owner = background_pixels(scene.background, rng) * LIGHTS[scene.light], np.full((SIZE, SIZE), len(scene.things))
    for i, thing in enumerate(scene.things):
        mask, color = shape_mask(thing), np.array(COLORS[thing.color], float)
        second = color * 0.45 if color.mean() > 60 else color + 110
        pixels[mask] = np.where(texture_mask(thing.texture, rng)[..., None], second, color)[mask]
        owner[mask] = i
    pixels += rng.normal(0, 4, pixels.shape) + rng.normal(0, 6, 3)                          # sensor noise, white balance
    return pixels.clip(0, 255).astype(np.uint8), [owner == i for i in range(len(scene.things) + 1)]


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
    relations = [r for r, gap in RELATIONS.items() if gap(things[0], things[1]) > 16]
    if relations and rng.random() < 0.6:
        names[:2] = [f"{names[0]} {rng.choice(relations)} {names[1]}"]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return f"{rng.choice(['', 'there is ', 'a picture of '])}{listed} on {scene.light} {scene.background}."


def near_miss(scene: Scene, rng) -> Scene:
    """The scene with one attribute of one object changed, mostly texture or shape: a hard negative for the contrastive loss."""
    index, kind = rng.integers(len(scene.things)), str(rng.choice(["color", "texture", "shape"], p=[0.1, 0.45, 0.45]))
    values = [v for v in {"color": COLORS, "texture": TEXTURES, "shape": SHAPES}[kind] if v != getattr(scene.things[index], kind)]
    changed = dataclasses.replace(scene.things[index], **{kind: str(rng.choice(values))})
    return dataclasses.replace(scene, things=scene.things[:index] + [changed] + scene.things[index + 1:])


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
    else:                                                                # half about what is there, half about anything
        values, every = ((colors, list(COLORS)), (shapes, list(SHAPES)))[kind - 1]
        value = rng.choice(values if rng.random() < 0.7 else every)
        out.append(("count", f"How many {value} objects are there?" if kind == 1 else f"How many {value} shapes are there?",
                    str(values.count(value))))
    t = things[rng.integers(len(things))]
    color, shape = t.color, t.shape
    if rng.random() < 0.5:                                               # a near miss: one attribute changed
        color, shape = (str(rng.choice(list(COLORS))), shape) if rng.random() < 0.5 else (color, str(rng.choice(SHAPES)))
    out.append(("existence", f"Is there {article(f'{color} {shape}')}?", "yes" if (color, shape) in zip(colors, shapes) else "no"))
    if len(unique) >= 2:
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        relation = str(rng.choice(list(RELATIONS)))
        if abs(RELATIONS[relation](a, b)) > 12:
            out.append(("relation", f"Is the {a.shape} {relation} the {b.shape}?", "yes" if RELATIONS[relation](a, b) > 0 else "no"))
    return out


def referring(scene: Scene, rng) -> list[tuple[int, str]]:
    """(object index, expression) with a unique referent: the fewest attributes, in random order of preference, that single it out."""
    out = []
    for i, t in enumerate(scene.things):
        others = [o for o in scene.things if o is not t]
        for keys in (("color",), ("shape",), ("texture", "shape"), ("color", "shape"), ("texture", "color"), ("texture", "color", "shape")):
            if not any(all(getattr(o, k) == getattr(t, k) for k in keys) for o in others) and (len(keys) == 3 or rng.random() < 0.5):
                noun = [getattr(t, k) for k in keys] + (["object"] if "shape" not in keys else [])
                out.append((i, "the " + " ".join(noun)))
                break
    return out


def box_text(box) -> str:
    """A pixel box as language: the four numbers relative to the image's side, two decimals."""
    return "[" + ", ".join(f"{v / SIZE:.2f}" for v in box) + "]"


def full_box(t: Thing) -> list[float]:
    """Roughly the object's box before others hide it, for texts about scenes that are never drawn."""
    return [max(0, t.x - t.radius), max(0, t.y - t.radius), min(SIZE, t.x + t.radius), min(SIZE, t.y + t.radius)]


def description(scene: Scene, rng, boxes: bool) -> str:
    """The scene in words only, for the language model's pretraining: objects in random order with their places or boxes."""
    parts = [f"{article(t.phrase)} {box_text(full_box(t)) if boxes else f'at the {t.place}'}"
             for t in (scene.things[i] for i in rng.permutation(len(scene.things)))]
    return ", ".join(parts) + f", on {scene.light} {scene.background}."


REFER = "Give the bounding box of: {}"


def text_sample(rng) -> list[tuple[str, str]]:
    """A text for the language model, as (kind, segment) pairs, kind "" for what the user says: a caption alone, or a scene described in
    words and then either its caption or questions about it."""
    scene = sample_scene(rng)
    form, boxes = rng.random(), rng.random() < 0.15
    if form < 0.15:
        return [("caption", f"{caption(scene, rng)}</s>")]
    if form < 0.5:
        asked = [("summary", "Describe the image.", caption(scene, rng))]
    else:
        asked = questions(scene, rng)
        if boxes:
            index, expression = (refs := referring(scene, rng) or [(0, f"the {scene.things[0].phrase}")])[rng.integers(len(refs))]
            asked.append(("box", REFER.format(expression), box_text(full_box(scene.things[index]))))
        asked = [asked[i] for i in rng.permutation(len(asked))]
    segments = [s for kind, question, answer in asked for s in (("", f"USER: {question} ASSISTANT:"), (kind, f" {answer}</s>"))]
    segments[0] = ("", segments[0][1].replace("USER:", f"USER: {description(scene, rng, boxes)}", 1))
    return segments


# --------------------------------------------------------------------------------------------------------------------- the data

def record(name: str, suffix: str, question: str, said: str, **more) -> dict:
    """A LLaVA record about the image `name`, with one turn."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": said}]
    return {"id": name + suffix, "image": f"{name}.png", "conversations": turns, **more}


def scene_records(name: str, scene: Scene, masks: list, rng) -> dict[str, list]:
    """All records of one image: its caption with regions, its questions, its referring expressions, by suffix of their file."""
    names = [article(t.phrase) for t in scene.things] + [f"{scene.light} {scene.background}"]
    regions = [{"phrase": p, "rle": data.encode_rle(m)} for p, m in zip(names, masks) if m.any()]
    out = {"": [record(name, "", "Describe the image.", caption(scene, rng), regions=regions)],
           "_vqa": [record(name, f"_{kind}", question, answer, task="vqa", kind=kind, answer=answer)
                    for kind, question, answer in questions(scene, rng)],
           "_refer": []}
    for index, expression in referring(scene, rng):
        ys, xs = np.nonzero(masks[index])
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        out["_refer"].append(record(name, f"_refer{index}", REFER.format(expression), box_text(box), task="refer", answer=box))
    return out


def build(folder: Path) -> None:
    """Write the whole data folder, which must not exist; it gets its name only when complete, so half of it is never taken for all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        temporary = Path(parent) / folder.name
        (temporary / "images").mkdir(parents=True)
        for split, count in SPLITS.items():
            lines = {"": [], "_vqa": [], "_refer": []}
            for i in range(count):
                rng = np.random.default_rng(SEEDS[split] + i)
                scene = sample_scene(rng)
                pixels, masks = render(scene, rng)
                name = f"{split}_{i:05d}"
                Image.fromarray(pixels).save(temporary / "images" / f"{name}.png", compress_level=1)
                for suffix, records in scene_records(name, scene, masks, rng).items():
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
    """The data folder, built first when it is missing or of another version."""
    version = folder / "version"
    if not version.exists() or version.read_text() != str(VERSION):
        began = time.time()
        clear(folder)
        build(folder)
        runtime.log(f"toy world: wrote {sum(SPLITS.values())} scenes to {folder} in {time.time() - began:.0f} s")
    return folder


# ---------------------------------------------------------------------------------------------------------------- the backbones

def train_tokenizer() -> "PreTrainedTokenizerFast":  # noqa: F821
    """A byte-level BPE tokenizer on 20,000 texts, with Llama's special tokens; saved into the language model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    segments = (text.removesuffix("</s>") for i in range(20_000) for _, text in text_sample(np.random.default_rng(SEEDS["backbones"] + i)))
    tokenizer.train_from_iterator(segments, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"], min_frequency=20,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(LLM)
    return fast


def pad(rows: list[list[int]]):
    """Token rows as (B, T) int64, padded with 0, and the mask of real tokens."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]


def optimise(parameters, loss_of_step, steps: int, rate: float, name: str) -> None:
    """AdamW with warm-up and cosine decay over `loss_of_step(step)`."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: runtime.cosine(s, steps, steps // 20))
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def train_vision(tokenizer, steps: int) -> dict:
    """A small CLIP on captions only (it never sees a region); its image half is saved. Returns what it reaches on unseen scenes.

    Colours and background alone tell most scenes apart, so each caption also competes with a near miss (hard negatives as in NegCLIP,
    Yuksekgonul et al., ICLR 2023): without them the patches hardly know texture and shape.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    torch.manual_seed(0)
    end = len(tokenizer)                                                 # an end token of its own: for id 2 transformers pools elsewhere
    shared = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128)
    model = CLIPModel(CLIPConfig(
        text_config=dict(shared, vocab_size=end + 1, num_hidden_layers=2, max_position_embeddings=96, bos_token_id=1, eos_token_id=end,
                         pad_token_id=0),
        vision_config=dict(shared, num_hidden_layers=4, image_size=SIZE, patch_size=12), projection_dim=128))
    mean, std = [0.5] * 3, [0.25] * 3

    def make(seed, count):
        pixels, scenes, owners = np.empty((count, SIZE, SIZE, 3), np.uint8), [], []
        for i in range(count):
            rng = np.random.default_rng(seed + i)
            scenes.append(sample_scene(rng))
            pixels[i], masks = render(scenes[-1], rng)
            owners.append(np.argmax(masks, 0))
        return torch.from_numpy(pixels), scenes, np.stack(owners)

    def logits(pixels, scenes, seeds):
        """Image by caption similarities (N, 2 N): each image's own captions in order, then each with one attribute changed."""
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean[0]) / std[0]
        changed = [near_miss(scene, np.random.default_rng([3, *seed])) for scene, seed in zip(scenes, seeds)]
        texts = [caption(scene, np.random.default_rng(seed)) for s in (scenes, changed) for scene, seed in zip(s, seeds)]
        ids, mask = pad([tokenizer(text)["input_ids"] + [end] for text in texts])
        return model(pixel_values=x, input_ids=ids, attention_mask=mask.long()).logits_per_image

    pixels, scenes, _ = make(SEEDS["backbones"], 24_000)

    def loss_of_step(step):
        index = np.random.default_rng([1, step]).integers(0, len(scenes), 128)
        similarity, own = logits(pixels[index], [scenes[i] for i in index], [(step, int(i)) for i in index]), torch.arange(128)
        return (torch.nn.functional.cross_entropy(similarity, own) + torch.nn.functional.cross_entropy(similarity[:, :128].T, own)) / 2

    optimise(list(model.parameters()), loss_of_step, steps, 1e-3, "vision")

    model.eval()
    pixels, scenes, owners = make(SEEDS["backbones_test"], 512)
    with torch.no_grad():
        similarity = logits(pixels[:256], scenes[:256], [(0, i) for i in range(256)])
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean[0]) / std[0]
        z = model.vision_model(x, output_hidden_states=True).hidden_states[-2][:, 1:]                         # (512, 64, 128)
    report = {"retrieval_top1_of_256": (similarity[:, :256].argmax(1) == torch.arange(256)).float().mean().item(),
              "own_above_near_miss": (similarity[:, :256].diagonal() > similarity[:, 256:].diagonal()).float().mean().item()}
    cells = owners.reshape(-1, 8, 12, 8, 12).transpose(0, 1, 3, 2, 4).reshape(-1, 64, 144)                    # a patch's pixels
    for name in ("color", "texture", "shape"):                          # ridge read-out of patches that lie within one object
        rows, targets, values = [], [], sorted({getattr(t, name) for s in scenes for t in s.things})
        for i, scene in enumerate(scenes):
            for j in range(64):
                first = cells[i, j, 0]
                if first < len(scene.things) and (cells[i, j] == first).mean() > 0.7:
                    rows.append((i, j))
                    targets.append(values.index(getattr(scene.things[first], name)))
        index, y = torch.tensor(rows), torch.tensor(targets)
        x = torch.nn.functional.pad(z[index[:, 0], index[:, 1]].double(), (0, 1), value=1.0)
        train = index[:, 0] < 384
        onehot = torch.nn.functional.one_hot(y, len(values)).double()
        weights = torch.linalg.solve(x[train].T @ x[train] + torch.eye(x.shape[1]), x[train].T @ onehot[train])
        report[f"patch_{name}"] = ((x[~train] @ weights).argmax(1) == y[~train]).double().mean().item()

    vision = CLIPVisionModel(model.config.vision_config)
    state = {k: v for k, v in model.state_dict().items() if k.startswith("vision_model.")}
    if set(vision.state_dict()) != set(state):                           # transformers 5 dropped the prefix in the stand-alone class
        state = {k.removeprefix("vision_model."): v for k, v in state.items()}
    vision.load_state_dict(state)
    vision.half().save_pretrained(VISION)
    (VISION / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": mean, "image_std": std, "do_resize": True, "do_center_crop": True, "do_normalize": True}, indent=1))
    return report


def train_llm(tokenizer, steps: int) -> dict:
    """A small Llama on text alone: captions, and described scenes with questions. Returns the accuracy per kind on unseen texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.07))
    with torch.no_grad():                                                # large against what the blocks add, so that at this width the
        model.get_input_embeddings().weight.mul_(10)                     # words do not drown; early trials learnt faster with it

    def encode(samples):
        """Token ids (B, T), padded with 0, and the kind of every token's segment."""
        kinds = [[""] + [kind for kind, text in s for _ in tokenizer(text, add_special_tokens=False)["input_ids"]] for s in samples]
        rows = [[1] + [t for _, text in s for t in tokenizer(text, add_special_tokens=False)["input_ids"]] for s in samples]
        return *pad(rows), kinds

    def loss_of_step(step):
        rng = np.random.default_rng([SEEDS["backbones"], step // 8])     # eight steps share a draw, sorted so that padding is little
        samples = sorted((text_sample(rng) for _ in range(8 * 48)), key=lambda s: sum(len(text) for _, text in s))
        place = np.random.default_rng(step // 8).permutation(8)[step % 8]
        ids, mask, kinds = encode(samples[48 * place: 48 * (place + 1)])
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
        said = pad([[1 if kind else 0 for kind in row] for row in kinds])[0][:, 1:]
        weights = (0.1 + 0.9 * said) * mask[:, 1:]                       # a random scene cannot be predicted, the answers about it can
        return (losses * weights).sum() / weights.sum()

    optimise(list(model.parameters()), loss_of_step, steps, 2e-3, "llm")

    model.eval()
    right, asked = defaultdict(int), defaultdict(int)
    with torch.no_grad():
        for i in range(8):
            rng = np.random.default_rng([SEEDS["backbones_test"], i])
            ids, mask, kinds = encode([text_sample(rng) for _ in range(64)])
            correct = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].argmax(-1) == ids[:, 1:]   # t + 1 from 0..t
            for names, hits in zip(kinds, correct.tolist()):
                at = 1
                for kind, run in itertools.groupby(names[1:]):
                    length = len(list(run))
                    if kind not in ("", "caption", "summary"):           # these have no single right wording
                        asked[kind] += 1
                        right[kind] += all(hits[at - 1: at - 1 + length])
                    at += length
    model.half().save_pretrained(LLM)
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


# ------------------------------------------------------------------------------------------------------------------------- main

def main(args: Args) -> None:
    """Write the data, or train the backbones."""
    if not args.train_backbones:
        folder = Path(args.out) if args.out else DATA
        clear(folder)
        build(folder)
        print(f"wrote {folder}; next: torchrun pretrain.py")
        return
    tokenizer, reached = train_tokenizer(), {}
    if args.part in ("all", "vision"):
        reached["vision"] = train_vision(tokenizer, args.vision_steps)
    if args.part in ("all", "llm"):
        reached["llm"] = train_llm(tokenizer, args.llm_steps)
    path = VISION.parent / "report.json"
    report = (json.loads(path.read_text()) if path.exists() else {}) | reached
    path.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    print(f"wrote {VISION.parent}; next: python toy.py")


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, data.InputError)
