"""What a stage will take, before a GPU is rented: parameters, tokens, FLOPs and memory, from configuration alone (--dry-run).

    python pretrain.py @presets/llava-1.5-7b.pretrain.txt --dry-run
    WORLD_SIZE=8 python sft.py runs/llava-1.5-7b/pretrain/plan.pt @presets/llava-1.5-7b.sft.txt --dry-run

Nothing is estimated from the names of layers: one step is run, the stage's own `forward`, backward pass and optimizer, on torch's meta
device, where tensors have shapes but no numbers and take no memory. So whatever encoder, projector or language model the stage takes,
this takes too. While it runs, three things are watched:

    FLOPs         every matrix product (m, k) (k, n) counts 2 m k n, as torch.utils.flop_counter does
    activations   the distinct storages that autograd keeps between the forward and the backward pass, parameters apart
    memory        the bytes of all tensors alive, from operation to operation; the peak is the most there ever was

Known forms of what is counted (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B; Hu et al. 2022 for LoRA): per sample of
T tokens, a part with N weights in its linear maps and L layers of attention of width A (heads times their width) takes

    forward       F = 2 N T + 4 L A T^2        scores and weighted sum, the half that the causal mask hides included: it is computed;
                                               the output head only where an answer is predicted
    frozen, nothing trained below it (the encoder)                    F
    frozen, the projector trained below it (stage 1)                  2 F: the gradient of activations alone
    trained in full                                                   3 F: and that of weights
    LoRA                                                              2 F, and 3 times the factors' own
    recomputed activations (--checkpointing)                          one F of the layers more, but for each layer's last product

The backward pass of fused attention makes the scores again: five products to the forward pass's two. The patch loss takes two products,
4 n V D for n patches, both in its forward pass (kernels/patch_loss.py).

What a GPU does otherwise than the meta device is put in its place: automatic mixed precision, memory-efficient attention, the fused patch
loss's working memory. Not counted: what CUDA and its libraries take (about 0.5 to 1 GiB), fragments of the allocator, and processes'
buffers for messages. Sharding is not run: see `sharded`.
"""
import contextlib
import itertools
import shlex
import sys
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import runtime
from data import InputError, StepSampler, read_records, sides, tokenize
from kernels.patch_loss import FUSED_SCRATCH, run_sweep
from model import LoRA

SAMPLED = 256                   # records whose lengths are looked at
TARGETS = 4                     # tokens that name a patch, for the size of Y: it hardly matters
H100 = 989e12                   # its dense bfloat16 FLOP/s, of the data sheet

# ------------------------------------------------------------------------------------- what a GPU does otherwise than the meta device

LOW = {F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.conv1d,
       torch.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.mm, torch.Tensor.mm,
       torch.bmm, torch.Tensor.bmm, torch.addmm, torch.baddbmm, torch.einsum, F.scaled_dot_product_attention,
       F.multi_head_attention_forward, torch._native_multi_head_attention}
HIGH = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax,
        torch.Tensor.log_softmax, F.cross_entropy, F.softplus, torch.rsqrt, torch.Tensor.rsqrt, torch.pow, torch.Tensor.pow,
        torch.Tensor.__pow__, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log}      # of torch.autocast's lists, what models use


class Shapes(TorchFunctionMode):
    """Runs on tensors without numbers what was written for a GPU.

    dtype       of the matrix products: torch.autocast's rules, which the meta device lacks; float32: none
    copies      the low-precision copies of trained weights, which autocast keeps while it is on: {id: (weight, copy)}
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def __exit__(self, *error):
        self.copies = {}
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__bool__:                  # what an encoder asks of its mask: "is there padding?"
            return False
        if self.dtype != torch.float32 and (function in LOW or function in HIGH):
            args, kwargs = tree_map(self.low if function in LOW else high, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return function(*args, **kwargs)

    def low(self, x):
        """A floating-point tensor in the dtype of the products; a trained weight is converted once."""
        if not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if not (x.requires_grad and x.is_leaf):
            return x.to(self.dtype)
        if id(x) not in self.copies:
            self.copies[id(x)] = x, x.to(self.dtype)
        return self.copies[id(x)][1]


def high(x):
    """A low-precision tensor in float32."""
    return x.float() if torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16) else x


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention as a GPU runs it: never the (T, T) scores of all heads in memory."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale)[0]


def patch_loss_shapes(h, w, ids, weights, tau):
    """The patch loss's shapes: its gradient, and at most the fused path's working memory."""
    def sweep(h, w, ids, weights, tau, need_grad):
        torch.empty(min(FUSED_SCRATCH, len(h) * (w.shape[0] + w.shape[1]) * w.itemsize), dtype=torch.uint8, device=h.device)
        return torch.zeros((), device=h.device), torch.zeros_like(h) if need_grad else None

    return run_sweep(sweep, h, w, ids, weights, tau)


# ------------------------------------------------------------------------------------------------------------------- watching a step


class Live(TorchDispatchMode):
    """The bytes of all tensors alive, and the most there ever were since `peak` was last set."""

    def __init__(self):
        super().__init__()
        self.sizes, self.bytes, self.peak = {}, 0, 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, id(storage))

    def remove(self, key: int) -> None:
        """A storage was freed."""
        self.bytes -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.add(tensor)
        return result


@contextlib.contextmanager
def saved_for_backward(model):
    """-> {storage: bytes} of what autograd keeps while the context is open, parameters and buffers apart. Real models too."""
    own = {id(t.untyped_storage()) for t in itertools.chain(model.parameters(), model.buffers())}
    storages, sizes = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            storages[id(storage)], sizes[id(storage)] = storage, storage.nbytes()     # held, or another might get its id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    storages.clear()


@dataclass
class Shape:
    """The shape of a forward pass."""

    samples: int
    """B"""
    images: int
    """N"""
    T: int
    """tokens per sample, patches included"""
    first: int
    """position of the first token of an answer"""


def meta_batch(model, shape: Shape) -> dict[str, torch.Tensor]:
    """A batch as `data.collate` makes it, of shapes alone."""
    def integers(*size):
        return torch.empty(size, dtype=torch.int64, device="meta")

    B, N, T, P = shape.samples, shape.images, shape.T, model.grid[0] * model.grid[1]
    return dict(input_ids=integers(B, T), labels=integers(B, T), places=integers(N * P), first_label=shape.first,
                pixel_values=torch.empty(N, 3, *sides(model.config["image_size"]), device="meta"), patch_ids=integers(N, P, TARGETS),
                patch_weights=torch.empty(N, P, TARGETS, device="meta"))


def forward_backward(model, shape: Shape, dtype: torch.dtype, checkpointing: bool, watch, between=lambda: None) -> dict[str, int]:
    """Run a forward and a backward pass over one batch, with `watch` (a Live or a FlopCounterMode) watching and `between` called between
    them -> {saved: bytes of activations kept for the backward pass, copies: bytes of weights kept in `dtype` beside them}."""
    shapes = Shapes(dtype)
    if checkpointing:                                                    # what is run again needs the same rules, and copies of its own
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(
            use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), Shapes(dtype))))
    with mock.patch("model.patch_loss", patch_loss_shapes), watch:
        batch = meta_batch(model, shape)
        with saved_for_backward(model) as saved:
            with shapes:
                sums = model(batch)
                copies = {id(copy.untyped_storage()): copy.untyped_storage().nbytes() for _, copy in shapes.copies.values()}
            loss = sums["caption_loss"] + sums.get("patch_loss", 0)
            result = dict(saved=sum(size for key, size in saved.items() if key not in copies),
                          copies=sum(size for key, size in copies.items() if key in saved))
        del sums                                                         # as in the stages, only the loss is held on to
        between()
        loss.backward()
    return result


def count_flops(model, shape: Shape, dtype: torch.dtype, checkpointing: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of a (forward, backward) pass over one batch, each {encoder, projector, llm, all}; the patch loss apart. The counter keeps
    tensors alive, so that memory is measured without it."""
    def parts():
        counts = counter.get_flop_counts()
        return {name: sum(counts.get(key, {}).values()) for name, key in (
            ("encoder", "PatchAlignedModel.encoder"), ("projector", "PatchAlignedModel.projector"), ("llm", "PatchAlignedModel.llm"),
            ("all", "Global"))}

    counter, forward = FlopCounterMode(display=False), {}
    forward_backward(model, shape, dtype, checkpointing, counter, lambda: forward.update(parts()))
    return forward, {name: count - forward[name] for name, count in parts().items()}


# ------------------------------------------------------------------------------------------------------------------------- memory


def bytes_of(tensors) -> int:
    """Their size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(model, shape: Shape, dtype: torch.dtype, accumulate: bool, checkpointing: bool = False,
           foreach: bool = True) -> dict[str, int]:
    """Bytes by part of a step, run on the meta device: weights (frozen, trained), copies, gradients, optimizer, saved; pass_peak and
    update_peak: the most alive during forward and backward pass, and during the update. `accumulate`: gradients of earlier micro-batches
    are there; `foreach`: the optimizer takes all tensors at once, PyTorch's default on a GPU, which needs one more copy of them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [t for t in itertools.chain(model.parameters(), model.buffers()) if not t.requires_grad]
    live = Live()
    for tensor in (*trained, *frozen):
        live.add(tensor)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, foreach=foreach)
    with live:                                                           # a first update, which makes the optimizer's state
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
    if not accumulate:
        optimizer.zero_grad(set_to_none=True)
    live.peak = live.bytes
    run = forward_backward(model, shape, dtype, checkpointing, live)
    pass_peak, live.peak = live.peak, live.bytes
    with live:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if t.device.type == "meta"]
    return dict(frozen=bytes_of(frozen), trained=bytes_of(trained), copies=run["copies"], gradients=bytes_of(trained),
                optimizer=bytes_of(state), saved=run["saved"], pass_peak=pass_peak, update_peak=live.peak)


def sharded(model, shape: Shape, dtype: torch.dtype, world: int, checkpointing: bool) -> dict[str, int]:
    """The same per GPU under FSDP2 over `world` processes, as sft.shard splits the model: weights, gradients and optimizer state in
    float32, 1 / world each; the encoder whole. Activations are run, in `dtype`; what is gathered is counted: all that is in no decoder
    layer (word embeddings, head, projector) stays gathered from forward to backward pass, with gradients; of the layers one is in use
    while the next comes, and one layer's gradients wait to be summed, in `dtype` and in float32. It leaves the model in `dtype`.
    """
    layers = max((m for m in model.llm.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    whole = [*model.llm.parameters(), *model.projector.parameters()]
    split, trained = sum(p.numel() for p in whole), sum(p.numel() for p in whole if p.requires_grad)
    layer = sum(p.numel() for p in layers[0].parameters())
    layer_trained = sum(p.numel() for p in layers[0].parameters() if p.requires_grad)
    root, root_trained = split - len(layers) * layer, trained - len(layers) * layer_trained
    width = dtype.itemsize
    gathered = width * (root + root_trained + 2 * layer + layer_trained) + 4 * layer_trained

    model.llm.to(dtype), model.projector.to(dtype)
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in whole if p.requires_grad]    # scattered
    live = Live()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        live.add(tensor)
    before, live.peak = live.bytes, live.bytes
    run = forward_backward(model, shape, dtype, checkpointing, live)
    for handle in handles:
        handle.remove()
    frozen = bytes_of(model.encoder.parameters())
    part = dict(frozen=frozen + 4 * (split - trained) // world, trained=4 * trained // world, copies=gathered,
                gradients=4 * trained // world, optimizer=8 * trained // world, saved=run["saved"])
    static = part["frozen"] + part["trained"] + part["optimizer"] + part["gradients"]
    return part | dict(pass_peak=static + gathered + live.peak - before, update_peak=static + 4 * trained // world)


# ------------------------------------------------------------------------------------------------------------------- tokens per sample


@dataclass
class Lengths:
    """Tokens per sample, patches included."""

    note: str
    """where they come from"""
    mean: float
    """of a sample"""
    padded: float
    """of a sample, padded to the longest of its micro-batch"""
    longest: int
    first: int
    """position of the earliest answer"""
    images: float
    """share of samples with an image"""


def lengths(model, path: str, max_length: int, micro: int) -> Lengths:
    """Lengths of samples: of up to SAMPLED records of the file `path`, evenly spaced, or their bound. InputError: unusable records, or
    a max_length without room for text."""
    P = model.grid[0] * model.grid[1]
    if P + 1 >= max_length:
        raise InputError(f"--max-length {max_length} leaves no room for text beside an image's {P} tokens")
    if not path or model.tokenizer is None:
        missing = "no --data given" if not path else f"{model.config['llm']} has no tokenizer that can be read"
        return Lengths(f"{missing}: text up to --max-length {max_length}, all of it answers", *[max_length] * 3, P + 1, 1.0)
    records = read_records(path)
    chosen = range(0, len(records), -(-len(records) // SAMPLED))
    rows = []
    for i in chosen:
        image = records[i].get("image") is not None
        _, labels = tokenize(records[i].get("conversations"), model.tokenizer, model.config["prompt"], P * image, max_length,
                             f"{path}: record {records[i].get('id', i)}")
        rows.append((len(labels), next(j for j, label in enumerate(labels) if label >= 0), image))
    totals = [total for total, _, _ in rows]
    groups = [totals[i: i + micro] for i in range(0, len(totals), micro)]
    padded = sum(max(group) * len(group) for group in groups) / len(totals)
    return Lengths(f"{len(rows)} of {len(records)} records of {path}", sum(totals) / len(totals), padded, max(totals),
                   min(first for _, first, _ in rows), sum(image for _, _, image in rows) / len(rows))


# -------------------------------------------------------------------------------------------------------------------------- report


def precision(args) -> torch.dtype:
    """The dtype of the matrix products that --dtype means on the GPU that may be rented: auto is bfloat16."""
    return torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)


def report(model, args, data: str, stage: str) -> None:
    """Print what the run of a stage with flags `args` (checked: batch_size is set) would take. model: on the meta device, made ready as
    the stage makes it. data: the file of its records, "" for none. Adds to the parameters' dtypes those that --dtype says."""
    dtype, world = precision(args), runtime.world()
    StepSampler(1, args.batch_size, args.seed, 0, world)                 # refuses a batch that the processes cannot share
    share = args.batch_size // world
    micro = min(args.micro_batch or share, share)
    passes = -(-share // micro)
    tokens = lengths(model, data, args.max_length, micro)
    is_sharded = getattr(args, "shard", False)
    P, V, D = model.grid[0] * model.grid[1], *model.word_embeddings.shape

    # ---- parameters, before sharding changes their dtypes
    names = dict(encoder=model.encoder, projector=model.projector, llm=model.llm)
    counted = {name: (sum(p.numel() for p in m.parameters()), sum(p.numel() for p in m.parameters() if p.requires_grad))
               for name, m in names.items()}
    head = model.llm.get_output_embeddings()
    tied = head is None or head.weight is model.word_embeddings
    factors = sum(p.numel() for m in model.llm.modules() if isinstance(m, LoRA) for p in (m.A, m.B))
    rows = [["parameters", "all", "trained"], *[[f"  {label}", f"{counted[name][0]:,}", f"{counted[name][1]:,}"] for name, label in
            (("encoder", "vision encoder"), ("projector", f"projector ({model.config['projector']})"), ("llm", "language model"))]]
    rows += [["    word embeddings" + (" and output head" if tied else ""), f"{V * D:,}", "in it"]]
    rows += [] if tied else [["    output head", f"{head.weight.numel():,}", "in it"]]
    rows += [["    LoRA's factors", f"{factors:,}", "in it"]] if factors else []
    rows += [["  all", *(f"{sum(column):,}" for column in zip(*counted.values()))]]

    # ---- FLOPs: a micro-batch of the usual length
    checkpointing = getattr(args, "checkpointing", False)
    usual = Shape(micro, round(micro * tokens.images) or 1, round(tokens.padded), min(tokens.first, round(tokens.padded) - 1))
    forward, backward = count_flops(model, usual, dtype, checkpointing)
    patch = 0
    if stage == "pretrain" and model.config["patch_loss"] == "softmax":
        patch = (4 if model.config["patch_weight"] else 2) * usual.images * P * V * D
    total = (forward["all"] + backward["all"] + patch) * args.batch_size / micro
    unit, name = (1e12, "TFLOP") if total > 1e13 else (1e9, "GFLOP")
    scale = args.batch_size / micro / unit
    table = [[f"{name} per step", "forward", "backward"], *[[f"  {label}", forward[key] * scale, backward[key] * scale]
             for key, label in (("encoder", "vision encoder"), ("projector", "projector"), ("llm", "language model"))]]
    table += [["  patch loss, with every patch labelled", patch * scale, 0.0]] if patch else []
    table += [["  all, both ways", "", total / unit]]

    # ---- memory: a micro-batch of the longest
    longest = Shape(micro, micro, tokens.longest, tokens.first)
    if is_sharded:
        used = sharded(model, longest, dtype, world, checkpointing)
    else:
        used = memory(model, longest, dtype, passes > 1, checkpointing)
    low = str(dtype).removeprefix("torch.")
    labels = dict(frozen="weights, frozen", trained="weights, trained, float32", gradients="gradients", optimizer="AdamW's two moments",
                  copies=f"gathered, {low}" if is_sharded else f"weights' copies in {low}",
                  saved="activations kept for the backward pass")
    present = [key for key in labels if key != "gradients" or passes > 1 or is_sharded]        # else they come as activations go
    peak = max(used["pass_peak"], used["update_peak"])
    unit, name = (2**30, "GiB") if peak > 2**33 else (2**20, "MiB")
    lines = [[label, used[key]] for key, label in labels.items() if used[key]]
    lines += [["temporary, at the peak of the passes", used["pass_peak"] - sum(used[key] for key in present)],
              ["peak of forward and backward pass", used["pass_peak"]], ["peak of the update", used["update_peak"]], ["peak", peak]]
    taken = [[f"{name} per GPU", ""], *[[f"  {label}", size / unit] for label, size in lines]]

    image = "x".join(map(str, model.grid))
    runtime.log(f"dry run of {stage}: {model.config['vision']} ({model.config['image_size']} px) and {model.config['llm']}, {low}")
    runtime.log(f"batch {args.batch_size} = {world} processes x {passes} x {micro}" + (", in shards" if is_sharded else "")
                + (", activations recomputed" if checkpointing else ""))
    runtime.log(f"tokens per sample: {P} of the image ({image}), text {tokens.mean - P * tokens.images:.0f}; padded {tokens.padded:.0f}, "
                f"longest {tokens.longest} ({tokens.note})")
    for part in (rows, table, taken):
        runtime.log("\n" + runtime.table(part))
    runtime.log(f"\nsteps in an hour on {world} H100 at 40% of {H100 / 1e12:.0f} bfloat16 TFLOP/s (a guess, small models reach "
                f"less): {3600 * 0.4 * H100 * world / total:,.0f}")


def command(script: str) -> str:
    """The command line that was given, as a shell takes it, without --dry-run."""
    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    launcher = f"torchrun --nproc_per_node {runtime.world()}" if runtime.world() > 1 else "torchrun"
    return f"{launcher} {script} {shlex.join(words)}".strip()
