"""The toy encoder: a small CLIP on captions alone, whose image half is kept."""
import dataclasses
import json

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from toy import records
from toy.language import caption
from toy.train import BUDGET, SEED, TEST_SEED, optimise, pad
from toy.world import COLORS, SHAPES, SIZE, TEXTURES, Scene, render, sample_scene


def near_miss(scene: Scene, rng) -> Scene:
    """The scene with one attribute of one object changed, mostly texture or shape."""
    index = rng.integers(len(scene.things))
    kind = str(rng.choice(["color", "texture", "shape"], p=[0.1, 0.45, 0.45]))
    every, thing = dict(color=COLORS, texture=TEXTURES, shape=SHAPES)[kind], scene.things[index]
    values = [v for v in every if v != getattr(thing, kind)]
    changed = dataclasses.replace(thing, **{kind: str(rng.choice(values))})
    things = scene.things[:index] + [changed] + scene.things[index + 1:]
    return dataclasses.replace(scene, things=things)


def mirrored(scene: Scene) -> Scene:
    """The scene that a mirrored image shows."""
    things = [dataclasses.replace(t, x=SIZE - t.x, tilt=-t.tilt) for t in scene.things]
    return dataclasses.replace(scene, things=things)


def draw(seed: int, count: int, alone: float) -> tuple[torch.Tensor, list, np.ndarray]:
    """Pixels (count, 3, SIZE, SIZE) uint8, scenes, whose each pixel is (count, SIZE, SIZE).

    A share `alone` has one object only: there a shape alone parts a caption and its near miss.
    """
    pixels, scenes = np.empty((count, 3, SIZE, SIZE), np.uint8), []
    owners = np.empty((count, SIZE, SIZE), np.uint8)
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        scene = sample_scene(rng)
        if rng.random() < alone:
            scene = dataclasses.replace(scene, things=scene.things[:1])
        scenes.append(scene)
        image, masks = render(scene, rng)
        pixels[i], owners[i] = image.transpose(2, 0, 1), np.argmax(masks, 0)
    return torch.from_numpy(pixels), scenes, owners


class Teacher(torch.nn.Module):
    """The encoder with what teaches it: CLIP's contrastive loss, a decoder that captions from Z.

    The decoder (as in CoCa, Yu et al., TMLR 2022) must find, patch by patch, which texture and
    shape belong to a colour; a contrastive loss alone is content with knowing which are somewhere.
    """

    def __init__(self, end: int):
        """end: the number of tokens, and the id of one more that ends a text.

        (For id 2 transformers' CLIP pools at the largest id.)
        """
        super().__init__()
        self.mean, self.std, self.end, width = 0.5, 0.25, end, 128
        shared = dict(hidden_size=width, intermediate_size=512, num_attention_heads=4,
                      projection_dim=width)
        self.clip = CLIPModel(CLIPConfig(
            text_config=dict(shared, vocab_size=end + 1, num_hidden_layers=2, eos_token_id=end,
                             max_position_embeddings=96, bos_token_id=1, pad_token_id=0),
            vision_config=dict(shared, num_hidden_layers=5, image_size=SIZE, patch_size=12),
            projection_dim=width))
        self.words = torch.nn.Embedding(end + 1, width)
        self.places = torch.nn.Embedding(96, width)
        block = torch.nn.TransformerDecoderLayer(width, 4, 512, dropout=0.0, activation="gelu",
                                                 batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerDecoder(block, 2)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, end + 1)

    def see(self, pixels: torch.Tensor):
        """Pixels (N, 3, SIZE, SIZE) uint8 -> image embeddings (N, 128), Z (N, 64, 128)."""
        pixels = (pixels.float() / 255 - self.mean) / self.std
        out = self.clip.vision_model(pixels, output_hidden_states=True)
        image = F.normalize(self.clip.visual_projection(out.pooler_output), dim=-1)
        return image, out.hidden_states[-2][:, 1:]

    def similarity(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scaled cosines (N, M) of image embeddings and captions (M, T)."""
        states = self.clip.text_model(input_ids=ids, attention_mask=(ids > 0).long())
        text = F.normalize(self.clip.text_projection(states.pooler_output), dim=-1)
        return self.clip.logit_scale.exp() * image @ text.T

    def captioning(self, Z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of captions (N, T) given their images."""
        T = ids.shape[1] - 1
        x = self.words(ids[:, :-1]) + self.places.weight[:T]
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        said = ids[:, 1:] > 0
        logits = self.head(self.norm(self.blocks(x, Z, tgt_mask=later)[said]))
        return F.cross_entropy(logits, ids[:, 1:][said])


def train_vision(tokenizer) -> dict:
    """A small CLIP on captions only; its image half is saved -> what it reaches on unseen scenes.

    Colours and background alone tell most scenes apart, so each caption also competes with a near
    miss (hard negatives as in NegCLIP, Yuksekgonul et al., ICLR 2023).
    """
    torch.manual_seed(0)
    model = Teacher(len(tokenizer))
    pixels, scenes, _ = draw(SEED, BUDGET["images"], alone=0.5)

    def captions(scenes, seeds):
        """(N, T) token ids of a caption each."""
        texts = [caption(s, np.random.default_rng(seed)) for s, seed in zip(scenes, seeds)]
        return pad([ids + [model.end] for ids in tokenizer(texts)["input_ids"]])

    def own_and_near(scenes, seeds):
        """Captions of the scenes, then of their near misses: (2 N, T)."""
        near = [near_miss(s, np.random.default_rng([3, *seed])) for s, seed in zip(scenes, seeds)]
        return captions([*scenes, *near], seeds * 2)

    def loss_of_step(step):
        rng = np.random.default_rng([1, step])
        index, flip = rng.integers(0, len(scenes), 128), rng.random(128) < 0.5
        shift = tuple(rng.integers(-4, 5, 2))
        flipped = torch.from_numpy(flip)[:, None, None, None]
        seen = torch.where(flipped, pixels[index].flip(3), pixels[index]).roll(shift, (2, 3))
        shown = [mirrored(scenes[i]) if f else scenes[i] for i, f in zip(index, flip)]
        ids = own_and_near(shown, [(step, int(i)) for i in index])
        image, Z = model.see(seen)
        similarity, own = model.similarity(image, ids), torch.arange(128)
        contrastive = (F.cross_entropy(similarity, own)
                       + F.cross_entropy(similarity[:, :128].T, own)) / 2
        return contrastive + model.captioning(Z, ids[:128])

    optimise(model, loss_of_step, BUDGET["vision"], 1e-3, "vision")

    model.eval()
    pixels, scenes, owners = draw(TEST_SEED, BUDGET["unseen images"], alone=0)
    with torch.no_grad():
        image, Z = model.see(pixels)
        ids = own_and_near(scenes[:256], [(0, i) for i in range(256)])
        similarity = model.similarity(image[:256], ids)
    right, near = similarity[:, :256], similarity[:, 256:].diagonal()
    report = {
        "retrieval_top1_of_256": (right.argmax(1) == torch.arange(256)).float().mean().item(),
        "own_above_near_miss": (right.diagonal() > near).float().mean().item()}
    report |= {f"patch_{name}": read_out(Z, scenes, owners, name)
               for name in ("color", "texture", "shape")}
    save_vision(model)
    return report


def read_out(Z: torch.Tensor, scenes: list, owners: np.ndarray, name: str) -> float:
    """How well a ridge regression reads an attribute from a patch that lies mostly in one object.

    Accuracy on the last quarter of the images, fitted on the others.
    """
    cells = owners.reshape(-1, 8, 12, 8, 12).transpose(0, 1, 3, 2, 4).reshape(-1, 64, 144)
    rows, targets = [], []
    values = sorted({getattr(t, name) for s in scenes for t in s.things})
    for i, scene in enumerate(scenes):
        for j in range(64):
            owner = np.bincount(cells[i, j]).argmax()
            if owner < len(scene.things) and (cells[i, j] == owner).mean() > 0.7:
                rows.append((i, j))
                targets.append(values.index(getattr(scene.things[owner], name)))
    index, y = torch.tensor(rows), torch.tensor(targets)
    x = F.pad(Z[index[:, 0], index[:, 1]].double(), (0, 1), value=1.0)
    fit = index[:, 0] < len(scenes) * 3 // 4
    wanted = F.one_hot(y, len(values)).double()[fit]
    weights = torch.linalg.solve(x[fit].T @ x[fit] + torch.eye(x.shape[1]), x[fit].T @ wanted)
    return ((x[~fit] @ weights).argmax(1) == y[~fit]).double().mean().item()


def save_vision(model: Teacher) -> None:
    """The image half alone, in half precision, with its image processor's settings."""
    vision = CLIPVisionModel(model.clip.config.vision_config)
    state = {k: v for k, v in model.clip.state_dict().items() if k.startswith("vision_model.")}
    if set(vision.state_dict()) != set(state):      # transformers 5 dropped the prefix
        state = {k.removeprefix("vision_model."): v for k, v in state.items()}
    vision.load_state_dict(state)
    vision.half().save_pretrained(records.VISION)
    (records.VISION / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "image_mean": [model.mean] * 3,
        "image_std": [model.std] * 3, "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE}, "do_resize": True, "do_center_crop": True,
        "do_normalize": True}, indent=1))
