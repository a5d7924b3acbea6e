"""The model: rows go where they belong, what is frozen stays frozen, and checkpoints come back
whole or not at all."""

import json
import os
import pickle
import shutil

import pytest
import torch
from torch.nn import functional as F

import data
import toy
from backbones.loading import processor_size
from data import IGNORE, IMAGE_TOKEN
from model import PatchAlignedModel, load_checkpoint, read_checkpoint, save_checkpoint
from runtime import InputError

CONFIG = dict(
    vision=str(toy.VISION),
    llm=str(toy.LLM),
    projector="mlp2x_gelu",
    image_size=0,
    geometry="crop",
    feature_layer=-2,
    prompt="plain",
    coverage=0.25,
    tau=0.07,
    patch_weight=1.0,
    patch_loss="softmax",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PatchAlignedModel(CONFIG)


@pytest.fixture
def batch(world, model):
    records = data.Records(
        data.read_records(world / "train.jsonl"),
        world / "images",
        model.tokenizer,
        image_size=96,
        geometry="crop",
        grid=model.grid,
        mean=model.image_mean,
        std=model.image_std,
    )
    return data.collate([records[i] for i in range(5)], model.pad_id)


def test_splice_places_rows_exactly(model):
    """Row p of image n stands at its own position, whatever stands before it; all other positions
    are word embeddings."""
    width = model.word_embeddings.shape[1]
    H = torch.randn(2, 3, width)
    X = IMAGE_TOKEN
    ids = torch.tensor(
        [[1, X, X, X, 7, 8, 0], [5, 6, 7, 8, 9, 0, 0], [1, 4, 9, X, X, X, 2]]
    )  # the middle one has no image
    out = model.splice(ids, H)
    assert torch.equal(out[0, 1:4], H[0]) and torch.equal(out[2, 3:6], H[1])
    text = ids != X
    assert torch.equal(out[text], model.word_embeddings[ids[text]])
    with pytest.raises(InputError, match="6 image places in the text for 2 x 4"):
        model.splice(ids, torch.randn(2, 4, width))


@pytest.mark.parametrize("centre_words", [False, True])
def test_losses_are_sums_by_definition(model, batch, centre_words):
    """forward's four numbers against a plain computation, sample by sample, with the full logits
    and similarities."""
    model.config["centre_words"] = centre_words
    sums = model(batch)
    model.config["patch_loss"] = "cosine"
    pull = model(batch)["patch_loss"]
    caption = patch = towards = 0.0
    H = model.projector(model.encode(batch["pixel_values"]))
    centre = model.word_embeddings.mean(0) * centre_words
    cosine = F.normalize(H - centre, dim=-1) @ F.normalize(model.word_embeddings - centre, dim=-1).T
    for i in range(5):
        length = int((batch["labels"][i] != IGNORE).nonzero()[-1]) + 1
        logits = model.llm(
            inputs_embeds=model.splice(batch["input_ids"][i : i + 1, :length], H[i : i + 1])
        ).logits[0]
        for t in range(1, length):
            if batch["labels"][i, t] != IGNORE:
                caption -= logits[t - 1].log_softmax(-1)[batch["input_ids"][i, t]]
        for p in range(64):
            for token, weight in zip(batch["patch_ids"][i, p], batch["patch_weights"][i, p]):
                patch -= weight * (cosine[i, p] / 0.07).log_softmax(-1)[token]
                towards += weight * cosine[i, p, token]
    assert torch.allclose(sums["caption_loss"], caption, rtol=1e-4) and torch.allclose(
        sums["patch_loss"], patch, rtol=1e-4
    )
    assert torch.allclose(pull, sums["patches"] - towards, rtol=1e-4)
    assert sums["caption_tokens"] == (batch["labels"] != IGNORE).sum()
    assert sums["patches"] == (batch["patch_weights"].sum(-1) > 0).sum() > 200


def test_frozen_stays_frozen_and_the_projector_learns(model, batch):
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sums = model(batch)
    (sums["caption_loss"] + sums["patch_loss"]).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("projector."), name
    assert not model.llm.training and not model.encoder.training and model.projector.training


def test_weight_zero_measures_the_patch_loss_without_its_gradient(model, batch):
    """The baseline's gradient is the caption loss's alone, and its patch loss is the same
    number."""
    both = model(batch)
    expected = torch.autograd.grad(both["caption_loss"], list(model.projector.parameters()))
    model.config["patch_weight"] = 0.0
    baseline = model(batch)
    assert (
        torch.equal(baseline["patch_loss"], both["patch_loss"])
        and not baseline["patch_loss"].requires_grad
    )
    gradient = torch.autograd.grad(
        baseline["caption_loss"] + baseline["patch_loss"], list(model.projector.parameters())
    )
    assert all(torch.allclose(a, b) for a, b in zip(gradient, expected))


def test_generation_is_greedy_and_padding_does_not_matter(batch, tmp_path):
    """Batched answers equal the argmax of full forward passes without a cache, one sample at a
    time, whatever the language model's own generation_config.json says."""
    shutil.copytree(toy.LLM, tmp_path / "llm")
    own = {
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "min_new_tokens": 5,
        "eos_token_id": 300,
    }
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(own))
    torch.manual_seed(0)
    model = PatchAlignedModel(dict(CONFIG, llm=str(tmp_path / "llm")))

    def turn(question):
        return [{"from": "human", "value": question}]

    questions = ("What color is the star?", "Is the red ring to the left of the star?")
    prompts = [
        data.tokenize_prompt(turn("<image>\n" + q), model.tokenizer, "v1", 64) for q in questions
    ]
    prompts.append(
        data.tokenize_prompt(
            turn("How many objects are there in a scene with a cross?"), model.tokenizer, "v1", 0
        )
    )
    answers = model.generate(prompts, batch["pixel_values"][:2], max_new_tokens=6)
    H = model.projector(model.encode(batch["pixel_values"][:2]))
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[-1] != model.tokenizer.eos_token_id:
            X = model.splice(torch.tensor([ids]), H[i : i + 1] if i < 2 else H[:0])
            ids.append(int(model.llm(inputs_embeds=X).logits[0, -1].argmax()))
        assert (
            answers[i]
            == model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        )
    assert len(set(map(len, prompts))) == 3


def test_checkpoint_round_trip(model, batch, tmp_path):
    """A checkpoint rebuilds the model unaided and holds the projector alone."""
    save_checkpoint(tmp_path / "ckpt.pt", model, "pretrain", {"steps": 3})
    again, checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert torch.equal(again.eval()(batch)["caption_loss"], model.eval()(batch)["caption_loss"])
    assert set(checkpoint["model"]) == {
        "projector.0.weight",
        "projector.0.bias",
        "projector.2.weight",
        "projector.2.bias",
    }
    assert (checkpoint["stage"], checkpoint["metrics"], checkpoint["config"]["image_size"]) == (
        "pretrain",
        {"steps": 3},
        96,
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_foreign_and_unfitting_checkpoints(model, tmp_path, monkeypatch):
    """Each is one line that names the file, and a pickle's code does not run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="ckpt.pt: not a checkpoint"):
        read_checkpoint(path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(InputError, match="ckpt.pt: not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(InputError, match="needs stage, config"):
        read_checkpoint(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")

    save_checkpoint(path, model, "pretrain", {})
    whole = torch.load(path, weights_only=True)
    small = dict(whole["model"], **{"projector.0.weight": torch.zeros(128, 64)})
    for state, message in (
        (small, r"projector.0.weight \(128, 64\) does not fit .*\(128, 128\)"),
        (
            {k: v for k, v in whole["model"].items() if k != "projector.2.bias"},
            "projector.2.bias missing",
        ),
        (dict(whole["model"], other=torch.zeros(1)), "other .*no such tensor"),
    ):
        torch.save(dict(whole, model=state), path)
        with pytest.raises(InputError, match=message):
            load_checkpoint(path)
    torch.save(dict(whole, version=99), path)
    with pytest.raises(InputError, match="newer version"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision": "no/such/folder"}, "--vision no/such/folder: no such model folder"),
        ({"llm": "./backbones"}, "--llm ./backbones: no such model folder"),
        ({"vision": str(toy.LLM)}, "a llama has no patches"),
        ({"feature_layer": 6}, "--feature-layer 6: the encoder has 6 hidden states"),
        ({"image_size": 100}, "--image-size 100 is not a multiple of the encoder's patch size 12"),
    ],
)
def test_unusable_backbones(change, message):
    with pytest.raises(InputError, match=message) as caught:
        PatchAlignedModel(dict(CONFIG, **change))
    assert "\n" not in str(caught.value)


def test_another_image_size_gives_another_grid(world):
    """A smaller input interpolates the position table; labels follow the grid."""
    model = PatchAlignedModel(dict(CONFIG, image_size=48))
    assert model.grid == (4, 4)
    records = data.Records(
        data.read_records(world / "val.jsonl"),
        world / "images",
        model.tokenizer,
        image_size=48,
        geometry="crop",
        grid=model.grid,
        mean=model.image_mean,
        std=model.image_std,
    )
    batch = data.collate([records[0], records[1]], model.pad_id)
    assert batch["patch_ids"].shape[:2] == (2, 16) and model(batch)["patch_loss"].isfinite()


def test_processor_sizes():
    for settings, size in (
        ({"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}, (224, 224)),
        ({"size": 384}, (384, 384)),
        ({"size": {"height": 224, "width": 448}}, (224, 448)),
        ({}, None),
    ):
        assert processor_size(settings) == size
