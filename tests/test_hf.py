"""To and from LLaVA folders: the same logits, words, tensors, and numbers of probe.py."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# by its module: earlier versions want torchvision else
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import data
import labels
import probe
import sft
import toy
from data import IMAGE_TOKEN
from hf import imports
from hf.export import KEPT, image_processor
from hf.export import export as export_folder
from model import PatchAlignedModel, load_checkpoint, read_checkpoint, save_checkpoint
from runtime import InputError

# ---- tiny random models of several families ------------------------------------------------------

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. USER: <image>"
    " What is it? ASSISTANT: a red dog",
    "user\nWhat is it?\nmodel\nA red dog on a blue ball. Describe the image. And its left ear?"
    " Who are you?",
] * 3
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(kind):
    """As Qwen's (bytes), Gemma's (blanks as ▁, beginning put in), Vicuna's (a blank first)."""
    special = {
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "vicuna": ["<unk>", "<s>", "</s>"],
        "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    }[kind]
    backend = Tokenizer(models.BPE(unk_token=None if kind == "qwen" else "<unk>"))
    alphabet = sorted(set("".join(TEXT) + "▁"))
    if kind == "qwen":
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "gemma":
        backend.normalizer, backend.decoder = (
            normalizers.Replace(" ", "▁"),
            decoders.Replace("▁", " "),
        )
        backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    else:
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(),
        )
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    first = {"gemma": "<bos>", "vicuna": "<s>"}.get(kind)
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
        )
    names = {
        "qwen": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "vicuna": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        "gemma": dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"),
    }[kind]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.chat_template = {"qwen": CHATML, "gemma": TURNS, "vicuna": None}[kind]
    return fast


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DEEPER = SMALL | dict(num_hidden_layers=3)
VISION = {
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**DEEPER, image_size=28, patch_size=7)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**DEEPER, image_size=28, patch_size=7)
    ),
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**DEEPER, mlp_ratio=2, image_size=42, patch_size=7)
    ),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DEEPER, mlp_ratio=2, image_size=28, patch_size=7)
    ),
}
LLM = {
    "llama": (
        "vicuna",
        lambda V: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=V)),
    ),
    "qwen2": (
        "qwen",
        lambda V: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                **SMALL, num_key_value_heads=2, vocab_size=V + 30, tie_word_embeddings=True
            )
        ),
    ),
    "gemma": (
        "gemma",
        lambda V: transformers.GemmaForCausalLM(
            transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, vocab_size=V)
        ),
    ),
    "phi": (
        "qwen",
        lambda V: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL, vocab_size=V)),
    ),
}
PROCESSOR = {
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "size": {"height": 28, "width": 28},
}


def backbones(folder, vision, llm):
    """Two model folders -> their paths. Weights large enough that answers depend on the image."""
    torch.manual_seed(1)
    words = tokenizer(LLM[llm][0])
    for name, model in (("encoder", VISION[vision]()), ("words", LLM[llm][1](len(words)))):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    words.save_pretrained(folder / "words")
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return dict(vision=str(folder / "encoder"), llm=str(folder / "words"))


def checkpoint(folder, vision="clip", llm="llama", **config):
    """A checkpoint of a random projector -> its path."""
    folder.mkdir(exist_ok=True)
    ours = dict(
        projector="mlp2x_gelu",
        pool=2,
        image_size=0,
        geometry="crop",
        feature_layer=-2,
        prompt="v1",
        coverage=0.3,
        tau=0.05,
        patch_weight=0.5,
        patch_loss="cosine",
    )
    model = PatchAlignedModel(ours | backbones(folder, vision, llm) | config)
    torch.nn.init.normal_(model.projector[0].bias)
    save_checkpoint(folder / "ckpt.pt", model, "pretrain", {})
    return folder / "ckpt.pt"


def export(path, out, **flags):
    export_folder(str(path), str(out), **flags)
    return out


def photograph(path, width=50, height=33, seed=0):
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    ).resize((width, height)).save(path)
    return path


QUESTION = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A red dog."},
    {"from": "human", "value": "Who are you?"},
]


def messages(turns):
    """For a processor, as a user of transformers writes them."""
    made = []
    for turn in turns:
        text = turn["value"].removeprefix("<image>\n")
        image = [{"type": "image"}] if text != turn["value"] else []
        made.append(
            {
                "role": "assistant" if turn["from"] == "gpt" else "user",
                "content": [*image, {"type": "text", "text": text}],
            }
        )
    return made


# ---- export --------------------------------------------------------------------------------------

FAMILIES = [
    ("clip", "llama", dict(prompt="v1", geometry="pad")),
    ("siglip", "qwen2", dict(prompt="chat", geometry="stretch")),
    ("dinov2", "gemma", dict(prompt="chat", projector="linear", feature_layer=-1)),
    ("clip", "qwen2", dict(prompt="plain", image_size=42, projector="linear")),
]


@pytest.mark.parametrize(
    "vision, llm, config", FAMILIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_export_has_the_same_logits_tokens_and_words(vision, llm, config, tmp_path):
    """Through transformers' processor, from the file on: pixels, tokens, logits, greedy answers."""
    path = checkpoint(tmp_path / "ours", vision, llm, **config)
    model, _ = load_checkpoint(path)
    model.eval()
    folder = export(path, tmp_path / "theirs")
    processor, theirs = (
        transformers.AutoProcessor.from_pretrained(folder),
        transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval(),
    )

    picture = Image.open(photograph(tmp_path / "p.png"))
    turns = QUESTION[:1] if config["prompt"] == "plain" else QUESTION
    ids = data.tokenize_prompt(
        turns, model.tokenizer, model.config["prompt"], model.encoder_patches
    )
    text = processor.apply_chat_template(
        messages(turns), add_generation_prompt=True, tokenize=False
    )
    given = processor(images=picture, text=text, return_tensors="pt")
    pixels = labels.transform_image(picture, *model.image_form)
    torch.testing.assert_close(given["pixel_values"][0], pixels, atol=1e-5, rtol=0)
    assert [
        IMAGE_TOKEN if i == theirs.config.image_token_id else i
        for i in given["input_ids"][0].tolist()
    ] == ids

    with torch.inference_mode():
        X = model.splice(torch.tensor([ids]), model.projector(model.encode(pixels[None])))
        ours = model.llm(inputs_embeds=X).logits
        logits = theirs(**given).logits
        answer = theirs.generate(**given, max_new_tokens=12)[:, len(ids) :]
        blank = theirs(**given | {"pixel_values": torch.zeros_like(given["pixel_values"])}).logits
    assert theirs.generation_config.eos_token_id == data.end_ids(
        model.tokenizer, model.config["prompt"]
    )
    V = ours.shape[-1]
    torch.testing.assert_close(logits[..., :V], ours, atol=1e-4, rtol=1e-4)
    assert (logits - blank)[..., -1, :].abs().max() > 0.01  # the image matters
    assert logits.shape[-1] == V or (logits[..., V:] <= ours.max(-1, keepdim=True).values).all()
    assert model.generate([ids], pixels[None], max_new_tokens=12) == [
        processor.decode(answer[0], skip_special_tokens=True).strip()
    ]


def test_chat_template_that_treats_the_last_answer_otherwise(tmp_path):
    """Generation begins after the empty thoughts, as answers did in training."""
    path = checkpoint(tmp_path / "ours", "clip", "qwen2", prompt="chat")
    words = tokenizer("qwen")
    words.chat_template = THOUGHTS
    words.save_pretrained(tmp_path / "ours" / "words")
    folder = export(path, tmp_path / "theirs")
    text = transformers.AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages(QUESTION), add_generation_prompt=True, tokenize=False
    )
    assert (
        text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        and text.count("<think>") == 1
    )


@pytest.mark.parametrize("geometry", labels.GEOMETRIES)
@pytest.mark.parametrize("size", [(97, 60), (31, 75), (20, 20)])
def test_processor_makes_our_pixels(geometry, size, tmp_path):
    model, _ = load_checkpoint(checkpoint(tmp_path / "ours", geometry=geometry))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(model)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for mode in ("RGB", "L"):
        picture = Image.open(photograph(tmp_path / "p.png", *size)).convert(mode)
        ours = labels.transform_image(picture.convert("RGB"), *model.image_form)
        torch.testing.assert_close(
            processor(picture, return_tensors="pt")["pixel_values"][0], ours, atol=1e-5, rtol=0
        )


def test_lora_is_merged_and_half_precision_written(tmp_path):
    path = checkpoint(tmp_path / "ours", "clip", "qwen2")
    model, _ = load_checkpoint(path)
    options = dict(rank=4, alpha=8.0, dropout=0.0, modules=[])
    model.tune("lora", options)
    for name, parameter in model.llm.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)
    save_checkpoint(path, model.eval(), "sft", {})
    ids, untuned = (
        torch.arange(3, 20)[None],
        load_checkpoint(checkpoint(tmp_path / "plain", "clip", "qwen2"))[0],
    )
    with torch.inference_mode():
        expected, plain = model.llm(input_ids=ids).logits, untuned.llm(ids).logits
        theirs = (
            transformers.LlavaForConditionalGeneration.from_pretrained(
                export(path, tmp_path / "theirs")
            )
            .eval()(input_ids=ids)
            .logits
        )
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 0.1
    half = transformers.LlavaForConditionalGeneration.from_pretrained(
        export(path, tmp_path / "half", dtype="bfloat16")
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "vision, llm, config, message",
    [
        ("registers", "llama", {}, "5 class and register tokens"),
        ("clip", "phi", {}, "its output head has a bias"),
        (
            "clip",
            "llama",
            dict(projector="pixel_shuffle"),
            "cannot express projector pixel_shuffle",
        ),
        ("clip", "llama", dict(image_size=[28, 42]), "a grid of 4 x 6 patches"),
    ],
)
def test_what_llava_cannot_express_is_refused(vision, llm, config, message, tmp_path):
    folder = tmp_path / "ours"
    folder.mkdir()
    ours = dict(imports.DEFAULTS, pool=2, projector="mlp2x_gelu", image_size=0, prompt="v1")
    model = PatchAlignedModel(ours | backbones(folder, vision, llm) | config)
    save_checkpoint(folder / "ckpt.pt", model, "pretrain", {})
    with pytest.raises(InputError, match=message) as caught:
        export(folder / "ckpt.pt", tmp_path / "theirs")
    assert (
        "\n" not in str(caught.value)
        and not (tmp_path / "theirs").exists()
        and len(list(tmp_path.iterdir())) == 1
    )


def test_a_scaled_head_is_found_by_its_logits(tmp_path, monkeypatch):
    """What no table foresees: a language model that does something after its output head."""
    path, forward = checkpoint(tmp_path / "ours"), transformers.LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 3000 * torch.tanh(out.logits / 3000)  # too gentle for a comparison
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", capped)
    with pytest.raises(InputError, match="scales or caps the logits"):
        export(path, tmp_path / "theirs")


ALONE = """
import sys
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, picture, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
given = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt")
answer = model.generate(**given, max_new_tokens=20)[0, given["input_ids"].shape[1]:]
assert not {"model", "hf", "data"} & sys.modules.keys()
print(answer.tolist())
"""


def test_plain_transformers_says_the_same_in_a_process_of_its_own(world, tmp_path):
    """The toy world's backbones, an image file of it, no project on the path."""
    torch.manual_seed(0)
    names = dict(vision=str(toy.VISION), llm=str(toy.LLM))
    model = PatchAlignedModel(
        dict(imports.DEFAULTS, **names, projector="mlp2x_gelu", image_size=0, prompt="chat")
    )
    save_checkpoint(tmp_path / "ckpt.pt", model, "pretrain", {})
    export(tmp_path / "ckpt.pt", tmp_path / "theirs")
    record = data.read_records(world / "test.jsonl")[0]
    picture, question = world / "images" / record["image"], "What is there in the image?"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "theirs"), str(picture), question],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model.eval()
    turns = [{"from": "human", "value": f"<image>\n{question}"}]
    ids = data.tokenize_prompt(turns, model.tokenizer, "chat", model.encoder_patches)
    pixels = labels.transform_image(data.open_image(picture, "picture"), *model.image_form)
    said = model.tokenizer.decode(json.loads(done.stdout), skip_special_tokens=True).strip()
    assert model.generate([ids], pixels[None], max_new_tokens=20) == [said] and len(said) > 5


# ---- import --------------------------------------------------------------------------------------


def tensors(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype="auto"
    ).state_dict()


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "vision, llm, config", FAMILIES[:3], ids=lambda value: value if isinstance(value, str) else ""
)
def test_import_of_an_export_is_the_checkpoint_again(vision, llm, config, tmp_path):
    """Projector, backbones, tokens and settings; and an export of that is the export."""
    path = checkpoint(tmp_path / "ours", vision, llm, **config)
    folder = export(path, tmp_path / "theirs")
    imports.import_folder(str(folder), tmp_path / "again" / "ckpt.pt")
    first, second = (load_checkpoint(p)[0] for p in (path, tmp_path / "again" / "ckpt.pt"))
    same(first.state_dict(), second.state_dict())
    for key in KEPT:
        assert second.config.get(key) == first.config.get(key), key
    for prompt in {"v1", "plain", config["prompt"]}:
        turns = [*QUESTION, {"from": "gpt", "value": "A dog."}][: 2 if prompt == "plain" else 4]
        assert data.tokenize(turns, second.tokenizer, prompt, 3, 999, "") == data.tokenize(
            turns, first.tokenizer, prompt, 3, 999, ""
        )
    same(
        tensors(export(tmp_path / "again" / "ckpt.pt", tmp_path / "theirs again")), tensors(folder)
    )


def foreign(folder, **changes):
    """As others write them: half precision, <image> in a padded vocabulary, CLIP's processor."""
    torch.manual_seed(2)
    words = tokenizer("vicuna")
    words._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    words.chat_template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content %}"
        "{{ '<image>\n' if c.type == 'image' else c.text + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    settings = dict(
        vision_config=VISION["clip"]().config,
        text_config=transformers.LlamaConfig(**SMALL, vocab_size=len(words) + 20),
        image_seq_length=16,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**settings | changes)
    ).half()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_center_crop": True,
                "crop_size": {"height": 28, "width": 28},
                "do_resize": True,
                "size": {"shortest_edge": 28},
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "patch_size": 7,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            }
        )
    )
    return folder


def test_a_foreign_folder_comes_in_and_goes_out_unchanged(tmp_path):
    """The same logits and tokens here, the same tensors out again; both stages take it."""
    folder = foreign(tmp_path / "theirs")
    path = tmp_path / "ours" / "ckpt.pt"
    imports.import_folder(str(folder), path)
    model, saved = load_checkpoint(path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert (
        saved["stage"] == "import"
        and model.config["prompt"] == "chat"
        and model.config["geometry"] == "crop"
    )

    text = processor.apply_chat_template(
        messages(QUESTION[:1]), add_generation_prompt=True, tokenize=False
    )
    picture = Image.open(photograph(tmp_path / "p.png", 28, 28))
    given = processor(images=picture, text=text, return_tensors="pt")
    ids = data.tokenize_prompt(QUESTION[:1], model.tokenizer, "chat", 16)
    theirs_ids = [
        IMAGE_TOKEN if i == theirs.config.image_token_id else i
        for i in given["input_ids"][0].tolist()
    ]
    assert theirs_ids == ids
    with torch.inference_mode():
        pixels = labels.transform_image(picture, *model.image_form)[None]
        X = model.eval().splice(torch.tensor([ids]), model.projector(model.encode(pixels)))
        torch.testing.assert_close(
            model.llm(inputs_embeds=X).logits, theirs(**given).logits, atol=1e-4, rtol=1e-4
        )
    same(tensors(export(path, tmp_path / "out", dtype="float16")), tensors(folder))

    inherited = sft.inherit(sft.Args(str(path), prompt="chat", geometry="pad"), torch.float32)
    assert inherited.config["tune"] == "full" and inherited.config["geometry"] == "pad"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
        (dict(projector_hidden_act="relu"), "projector_hidden_act relu"),
        (dict(projector_hidden_act="linear"), "two linear maps without an activation"),
        (dict(vision_feature_select_strategy="full"), "its projector gets 17 rows for 16 patches"),
    ],
)
def test_folders_that_do_not_fit_are_refused(changes, message, tmp_path):
    folder = foreign(tmp_path / "theirs", **changes)
    with pytest.raises(InputError, match=message) as caught:
        imports.import_folder(str(folder), tmp_path / "ours" / "ckpt.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "ours" / "vision").exists()


def test_incomplete_and_other_folders_are_refused(tmp_path, here):
    folder = checkpoint(tmp_path / "ours").parent / "words"
    with pytest.raises(InputError, match="a llama, not a LlavaForConditionalGeneration"):
        imports.import_folder(str(folder), tmp_path / "x" / "ckpt.pt")
    with pytest.raises(InputError, match="no such model folder"):
        imports.import_folder(str(tmp_path / "none"), tmp_path / "x" / "ckpt.pt")
    theirs = foreign(tmp_path / "theirs")
    weights = tensors(theirs)
    transformers.LlavaForConditionalGeneration.from_pretrained(theirs).save_pretrained(
        theirs, state_dict={k: v for k, v in weights.items() if "linear_2.bias" not in k}
    )
    with pytest.raises(InputError, match="linear_2.bias is missing"):
        imports.import_folder(str(theirs), tmp_path / "x" / "ckpt.pt")
    commands = (
        (["export", tmp_path / "none.pt", tmp_path / "y"], "no such checkpoint"),
        (["import", tmp_path / "none", tmp_path / "y.pt"], "no such model folder"),
        (["sell"], "sell: export or import"),
        (["export", tmp_path / "ours" / "ckpt.pt", theirs], "already there"),
    )
    for arguments, message in commands:
        done = here("hf", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert "python -m hf export" in here("hf", "--help").stdout


# ---- probe ---------------------------------------------------------------------------------------


def probed(name, world, out, **flags):
    probe.main(
        probe.Args(
            [str(name)],
            data=str(world / "test.jsonl"),
            out=str(out),
            pursuit_patches=40,
            show=1,
            **flags,
        )
    )
    return json.loads((out / "probe.json").read_text())


def numbers(value):
    """The leaves of a probe.json, but the name."""
    if isinstance(value, dict):
        return [
            leaf for key in sorted(value) if key != "checkpoint" for leaf in numbers(value[key])
        ]
    return (
        [leaf for item in value for leaf in numbers(item)] if isinstance(value, list) else [value]
    )


def test_probe_gives_the_same_numbers_of_an_export_and_of_mm_projector(world, tmp_path):
    path = checkpoint(tmp_path / "ours", "dinov2", "llama", coverage=0.2)
    ours = probed(path, world, tmp_path / "a")
    assert ours["align"] is not None and ours["labelled"] > 20
    theirs = probed(export(path, tmp_path / "theirs"), world, tmp_path / "b")
    assert numbers(theirs) == pytest.approx(numbers(ours), abs=1e-5) and theirs[
        "checkpoint"
    ] == str(tmp_path / "theirs")
    assert not list(tmp_path.glob("theirs/vision"))

    saved = read_checkpoint(path)
    kept = {f"model.mm_{name}": tensor for name, tensor in saved["model"].items()}
    assert "model.mm_projector.0.weight" in kept
    torch.save(kept, tmp_path / "mm_projector.bin")
    named = dict(vision=saved["config"]["vision"], llm=saved["config"]["llm"], coverage=0.2)
    assert numbers(
        probed(tmp_path / "mm_projector.bin", world, tmp_path / "c", **named)
    ) == pytest.approx(numbers(ours), abs=1e-5)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_projector_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = backbones(tmp_path, "clip", "llama")
    path = tmp_path / "mm_projector.bin"
    weight, bias = torch.randn(32, 32), torch.randn(32)
    torch.save(
        {"model.mm_projector.weight": weight.half(), "model.mm_projector.bias": bias.half()}, path
    )
    with imports.opened(str(path), **folders) as file:
        model, _ = load_checkpoint(file)
    assert model.config["projector"] == "linear" and torch.equal(
        model.projector[0].weight, weight.half().float()
    )
    deeper = {f"model.mm_projector.{i}.weight": weight for i in (0, 2, 4)}
    for content, message in (
        (deeper, "linear or mlp2x_gelu is needed"),
        ({"other": weight}, "tensors of no mm_projector"),
        (Evil(), "refused unread"),
        ([1], "not a file of tensors"),
    ):
        torch.save(content, path) if not isinstance(content, Evil) else path.write_bytes(
            pickle.dumps(content)
        )
        with pytest.raises(InputError, match=message), imports.opened(str(path), **folders):
            pass
    assert not (tmp_path / "evil").exists()
    with pytest.raises(InputError, match="name the backbones"), imports.opened(str(path)):
        pass
    with (
        pytest.raises(InputError, match="are for LLaVA's mm_projector.bin"),
        imports.opened("runs/ckpt.pt", **folders),
    ):
        pass
    assert (
        imports.is_folder("llava-hf/llava-1.5-7b-hf")
        and not imports.is_folder("runs/ckpt.pt")
        and imports.is_folder(str(tmp_path))
    )
