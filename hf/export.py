"""A checkpoint -> a LlavaForConditionalGeneration folder; see hf/__init__.py for the table."""
import contextlib
import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

import runtime
from data import IMAGE_MARKER, end_ids
from hf.compare import behaviour, refuse_unless_equal
from hf.templates import exported_tokenizer, kept_of
from labels import sides
from model import PatchAlignedModel, load_checkpoint, merge_lora
from runtime import InputError

OURS = "patch_aligned"                              # key of config.json
KEPT = ("geometry", "prompt", "coverage", "tau", "patch_weight", "patch_loss", "centre_words")


def image_processor(model: PatchAlignedModel) -> dict:
    """preprocessor_config.json that makes the pixels of `labels.transform_image`."""
    geometry, side = model.config["geometry"], model.config["image_size"]
    square = {"height": side, "width": side}
    kind = "PerceiverImageProcessor" if geometry == "crop" else "LlavaImageProcessor"
    return {
        "image_processor_type": kind, "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": geometry == "pad", "do_center_crop": geometry == "crop", "crop_size": square,
        "do_resize": True, "size": square, "resample": model.image_resample, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(model.image_mean),
        "image_std": list(model.image_std)}


def check_expressible(model: PatchAlignedModel) -> None:
    """InputError: a part that LlavaForConditionalGeneration does not have."""
    config, (rows, columns) = model.config, model.encoder_grid
    square = rows == columns and model.patch_size[0] == model.patch_size[1]
    bias = getattr(model.llm.get_output_embeddings(), "bias", None)
    reasons = {
        f"projector {config['projector']}: LLaVA's is two linear maps with an activation between"
        " them": config["projector"] not in ("linear", "mlp2x_gelu"),
        f"{config['vision']}: an encoder that takes patches, where LLaVA's takes pixels":
            model.patchified,
        f"a grid of {rows} x {columns} patches: LLaVA's processor makes squares": not square,
        f"{config['llm']}: its output head has a bias, LLaVA's has none": bias is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"LLaVA cannot express {reason}")


@torch.inference_mode()
def tokens_before_patches(model: PatchAlignedModel) -> int:
    """Class and register tokens of the encoder. InputError: more than LLaVA can drop."""
    side, dtype = model.config["image_size"], next(model.encoder.parameters()).dtype
    pixels = torch.zeros(1, 3, side, side, dtype=dtype)
    out = model.encoder(pixel_values=pixels, output_hidden_states=True, **model.encoder_options)
    tokens = out.hidden_states[model.config["feature_layer"]].shape[1]
    before = tokens - model.encoder_patches
    if before > 1:
        raise InputError(f"LLaVA cannot express {model.config['vision']}: {before} class and"
                         " register tokens stand before its patches; it drops one or none")
    return before


@torch.no_grad()
def keep_positions(model: PatchAlignedModel) -> None:
    """Replace a position table that every forward pass interpolates by its interpolation.

    InputError: an encoder whose table is of another make.
    """
    embed, side = getattr(model.encoder, "embeddings", None), model.config["image_size"]
    table = getattr(embed, "position_embedding", None)
    if not isinstance(table, nn.Embedding) or not hasattr(embed, "interpolate_pos_encoding"):
        raise InputError(f"LLaVA cannot express image size {side}, for which the position table of"
                         f" {model.config['vision']} is interpolated; train with its own size")
    before = table.num_embeddings - getattr(embed, "num_patches", table.num_embeddings)
    tokens = table.weight.new_zeros(1, model.encoder_patches + before, table.embedding_dim)
    rows = embed.interpolate_pos_encoding(tokens, side, side)[0]                # (tokens, D_v)
    embed.position_embedding = nn.Embedding.from_pretrained(rows.clone())
    embed.image_size = model.encoder.config.image_size = side
    embed.num_patches, embed.num_positions = model.encoder_patches, len(rows)
    embed.register_buffer("position_ids", torch.arange(len(rows))[None], persistent=False)
    model.encoder_options = {}


@torch.no_grad()
def add_words(llm, rows: int) -> None:
    """Grow both tables of words to so many rows; the new ones are the mean of the others."""
    def tables():
        return llm.get_input_embeddings(), llm.get_output_embeddings()

    means, known = [t.weight.float().mean(0) for t in tables()], len(tables()[0].weight)
    llm.resize_token_embeddings(rows, mean_resizing=False)
    for table, mean in zip(tables(), means):
        table.weight[known:] = mean.to(table.weight.dtype)


@torch.no_grad()
def to_llava(model: PatchAlignedModel, image_token: int, dtype: torch.dtype) -> Llava:
    """The model's parts, not copies, as a LlavaForConditionalGeneration. InputError: a misfit.

    image_token: the id that stands for a patch.
    """
    strategy = "default" if tokens_before_patches(model) else "full"
    if model.encoder_options:
        keep_positions(model)
    config, size = model.config, sides(model.config["image_size"])
    before = behaviour(model, image_token, model.encoder_patches, size)
    if image_token >= len(model.word_embeddings):
        add_words(model.llm, image_token + 1)
    maps, activation = [m for m in model.projector if isinstance(m, nn.Linear)], "gelu"
    if len(maps) == 1:
        maps.append(nn.Linear(*[maps[0].out_features] * 2))
        maps[1].weight.copy_(torch.eye(maps[0].out_features))
        maps[1].bias.zero_()
        activation = "linear"
    parts = [copy.deepcopy(part.config) for part in (model.encoder, model.llm)]
    for part in parts:
        part._name_or_path = ""                     # where the backbone was
    settings = LlavaConfig(
        vision_config=parts[0], text_config=parts[1], image_token_index=image_token,
        image_seq_length=model.encoder_patches, projector_hidden_act=activation,
        vision_feature_select_strategy=strategy, vision_feature_layer=config["feature_layer"],
        tie_word_embeddings=model.llm.config.tie_word_embeddings)
    with torch.device("meta"):
        llava = Llava(settings)
    expected = {name: tensor.shape for name, tensor in llava.state_dict().items()}
    tower, projector = llava.model.vision_tower, llava.model.multi_modal_projector
    if hasattr(tower, "vision_model"):              # some versions wrap the transformer once more
        tower.vision_model = model.encoder
    else:
        llava.model.vision_tower = model.encoder
    llava.model.language_model = model.llm.base_model
    llava.lm_head = model.llm.get_output_embeddings()
    projector.linear_1, projector.linear_2 = maps
    found = {name: tensor.shape for name, tensor in llava.state_dict().items()}
    if found != expected:
        names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise InputError(f"LLaVA cannot express {type(model.llm).__name__} and"
                         f" {type(model.encoder).__name__}: it has no {names[0]}")
    llava.to(dtype).eval()
    after = behaviour(llava, image_token, model.encoder_patches, size)
    problem = f"LLaVA cannot express {config['vision']} and {config['llm']}"
    refuse_unless_equal(before, after, dtype, problem)
    x = model.llm.get_input_embeddings()(torch.tensor([[3, 5, 7]]))  # a cap hides in small logits
    plain = llava.lm_head(model.llm.base_model(inputs_embeds=x).last_hidden_state)
    if not torch.equal(model.llm(inputs_embeds=x).logits, plain):
        raise InputError(f"LLaVA cannot express {config['llm']}: it scales or caps the logits of"
                         " its output head")
    return llava


@contextlib.contextmanager
def new_folder(out: Path):
    """A folder to fill, renamed to `out` on success. InputError: that is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already there; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)                      # mkdtemp's folders are private
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """A small file of settings."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def export(checkpoint: str, out: str, dtype: str = "float32") -> None:
    """Checkpoint -> folder `out`, with weights in dtype. InputError: what LLaVA cannot express."""
    runtime.log(f"loads {checkpoint}, writes {out}, and compares the two models")
    model, _ = load_checkpoint(checkpoint, dtype=getattr(torch, dtype))
    if model.config.get("tune") == "lora":
        merge_lora(model)
    model.eval()
    check_expressible(model)
    prompt, words = model.config["prompt"], len(model.word_embeddings)
    with new_folder(Path(out)) as folder:
        tokenizer, template = exported_tokenizer(model.tokenizer, prompt, model.config["llm"])
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        llava = to_llava(model, image_token, getattr(torch, dtype))
        setattr(llava.config, OURS, {
            "config": {key: model.config[key] for key in KEPT if key in model.config},
            "words": words, "tokenizer": kept_of(model.tokenizer)})
        llava.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=64, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=end_ids(model.tokenizer, prompt))
        llava.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        written = folder / "tokenizer_config.json"  # under a class name that all versions know
        known = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(written, json.loads(written.read_text()) | known)
        write_json(folder / "preprocessor_config.json", image_processor(model))
        strategy = llava.config.vision_feature_select_strategy
        write_json(folder / "processor_config.json", {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_MARKER,
            "patch_size": model.patch_size[0], "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default")})
    runtime.log(f"{type(model.encoder).__name__} and {type(model.llm).__name__}, {dtype}, prompt"
                f" {prompt}")
