"""How the toy world's backbones are made: `python toy.py --train-backbones` calls `train` below. No stage imports this file.

Three parts, each from fixed seeds and from scratch: a tokenizer, a small CLIP on captions alone (it never sees a region), and a small
Llama on text alone.

reads:  nothing
writes: backbones/toy-llama (tokenizer and language model), backbones/toy-clip (the image half of the CLIP), both in half precision;
        backbones/report.json, what they reach on unseen scenes
"""
import dataclasses
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import runtime
import toy

SEED, TEST_SEED = 1 << 26, 1 << 27                 # far from the data's own, so that no image of a split is ever seen here
BUDGET = {"tokenizer": 20_000, "images": 40_000,                        # texts, images
          "vision": 2000, "drills": 400, "texts": 3100}                                                  # optimizer steps


def train(part: str) -> dict:
    """Train `part` (all | vision | llm; the tokenizer belongs to llm) and write it with its report. Returns what the parts reach."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(toy.LLM) if part == "vision" else train_tokenizer()
    path = toy.VISION.parent / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name, make in (("vision", train_vision), ("llm", train_llm)):
        if part in ("all", name):
            report[name] = make(tokenizer)
            path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def optimise(model: torch.nn.Module, loss_of_step: Callable[[int], torch.Tensor], steps: int, rate: float, name: str) -> None:
    """Muon (Jordan et al., 2024) for the matrices of the blocks and AdamW for
    the rest, with warm-up and cosine decay over `loss_of_step(step)`, in bfloat16."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, 2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.05)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: runtime.cosine(s, steps, steps // 20)) for o in optimizers]
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(step)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def pad(rows: list[list]) -> torch.Tensor:
    """Rows of numbers as one tensor (B, T), filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


# ------------------------------------------------------------------------------------------------------------------------ texts

def relations(scene: toy.Scene, rng) -> Iterator[tuple[str, str, str]]:
    """Spatial questions whose answer the described places tell: the shapes are unique and their cells differ in that direction."""
    shapes = [t.shape for t in scene.things]
    for a, b in itertools.permutations([t for t in scene.things if shapes.count(t.shape) == 1], 2):
        name = str(rng.choice(list(toy.RELATIONS)))
        axis, sign = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}[name]
        gap = sign * (b.cell[axis] - a.cell[axis])
        if gap:
            yield "relation", f"Is the {a.shape} {name} the {b.shape}?", "yes" if gap > 0 else "no"


def asked(scene: toy.Scene, rng, boxes: bool) -> list[tuple[str, str, str]]:
    """Different (kind, question, answer) that the scene's description answers: up to six of `toy.questions` and up to six others."""
    own = {q: (kind, q, a) for _ in range(4) for kind, q, a in toy.questions(scene, rng) if kind != "relation"}
    more = list(relations(scene, rng))
    if boxes:                                                            # in place of places
        more = [("box", toy.REFER.format(e), toy.box_text(toy.full_box(scene.things[i]))) for i, e in toy.referring(scene, rng)]
    else:
        for key, noun in (("shape", "the {}"), ("color", "the {} object")):
            values = [getattr(t, key) for t in scene.things]
            for t, name in ((t, noun.format(v)) for t, v in zip(scene.things, values) if values.count(v) == 1):
                more += [("phrase", f"Describe {name}.", toy.article(t.phrase)), ("place", f"Where is {name}?", t.place)]
    return [group[i] for group in (list(own.values()), more) for i in rng.permutation(len(group))[:6]]


@dataclass
class Text:
    """A text to learn from: what comes first, and the turns (kind, question, answer) that follow it.

    Turns that see each other give answers away: an earlier answer names what a later question asks. So most texts keep them apart:
    every question must be answered from the description, and a dozen of them cost one reading of it.
    """

    first: str
    turns: list
    apart: bool = True
    """each turn follows `first` as if the others were not there; else they are one conversation"""


def drill(rng, count: int, boxes: bool) -> Text:
    """A list of `count` objects, and the same again in another order, where the first word of each tells the others, or its box.

    So nearly every word of the second half is a look-up. Questions hold so few of them that a model of this size does not begin to
    look anything up within thousands of texts; some hundred batches of drills, and it does.
    """
    color_first = rng.random() < 0.5
    colors, shapes = rng.permutation(list(toy.COLORS))[:count], rng.permutation(list(toy.SHAPES))[:count]
    textures = rng.choice(toy.TEXTURES, count)
    listed, turns = [], []
    for color, shape, texture in zip(colors, shapes, textures):
        box = toy.box_text(np.sort(rng.uniform(0, toy.SIZE, (2, 2)), 0).flatten())
        listed.append(f" {texture} {color} {shape}" + f" {box}" * boxes)
        key, other = (color, shape) if rng.random() < 0.5 else (shape, color)
        turns.append(("drill", f", {key}", f" {box}" if boxes else f" {other} {texture}" if color_first else f" {texture} {other}"))
    return Text(",".join(listed), [turns[i] for i in rng.permutation(count)], apart=False)


def grid(scene: toy.Scene, masks: list, rng) -> str:
    """The scene as 8 x 8 words, row by row: each names something that covers a quarter or more of its cell, as a patch label would."""
    share = np.stack([m.reshape(8, 12, 8, 12).mean((1, 3)) for m in masks])                                   # (objects + 1, 8, 8)
    names = [t.phrase.split() for t in scene.things] + [[scene.light, scene.background]]
    cells = [[w for i in np.nonzero(share[:, y, x] >= 0.25)[0] for w in names[i]] for y in range(8) for x in range(8)]
    return " ".join(str(rng.choice(words)) for words in cells)


def beside(turns: list[tuple[str, str]], opening: str = " ") -> tuple[str, str]:
    """Turns of one request as what is asked, up to where the last answer begins, and that answer."""
    *earlier, (request, answer) = turns
    return opening + "".join(f"{q} ASSISTANT: {a}</s>USER: " for q, a in earlier) + f"{request} ASSISTANT:", f" {answer}</s>"


def sample_text(rng) -> Text:
    """A caption alone, or a scene in words or as a grid of words, and then questions and requests about it, and what a caption of it would
    be."""
    scene, share = toy.sample_scene(rng), rng.random()
    if share < 0.1:
        return Text("", [("caption", "", toy.caption(scene, rng) + "</s>")])
    said = [("caption", [("Describe the image.", toy.caption(scene, rng))])] if rng.random() < 0.4 else []
    if share < 0.55:
        masks = toy.visible(scene)
        boxes = {e: box for _ in range(4) for e, box in toy.referred(scene, masks, rng).values()}     # where things are is the hardest
        said += [(f"grid {kind}", [(q, a)]) for kind, q, a in toy.questions(scene, rng)]
        said += [("grid box", [(toy.REFER.format(e), toy.box_text(box))]) for e, box in boxes.items()]
        said += [(f"grid {kind}", turns) for kind, turns in toy.instructions(scene, rng)]
        return Text(f"USER: {grid(scene, masks, rng)}", [(kind, *beside(turns, "\n")) for kind, turns in said])
    boxes = rng.random() < 0.3
    turns = [(kind, [(q, a)]) for kind, q, a in asked(scene, rng, boxes)] + said
    if apart := rng.random() < 0.8:
        turns += [(kind, turns) for kind, turns in toy.instructions(scene, rng) if kind != "list"]
        turns = [(kind, *beside(turns)) for kind, turns in turns]
    else:
        turns = [turns[i] for i in rng.permutation(len(turns))[:4]]
        turns = [(kind, *beside(turns, "USER: " if i else " ")) for i, (kind, turns) in enumerate(turns)]
    return Text(f"USER: {toy.description(scene, rng, boxes)}", turns, apart)


# ------------------------------------------------------------------------------------------------------- tokenizer, language model

CHAT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% if m.role == 'user' and (not loop.last or add_generation_prompt) %} ASSISTANT:{% endif %}{% endfor %}")

def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on made texts, with Llama's special tokens; saved into the language model's folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (sample_text(np.random.default_rng(SEED + i)) for i in range(BUDGET["tokenizer"]))
    said = (part.removesuffix("</s>") for text in texts for part in (text.first, *(x for turn in text.turns for x in turn[1:])))
    tokenizer.train_from_iterator(said, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"], min_frequency=20,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT
    fast.save_pretrained(toy.LLM)
    return fast


def encode(tokenizer, texts: list[Text]) -> tuple[dict, torch.Tensor, list[list[str]]]:
    """Texts as the model's inputs, the weight (B, T) of each token's loss, and what kind of answer each token belongs to ("": none).

    The attention mask (B, 1, T, T) shows a turn that stands apart the first part and itself, and its positions go on from there. A
    random scene cannot be predicted, the answers about it can: its tokens weigh a tenth, those of questions nothing. A caption alone counts
    as an answer: what it is like is all that the language model learns from it.
    """
    parts = [part for text in texts for part in (f"<s>{text.first}", *(x for turn in text.turns for x in turn[1:]))]
    tokens, rows = iter(tokenizer(parts, add_special_tokens=False)["input_ids"]), []
    for text in texts:
        ids = next(tokens)
        turn, position, weight, kinds = [0] * len(ids), list(range(len(ids))), [0.1] * len(ids), [""] * len(ids)
        for number, (kind, _, _) in enumerate(text.turns, 1):
            q, a = next(tokens), next(tokens)
            start, length = turn.count(0) if text.apart else len(ids), len(q) + len(a)
            ids, turn, position = ids + q + a, turn + [number if text.apart else 0] * length, position + list(range(start, start + length))
            weight, kinds = weight + [0.0] * len(q) + [1.0] * len(a), kinds + [""] * len(q) + [kind] * len(a)
        rows.append((ids, turn, position, weight, kinds))
    ids, turn, position, weight = (pad([row[i] for row in rows]) for i in range(4))
    T = ids.shape[1]
    sees = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    mask = (sees & torch.ones(T, T, dtype=torch.bool).tril())[:, None]                                # padding stands last: nobody sees it
    return dict(input_ids=ids, attention_mask=mask, position_ids=position), weight, [row[4] for row in rows]


@torch.no_grad()
def ready_to_look_up(model: LlamaForCausalLM) -> None:
    """Initial weights from which look-ups emerge within hundreds of steps, not thousands; training is free to change them all.

    As in mimetic initialization (Trockman and Kolter, ICML 2023), queries resemble keys, so that equal words find each other, and what
    a head reads it writes back as it was. The biases of the first layer's first heads let them look one, two and three words back: the
    key's bias is the query's, turned as its rotary embedding turns it over that distance, on the four fastest frequencies.
    """
    words = model.get_input_embeddings().weight
    model.lm_head.weight.copy_(words)
    words.mul_(10)                                                       # large against what the blocks add: the words do not drown
    for layer in model.model.layers:
        q, k, v, o = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")
        k.mul_(0.6).add_(q, alpha=0.8)
        o.mul_(0.7).add_(v.T, alpha=0.7)
    first, half = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq.numel()
    for head in range(3):
        at, turn = 2 * half * head, (head + 1) * model.model.rotary_emb.inv_freq[:4]
        first.q_proj.bias[at: at + 4] = 3
        first.k_proj.bias[at: at + 4], first.k_proj.bias[at + half: at + half + 4] = 3 * turn.cos(), 3 * turn.sin()


def train_llm(tokenizer) -> dict:
    """A small Llama on text alone. Returns the share of exact answers per kind of question about unseen described scenes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4, attention_bias=True,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.07))
    ready_to_look_up(model)

    def loss_of(texts):
        inputs, weight, _ = encode(tokenizer, texts)
        hidden, weight = model.model(**inputs).last_hidden_state[:, :-1], weight[:, 1:]
        keep = weight > 0
        losses = F.cross_entropy(model.lm_head(hidden[keep]), inputs["input_ids"][:, 1:][keep], reduction="none")
        return (losses * weight[keep]).sum() / weight.sum()

    def drills(step):
        rng = np.random.default_rng([SEED, 0, step])
        boxes = rng.random() < 0.3
        count = int(rng.integers(2, 5 if boxes else 9))
        return loss_of([drill(rng, count, boxes) for _ in range((128 if boxes else 512) // count)])

    def texts(step):
        rng = np.random.default_rng([SEED, 1, step])
        return loss_of([sample_text(rng) for _ in range(32)])

    optimise(model, drills, BUDGET["drills"], 1e-3, "drills")
    optimise(model, texts, BUDGET["texts"], 1e-3, "texts")
    report = exact_answers(model.eval(), tokenizer)
    model.half().save_pretrained(toy.LLM)
    return report


@torch.no_grad()
def exact_answers(model: LlamaForCausalLM, tokenizer) -> dict[str, float]:
    """The share of answers whose every token is the likeliest, by kind of question about unseen scenes, told in sentences or in a grid; of
    boxes found in a grid, the share with an intersection over union of a half."""
    right, count = defaultdict(int), defaultdict(int)
    for i in range(8):
        rng = np.random.default_rng([TEST_SEED, i])
        inputs, _, kinds = encode(tokenizer, [text for text in (sample_text(rng) for _ in range(80)) if text.apart])
        said, ids = model(**inputs).logits[:, :-1].argmax(-1), inputs["input_ids"][:, 1:]                # t + 1 from 0..t
        for row, named in enumerate(kinds):
            at = 1
            for kind, run in itertools.groupby(named[1:]):
                length = len(list(run))
                span, at = slice(at - 1, at - 1 + length), at + length
                if kind in ("", "caption"):                              # a caption has no single right wording
                    continue
                count[kind] += 1
                if kind == "grid box":
                    boxes = [[float(n) for n in re.findall(r"\.\d\d", tokenizer.decode(x[row, span]))] for x in (said, ids)]
                    right[kind] += len(boxes[0]) == 4 and overlap(*boxes) >= 0.5
                else:
                    right[kind] += bool((said[row, span] == ids[row, span]).all())
    return {kind: right[kind] / count[kind] for kind in sorted(count)}


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum(max(0, x[2] - x[0]) * max(0, x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / area if area else 0.0


# --------------------------------------------------------------------------------------------------------------- vision encoder

def near_miss(scene: toy.Scene, rng) -> toy.Scene:
    """The scene with one attribute of one object changed, mostly texture or shape: a hard negative for the contrastive loss."""
    index, kind = rng.integers(len(scene.things)), str(rng.choice(["color", "texture", "shape"], p=[0.1, 0.45, 0.45]))
    every = {"color": toy.COLORS, "texture": toy.TEXTURES, "shape": toy.SHAPES}[kind]
    values = [v for v in every if v != getattr(scene.things[index], kind)]
    changed = dataclasses.replace(scene.things[index], **{kind: str(rng.choice(values))})
    return dataclasses.replace(scene, things=scene.things[:index] + [changed] + scene.things[index + 1:])


def mirrored(scene: toy.Scene) -> toy.Scene:
    """The scene that a mirrored image shows."""
    return dataclasses.replace(scene, things=[dataclasses.replace(t, x=toy.SIZE - t.x, tilt=-t.tilt) for t in scene.things])


def draw(seed: int, count: int, alone: float) -> tuple[torch.Tensor, list, np.ndarray]:
    """Pixels (count, 3, SIZE, SIZE) uint8, scenes, and whose each pixel is (count, SIZE, SIZE). A share `alone` has one object only:
    there a shape makes the whole difference between a caption and its near miss."""
    pixels, scenes, owners = np.empty((count, 3, toy.SIZE, toy.SIZE), np.uint8), [], np.empty((count, toy.SIZE, toy.SIZE), np.uint8)
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        scene = toy.sample_scene(rng)
        scenes.append(dataclasses.replace(scene, things=scene.things[:1]) if rng.random() < alone else scene)
        image, masks = toy.render(scenes[-1], rng)
        pixels[i], owners[i] = image.transpose(2, 0, 1), np.argmax(masks, 0)
    return torch.from_numpy(pixels), scenes, owners


class Teacher(torch.nn.Module):
    """The encoder with what teaches it: CLIP's text half and contrastive loss, and a small decoder that captions from Z.

    The decoder (as in CoCa, Yu et al., TMLR 2022) must find, patch by patch, which texture and shape belong to a colour; a contrastive
    loss alone is content with knowing which ones are somewhere in the image.
    """

    def __init__(self, end: int):
        """`end`: the number of tokens, and the id of one more that ends a text (for id 2 transformers' CLIP pools at the largest id)."""
        super().__init__()
        self.mean, self.std, self.end, width = 0.5, 0.25, end, 128
        shared = dict(hidden_size=width, intermediate_size=512, num_attention_heads=4, projection_dim=width)
        self.clip = CLIPModel(CLIPConfig(
            text_config=dict(shared, vocab_size=end + 1, num_hidden_layers=2, max_position_embeddings=96, bos_token_id=1, eos_token_id=end,
                             pad_token_id=0),
            vision_config=dict(shared, num_hidden_layers=5, image_size=toy.SIZE, patch_size=12), projection_dim=width))
        self.words, self.places = torch.nn.Embedding(end + 1, width), torch.nn.Embedding(96, width)
        block = torch.nn.TransformerDecoderLayer(width, 4, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = torch.nn.TransformerDecoder(block, 2), torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, end + 1)

    def see(self, pixels: torch.Tensor):
        """Pixels (N, 3, SIZE, SIZE) uint8 -> image embeddings (N, 128), Z (N, 64, 128)."""
        out = self.clip.vision_model((pixels.float() / 255 - self.mean) / self.std, output_hidden_states=True)
        return F.normalize(self.clip.visual_projection(out.pooler_output), dim=-1), out.hidden_states[-2][:, 1:]

    def similarity(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scaled cosines (N, M) of image embeddings and captions (M, T)."""
        states = self.clip.text_model(input_ids=ids, attention_mask=(ids > 0).long())
        return self.clip.logit_scale.exp() * image @ F.normalize(self.clip.text_projection(states.pooler_output), dim=-1).T

    def captioning(self, Z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of captions (N, T) given their images."""
        T = ids.shape[1] - 1
        x, later = self.words(ids[:, :-1]) + self.places.weight[:T], torch.ones(T, T, dtype=torch.bool).triu(1)
        said = ids[:, 1:] > 0
        return F.cross_entropy(self.head(self.norm(self.blocks(x, Z, tgt_mask=later)[said])), ids[:, 1:][said])


def train_vision(tokenizer) -> dict:
    """A small CLIP on captions only (it never sees a region); its image half is saved. Returns what it reaches on unseen scenes.

    Colours and background alone tell most scenes apart, so each caption also competes with a near miss (hard negatives as in NegCLIP,
    Yuksekgonul et al., ICLR 2023).
    """
    torch.manual_seed(0)
    model = Teacher(len(tokenizer))
    pixels, scenes, _ = draw(SEED, BUDGET["images"], alone=0.5)

    def captions(scenes, seeds):
        """(N, T) token ids of a caption each."""
        texts = [toy.caption(scene, np.random.default_rng(seed)) for scene, seed in zip(scenes, seeds)]
        return pad([ids + [model.end] for ids in tokenizer(texts)["input_ids"]])

    def own_and_near(scenes, seeds):
        """Captions of the scenes, then of their near misses: (2 N, T)."""
        return captions([*scenes, *(near_miss(s, np.random.default_rng([3, *seed])) for s, seed in zip(scenes, seeds))], seeds * 2)

    def loss_of_step(step):
        rng = np.random.default_rng([1, step])
        index, flip, shift = rng.integers(0, len(scenes), 128), rng.random(128) < 0.5, tuple(rng.integers(-4, 5, 2))
        seen = torch.where(torch.from_numpy(flip)[:, None, None, None], pixels[index].flip(3), pixels[index]).roll(shift, (2, 3))
        ids = own_and_near([mirrored(scenes[i]) if f else scenes[i] for i, f in zip(index, flip)], [(step, int(i)) for i in index])
        image, Z = model.see(seen)
        similarity, own = model.similarity(image, ids), torch.arange(128)
        contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity[:, :128].T, own)) / 2
        return contrastive + model.captioning(Z, ids[:128])

    optimise(model, loss_of_step, BUDGET["vision"], 1e-3, "vision")

    model.eval()
    pixels, scenes, owners = draw(TEST_SEED, 768, alone=0)
    with torch.no_grad():
        image, Z = model.see(pixels)
        similarity = model.similarity(image[:256], own_and_near(scenes[:256], [(0, i) for i in range(256)]))
    report = {"retrieval_top1_of_256": (similarity[:, :256].argmax(1) == torch.arange(256)).float().mean().item(),
              "own_above_near_miss": (similarity[:, :256].diagonal() > similarity[:, 256:].diagonal()).float().mean().item()}
    report |= {f"patch_{name}": read_out(Z, scenes, owners, name) for name in ("color", "texture", "shape")}
    save_vision(model)
    return report


def read_out(Z: torch.Tensor, scenes: list, owners: np.ndarray, name: str) -> float:
    """How well a ridge regression reads an attribute from a patch of Z that lies mostly within one object: accuracy on the last
    quarter of the images, fitted on the others."""
    cells = owners.reshape(-1, 8, 12, 8, 12).transpose(0, 1, 3, 2, 4).reshape(-1, 64, 144)                    # a patch's pixels
    rows, targets, values = [], [], sorted({getattr(t, name) for s in scenes for t in s.things})
    for i, scene in enumerate(scenes):
        for j in range(64):
            owner = np.bincount(cells[i, j]).argmax()
            if owner < len(scene.things) and (cells[i, j] == owner).mean() > 0.7:
                rows.append((i, j))
                targets.append(values.index(getattr(scene.things[owner], name)))
    index, y = torch.tensor(rows), torch.tensor(targets)
    x, fit = F.pad(Z[index[:, 0], index[:, 1]].double(), (0, 1), value=1.0), index[:, 0] < len(scenes) * 3 // 4
    weights = torch.linalg.solve(x[fit].T @ x[fit] + torch.eye(x.shape[1]), x[fit].T @ F.one_hot(y, len(values)).double()[fit])
    return ((x[~fit] @ weights).argmax(1) == y[~fit]).double().mean().item()


def save_vision(model: Teacher) -> None:
    """The image half alone, in half precision, with its image processor's settings."""
    vision = CLIPVisionModel(model.clip.config.vision_config)
    state = {k: v for k, v in model.clip.state_dict().items() if k.startswith("vision_model.")}
    if set(vision.state_dict()) != set(state):                           # transformers 5 dropped the prefix in the stand-alone class
        state = {k.removeprefix("vision_model."): v for k, v in state.items()}
    vision.load_state_dict(state)
    vision.half().save_pretrained(toy.VISION)
    (toy.VISION / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "image_mean": [model.mean] * 3, "image_std": [model.std] * 3,
        "size": {"shortest_edge": toy.SIZE}, "crop_size": {"height": toy.SIZE, "width": toy.SIZE},
        "do_resize": True, "do_center_crop": True, "do_normalize": True}, indent=1))
