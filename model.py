"""The multimodal language model: encoder -> projector -> splice -> language model; checkpoints.

    pixels (N, 3, height, width)
      --encoder, frozen-->    Z (N, P_v, D_v)
      --projector, trained--> H (N, P, D) ---------+
                                                   splice -> (B, T, D) -> LLM -> logits
    token ids (B, T) -- W (V, D), frozen ----------+

The encoder is any vision transformer, the language model any causal one, that transformers' Auto
classes load. What differs between families (tokens before the patches, grid, pixel statistics,
scale of the embeddings, chat template) is read from the model's own files. Stage 1 trains the
projector alone, stage 2 the language model as well: all of it, or low-rank factors (LoRA).

The one legend of symbols, used in all files:

    B     samples in a batch; N of them with an image (stage 1: all)
    P     patches per image after the projector (P_v before it; equal unless the projector pools)
    T     tokens per sample, patches included
    D_v   width of the vision encoder;  D  width of the language model;  V  size of its vocabulary
    Z     patch features of the frozen encoder: penultimate layer, class and register tokens off
    H     projected patch embeddings, H = projector(Z)
    W     the language model's input word-embedding table
    Y     target distribution of a patch over V (patch_ids, patch_weights: its K entries that are
          not zero; all zero = unlabelled)
    tau   temperature of the patch loss
"""
import contextlib
import inspect
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, masking_utils)
from transformers.utils import logging

from backbones.loading import (
    check_encoder, check_finite, embedding_scale, encoder_input, find_model, load_backbone,
    native_grid, patchify, read_processor)
from data import IGNORE, IMAGE_TOKEN, Records, end_ids, read_records
from kernels.patch_loss import cosine_loss, patch_loss
from labels import sides
from projector import PROJECTORS, output_grid
from runtime import InputError

logging.disable_progress_bar()                          # one bar at a time: the stage's own
VERSION = 1                                             # of the checkpoint format

# ---- the model -----------------------------------------------------------------------------------


class PatchAlignedModel(nn.Module):
    """Encoder, projector and language model, rebuilt from a plain dict that a checkpoint stores.

    config: vision, llm (folders or hub names), projector, pool, image_size (0: what the image
    processor says), geometry, feature_layer, prompt, coverage, tau, patch_weight, patch_loss
    (softmax | cosine), centre_words, stop_words (None: English); after stage 2 also tune (full |
    lora) and lora {rank, alpha, dropout, modules}. pretrain.py's flags say what each is. Without
    `weights` nothing is read but configurations: all is on torch's meta device, and the tokenizer
    is None where there is none.
    InputError: a backbone that cannot be loaded.
    """

    def __init__(self, config: dict, dtype: torch.dtype = torch.float32, weights: bool = True):
        super().__init__()
        vision, llm = find_model(config["vision"], "--vision"), find_model(config["llm"], "--llm")
        loaded = load_backbone(AutoModel, vision, "--vision", weights, dtype=dtype)
        loaded = getattr(loaded, "vision_model", loaded)                # the image half of a CLIP
        self.encoder = loaded.requires_grad_(False)
        loaded = load_backbone(AutoModelForCausalLM, llm, "--llm", weights, dtype=dtype)
        self.llm = loaded.requires_grad_(False)
        self.llm.generation_config = GenerationConfig()     # its own may penalise repetition
        self.tokenizer = load_backbone(AutoTokenizer, llm, "--llm", weights)

        settings = self.encoder.config
        layers = check_encoder(settings, vision).num_hidden_layers + 1
        if not -layers <= config["feature_layer"] < layers:
            raise InputError(f"--feature-layer {config['feature_layer']}: the encoder has {layers}"
                             " hidden states")
        processor = read_processor(vision)
        self.image_mean = processor.get("image_mean", [0.5] * 3)
        self.image_std = processor.get("image_std", [0.5] * 3)
        self.image_resample = processor.get("resample", 3)              # PIL's number of a filter
        self.patch_size = sides(settings.patch_size)  # (height, width), pixels
        size, self.encoder_grid = encoder_input(config["image_size"], processor, settings)
        self.encoder_patches = self.encoder_grid[0] * self.encoder_grid[1]  # P_v
        takes = inspect.signature(self.encoder.forward).parameters
        self.patchified = "spatial_shapes" in takes                         # it wants patches
        resized = self.encoder_grid != native_grid(settings) and "interpolate_pos_encoding" in takes
        self.encoder_options = {"interpolate_pos_encoding": True} if resized else {}

        self.config = dict(config, image_size=size, vision=vision, llm=llm)
        kind, pool, D = config["projector"], config.get("pool", 1), self.word_embeddings.shape[1]
        try:
            grid = output_grid(kind, self.encoder_grid, pool)
        except ValueError as error:
            raise InputError(f"--{error}") from None
        self.grid = None if isinstance(grid, int) else grid                 # rows x columns = P
        self.patches = grid if isinstance(grid, int) else grid[0] * grid[1]
        self.projector = PROJECTORS[kind](settings.hidden_size, D, self.encoder_grid, pool)
        self.embedding_scale = embedding_scale(self.llm)
        self.words_centre = None  # (D,), once it is needed
        if config.get("tune"):
            self.tune(config["tune"], config.get("lora"))
        if not weights:
            self.to("meta")
        self.train()

    def tune(self, what: str, lora: dict | None = None) -> None:
        """Make the language model trainable: full, or lora with the options of `add_lora`."""
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
        ids = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0
        return next(i for i in ids if i is not None)

    @property
    def image_form(self) -> tuple:
        """What `labels.transform_image` needs: size, geometry, mean, std, resample."""
        config = self.config
        return (config["image_size"], config["geometry"], self.image_mean, self.image_std,
                self.image_resample)

    @property
    def aspect(self) -> float:
        """Width / height of the encoder's input."""
        height, width = sides(self.config["image_size"])
        return width / height

    def records(self, path: str, image_dir: str, regions: str = "", max_length: int = 2048,
                require_image: bool = True, checked: bool = True) -> Records:
        """The records of a file as samples for this model; checked: see `Records`."""
        size, geometry, mean, std, resample = self.image_form
        return Records(
            read_records(path, regions or None), image_dir, self.tokenizer, image_size=size,
            geometry=geometry, grid=self.grid or self.patches, mean=mean, std=std,
            resample=resample, stop_words=self.config.get("stop_words"), checked=checked,
            prompt=self.config["prompt"], max_length=max_length, coverage=self.config["coverage"],
            require_image=require_image, source=path, pad_id=self.pad_id)

    def train(self, mode: bool = True):
        """Training mode for what is trained; frozen backbones never drop out."""
        super().train(mode)
        self.encoder.eval()
        if not self.config.get("tune"):
            self.llm.eval()
        return self

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, by name: what a checkpoint holds.

        Every rank must call this where they are sharded; they are gathered one by one, for rank 0.
        """
        trained, state = {n for n, p in self.named_parameters() if p.requires_grad}, {}
        for name, tensor in self.state_dict().items():
            if name in trained:
                sharded = isinstance(tensor, DTensor)
                whole = tensor.full_tensor() if sharded else tensor
                if not sharded or tensor.device_mesh.get_rank() == 0:
                    state[name] = whole.detach().cpu()
        return state

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (N, 3, height, width) -> Z (N, P_v, D_v), float32. InputError: too few tokens.

        Tokens before the patches (class, registers) are dropped.
        """
        pixels = pixel_values.to(self.device, next(self.encoder.parameters()).dtype)
        inputs = dict(pixel_values=pixels)
        if self.patchified:
            inputs = patchify(pixels, self.patch_size)
        states = self.encoder(**inputs, output_hidden_states=True, **self.encoder_options)
        Z = states.hidden_states[self.config["feature_layer"]]
        if Z.shape[1] < self.encoder_patches:
            raise InputError(f"--vision {self.config['vision']}: {Z.shape[1]} tokens for"
                             f" {self.encoder_patches} patches; its patches are not of one size")
        return Z[:, -self.encoder_patches:].float()

    def splice(self, input_ids: torch.Tensor, H: torch.Tensor,
               places: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings (B, T, D), with the rows of H (N, P, D) in the places of IMAGE_TOKEN.

        places (N P,): indices into the flat ids; looking them up would mean waiting for a GPU.
        """
        if places is None:
            places = (input_ids.flatten() == IMAGE_TOKEN).nonzero().squeeze(1)
        if len(places) != H.shape[0] * H.shape[1]:
            raise InputError(f"{len(places)} image places in the text for {H.shape[0]} x"
                             f" {H.shape[1]} projected patches")
        text = input_ids.masked_fill(input_ids == IMAGE_TOKEN, 0)
        X = self.llm.get_input_embeddings()(text)                           # (B, T, D)
        rows = H.flatten(0, 1).to(X.dtype)                                  # (N P, D)
        return X.flatten(0, 1).index_copy(0, places, rows).view_as(X)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Sums and counts of the losses over a batch from `data.collate`.

        -> {caption_loss, caption_tokens} over what the assistant says; in stage 1 also {patch_loss,
        patches}. The caller divides once, after adding up batches and ranks. With patch_weight 0
        the patch loss is measured, without a gradient. batch["features"] (N, P_v, D_v), if there,
        is Z.

        Nothing here waits for a GPU: no loss is read, and what the host must know `collate` has
        read off. Padding stands on the right, where no label is and no causal attention looks, so
        the language model needs no mask and takes its fastest attention.
        """
        config, images = self.config, len(batch["patch_ids"])               # images: N
        if not images:                              # text alone: any image, taken 0 times, so that
            width = self.encoder.config.hidden_size                         # gradients exist, as 0
            Z = torch.zeros(1, self.encoder_patches, width, device=self.device)
        else:
            Z = batch["features"] if "features" in batch else self.encode(batch["pixel_values"])
        H = self.projector(Z)                                               # (N, P, D)
        X = self.splice(batch["input_ids"], H[:images], batch["places"])    # (B, T, D)
        X = X + 0 * H.sum().to(X.dtype)

        labels, first = batch["labels"], batch["first_label"]               # (B, T)
        T = labels.shape[1]
        keep = torch.arange(first - 1, T - 1, device=labels.device)         # t predicted at t - 1
        with never_packed():
            logits = self.llm(inputs_embeds=X, logits_to_keep=keep, use_cache=False).logits
        targets = labels[:, first:]                                         # (B, T - first)
        caption = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(),
                                  ignore_index=IGNORE, reduction="sum")
        sums = dict(caption_loss=caption, caption_tokens=(targets != IGNORE).sum())
        return sums if config.get("tune") else sums | self.patch_sums(H, batch)

    def patch_sums(self, H: torch.Tensor, batch: dict) -> dict[str, torch.Tensor]:
        """{patch_loss, patches} of H (N, P, D): the sum over labelled patches, and their number.

        The gradient is by H alone: W is frozen, so `patch_loss` treats it as a constant.
        """
        config, W = self.config, self.word_embeddings
        rows = (H if config["patch_weight"] else H.detach()).flatten(0, 1)  # (N P, D)
        ids, weights = batch["patch_ids"].flatten(0, 1), batch["patch_weights"].flatten(0, 1)
        if config.get("centre_words"):
            if self.words_centre is None:
                self.words_centre = W.float().mean(0)
            rows = rows - self.embedding_scale * self.words_centre
            W = W - self.words_centre.to(W.dtype)
        if config["patch_loss"] == "cosine":
            patch, patches = cosine_loss(rows, W, ids, weights)
        else:
            patch, patches = patch_loss(rows, W, ids, weights, config["tau"])
        return dict(patch_loss=patch, patches=patches)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], pixel_values: torch.Tensor,
                 max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to prompts (token ids of `data.tokenize_prompt`) and the images they have.

        Shorter prompts are padded on the left, so that all answers begin at one position.
        """
        T, device = max(map(len, prompts)), self.device
        ids = torch.tensor([[self.pad_id] * (T - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
        H = torch.empty(0, 0, self.word_embeddings.shape[1], device=device)
        if len(pixel_values):
            H = self.projector(self.encode(pixel_values))
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
            pad_token_id=self.pad_id, eos_token_id=end_ids(self.tokenizer, self.config["prompt"]))
        X = self.splice(ids, H)                                             # (B, T, D)
        answers = self.llm.generate(inputs_embeds=X, attention_mask=mask,
                                    generation_config=greedy)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]


@contextlib.contextmanager
def never_packed():
    """Our samples are never packed into one row.

    Without a mask transformers looks for that in the positions, in every forward pass, and the host
    waits for a GPU's answer. Here it does not look.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


# ---- LoRA ----------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear map with low-rank factors: base(x) + alpha / rank * B A dropout(x).

    Hu et al., ICLR 2022. A (rank, in) and B (out, rank) are float32; B starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
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
    """Freeze `llm`; put LoRA in the place of its linear maps with these names, [] for all but the
    output head. InputError: a name that none has."""
    llm.requires_grad_(False)
    linear = {name: module for name, module in llm.named_modules()
              if isinstance(module, nn.Linear) and module is not llm.get_output_embeddings()}
    short = {name: name.rsplit(".", 1)[-1] for name in linear}
    if set(modules) - set(short.values()):
        raise InputError(f"--lora-modules {' '.join(modules)}: choose from the language model's"
                         f" linear maps, {' '.join(sorted(set(short.values())))}")
    for name, module in linear.items():
        if not modules or short[name] in modules:
            llm.set_submodule(name, LoRA(module, rank, alpha, dropout))


def merge_lora(model: PatchAlignedModel) -> None:
    """Turn LoRA's factors into weights: from then on the model is like one tuned in full."""
    for name, module in list(model.llm.named_modules()):
        if isinstance(module, LoRA):
            model.llm.set_submodule(name, module.merged())
    model.llm.requires_grad_(True)
    model.config = {k: v for k, v in model.config.items() if k != "lora"} | {"tune": "full"}


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path: Path, model: PatchAlignedModel, stage: str, metrics: dict,
                    state: dict | None = None) -> None:
    """Write {stage, config, model, metrics, version}: tensors and plain values only.

    path: the caller's temporary file; state: of `trained_state`, where it was called before.
    """
    state = model.trained_state() if state is None else state
    values = dict(stage=stage, config=model.config, model=state, metrics=metrics, version=VERSION)
    torch.save(values, path)


def read_checkpoint(path) -> dict:
    """The dict of a checkpoint file, read without running code. InputError: missing or not ours."""
    path = Path(path)
    if not path.is_file():
        inside = path / "ckpt.pt"
        hint = f"{inside} is one" if inside.is_file() else ("torchrun pretrain.py writes one to"
                                                            " runs/pretrain/ckpt.pt")
        raise InputError(f"{path}: no such checkpoint file; {hint}")
    try:
        with warnings.catch_warnings(action="ignore"):      # the error says it all
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                   # whatever a foreign file makes torch raise
        raise InputError(f"{path}: not a checkpoint of this project (only tensors and plain values"
                         " are read, a pickle that runs code is refused unread)") from None
    keys = {"stage", "config", "model", "metrics", "version"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of this project (it needs stage, config, model,"
                         " metrics and version)")
    version = checkpoint["version"]
    if not isinstance(version, int) or version > VERSION:
        raise InputError(f"{path}: written by a newer version of this project (format {version},"
                         f" known up to {VERSION})")
    return checkpoint


def load_checkpoint(path, device="cpu",
                    dtype: torch.dtype = torch.float32) -> tuple[PatchAlignedModel, dict]:
    """Rebuild the model of a checkpoint unaided -> (model, checkpoint).

    InputError: see `read_checkpoint` and `load_trained`; a backbone that is gone.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint["stage"] == "plan":
        raise InputError(f"{path}: a plan of pretrain.py --dry-run, which has no weights;"
                         " name a ckpt.pt")
    model = PatchAlignedModel(checkpoint["config"], dtype)
    load_trained(model, checkpoint["model"], path)
    return model.to(device), checkpoint


def load_trained(model: PatchAlignedModel, saved: dict[str, torch.Tensor], path) -> None:
    """Load what `trained_state` returned. InputError unless every tensor has its place and finite
    values, and exactly the frozen ones are missing."""
    own = model.state_dict()
    check_finite(saved.items(), str(path))
    for name, tensor in saved.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such tensor"
            raise InputError(f"{path}: {name} {tuple(tensor.shape)} does not fit the backbones"
                             f" {model.config['vision']} and {model.config['llm']} ({shape}); it"
                             " was trained with others")
    missing = set(model.load_state_dict(saved, strict=False).missing_keys)
    lost = missing & {name for name, p in model.named_parameters() if p.requires_grad}
    if lost:
        raise InputError(f"{path}: {', '.join(sorted(lost))} missing; the file is incomplete")
