"""Vision encoders and language models of transformers, by what their own files say of them.

    find_model       a folder or hub name -> what a checkpoint remembers
    load_backbone    -> a model or tokenizer of one of transformers' Auto classes
    encoder_input    image processor, encoder -> size of its input, grid of its patches
    patchify, embedding_scale      what two families want otherwise

No name of a family stands here but as an example. model.py puts the parts together.
"""
import contextlib
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from labels import sides
from runtime import InputError

ROOT = Path(__file__).resolve().parent.parent           # of the project


def find_model(name: str, flag: str) -> str:
    """A folder or hub name -> what a checkpoint remembers: a full path, a path inside this project
    (looked up there first), or the hub name. InputError: a path that is not there."""
    if not Path(name).is_absolute() and (ROOT / name / "config.json").is_file():
        return name
    if (Path(name) / "config.json").is_file():
        folder = Path(name).resolve()
        return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
    path = Path(name).exists() or name.startswith((".", "/", "~", "runs/"))
    if path or name.count("/") != 1:
        raise InputError(f"{flag} {name}: no such model folder (with a config.json), nor a hub name"
                         " such as openai/clip-vit-base-patch32")
    return name


def located(name: str) -> str:
    """What `find_model` returned, as transformers takes it from any current folder."""
    return str(ROOT / name) if (ROOT / name / "config.json").is_file() else name


def load_backbone(auto, name: str, flag: str, weights: bool = True, **options):
    """`auto.from_pretrained` with a one-line error. Without `weights`: a model on the meta device,
    from its configuration alone, and None for a tokenizer that is not there. InputError: also where
    a model's weights do not fit its config, are missing, or are not finite."""
    try:
        if weights and hasattr(auto, "from_config") and auto is not AutoConfig:
            return load_weights(auto, name, flag, options)
        if weights:
            return auto.from_pretrained(located(name), **options)
        if auto is AutoTokenizer:
            with contextlib.suppress(OSError, ValueError, ImportError):
                tokenizer = auto.from_pretrained(located(name))
                return tokenizer if tokenizer("a").input_ids else None  # some make an empty one
            return None
        with torch.device("meta"):
            return auto.from_config(AutoConfig.from_pretrained(located(name)), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{flag} {name}: {auto.__name__} cannot load it ({reason})") from None


def load_weights(auto, name: str, flag: str, options: dict):
    """A model whose every tensor comes from its folder, with numbers in it. InputError."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()           # its report is a table; the first line of it is ours
    try:
        model, report = auto.from_pretrained(
            located(name), ignore_mismatched_sizes=True, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    for key, found, expected in sorted(report["mismatched_keys"], key=lambda row: row[0]):
        raise InputError(f"{flag} {name}: {key} has the shape {tuple(found)} in its weights, but"
                         f" {tuple(expected)} by its config.json; they belong to different models")
    missing = sorted(report["missing_keys"])
    if auto is AutoModel:                   # heads and the text half of a CLIP are not used
        part = "vision_model." if hasattr(model, "vision_model") else ""
        used = re.compile(rf"^{part}.*(embed|\blayers?\.\d)")
        missing = [key for key in missing if used.search(key)]
    if missing:
        raise InputError(f"{flag} {name}: {missing[0]} is not among its weights, nor are"
                         f" {len(missing) - 1} others; the folder is incomplete")
    check_finite(model.named_parameters(), f"{flag} {name}")
    return model


def check_finite(tensors, where: str) -> None:
    """(name, tensor) pairs. InputError: the first that holds NaN or an infinity, and where."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.itemsize < 2:
            continue
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            row = (~tensor.isfinite()).reshape(len(tensor) if tensor.ndim else 1, -1).any(1)
            raise InputError(f"{where}: {name} holds values that are not finite (row"
                             f" {int(row.int().argmax())} and {int(row.sum()) - 1} more of"
                             f" {len(row)}); it is damaged, or its training diverged")


def check_encoder(settings, name: str):
    """An encoder's settings. InputError: it has no patches."""
    if not hasattr(settings, "patch_size") or not hasattr(settings, "num_hidden_layers"):
        raise InputError(f"--vision {name}: a {settings.model_type} has no patches; use a vision"
                         " transformer such as CLIP")
    return settings


def read_processor(name: str) -> dict:
    """The image processor's plain settings; unlike the processor, they need no torchvision."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(located(name))[0]
    except OSError:
        raise InputError(f"--vision {name}: it has no preprocessor_config.json, which gives the"
                         " mean and deviation of its pixels") from None


def processor_size(settings: dict) -> tuple[int, int] | None:
    """(height, width) of what an image processor makes, None if it does not say."""
    for key in ("crop_size", "size"):
        value = settings.get(key) or {}
        if isinstance(value, int):
            return value, value
        if "shortest_edge" in value:
            return value["shortest_edge"], value["shortest_edge"]
        if "height" in value:
            return value["height"], value["width"]
    return None


def native_grid(settings) -> tuple[int, int]:
    """The grid (rows, columns) of an encoder's own position table, from its config."""
    if not hasattr(settings, "image_size"):                 # SigLIP 2 NaFlex: a square table
        return (math.isqrt(settings.num_patches),) * 2
    both = zip(sides(settings.image_size), sides(settings.patch_size))
    return tuple(side // patch for side, patch in both)


def encoder_input(image_size, processor: dict, settings) -> tuple[int | list, tuple[int, int]]:
    """-> (size of the encoder's input, an int for a square, else [height, width]; grid).

    image_size: of --image-size; 0: what the processor says, or else the encoder, cut to whole
    patches. InputError: no multiple of the patch size.
    """
    patch = sides(settings.patch_size)
    if image_size:
        size = sides(image_size)
        if min(size) <= 0 or size[0] % patch[0] or size[1] % patch[1]:
            shown = patch[0] if patch[0] == patch[1] else f"{patch[0]} x {patch[1]}"
            raise InputError(f"--image-size {image_size} is not a multiple of the encoder's patch"
                             f" size {shown}")
    else:
        own = [rows * side for rows, side in zip(native_grid(settings), patch)]
        size = processor_size(processor) or own
    grid = tuple(side // of for side, of in zip(size, patch))
    height, width = (rows * of for rows, of in zip(grid, patch))
    return height if height == width else [height, width], grid


def patchify(pixels: torch.Tensor, patch_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Pixels (N, 3, height, width) as SigLIP 2's NaFlex encoders take them: (N, P_v, p_h p_w 3)."""
    N, (p_h, p_w), device = len(pixels), patch_size, pixels.device
    rows, columns = pixels.shape[2] // p_h, pixels.shape[3] // p_w
    patches = pixels.view(N, 3, rows, p_h, columns, p_w).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(N, rows * columns, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=device)
    shapes = torch.tensor([[rows, columns]] * N, device=device)
    return dict(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)


@torch.no_grad()
def embedding_scale(llm) -> float:
    """What a language model multiplies its word embeddings by inside their layer (Gemma: the root
    of D), 1 for most. Patches take their place after that layer."""
    embed = llm.get_input_embeddings()
    ids = torch.arange(min(64, embed.weight.shape[0]), device=embed.weight.device)
    rows, out = embed.weight[ids].double(), embed(ids).double()
    if embed.weight.is_meta:
        return 1.0
    return float((rows * out).sum() / rows.square().sum().clamp_min(1e-30))
