"""The multimodal language model: vision encoder -> projector -> splice -> language model; LoRA; checkpoints in and out.

    pixels (N, 3, height, width) --encoder, frozen--> Z (N, P_v, D_v) --projector, trained--> H (N, P, D) --+
                                                                                         splice -> (B, T, D) -> LLM -> logits
    token ids (B, T) ---------------------- W, the LLM's own word embeddings (V, D) ------------------------+

The encoder is any vision transformer and the language model any causal one that transformers' Auto classes load: what differs between
families (tokens before the patches, grid, pixel statistics, scale of the embeddings, chat template) is read from the model's own files.

Stage 1 trains the projector alone, stage 2 the language model as well, all of it or low-rank factors beside its linear maps.

The one legend of symbols, used in all files:

    B     samples in a batch; N of them with an image (stage 1: all)
    P     patches per image after the projector (P_v before it; equal unless the projector pools)
    T     tokens per sample, patches included
    D_v   width of the vision encoder;  D  width of the language model;  V  size of its vocabulary
    Z     patch features of the frozen encoder: penultimate layer, class and register tokens dropped
    H     projected patch embeddings, H = projector(Z)
    W     the language model's input word-embedding table
    Y     target distribution of a patch over V (patch_ids, patch_weights: its K non-zero entries; all zero = unlabelled)
    tau   temperature of the patch loss
"""
import contextlib
import inspect
import math
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, masking_utils
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from data import IGNORE, IMAGE_TOKEN, InputError, Records, end_ids, read_records, sides
from kernels.patch_loss import cosine_loss, patch_loss
from projector import PROJECTORS, output_grid

logging.disable_progress_bar()                                        # one bar at a time: the stage's own
ROOT = Path(__file__).resolve().parent
VERSION = 1                                                           # of the checkpoint format

# ------------------------------------------------------------------------------------------------------------------- the model


class PatchAlignedModel(nn.Module):
    """Encoder, projector and language model named by a plain dict, which a checkpoint stores and rebuilds the model from.

    config: vision, llm (folders or hub names), projector (a key of PROJECTORS), pool (side of the square of patches that a pooling
    projector makes one of), image_size (side, or [height, width], of the encoder's input; 0: what the image processor says), geometry
    (pad | crop | stretch), feature_layer (index into the encoder's hidden states), prompt, coverage, tau,
    patch_weight, patch_loss (softmax | cosine), centre_words (patch loss on W and H less the mean of W); after stage 2 also
    tune (full | lora: what of the language model is trained) and, with lora, its rank, alpha, dropout and modules. Without `weights`
    no weight is read: all is on torch's meta device, with shapes and without numbers, and the tokenizer is None where there is none.
    Raises InputError when a backbone cannot be loaded.
    """

    def __init__(self, config: dict, dtype: torch.dtype = torch.float32, weights: bool = True):
        super().__init__()
        vision, llm = find_model(config["vision"], "--vision"), find_model(config["llm"], "--llm")
        loaded = load_backbone(AutoModel, vision, "--vision", weights, dtype=dtype)
        self.encoder = getattr(loaded, "vision_model", loaded).requires_grad_(False)                # CLIP's, SigLIP's image half
        self.llm = load_backbone(AutoModelForCausalLM, llm, "--llm", weights, dtype=dtype).requires_grad_(False)
        self.llm.generation_config = GenerationConfig()         # transformers would fill up ours from the model's own, which may penalise
        self.tokenizer = load_backbone(AutoTokenizer, llm, "--llm", weights)

        settings = self.encoder.config
        if not hasattr(settings, "patch_size") or not hasattr(settings, "num_hidden_layers"):
            raise InputError(f"--vision {vision}: a {settings.model_type} has no patches; use a vision transformer such as CLIP")
        layers = settings.num_hidden_layers + 1
        if not -layers <= config["feature_layer"] < layers:
            raise InputError(f"--feature-layer {config['feature_layer']}: the encoder has {layers} hidden states")
        processor = read_processor(vision)
        self.image_mean, self.image_std = processor.get("image_mean", [0.5] * 3), processor.get("image_std", [0.5] * 3)
        self.image_resample = processor.get("resample", 3)                                           # PIL's number of a filter
        self.patch_size = sides(settings.patch_size)                                                 # (height, width), pixels
        size, self.encoder_grid = encoder_input(config["image_size"], processor, settings)
        self.encoder_patches = self.encoder_grid[0] * self.encoder_grid[1]                           # P_v
        takes = inspect.signature(self.encoder.forward).parameters
        self.patchified = "spatial_shapes" in takes                                                  # it wants patches for pixels
        resized = self.encoder_grid != native_grid(settings) and "interpolate_pos_encoding" in takes
        self.encoder_options = {"interpolate_pos_encoding": True} if resized else {}

        self.config = dict(config, image_size=size, vision=vision, llm=llm)
        kind, pool = config["projector"], config.get("pool", 1)
        try:
            self.grid = output_grid(kind, self.encoder_grid, pool)                                   # (rows, columns), P = their product
        except ValueError as error:
            raise InputError(f"--{error}") from None
        self.projector = PROJECTORS[kind](settings.hidden_size, self.word_embeddings.shape[1], self.encoder_grid, pool)
        self.embedding_scale = embedding_scale(self.llm)
        self.words_centre = None                                                                     # mean of W, once it is needed
        if config.get("tune"):
            self.tune(config["tune"], config.get("lora"))
        if not weights:
            self.to("meta")
        self.train()

    def tune(self, what: str, lora: dict | None = None) -> None:
        """Make the language model trainable as well: full, or lora with the options of `add_lora`."""
        self.config |= dict(tune=what) | (dict(lora=lora) if lora else {})
        if what == "full":
            self.llm.requires_grad_(True)
        else:
            add_lora(self.llm, **lora)

    @property
    def word_embeddings(self) -> torch.Tensor:
        """W (V, D)."""
        return self.llm.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.word_embeddings.device

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter samples; it is masked, so any will do."""
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def records(self, path: str, image_dir: str, regions: str = "", max_length: int = 2048, require_image: bool = True) -> Records:
        """The records of a file as samples for this model: its encoder's input, its grid, its tokenizer and prompt."""
        size, geometry, mean, std, resample = self.image_form
        return Records(read_records(path, regions or None), image_dir, self.tokenizer, image_size=size, geometry=geometry, grid=self.grid,
                       mean=mean, std=std, resample=resample, prompt=self.config["prompt"], max_length=max_length,
                       coverage=self.config["coverage"], require_image=require_image, source=path)

    def train(self, mode: bool = True):
        """Training mode for what is trained; the frozen backbones stay in evaluation mode, without dropout."""
        super().train(mode)
        self.encoder.eval()
        if not self.config.get("tune"):
            self.llm.eval()
        return self

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, by name: what a checkpoint holds. Where they are sharded, every rank must call this, and
        rank 0 alone gets them: a model that outgrows one GPU is gathered tensor by tensor."""
        trained, state = {n for n, p in self.named_parameters() if p.requires_grad}, {}
        for name, tensor in self.state_dict().items():
            if name in trained:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if not isinstance(tensor, DTensor) or tensor.device_mesh.get_rank() == 0:
                    state[name] = whole.detach().cpu()
        return state

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (N, 3, height, width) -> Z (N, P_v, D_v), float32. Tokens before the patches (class, registers) are dropped. InputError:
        fewer tokens than patches."""
        pixels = pixel_values.to(self.device, next(self.encoder.parameters()).dtype)
        inputs = patchify(pixels, self.patch_size) if self.patchified else dict(pixel_values=pixels)
        Z = self.encoder(**inputs, output_hidden_states=True, **self.encoder_options).hidden_states[self.config["feature_layer"]]
        if Z.shape[1] < self.encoder_patches:
            raise InputError(f"--vision {self.config['vision']}: {Z.shape[1]} tokens for {self.encoder_patches} patches; its patches are "
                             "not of one size")
        return Z[:, -self.encoder_patches:].float()

    @property
    def image_form(self) -> tuple:
        """What `data.transform_image` needs to make the encoder's input of an image: size, geometry, mean, std, resample."""
        return self.config["image_size"], self.config["geometry"], self.image_mean, self.image_std, self.image_resample

    @property
    def aspect(self) -> float:
        """Width / height of the encoder's input."""
        height, width = sides(self.config["image_size"])
        return width / height

    def splice(self, input_ids: torch.Tensor, H: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings (B, T, D) with the rows of H (N, P, D), image by image, in the places of IMAGE_TOKEN: (N P,), indices into
        the flat ids, which are looked up if they are not given."""
        if places is None:
            places = (input_ids.flatten() == IMAGE_TOKEN).nonzero().squeeze(1)                       # on a GPU the host waits for this
        if len(places) != H.shape[0] * H.shape[1]:
            raise InputError(f"{len(places)} image places in the text for {H.shape[0]} x {H.shape[1]} projected patches")
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(input_ids == IMAGE_TOKEN, 0))           # (B, T, D)
        return embeddings.flatten(0, 1).index_copy(0, places, H.flatten(0, 1).to(embeddings.dtype)).view_as(embeddings)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Sums and counts of the losses over a batch from `data.collate`: divide once, after adding up batches and ranks.

        -> {caption_loss, caption_tokens: over all that the assistant says}, and in stage 1 {patch_loss, patches}. With patch_weight 0
        the patch loss is measured but gives no gradient. "features" (N, P_v, D_v), where the batch has them, are Z (features.py).

        Nothing here waits for a GPU: the loss of a step is not read, and what the host must know, `collate` has read off. Padding stands
        on the right, where no label is and no causal attention looks back from, so the language model needs no mask, and without
        one takes its fastest attention.
        """
        config, images = self.config, len(batch["patch_ids"])                                        # images: N
        if not images:                                                                               # text alone: any image, taken 0 times,
            Z = torch.zeros(1, self.encoder_patches, self.encoder.config.hidden_size, device=self.device)    # gives a gradient of 0
        else:
            Z = batch["features"] if "features" in batch else self.encode(batch["pixel_values"])     # (N, P_v, D_v)
        H = self.projector(Z)                                                                        # (N, P, D)
        X = self.splice(batch["input_ids"], H[:images], batch["places"])                             # (B, T, D)
        X = X + 0 * H.sum().to(X.dtype)

        labels, first = batch["labels"], batch["first_label"]                                        # (B, T); no label before `first`
        keep = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)                    # token t is predicted at t - 1
        with never_packed():
            logits = self.llm(inputs_embeds=X, logits_to_keep=keep, use_cache=False).logits
        targets = labels[:, first:]                                                                  # (B, T - first)
        caption = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        sums = dict(caption_loss=caption, caption_tokens=(targets != IGNORE).sum())
        return sums if config.get("tune") else sums | self.patch_sums(H, batch)

    def patch_sums(self, H: torch.Tensor, batch: dict) -> dict[str, torch.Tensor]:
        """{patch_loss, patches} of H (N, P, D): the sum over labelled patches and their number."""
        config, W = self.config, self.word_embeddings
        rows = (H if config["patch_weight"] else H.detach()).flatten(0, 1)                           # (N P, D)
        ids, weights = batch["patch_ids"].flatten(0, 1), batch["patch_weights"].flatten(0, 1)        # (N P, K)
        if config.get("centre_words"):
            if self.words_centre is None:                                                            # W is frozen: once is enough
                self.words_centre = W.float().mean(0)                                                # (D,)
            rows, W = rows - self.embedding_scale * self.words_centre, W - self.words_centre.to(W.dtype)
        if config["patch_loss"] == "cosine":
            patch, patches = cosine_loss(rows, W, ids, weights)
        else:
            patch, patches = patch_loss(rows, W, ids, weights, config["tau"])
        return dict(patch_loss=patch, patches=patches)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], pixel_values: torch.Tensor, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, with a KV cache, to prompts (token ids from `data.tokenize_prompt`) and the images of those that have one.

        Prompts of different lengths are padded on the left, so that all answers begin at the same position.
        """
        T = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (T - len(p)) + p for p in prompts], device=self.device)                # (B, T)
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        H = self.projector(self.encode(pixel_values)) if len(pixel_values) else ids.new_empty(0, 0, self.word_embeddings.shape[1]).float()
        greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=self.pad_id,
                                  eos_token_id=end_ids(self.tokenizer, self.config["prompt"]))
        answers = self.llm.generate(inputs_embeds=self.splice(ids, H), attention_mask=mask, generation_config=greedy)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


@contextlib.contextmanager
def never_packed():
    """Samples of ours are never packed into one row. Without a mask transformers looks for that in the positions, and the host waits for
    the GPU's answer in every forward pass; here it does not look."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


# ------------------------------------------------------------------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """A frozen linear map with trained low-rank factors beside it: y = base(x) + alpha / rank * B A dropout(x) (Hu et al., ICLR 2022)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, base.in_features))                                   # (rank, in), float32
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))                                  # (out, rank): starts without effect
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        low = F.linear(F.linear(self.dropout(x).to(self.A.dtype), self.A), self.B)
        return self.base(x) + self.scale * low.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with the product of the factors added to its weight."""
        self.base.weight += (self.scale * self.B @ self.A).to(self.base.weight.dtype)
        return self.base


def add_lora(llm: nn.Module, rank: int, alpha: float, dropout: float, modules: list[str]) -> None:
    """Freeze `llm` and put LoRA in the place of its linear maps with these names, [] for all but the output head. InputError: none has."""
    llm.requires_grad_(False)
    linear = {n: m for n, m in llm.named_modules() if isinstance(m, nn.Linear) and m is not llm.get_output_embeddings()}
    chosen = [n for n in linear if not modules or n.rsplit(".", 1)[-1] in modules]
    if not chosen or set(modules) - {n.rsplit(".", 1)[-1] for n in linear}:
        names = sorted({n.rsplit(".", 1)[-1] for n in linear})
        raise InputError(f"--lora-modules {' '.join(modules)}: choose from the language model's linear maps, {' '.join(names)}")
    for name in chosen:
        llm.set_submodule(name, LoRA(linear[name], rank, alpha, dropout))


def merge_lora(model: PatchAlignedModel) -> None:
    """Turn LoRA's factors into weights; from then on the model is like one that was tuned in full."""
    for name, module in list(model.llm.named_modules()):
        if isinstance(module, LoRA):
            model.llm.set_submodule(name, module.merged())
    model.llm.requires_grad_(True)
    model.config = {k: v for k, v in model.config.items() if k != "lora"} | {"tune": "full"}


# ----------------------------------------------------------------------------------------------------------------- backbones in

def find_model(name: str, flag: str) -> str:
    """A folder or a hub name -> what transformers loads and a checkpoint remembers: a full path, or a path inside this project, which
    is looked up there first, or the hub name. InputError: a path that is not there."""
    if not Path(name).is_absolute() and (ROOT / name / "config.json").is_file():
        return name
    if (Path(name) / "config.json").is_file():
        folder = Path(name).resolve()
        return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
    if Path(name).exists() or name.startswith((".", "/", "~", "runs/")) or name.count("/") != 1:
        raise InputError(f"{flag} {name}: no such model folder (with a config.json), nor a hub name such as openai/clip-vit-base-patch32")
    return name


def located(name: str) -> str:
    """What `find_model` returned, as transformers takes it: a path inside this project does not depend on the current folder."""
    return str(ROOT / name) if (ROOT / name / "config.json").is_file() else name


def load_backbone(auto, name: str, flag: str, weights: bool = True, **options):
    """`auto.from_pretrained` with a one-line error; without `weights` a model on the meta device from its configuration alone, and None for
    a tokenizer that is not there."""
    try:
        if weights:
            return auto.from_pretrained(located(name), **options)
        if auto is AutoTokenizer:
            with contextlib.suppress(OSError, ValueError, ImportError):
                tokenizer = auto.from_pretrained(located(name))
                return tokenizer if tokenizer("a").input_ids else None        # some classes make an empty one out of nothing
            return None
        with torch.device("meta"):
            return auto.from_config(AutoConfig.from_pretrained(located(name)), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{flag} {name}: {auto.__name__} cannot load it ({reason})") from None


def read_processor(name: str) -> dict:
    """The image processor's plain settings (mean, std, size); reading them needs no torchvision, the processor itself does."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(located(name))[0]
    except OSError:
        raise InputError(f"--vision {name}: it has no preprocessor_config.json, which gives the mean and deviation of its pixels") from None


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
    if not hasattr(settings, "image_size"):                                                          # SigLIP 2 NaFlex: a square table
        return (math.isqrt(settings.num_patches),) * 2
    return tuple(side // patch for side, patch in zip(sides(settings.image_size), sides(settings.patch_size)))


def encoder_input(image_size, processor: dict, settings) -> tuple[int | list[int], tuple[int, int]]:
    """-> (size of the encoder's input, an int for a square, else [height, width]; its grid (rows, columns)).

    image_size: of --image-size, 0 for what the processor says, or else the encoder's own; these are cut to whole patches. InputError: no
    multiple of the patch size.
    """
    patch = sides(settings.patch_size)
    if image_size:
        size = sides(image_size)
        if min(size) <= 0 or size[0] % patch[0] or size[1] % patch[1]:
            shown = patch[0] if patch[0] == patch[1] else f"{patch[0]} x {patch[1]}"
            raise InputError(f"--image-size {image_size} is not a multiple of the encoder's patch size {shown}")
    else:
        size = processor_size(processor) or [rows * side for rows, side in zip(native_grid(settings), patch)]
    grid = tuple(side // of for side, of in zip(size, patch))
    height, width = (rows * of for rows, of in zip(grid, patch))
    return height if height == width else [height, width], grid


def patchify(pixels: torch.Tensor, patch_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Pixels (N, 3, height, width) as SigLIP 2's NaFlex encoders take them: pixel_values (N, P_v, p_h p_w 3), a mask and the grids."""
    N, (p_h, p_w) = len(pixels), patch_size
    rows, columns = pixels.shape[2] // p_h, pixels.shape[3] // p_w
    patches = pixels.view(N, 3, rows, p_h, columns, p_w).permute(0, 2, 4, 3, 5, 1).reshape(N, rows * columns, -1)
    return dict(pixel_values=patches, pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int64, device=pixels.device),
                spatial_shapes=torch.tensor([[rows, columns]] * N, device=pixels.device))


@torch.no_grad()
def embedding_scale(llm) -> float:
    """What a language model multiplies its word embeddings by inside their layer (Gemma: the root of D), 1 for most. Patches take their
    place after that layer."""
    embed = llm.get_input_embeddings()
    ids = torch.arange(min(64, embed.weight.shape[0]), device=embed.weight.device)
    rows, out = embed.weight[ids].double(), embed(ids).double()
    return 1.0 if embed.weight.is_meta else float((rows * out).sum() / rows.square().sum().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path: Path, model: PatchAlignedModel, stage: str, metrics: dict, state: dict | None = None) -> None:
    """Write {stage, config, model, metrics, version}: tensors and plain values only. `path` is the caller's temporary file; `state` what
    `trained_state` returned, where it has been called before."""
    state = model.trained_state() if state is None else state
    torch.save(dict(stage=stage, config=model.config, model=state, metrics=metrics, version=VERSION), path)


def read_checkpoint(path) -> dict:
    """The dict of a checkpoint file, read without running code. InputError: missing, not ours, or of a newer version."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file; torchrun pretrain.py writes one to runs/pretrain/ckpt.pt")
    try:
        with warnings.catch_warnings(action="ignore"):                # the error says it all
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                                 # whatever a file that we did not write makes torch raise
        raise InputError(f"{path}: not a checkpoint of this project (only tensors and plain values are read, a pickle that runs code is"
                         " refused unread)") from None
    if not isinstance(checkpoint, dict) or not {"stage", "config", "model", "metrics", "version"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of this project (it needs stage, config, model, metrics and version)")
    if not isinstance(checkpoint["version"], int) or checkpoint["version"] > VERSION:
        raise InputError(f"{path}: written by a newer version of this project (format {checkpoint['version']}, known up to {VERSION})")
    return checkpoint


def load_checkpoint(path, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[PatchAlignedModel, dict]:
    """Rebuild the model of a checkpoint unaided -> (model, checkpoint).

    Every tensor of the file must have its place and exactly the frozen backbones may be missing from it. InputError: one of the
    errors of `read_checkpoint`, a backbone that is gone, or a projector that does not fit the backbones.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint["stage"] == "plan":
        raise InputError(f"{path}: a plan of pretrain.py --dry-run, which has no weights; name a ckpt.pt")
    model = PatchAlignedModel(checkpoint["config"], dtype)
    load_trained(model, checkpoint["model"], path)
    return model.to(device), checkpoint


def load_trained(model: PatchAlignedModel, saved: dict[str, torch.Tensor], path) -> None:
    """Load what `trained_state` returned. InputError unless every tensor has its place and only frozen ones are missing."""
    own = model.state_dict()
    for name, tensor in saved.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such tensor"
            raise InputError(f"{path}: {name} {tuple(tensor.shape)} does not fit the backbones {model.config['vision']} and"
                             f" {model.config['llm']} ({shape}); it was trained with others")
    missing = model.load_state_dict(saved, strict=False).missing_keys
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    if trained & set(missing):
        raise InputError(f"{path}: {', '.join(sorted(trained & set(missing)))} missing; the file is incomplete")


if __name__ == "__main__":
    import llava

    llava.main()
