"""Backbones by name: encoders, language models, chat templates and projectors of many families,
tiny and random, each read right."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import data
import model as module
import toy
from data import IGNORE, IMAGE_TOKEN
from labels import sides
from model import PatchAlignedModel
from projector import PROJECTORS, output_grid
from runtime import InputError

CONFIG = dict(
    vision=str(toy.VISION),
    llm=str(toy.LLM),
    projector="linear",
    pool=2,
    image_size=0,
    geometry="stretch",
    feature_layer=-2,
    prompt="plain",
    coverage=0.25,
    tau=0.07,
    patch_weight=1.0,
    patch_loss="softmax",
)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
V = 627  # words of the toy tokenizer

# ---- encoders ------------------------------------------------------------------------------------

SQUARE = {"size": {"height": 48, "width": 48}}
ENCODERS = {  # config of the model, settings of its image processor, grid
    "clip": (
        "clip",
        dict(vision_config=dict(SIZES, image_size=48, patch_size=12)),
        {"crop_size": 48, "size": {"shortest_edge": 5}},
        (4, 4),
    ),
    "clip, another size": (
        "clip_vision_model",
        dict(SIZES, image_size=48, patch_size=12),
        {"size": 72},
        (6, 6),
    ),
    "siglip": (
        "siglip_vision_model",
        dict(SIZES, image_size=51, patch_size=12),
        {"size": {"height": 51, "width": 51}},
        (4, 4),
    ),
    "siglip2 naflex": (
        "siglip2_vision_model",
        dict(SIZES, patch_size=12, num_patches=16),
        {},
        (4, 4),
    ),
    "dinov2": ("dinov2", dict(SIZES, image_size=72, patch_size=12, mlp_ratio=2), SQUARE, (4, 4)),
    "dinov2, registers": (
        "dinov2_with_registers",
        dict(SIZES, image_size=72, patch_size=12, mlp_ratio=2),
        SQUARE,
        (4, 4),
    ),
    "dinov3": (
        "dinov3_vit",
        dict(SIZES, image_size=48, patch_size=12, num_register_tokens=4),
        SQUARE,
        (4, 4),
    ),
    "vit, not square": (
        "vit",
        dict(SIZES, image_size=[24, 60], patch_size=[12, 12]),
        {"size": {"height": 24, "width": 60}},
        (2, 5),
    ),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_patches_of_every_encoder(family, tmp_path):
    """Row i of Z is patch i of the grid, in every family: of the embeddings (hidden state 0) only
    that row changes with its pixels. The penultimate state is the one of the encoder itself, and
    the pixel statistics are its processor's."""
    kind, settings, processor, grid = ENCODERS[family]
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(processor, image_mean=[0.1, 0.2, 0.3], resample=2))
    )
    model = PatchAlignedModel(dict(CONFIG, vision=str(tmp_path), feature_layer=0))
    height, width = sides(model.config["image_size"])
    assert (height, width) == (12 * grid[0], 12 * grid[1]) and model.grid == grid
    assert (model.image_mean, model.image_std, model.image_resample) == (
        [0.1, 0.2, 0.3],
        [0.5] * 3,
        2,
    )
    pixels = torch.randn(1, 3, height, width)
    Z = model.encode(pixels)
    assert Z.shape == (1, grid[0] * grid[1], 32)
    for i in (1, grid[1], grid[0] * grid[1] - 1):
        row, column = divmod(i, grid[1])
        other = pixels.clone()
        other[..., 12 * row : 12 * row + 12, 12 * column : 12 * column + 12] += 1
        changed = (model.encode(other) != Z).any(2)[0]
        assert changed.nonzero().tolist() == [[i]]
    model.config["feature_layer"] = -2
    batch = torch.randn(2, 3, height, width)
    Z, handed = model.encode(batch), {}
    model.encoder.register_forward_hook(lambda *out: handed.update(states=out[2].hidden_states))
    model.encode(batch)
    assert torch.equal(Z, handed["states"][1][:, -len(Z[0]) :]) and not torch.equal(Z[0], Z[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_size=50), "--image-size 50 is not a multiple of the encoder's patch size 12"),
        (
            dict(projector="pixel_shuffle", pool=3),
            "--pool 3: the encoder's grid of 8 x 8 patches is not a multiple",
        ),
    ],
)
def test_grids_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message) as caught:
        PatchAlignedModel(dict(CONFIG, **change))
    assert "\n" not in str(caught.value)


def test_fewer_tokens_than_patches(tmp_path):
    """Both numbers are named."""
    model = PatchAlignedModel(CONFIG)
    model.encoder_patches = 80
    with pytest.raises(InputError, match="65 tokens for 80 patches"):
        model.encode(torch.randn(1, 3, 96, 96))


# ---- language models -----------------------------------------------------------------------------

HEADS = dict(SIZES, vocab_size=V, num_key_value_heads=1, head_dim=16, max_position_embeddings=256)
LANGUAGE_MODELS = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": {},
    "gemma": {},
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=32),
    "phi": {},
    "phi3": dict(pad_token_id=0),
    "smollm3": dict(pad_token_id=0),
}


@pytest.fixture
def language_model(request, tmp_path):
    """A folder with a tiny random language model of a family and the toy tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**HEADS, **LANGUAGE_MODELS[request.param]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    for file in (toy.LLM).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llm")
    return tmp_path / "llm"


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS, indirect=True)
def test_patches_stand_where_words_do(language_model, world):
    """A patch that equals a word's embedding, as the language model makes it of W, is that word to
    it, and the patch loss finds it. Padding changes no loss, and greedy answers are the argmax of
    whole forward passes."""
    model = PatchAlignedModel(dict(CONFIG, llm=str(language_model))).eval()
    ids = torch.randint(5, V, (2, 9))
    spliced = ids.clone()
    spliced[:, 3:6] = IMAGE_TOKEN
    H = model.embedding_scale * model.word_embeddings[ids[:, 3:6]]
    said = model.llm(inputs_embeds=model.splice(spliced, H)).logits
    assert torch.allclose(said, model.llm(input_ids=ids).logits, atol=1e-4)
    wide = {"gemma": 32**0.5, "gemma3_text": 32**0.5}.get(model.llm.config.model_type, 1)
    assert model.embedding_scale == pytest.approx(wide, rel=1e-5)

    target = dict(patch_ids=ids[:, 3:6, None], patch_weights=torch.ones(2, 3, 1))
    for centred in (False, True):
        model.config |= dict(patch_loss="cosine", centre_words=centred)
        assert float(model.patch_sums(H, target)["patch_loss"]) == pytest.approx(0, abs=1e-4)

    records = data.read_records(world / "train.jsonl")[:4]
    dataset = data.Records(
        records,
        world / "images",
        model.tokenizer,
        image_size=96,
        geometry="crop",
        grid=model.grid,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    samples = [dataset[i] for i in range(4)]
    assert len({len(s["input_ids"]) for s in samples}) > 1
    together = model(data.collate(samples, model.pad_id))["caption_loss"]
    apart = sum(model(data.collate([s], model.pad_id))["caption_loss"] for s in samples)
    assert torch.allclose(together, apart, rtol=1e-5)

    prompts = [
        data.tokenize_prompt(r["conversations"], model.tokenizer, "v1", 64) for r in records[:2]
    ]
    prompts[1] = [*prompts[1], 9, 8]  # of another length
    pixels = torch.stack([s["pixel_values"] for s in samples[:2]])
    answers = model.generate(prompts, pixels, max_new_tokens=5)
    H = model.projector(model.encode(pixels))
    for i, prompt in enumerate(prompts):
        longer = list(prompt)
        while len(longer) < len(prompt) + 5 and longer[-1] != model.tokenizer.eos_token_id:
            longer.append(
                int(
                    model.llm(inputs_embeds=model.splice(torch.tensor([longer]), H[i : i + 1]))
                    .logits[0, -1]
                    .argmax()
                )
            )
        assert (
            answers[i]
            == model.tokenizer.decode(longer[len(prompt) :], skip_special_tokens=True).strip()
        )
    said = longer[len(prompt) :]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(
        said[3]
    )  # now an answer ends here
    ended = model.generate(prompts[1:], pixels[1:], max_new_tokens=5)[0]
    assert (
        ended
        == model.tokenizer.decode(said[: said.index(said[3]) + 1], skip_special_tokens=True).strip()
        != answers[1]
    )


# ---- chat templates ------------------------------------------------------------------------------

LOOP = "{% for m in messages %}", "{% endfor %}"
OPEN = "{% if add_generation_prompt %}", "{% endif %}"
TEMPLATES = {  # in the manner of each family: template, the token that ends an answer
    "chatml": (
        LOOP[0]
        + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        + LOOP[1]
        + OPEN[0]
        + "<|im_start|>assistant\n"
        + OPEN[1],
        "<|im_end|>",
    ),
    "llama 3": (
        "{{ bos_token }}"
        + LOOP[0]
        + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
        + LOOP[1],
        "<|eot|>",
    ),
    "gemma": (
        "{{ bos_token }}"
        + LOOP[0]
        + "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n"
        + LOOP[1],
        "<end>",
    ),
    "mistral": (
        "{{ bos_token }}"
        + LOOP[0]
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}" + LOOP[1],
        "</s>",
    ),
    "qwen 3": (
        LOOP[0] + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n" + LOOP[1],
        "<|im_end|>",
    ),
    "a processor's": (
        LOOP[0]
        + "<|im_start|>{{ m.role }}\n"
        + "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
        + LOOP[1],
        "<|im_end|>",
    ),
    "unended": (LOOP[0] + "{{ m.role }}: {{ m.content }}\n" + LOOP[1], "</s>"),
}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<start>",
    "<end>",
    "[INST]",
    "[/INST]",
]
TURNS = ["<image>\nWhat is red?", "A ring.", "And {{blue}} @1@?", "The star."]
CONVERSATION = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(TURNS)]


def chat_tokenizer(template):
    tokenizer = AutoTokenizer.from_pretrained(toy.LLM)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": SPECIAL}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", TEMPLATES)
def test_chat_templates(family):
    """The tokens are those of the rendered conversation, the answers and the tokens that end them
    are learnt, generation begins where the answer does, whatever the texts hold, and it ends at
    that token."""
    template, end = TEMPLATES[family]
    tokenizer = chat_tokenizer(template)
    ids, labels = data.tokenize(CONVERSATION, tokenizer, "chat", 1, 999, "x")
    listed = family == "a processor's"
    messages = [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [{"type": "text", "text": text}] if listed else text,
        }
        for i, text in enumerate(TURNS)
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    if family != "unended":
        before, after = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in rendered.split("<image>")
        )
        assert ids == [*before, IMAGE_TOKEN, *after]
    else:
        assert tokenizer.decode(ids[1 + ids.index(IMAGE_TOKEN) :]) == (
            "\nWhat is red?\nassistant: A ring.</s>\n"
            "user: And {{blue}} @1@?\nassistant: The star.</s>\n"
        )
    learnt = tokenizer.decode([i for i in labels if i != IGNORE])
    assert learnt.replace(" ", "") == f"Aring.{end}Thestar.{end}" and "A ring." in learnt
    prompt = data.tokenize_prompt(CONVERSATION[:3], tokenizer, "chat", 1)
    starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
    assert prompt == ids[: starts[-1]]
    assert set(data.end_ids(tokenizer, "chat")) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(end),
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        LOOP[0] + "{{ m.content + m.content }}" + LOOP[1],
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_lose_texts(template):
    with pytest.raises(InputError, match="rec 1: .*once and in order; use --prompt v1"):
        data.tokenize(CONVERSATION, chat_tokenizer(template), "chat", 1, 999, "rec 1")


# ---- projectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, grid, pooled",
    [
        ("linear", (6, 4), (6, 4)),
        ("mlp2x_gelu", (6, 4), (6, 4)),
        ("pixel_shuffle", (6, 4), (3, 2)),
        ("c_abstractor", (12, 10), (6, 5)),
        ("c_abstractor", (9, 14), (4, 7)),
    ],
)
def test_projectors_keep_places(kind, grid, pooled):
    """P is the grid's, and a projected patch looks at its own patches: exactly, or, with
    convolutions, most."""
    torch.manual_seed(0)
    project, (rows, columns) = PROJECTORS[kind](16, 12, grid, 2), pooled
    assert output_grid(kind, grid, 2) == pooled
    Z = torch.randn(9, grid[0] * grid[1], 16, requires_grad=True)
    H = project(Z)
    assert H.shape == (9, rows * columns, 12)
    for i in (1, columns, rows * columns - 1):
        row, column = divmod(i, columns)
        seen = (
            torch.autograd.grad((H[1:, i] @ torch.randn(12)).sum(), Z, retain_graph=True)[0]
            .square()
            .sum(2)
        )
        own = torch.zeros(grid)
        own[
            row * grid[0] // rows : -(-(row + 1) * grid[0] // rows),
            column * grid[1] // columns : -(-(column + 1) * grid[1] // columns),
        ] = 1
        inside, outside = seen[1:].sum(0)[own.flatten() == 1], seen[1:].sum(0)[own.flatten() == 0]
        assert (inside > 0).all() and not seen[0].any()
        assert not outside.any() if kind != "c_abstractor" else inside.mean() > 3 * outside.mean()


@pytest.mark.parametrize("kind", ["pixel_shuffle", "c_abstractor"])
def test_a_pooling_projector_from_flag_to_probe(kind, here, world, tmp_path):
    """16 labelled patches in place of 64, on a checkpoint that needs no flag; text-only batches go
    through as well."""
    done = here(
        "pretrain.py",
        "--data",
        world / "train.jsonl",
        "--projector",
        kind,
        "--steps",
        1,
        "--batch-size",
        4,
        "--out",
        tmp_path,
    )
    assert done.returncode == 0 and "4 x 4 patches" in done.stdout + done.stderr, done.stderr
    done = here("probe.py", tmp_path / "ckpt.pt", "--data", world / "test.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "probe.json").read_text())["patches"] == 6 * 16
    model, _ = module.load_checkpoint(tmp_path / "ckpt.pt")
    text = data.collate(
        [
            dict(
                id="0",
                image_size=None,
                pixel_values=None,
                input_ids=[9, 8, 7],
                labels=[IGNORE, 8, 7],
            )
        ],
        0,
    )
    model.tune("full")
    model(text)["caption_loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
