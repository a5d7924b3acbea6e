"""The Hugging Face world: checkpoints to and from `LlavaForConditionalGeneration` folders, and original LLaVA's projectors.

    python model.py export runs/sft/ckpt.pt OUT                             # a folder that plain transformers loads and generates from
    python model.py import llava-hf/llava-1.5-7b-hf runs/llava/ckpt.pt      # its inverse, for eval.py and sft.py
    python probe.py NAME                                                    # reads folder, hub name or mm_projector.bin by itself

What becomes what:

    ours                        LlavaForConditionalGeneration
    encoder                     vision_tower; where we interpolate the position table, the interpolated table
    projector mlp2x_gelu        multi_modal_projector: linear_1, exact GELU, linear_2
    projector linear            linear_1, the activation "linear", which does nothing, and the identity as linear_2
    language model              language_model and lm_head, LoRA merged; <image> has a spare row of W, or a new one, the mean of the others:
                                its logit is the mean of theirs, so greedy generation never picks it
    feature_layer               vision_feature_layer; vision_feature_select_strategy is "default" (drop one class token) or "full" (none)
    geometry                    the image processor: crop is PerceiverImageProcessor, which like us cuts before it resizes, pad and stretch
                                are LlavaImageProcessor
    prompt                      a chat template of the same text, and a tokenizer that reads it as the same tokens

What LLaVA cannot express is refused. Before anything is kept, both directions compare what the language model is given and what it answers
on an image of noise, so a difference that this table does not know is refused too. Settings that LLaVA has no word for stand in config.json
under "patch_aligned"; an import takes them from there.

reads:  a checkpoint with its backbones; a folder or hub name; original LLaVA's mm_projector.bin
writes: the new folder OUT; or a checkpoint with the folders vision/ and llm/ beside it
"""
import contextlib
import copy
import json
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

import data
import runtime
from data import IMAGE_MARKER, IMAGE_TOKEN, InputError
from model import (
    VERSION,
    PatchAlignedModel,
    find_model,
    load_backbone,
    load_checkpoint,
    load_trained,
    merge_lora,
    processor_size,
    read_processor,
    save_checkpoint,
)
from templates import exported_tokenizer, kept_of, restored_tokenizer, usable_prompt

OURS = "patch_aligned"                                          # key of config.json
KEPT = ("geometry", "prompt", "coverage", "tau", "patch_weight", "patch_loss", "centre_words")                # of our config, there
DEFAULTS = dict(pool=1, geometry="crop", feature_layer=-2, prompt="plain", coverage=0.25, tau=0.07, patch_weight=0.0,
                patch_loss="softmax")                           # of what was not trained here


@dataclass
class Export:
    """Flags of python model.py export."""

    checkpoint: str = field(metadata={"positional": True})
    """checkpoint of pretrain.py or sft.py"""
    out: str = field(metadata={"positional": True})
    """folder to write, new"""
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    """of the weights; float32 loses nothing"""


@dataclass
class Import:
    """Flags of python model.py import."""

    folder: str = field(metadata={"positional": True})
    """folder or hub name of a LlavaForConditionalGeneration"""
    checkpoint: str = field(metadata={"positional": True})
    """checkpoint to write; the backbones go into vision/ and llm/ beside it"""


# ------------------------------------------------------------------------------------------------------------ comparing the two models


@torch.inference_mode()
def behaviour(model: nn.Module, image_token: int, patches: int, size: tuple[int, int]) -> list[torch.Tensor]:
    """What the language model is given (T, D) and what it answers (T, V), float32, for an image of noise and four words.

    model: either kind; image_token: the id of <image> in LLaVA's vocabulary; size: (height, width) of the image.
    """
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    words = [i for i in range(3, 8) if i != image_token][:4]
    ours = isinstance(model, PatchAlignedModel)
    ids = torch.tensor([[*words[:2], *[IMAGE_TOKEN if ours else image_token] * patches, *words[2:]]])
    if ours:
        X = model.splice(ids, model.projector(model.encode(noise)))
        return [X[0].float(), model.llm(inputs_embeds=X).logits[0].float()]
    given = []
    hook = model.model.language_model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]),
                                                                with_kwargs=True)
    logits = model(input_ids=ids, pixel_values=noise.to(model.dtype)).logits
    hook.remove()
    return [given[0][0].float(), logits[0].float()]


def refuse_unless_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: torch.dtype, problem: str) -> None:
    """InputError unless two results of `behaviour` agree up to the rounding of dtype; words that only one side has do not count."""
    for name, a, b in zip(("patch embeddings", "logits"), ours, theirs):
        columns = min(a.shape[1], b.shape[1])
        error = float((a[:, :columns] - b[:, :columns]).norm() / a[:, :columns].norm())
        if not error < (1e-3 if dtype == torch.float32 else 0.05):
            raise InputError(f"{problem}: its {name} differ by {error:.1%}")


# --------------------------------------------------------------------------------------------------------------------------- export


def image_processor(model: PatchAlignedModel) -> dict:
    """preprocessor_config.json that makes the pixels of `data.transform_image`."""
    geometry, side = model.config["geometry"], model.config["image_size"]
    square = {"height": side, "width": side}
    kind = "PerceiverImageProcessor" if geometry == "crop" else "LlavaImageProcessor"
    return {"image_processor_type": kind, "processor_class": "LlavaProcessor", "do_convert_rgb": True, "do_pad": geometry == "pad",
            "do_center_crop": geometry == "crop", "crop_size": square, "do_resize": True, "size": square, "resample": model.image_resample,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(model.image_mean),
            "image_std": list(model.image_std)}


def check_expressible(model: PatchAlignedModel) -> None:
    """InputError: a part that LlavaForConditionalGeneration does not have."""
    config, head = model.config, model.llm.get_output_embeddings()
    reasons = {
        f"projector {config['projector']}: LLaVA's is two linear maps with an activation between them":
            config["projector"] not in ("linear", "mlp2x_gelu"),
        f"{config['vision']}: an encoder that takes patches, where LLaVA's takes pixels": model.patchified,
        f"a grid of {model.encoder_grid[0]} x {model.encoder_grid[1]} patches: LLaVA's processor makes squares":
            model.encoder_grid[0] != model.encoder_grid[1] or model.patch_size[0] != model.patch_size[1],
        f"{config['llm']}: its output head has a bias, LLaVA's has none": getattr(head, "bias", None) is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"LLaVA cannot express {reason}")


@torch.inference_mode()
def tokens_before_patches(model: PatchAlignedModel) -> int:
    """Class and register tokens of the encoder. InputError: more than LLaVA can drop."""
    side = model.config["image_size"]
    pixels = torch.zeros(1, 3, side, side, dtype=next(model.encoder.parameters()).dtype)
    states = model.encoder(pixel_values=pixels, output_hidden_states=True, **model.encoder_options).hidden_states
    before = states[model.config["feature_layer"]].shape[1] - model.encoder_patches
    if before > 1:
        raise InputError(f"LLaVA cannot express {model.config['vision']}: {before} class and register tokens stand before its patches, of "
                         "which it drops one or none")
    return before


@torch.no_grad()
def keep_positions(model: PatchAlignedModel) -> None:
    """Replace a position table that is interpolated in every forward pass by its interpolation. InputError: an encoder whose table is of
    another make."""
    embed, side = getattr(model.encoder, "embeddings", None), model.config["image_size"]
    table = getattr(embed, "position_embedding", None)
    if not isinstance(table, nn.Embedding) or not hasattr(embed, "interpolate_pos_encoding"):
        raise InputError(f"LLaVA cannot express image size {side}, for which the position table of "
                         f"{model.config['vision']} is interpolated; train with its own size")
    before = table.num_embeddings - getattr(embed, "num_patches", table.num_embeddings)
    tokens = table.weight.new_zeros(1, model.encoder_patches + before, table.embedding_dim)
    rows = embed.interpolate_pos_encoding(tokens, side, side)[0]                                   # (tokens, D_v)
    embed.position_embedding = nn.Embedding.from_pretrained(rows.clone())
    embed.image_size = model.encoder.config.image_size = side
    embed.num_patches, embed.num_positions = model.encoder_patches, len(rows)
    embed.register_buffer("position_ids", torch.arange(len(rows))[None], persistent=False)
    model.encoder_options = {}


@torch.no_grad()
def add_words(llm, rows: int) -> None:
    """Grow both tables of words to so many rows; the new ones are the mean of the others."""
    tables = {"in": llm.get_input_embeddings(), "out": llm.get_output_embeddings()}
    means, known = {k: t.weight.float().mean(0) for k, t in tables.items()}, len(tables["in"].weight)
    llm.resize_token_embeddings(rows, mean_resizing=False)
    for key, table in {"in": llm.get_input_embeddings(), "out": llm.get_output_embeddings()}.items():
        table.weight[known:] = means[key].to(table.weight.dtype)


@torch.no_grad()
def to_llava(model: PatchAlignedModel, image_token: int, dtype: torch.dtype) -> Llava:
    """The model's parts, not copies, as a LlavaForConditionalGeneration in which this id stands for a patch. InputError: a part that it
    cannot hold."""
    strategy = "default" if tokens_before_patches(model) else "full"
    if model.encoder_options:
        keep_positions(model)
    size = data.sides(model.config["image_size"])
    before = behaviour(model, image_token, model.encoder_patches, size)
    words = len(model.word_embeddings)
    if image_token >= words:
        add_words(model.llm, image_token + 1)
    maps = [m for m in model.projector if isinstance(m, nn.Linear)]
    if len(maps) == 1:
        maps.append(nn.Linear(*[maps[0].out_features] * 2))
        maps[1].weight.copy_(torch.eye(maps[0].out_features))
        maps[1].bias.zero_()
        activation = "linear"
    else:
        activation = "gelu"
    parts = [copy.deepcopy(part.config) for part in (model.encoder, model.llm)]
    for part in parts:
        part._name_or_path = ""                                 # where the backbone was
    settings = LlavaConfig(
        vision_config=parts[0], text_config=parts[1], image_token_index=image_token,
        image_seq_length=model.encoder_patches, projector_hidden_act=activation, vision_feature_select_strategy=strategy,
        vision_feature_layer=model.config["feature_layer"], tie_word_embeddings=model.llm.config.tie_word_embeddings)
    with torch.device("meta"):
        llava = Llava(settings)
    expected = {name: tensor.shape for name, tensor in llava.state_dict().items()}
    if hasattr(llava.model.vision_tower, "vision_model"):       # some versions of transformers wrap the transformer once more
        llava.model.vision_tower.vision_model = model.encoder
    else:
        llava.model.vision_tower = model.encoder
    llava.model.language_model, llava.lm_head = model.llm.base_model, model.llm.get_output_embeddings()
    llava.model.multi_modal_projector.linear_1, llava.model.multi_modal_projector.linear_2 = maps
    found = {name: tensor.shape for name, tensor in llava.state_dict().items()}
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(f"LLaVA cannot express {type(model.llm).__name__} and {type(model.encoder).__name__}: it has no {names[0]}")
    llava.to(dtype).eval()
    after = behaviour(llava, image_token, model.encoder_patches, size)
    refuse_unless_equal(before, after, dtype, f"LLaVA cannot express {model.config['vision']} and {model.config['llm']}")
    x = model.llm.get_input_embeddings()(torch.tensor([[3, 5, 7]]))                                # a cap hides in small logits
    plain = llava.lm_head(model.llm.base_model(inputs_embeds=x).last_hidden_state)
    if not torch.equal(model.llm(inputs_embeds=x).logits, plain):
        raise InputError(f"LLaVA cannot express {model.config['llm']}: it scales or caps the logits of its output head")
    return llava


@contextlib.contextmanager
def new_folder(out: Path):
    """A temporary folder beside `out` to fill, renamed to it on success. InputError: there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already there; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)                                  # mkdtemp's folders are private
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """A small file of settings."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def export(args: Export) -> None:
    """Checkpoint -> folder."""
    out, dtype = Path(args.out), getattr(torch, args.dtype)
    with new_folder(out) as folder:
        model, _ = load_checkpoint(args.checkpoint, dtype=dtype)
        if model.config.get("tune") == "lora":
            merge_lora(model)
        model.eval()
        check_expressible(model)
        words = len(model.word_embeddings)
        tokenizer, template = exported_tokenizer(model.tokenizer, model.config["prompt"], model.config["llm"])
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        llava = to_llava(model, image_token, dtype)
        setattr(llava.config, OURS, {
            "config": {key: model.config[key] for key in KEPT if key in model.config}, "words": words,
            "tokenizer": kept_of(model.tokenizer)})
        llava.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=64, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=data.end_ids(model.tokenizer, model.config["prompt"]))
        llava.save_pretrained(folder, max_shard_size="5GB")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        written = folder / "tokenizer_config.json"              # under the class name that all versions of transformers know
        write_json(written, json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
        write_json(folder / "preprocessor_config.json", image_processor(model))
        strategy = llava.config.vision_feature_select_strategy
        write_json(folder / "processor_config.json", {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_MARKER, "patch_size": model.patch_size[0],
            "vision_feature_select_strategy": strategy, "num_additional_image_tokens": int(strategy == "default")})
    runtime.log(f"wrote {out}: {type(model.encoder).__name__} and {type(model.llm).__name__}, {args.dtype}, prompt "
                f"{model.config['prompt']}; next: python probe.py {out}")


# --------------------------------------------------------------------------------------------------------------------------- import


def read_config(name: str) -> LlavaConfig:
    """The folder's config. InputError: not there, of another kind, or with a part that we do not have."""
    config = load_backbone(AutoConfig, name, "folder")
    if config.model_type != "llava":
        raise InputError(f"{name}: a {config.model_type}, not a LlavaForConditionalGeneration")
    for reason, holds in {
        f"vision_feature_layer {config.vision_feature_layer}: here it is one": not isinstance(config.vision_feature_layer, int),
        f"projector_hidden_act {config.projector_hidden_act}: here it is gelu": config.projector_hidden_act not in ("gelu", "linear"),
    }.items():
        if holds:
            raise InputError(f"{name}: {reason}")
    return config


def geometry_of(name: str, settings: dict) -> str:
    """How an image processor makes a square: pad, crop or stretch. What only comes near ours is said. InputError: it does not resize."""
    size, kind = settings.get("size") or {}, settings.get("image_processor_type", "")
    if settings.get("do_resize") is False:
        raise InputError(f"{name}: its image processor does not resize images")
    if settings.get("do_pad") and kind.startswith("Llava"):
        return "pad"
    if settings.get("do_center_crop", "crop_size" in settings):
        edge = size if isinstance(size, int) else size.get("shortest_edge", processor_size(settings)[0])
        if edge != processor_size(settings)[0]:
            runtime.log(f"{name}: its processor resizes the shorter side to {edge} and cuts out {processor_size(settings)[0]}; here the "
                        "centre square is resized as a whole")
        return "crop"
    return "stretch" if isinstance(size, int) or "height" in size else "crop"


def projector_of(name: str, llava: Llava) -> tuple[str, dict[str, torch.Tensor]]:
    """-> (kind, its tensors as a checkpoint names them). InputError: two linear maps without an activation that are not one."""
    maps = llava.model.multi_modal_projector.linear_1, llava.model.multi_modal_projector.linear_2
    pairs = [(m.weight.detach().float(), torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float()) for m in maps]
    kind = "mlp2x_gelu"
    if llava.config.projector_hidden_act == "linear":
        kind, (weight, bias) = "linear", pairs.pop()
        if not torch.equal(weight, torch.eye(len(weight))) or bias.any():
            raise InputError(f"{name}: two linear maps without an activation between them; here it is one, or two with gelu")
    return kind, {f"projector.{2 * i}.{part}": t for i, pair in enumerate(pairs) for part, t in zip(("weight", "bias"), pair)}


@torch.no_grad()
def split(llava: Llava, words: int, folder: Path) -> None:
    """Write the two backbones as folders vision/ and llm/, with the first `words` rows of the tables of words."""
    llava.model.vision_tower.save_pretrained(folder / "vision")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llava.config.text_config)
    setattr(llm, llm.base_model_prefix, llava.model.language_model)
    llm.set_output_embeddings(llava.lm_head)
    embed, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    llm.config.tie_word_embeddings = tied = embed.weight is head.weight
    llm.config.vocab_size = words
    if words < len(embed.weight):
        embed.weight = nn.Parameter(embed.weight[:words].clone())
        head.weight = embed.weight if tied else nn.Parameter(head.weight[:words].clone())
    llm.generation_config = GenerationConfig(eos_token_id=llava.generation_config.eos_token_id)
    llm.save_pretrained(folder / "llm", max_shard_size="5GB")


@torch.inference_mode()
def check_tower(name: str, llava: Llava, size: tuple[int, int], patches: int) -> None:
    """InputError unless what the projector gets is the patches, all of them and nothing else."""
    states = llava.model.vision_tower(torch.zeros(1, 3, *size, dtype=llava.dtype), output_hidden_states=True).hidden_states
    strategy = llava.config.vision_feature_select_strategy
    kept = states[llava.config.vision_feature_layer].shape[1] - (strategy == "default")
    if kept != patches:
        raise InputError(f'{name}: with vision_feature_select_strategy "{strategy}" its projector gets {kept} rows for {patches} patches; '
                         "here it gets the patches alone")


def import_folder(name: str, path: Path) -> None:
    """Folder or hub name -> checkpoint `path`, with the backbones beside it. InputError: what `read_config` and others refuse."""
    folders = [path.parent / part for part in ("vision", "llm")]
    for file in (path, *folders):
        if file.exists():
            raise InputError(f"{file}: already there; name a checkpoint in a new folder")
    name = find_model(name, "folder")
    settings = read_config(name)
    ours = getattr(settings, OURS, None) or {}
    processor = read_processor(name)
    theirs, tokenizer = (load_backbone(AutoTokenizer, name, "folder") for _ in range(2))
    tokenizer = restored_tokenizer(tokenizer, ours.get("tokenizer"))
    llava, report = load_backbone(Llava, name, "folder", dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise InputError(f"{name}: {sorted(report['missing_keys'])[0]} is missing; the folder is incomplete")
    size, (kind, projector), dtype = processor_size(processor), projector_of(name, llava), llava.dtype
    patch = data.sides(settings.vision_config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    image_size = size[0] if size[0] == size[1] else list(size)
    if size[0] % patch[0] or size[1] % patch[1]:
        image_size = 0
        runtime.log(f"{name}: its images of {size[0]} x {size[1]} pixels are no multiple of the patches' {patch[0]} x {patch[1]}, which "
                    "leave the rest out; here images are resized to whole patches")
    check_tower(name, llava.eval(), size, patches)
    expected = behaviour(llava, settings.image_token_id, patches, size)

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".import.") as temporary:
            split(llava, ours.get("words") or len(llava.get_input_embeddings().weight), Path(temporary))
            del llava                                           # one copy of the language model at a time
            write_json(Path(temporary, "vision", "preprocessor_config.json"), processor)
            tokenizer.save_pretrained(Path(temporary, "llm"))
            for folder in folders:
                Path(temporary, folder.name).rename(folder)
        known = DEFAULTS | dict(geometry=geometry_of(name, processor)) | ours.get("config", {})
        if not ours:
            known["prompt"] = usable_prompt(name, theirs, tokenizer)
        model = PatchAlignedModel(known | dict(
            vision=str(folders[0]), llm=str(folders[1]), projector=kind, feature_layer=settings.vision_feature_layer,
            image_size=image_size, imported=name), dtype)
        load_trained(model, projector, name)
        found = behaviour(model.eval(), settings.image_token_id, patches, size)
        refuse_unless_equal(found, expected, dtype, f"{name}: cannot be expressed here")
        with runtime.atomic(path) as file:
            save_checkpoint(file, model, "import", dict(steps=0))
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------- original LLaVA's mm_projector.bin


def projector_checkpoint(path: Path, vision: str, llm: str) -> dict:
    """The projector that LLaVA's training wrote, between the backbones that it was trained with -> a checkpoint of ours. Images are cropped
    as in LLaVA's stage 1. InputError: not such a file, or a projector of another kind."""
    if not vision or not llm:
        raise InputError(f"{path}: a projector alone; name the backbones that it was trained with, --vision and --llm")
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.partition("mm_projector.")[2]: tensor.float() for key, tensor in found.items() if "mm_projector." in key}
    except Exception:                                           # whatever torch raises for a file of another kind
        raise InputError(f"{path}: not a file of tensors such as mm_projector.bin (a pickle that runs code is refused unread)") from None
    kinds = {"mlp2x_gelu": {"0.weight", "0.bias", "2.weight", "2.bias"}, "linear": {"weight", "bias"}}
    kind = next((kind for kind, names in kinds.items() if names == state.keys()), None)
    if kind is None:
        raise InputError(f"{path}: tensors {', '.join(sorted(state)) or 'of no mm_projector'}; a projector linear or mlp2x_gelu is needed")
    config = DEFAULTS | dict(vision=find_model(vision, "--vision"), llm=find_model(llm, "--llm"), projector=kind, image_size=0)
    model = {f"projector.{name if kind != 'linear' else '0.' + name}": tensor for name, tensor in state.items()}
    return dict(stage="import", config=config, model=model, metrics=dict(steps=0), version=VERSION)


# --------------------------------------------------------------------------------------------------------------------- any of them


def is_folder(name: str) -> bool:
    """Whether a name means a LLaVA folder or a hub name, not a file."""
    return Path(name).is_dir() or not Path(name).exists() and name.count("/") == 1 and not name.endswith((".pt", ".bin"))


@contextlib.contextmanager
def opened(name: str, vision: str = "", llm: str = ""):
    """A checkpoint file of whatever `name` is: a checkpoint, a LLaVA folder or hub name, mm_projector.bin with the names of its backbones.
    What has to be converted is deleted at the end (it takes the model's size in $TMPDIR)."""
    projector = name.endswith(".bin") and Path(name).is_file()
    if (vision or llm) and not projector:
        raise InputError(f"{name}: --vision and --llm are for LLaVA's mm_projector.bin; this names its own backbones")
    if not projector and not is_folder(name):
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="llava.") as temporary:
        path = Path(temporary, "ckpt.pt")
        if projector:
            torch.save(projector_checkpoint(Path(name), vision, llm), path)
        else:
            import_folder(name, path)
        yield str(path)


# ---------------------------------------------------------------------------------------------------------------------------- main


def convert(args: Import) -> None:
    """Folder or hub name -> checkpoint."""
    import_folder(args.folder, Path(args.checkpoint))
    runtime.log(f"wrote {args.checkpoint}, with vision/ and llm/ beside it; next: python eval.py {args.checkpoint}")


def main() -> None:
    """The command line of model.py."""
    commands = {"export": (export, Export), "import": (convert, Import)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in commands:
        print(__doc__ if name in ("-h", "--help") else f"error: {name}: export or import; --help explains them",
              file=sys.stdout if name in ("-h", "--help") else sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    runtime.run(*commands[name], __doc__, InputError)
