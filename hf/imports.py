"""LLaVA folders, hub names and mm_projector.bin -> checkpoints; the table is in hf/__init__.py."""
import contextlib
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlavaConfig)
from transformers import LlavaForConditionalGeneration as Llava

import runtime
from backbones.loading import find_model, load_backbone, processor_size, read_processor
from hf.compare import behaviour, refuse_unless_equal
from hf.export import OURS, write_json
from hf.templates import restored_tokenizer, usable_prompt
from labels import sides
from model import VERSION, PatchAlignedModel, load_trained, save_checkpoint
from runtime import InputError

DEFAULTS = dict(pool=1, geometry="crop", feature_layer=-2, prompt="plain", coverage=0.25, tau=0.07,
                patch_weight=0.0, patch_loss="softmax")             # of what was not trained here


def read_config(name: str) -> LlavaConfig:
    """The folder's config. InputError: not there, of another kind, with a part we do not have."""
    config = load_backbone(AutoConfig, name, "folder")
    if config.model_type != "llava":
        raise InputError(f"{name}: a {config.model_type}, not a LlavaForConditionalGeneration")
    if not isinstance(config.vision_feature_layer, int):
        raise InputError(f"{name}: vision_feature_layer {config.vision_feature_layer}: here it is"
                         " one")
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise InputError(f"{name}: projector_hidden_act {config.projector_hidden_act}: here it is"
                         " gelu")
    return config


def geometry_of(name: str, settings: dict) -> str:
    """How an image processor makes a square: pad, crop or stretch. InputError: it does not resize.

    What only comes near ours is said.
    """
    size, kind = settings.get("size") or {}, settings.get("image_processor_type", "")
    if settings.get("do_resize") is False:
        raise InputError(f"{name}: its image processor does not resize images")
    if settings.get("do_pad") and kind.startswith("Llava"):
        return "pad"
    if settings.get("do_center_crop", "crop_size" in settings):
        own = processor_size(settings)[0]
        edge = size if isinstance(size, int) else size.get("shortest_edge", own)
        if edge != own:
            runtime.log(f"{name}: its processor resizes the shorter side to {edge} and cuts out"
                        f" {own}; here the centre square is resized as a whole")
        return "crop"
    return "stretch" if isinstance(size, int) or "height" in size else "crop"


def projector_of(name: str, llava: Llava) -> tuple[str, dict[str, torch.Tensor]]:
    """-> (kind, its tensors as a checkpoint names them). InputError: we have no such projector."""
    projector = llava.model.multi_modal_projector
    maps = [(m.weight.detach().float(),
             torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float())
            for m in (projector.linear_1, projector.linear_2)]
    kind = "mlp2x_gelu"
    if llava.config.projector_hidden_act == "linear":
        kind, (weight, bias) = "linear", maps.pop()
        if not torch.equal(weight, torch.eye(len(weight))) or bias.any():
            raise InputError(f"{name}: two linear maps without an activation between them; here it"
                             " is one, or two with gelu")
    return kind, {f"projector.{2 * i}.{part}": tensor for i, pair in enumerate(maps)
                  for part, tensor in zip(("weight", "bias"), pair)}


@torch.no_grad()
def split(llava: Llava, words: int, folder: Path) -> None:
    """Write the backbones as vision/ and llm/, with the first `words` rows of the tables."""
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
    """InputError unless the projector gets the patches, all of them and nothing else."""
    pixels = torch.zeros(1, 3, *size, dtype=llava.dtype)
    states = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    strategy = llava.config.vision_feature_select_strategy
    kept = states[llava.config.vision_feature_layer].shape[1] - (strategy == "default")
    if kept != patches:
        raise InputError(f'{name}: with vision_feature_select_strategy "{strategy}" its projector'
                         f" gets {kept} rows for {patches} patches; here it gets the patches alone")


def import_folder(name: str, path) -> None:
    """Folder or hub name -> checkpoint `path`, backbones beside it. InputError: a misfit."""
    path = Path(path)
    folders = [path.parent / part for part in ("vision", "llm")]
    for file in (path, *folders):
        if file.exists():
            raise InputError(f"{file}: already there; name a checkpoint in a new folder")
    name = find_model(name, "folder")
    settings = read_config(name)
    ours, processor = getattr(settings, OURS, None) or {}, read_processor(name)
    theirs, tokenizer = (load_backbone(AutoTokenizer, name, "folder") for _ in range(2))
    tokenizer = restored_tokenizer(tokenizer, ours.get("tokenizer"))
    options = dict(dtype="auto", output_loading_info=True)
    llava, report = load_backbone(Llava, name, "folder", **options)
    if report["missing_keys"]:
        raise InputError(f"{name}: {sorted(report['missing_keys'])[0]} is missing; the folder is"
                         " incomplete")
    size, (kind, projector) = processor_size(processor), projector_of(name, llava)
    dtype, patch = llava.dtype, sides(settings.vision_config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    image_size = size[0] if size[0] == size[1] else list(size)
    if size[0] % patch[0] or size[1] % patch[1]:
        image_size = 0
        runtime.log(f"{name}: its images of {size[0]} x {size[1]} pixels are no multiple of the"
                    f" patches' {patch[0]} x {patch[1]}, which leave the rest out; here images are"
                    " resized to whole patches")
    check_tower(name, llava.eval(), size, patches)
    expected = behaviour(llava, settings.image_token_id, patches, size)

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".import.") as temporary:
            words = ours.get("words") or len(llava.get_input_embeddings().weight)
            split(llava, words, Path(temporary))
            del llava                               # one copy of the language model at a time
            write_json(Path(temporary, "vision", "preprocessor_config.json"), processor)
            tokenizer.save_pretrained(Path(temporary, "llm"))
            for folder in folders:
                Path(temporary, folder.name).rename(folder)
        known = DEFAULTS | dict(geometry=geometry_of(name, processor)) | ours.get("config", {})
        if not ours:
            known["prompt"] = usable_prompt(name, theirs, tokenizer)
        model = PatchAlignedModel(known | dict(
            vision=str(folders[0]), llm=str(folders[1]), projector=kind, image_size=image_size,
            feature_layer=settings.vision_feature_layer, imported=name), dtype)
        load_trained(model, projector, name)
        found = behaviour(model.eval(), settings.image_token_id, patches, size)
        refuse_unless_equal(found, expected, dtype, f"{name}: cannot be expressed here")
        with runtime.atomic(path) as file:
            save_checkpoint(file, model, "import", dict(steps=0))
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- original LLaVA's mm_projector.bin, and any of them ------------------------------------------


def projector_checkpoint(path: Path, vision: str, llm: str) -> dict:
    """The projector that LLaVA's training wrote, between its backbones -> a checkpoint of ours.

    Images are cropped, as in LLaVA's stage 1. InputError: not such a file, or another projector.
    """
    if not vision or not llm:
        raise InputError(f"{path}: a projector alone; name the backbones that it was trained with,"
                         " --vision and --llm")
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.partition("mm_projector.")[2]: tensor.float() for key, tensor in found.items()
                 if "mm_projector." in key}
    except Exception:                               # whatever torch raises for another kind of file
        raise InputError(f"{path}: not a file of tensors such as mm_projector.bin (a pickle that"
                         " runs code is refused unread)") from None
    kinds = {"mlp2x_gelu": {"0.weight", "0.bias", "2.weight", "2.bias"},
             "linear": {"weight", "bias"}}
    kind = next((kind for kind, names in kinds.items() if names == state.keys()), None)
    if kind is None:
        raise InputError(f"{path}: tensors {', '.join(sorted(state)) or 'of no mm_projector'}; a"
                         " projector linear or mlp2x_gelu is needed")
    config = DEFAULTS | dict(vision=find_model(vision, "--vision"), llm=find_model(llm, "--llm"),
                             projector=kind, image_size=0)
    first = "0." if kind == "linear" else ""
    model = {f"projector.{first}{name}": tensor for name, tensor in state.items()}
    return dict(stage="import", config=config, model=model, metrics=dict(steps=0), version=VERSION)


def is_folder(name: str) -> bool:
    """Whether a name means a LLaVA folder or a hub name, not a file."""
    hub = not Path(name).exists() and name.count("/") == 1 and not name.endswith((".pt", ".bin"))
    return Path(name).is_dir() or hub


@contextlib.contextmanager
def opened(name: str, vision: str = "", llm: str = ""):
    """A checkpoint file of whatever `name` is: a checkpoint, a LLaVA folder or hub name, or an
    mm_projector.bin with its backbones. What is converted takes the model's size in $TMPDIR, and is
    deleted at the end."""
    projector = name.endswith(".bin") and Path(name).is_file()
    if (vision or llm) and not projector:
        raise InputError(f"{name}: --vision and --llm are for LLaVA's mm_projector.bin; this names"
                         " its own backbones")
    if not projector and (not is_folder(name) or (Path(name) / "ckpt.pt").is_file()):
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="llava.") as temporary:
        path = Path(temporary, "ckpt.pt")
        if projector:
            torch.save(projector_checkpoint(Path(name), vision, llm), path)
        else:
            import_folder(name, path)
        yield str(path)
