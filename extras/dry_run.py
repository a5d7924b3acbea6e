"""What a stage will take, before a GPU is rented: parameters, tokens, FLOPs, memory (--dry-run).

Nothing is estimated from the names of layers. One step is run, the stage's own `forward`, backward
pass and optimizer, on torch's meta device, where tensors have shapes but no numbers and no memory.
While it runs, three things are watched:

    FLOPs         every matrix product (m, k) (k, n) counts 2 m k n (torch.utils.flop_counter)
    activations   the storages that autograd keeps for the backward pass, parameters apart
    memory        the bytes of all tensors alive; the peak is the most there ever was

The forms behind it (Kaplan et al. 2020; Hu et al. 2022 for LoRA). Per sample of T tokens, a part
with N weights in its linear maps and L layers of attention of width A takes F = 2 N T + 4 L A T^2
in the forward pass. The encoder takes F; the frozen language model below which the projector is
trained, 2 F; one trained in full, 3 F; recomputed activations, about one F more. The patch loss
takes two products, 4 n V D for n patches.

What a GPU does otherwise is put in its place: automatic mixed precision, fused attention, the fused
patch loss's working memory. Not counted: CUDA itself (0.5 to 1 GiB), fragments of the allocator,
and buffers for messages. Sharding is not run: see `sharded`.
"""
import contextlib
import itertools
import shlex
import sys
import weakref
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import runtime
from data import StepSampler
from kernels.patch_loss import FUSED_SCRATCH, run_sweep
from labels import sides
from model import LoRA
from runtime import InputError

TARGETS = 4                     # tokens that name a patch, for the size of Y: it hardly matters

# ---- what a GPU does otherwise than the meta device ----------------------------------------------

LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
       torch.Tensor.__rmatmul__, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
       F.scaled_dot_product_attention, F.multi_head_attention_forward}
HIGH = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax,
        torch.log_softmax, F.cross_entropy, F.softplus, torch.rsqrt, torch.Tensor.rsqrt, torch.pow,
        torch.Tensor.pow, torch.Tensor.__pow__, torch.exp, torch.Tensor.exp, torch.log}


class Shapes(TorchFunctionMode):
    """Runs on tensors without numbers what was written for a GPU: LOW in `dtype`, HIGH in float32.

    These are torch.autocast's rules, which the meta device lacks; with float32 there are none.
    copies: {id: (weight, copy)} of trained weights in `dtype`, which autocast keeps while on.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def __exit__(self, *error):
        self.copies = {}
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__bool__:       # an encoder asks its mask: is there padding?
            return False
        if self.dtype != torch.float32 and function in LOW:
            args, kwargs = tree_map(self.low, (args, kwargs))
        elif self.dtype != torch.float32 and function in HIGH:
            args, kwargs = tree_map(high, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return function(*args, **kwargs)

    def low(self, x):
        """A floating-point tensor in the dtype of the products; a trained weight is copied once."""
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


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention as a GPU runs it: never all (T, T) scores in memory."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3)
                      for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill_(attn_mask.logical_not(), float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, trained, dropout_p, is_causal, scale=scale)[0]


def patch_loss_shapes(h, w, ids, weights, tau):
    """The patch loss's shapes: its gradient, and at most the fused path's working memory."""
    def sweep(h, w, ids, weights, tau, need_grad):
        scratch = min(FUSED_SCRATCH, len(h) * (w.shape[0] + w.shape[1]) * w.itemsize)
        torch.empty(scratch, dtype=torch.uint8, device=h.device)
        loss, labelled = torch.zeros(2, device=h.device)
        return loss, torch.zeros_like(h) if need_grad else None, labelled

    return run_sweep(sweep, h, w, ids, weights, tau)


# ---- watching a step -----------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The bytes of all tensors alive, and the most there ever were since `peak` was last set."""

    def __init__(self, tensors=()):
        super().__init__()
        self.sizes, self.bytes, self.peak = {}, 0, 0
        for tensor in tensors:
            self.add(tensor)

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
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            self.add(tensor)
        return result


@contextlib.contextmanager
def saved_for_backward(model):
    """-> {storage: bytes} of what autograd keeps meanwhile, parameters and buffers apart."""
    own = {id(t.untyped_storage()) for t in itertools.chain(model.parameters(), model.buffers())}
    storages, sizes = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in own:                  # held, or another storage might get its id
            storages[id(storage)], sizes[id(storage)] = storage, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    storages.clear()


class Shape(NamedTuple):
    """Of a forward pass: samples B, images N, tokens per sample T, position of the first label."""
    samples: int
    images: int
    T: int
    first: int


def meta_batch(model, shape: Shape) -> dict[str, torch.Tensor]:
    """A batch as `data.collate` makes it, of shapes alone."""
    B, N, T, first = shape
    P, size = model.patches, sides(model.config["image_size"])
    integers = dict(dtype=torch.int64, device="meta")
    return dict(
        input_ids=torch.empty(B, T, **integers), labels=torch.empty(B, T, **integers),
        places=torch.empty(N * P, **integers), first_label=first,
        pixel_values=torch.empty(N, 3, *size, device="meta"),
        patch_ids=torch.empty(N, P, TARGETS, **integers),
        patch_weights=torch.empty(N, P, TARGETS, device="meta"))


def forward_backward(model, shape: Shape, dtype: torch.dtype, checkpointing: bool, watch,
                     between=lambda: None) -> dict[str, int]:
    """A forward and a backward pass over one batch, watched; `between` is called between them.

    -> {saved: bytes of activations kept for the backward pass, copies: of weights in `dtype`}.
    """
    shapes = Shapes(dtype)
    if checkpointing:                               # what is run again needs the same rules
        def again():
            return contextlib.nullcontext(), Shapes(dtype)
        options = dict(use_reentrant=False, context_fn=again)
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with mock.patch("model.patch_loss", patch_loss_shapes), watch:
        batch = meta_batch(model, shape)
        with saved_for_backward(model) as saved:
            with shapes:
                sums = model(batch)
                storages = [copy.untyped_storage() for _, copy in shapes.copies.values()]
                copies = {id(storage): storage.nbytes() for storage in storages}
            loss = sums["caption_loss"] + sums.get("patch_loss", 0)
            result = dict(saved=sum(n for key, n in saved.items() if key not in copies),
                          copies=sum(n for key, n in copies.items() if key in saved))
        del sums, storages                          # as in the stages, only the loss is held on to
        between()
        loss.backward()
    return result


def count_flops(model, shape: Shape, dtype: torch.dtype,
                checkpointing: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of a (forward, backward) pass, each {encoder, projector, llm, all}; no patch loss."""
    def parts():
        counts = counter.get_flop_counts()
        names = {n: f"PatchAlignedModel.{n}" for n in ("encoder", "projector", "llm")}
        names["all"] = "Global"
        return {n: sum(counts.get(key, {}).values()) for n, key in names.items()}

    counter, forward = FlopCounterMode(display=False), {}
    forward_backward(model, shape, dtype, checkpointing, counter, lambda: forward.update(parts()))
    return forward, {name: count - forward[name] for name, count in parts().items()}


# ---- memory --------------------------------------------------------------------------------------


def bytes_of(tensors) -> int:
    """Their size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(model, shape: Shape, dtype: torch.dtype, accumulate: bool,
           checkpointing: bool = False) -> dict[str, int]:
    """Bytes by part of a step: frozen, trained, copies, gradients, optimizer, saved; two peaks.

    pass_peak: the most alive in forward and backward pass; update_peak: in the update. accumulate:
    gradients of earlier micro-batches are there. The stages' update is the fused one, in place.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    every = itertools.chain(model.parameters(), model.buffers())
    frozen = [t for t in every if not t.requires_grad]
    live = Live([*trained, *frozen])
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)    # fused knows no meta tensors
    with live:                                      # a first update makes the optimizer's state
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
    state = [t for own in optimizer.state.values() for t in own.values() if t.is_meta]
    return run | dict(frozen=bytes_of(frozen), trained=bytes_of(trained),
                      gradients=bytes_of(trained), optimizer=bytes_of(state), pass_peak=pass_peak,
                      update_peak=live.peak)


def sharded(model, shape: Shape, dtype: torch.dtype, world: int,
            checkpointing: bool) -> dict[str, int]:
    """The same per GPU under FSDP2 over `world` processes, as sft.shard splits the model.

    Weights, gradients and optimizer state are float32, 1 / world each; the encoder is whole.
    Activations are run, in `dtype`; what is gathered is counted: all that is in no decoder layer
    stays gathered from forward to backward pass, with gradients; of the layers one is in use while
    the next comes, and one layer's gradients wait to be summed. It leaves the model in `dtype`.
    """
    lists = [m for m in model.llm.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=len)
    whole = [*model.llm.parameters(), *model.projector.parameters()]

    def count(parameters):
        parameters = list(parameters)
        return (sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad))

    (split, trained), (layer, layer_trained) = count(whole), count(layers[0].parameters())
    root, root_trained = split - len(layers) * layer, trained - len(layers) * layer_trained
    gathered = dtype.itemsize * (root + root_trained + 2 * layer + layer_trained)
    gathered += 4 * layer_trained

    model.llm.to(dtype), model.projector.to(dtype)
    def scatter(p):
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(scatter) for p in whole if p.requires_grad]
    live = Live(itertools.chain(model.parameters(), model.buffers()))
    before, live.peak = live.bytes, live.bytes
    run = forward_backward(model, shape, dtype, checkpointing, live)
    for handle in handles:
        handle.remove()
    frozen = bytes_of(model.encoder.parameters())
    part = dict(frozen=frozen + 4 * (split - trained) // world, trained=4 * trained // world,
                copies=gathered, gradients=4 * trained // world, optimizer=8 * trained // world,
                saved=run["saved"])
    static = sum(part[key] for key in ("frozen", "trained", "optimizer", "gradients"))
    return part | dict(pass_peak=static + gathered + live.peak - before, update_peak=static)


# ---- report --------------------------------------------------------------------------------------


def precision(args) -> torch.dtype:
    """The dtype of the products that --dtype means on the GPU to be rented: auto is bfloat16."""
    return torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)


def parameters(model) -> list[list]:
    """The table of parameters: all and trained ones, part by part."""
    names = {"encoder": "vision encoder", "projector": f"projector ({model.config['projector']})",
             "llm": "language model"}
    counted = []
    for name in names:
        own = list(getattr(model, name).parameters())
        counted.append([sum(p.numel() for p in own if p.requires_grad or every)
                        for every in (True, False)])
    rows = [[f"  {label}", f"{every:,}", f"{own:,}"]
            for label, (every, own) in zip(names.values(), counted)]
    W, head = model.word_embeddings, model.llm.get_output_embeddings()
    tied = head is None or head.weight is W
    rows.append([f"    word embeddings{' and output head' * tied}", f"{W.numel():,}", "in it"])
    if not tied:
        rows.append(["    output head", f"{head.weight.numel():,}", "in it"])
    factors = [p for m in model.llm.modules() if isinstance(m, LoRA) for p in (m.A, m.B)]
    if factors:
        rows.append(["    LoRA's factors", f"{sum(p.numel() for p in factors):,}", "in it"])
    return [["parameters", "all", "trained"], *rows,
            ["  all", *(f"{sum(column):,}" for column in zip(*counted))]]


def report(model, args, stage: str) -> None:
    """Print what a run of a stage with checked flags `args` takes; all samples --max-length long.

    model: on the meta device, made ready as the stage makes it. InputError: no room for text.
    """
    dtype, world, T = precision(args), runtime.world(), args.max_length
    StepSampler(1, args.batch_size, args.seed, 0, world)    # refuses what processes cannot share
    share = args.batch_size // world
    micro = min(args.micro_batch or share, share)
    passes = -(-share // micro)
    shards, checkpointing = getattr(args, "shard", False), getattr(args, "checkpointing", False)
    P, (V, D) = model.patches, model.word_embeddings.shape
    if P + 1 >= T:
        raise InputError(f"--max-length {T} leaves no room for text beside an image's {P} tokens")
    shape = Shape(micro, micro, T, P + 1)                   # all of the text is answers
    tables = [parameters(model)]                            # before sharding changes their dtypes

    forward, backward = count_flops(model, shape, dtype, checkpointing)
    patch = 0
    if stage == "pretrain" and model.config["patch_loss"] == "softmax":
        patch = (4 if model.config["patch_weight"] else 2) * micro * P * V * D
    total = (forward["all"] + backward["all"] + patch) * args.batch_size / micro
    unit, name = (1e12, "TFLOP") if total > 1e13 else (1e9, "GFLOP")
    scale = args.batch_size / micro / unit
    labels = {"encoder": "vision encoder", "projector": "projector", "llm": "language model"}
    rows = [[f"  {label}", forward[k] * scale, backward[k] * scale] for k, label in labels.items()]
    if patch:
        rows.append(["  patch loss, with every patch labelled", patch * scale, 0.0])
    tables.append([[f"{name} per step", "forward", "backward"], *rows,
                   ["  all, both ways", "", total / unit]])

    low = str(dtype).split(".")[1]
    if shards:
        used = sharded(model, shape, dtype, world, checkpointing)
    else:
        used = memory(model, shape, dtype, passes > 1, checkpointing)
    labels = dict(
        frozen="weights, frozen", trained="weights, trained, float32", gradients="gradients",
        optimizer="AdamW's two moments",
        copies=f"gathered, {low}" if shards else f"weights' copies in {low}",
        saved="activations kept for the backward pass")
    early = [key for key in labels if key != "gradients" or passes > 1 or shards]
    peak = max(used["pass_peak"], used["update_peak"])
    unit, name = (2**30, "GiB") if peak > 2**33 else (2**20, "MiB")
    lines = [[label, used[key]] for key, label in labels.items() if used[key]]
    lines += [["temporary, at the peak of the passes",
               used["pass_peak"] - sum(used[key] for key in early)],
              ["peak of forward and backward pass", used["pass_peak"]],
              ["peak of the update", used["update_peak"]], ["peak", peak]]
    tables.append([[f"{name} per GPU", ""], *[[f"  {k}", size / unit] for k, size in lines]])

    runtime.log(f"dry run of {stage}: {model.config['vision']} ({model.config['image_size']} px)"
                f" and {model.config['llm']}, {low}\nbatch {args.batch_size} = {world} processes x"
                f" {passes} x {micro}{', in shards' * shards}"
                f"{', activations recomputed' * checkpointing}\ntokens per sample: {P} of the"
                f" image, text up to --max-length {T}, all of it answers")
    for rows in tables:
        runtime.log("\n" + runtime.table(rows))


def command(script: str) -> str:
    """The command line that was given, as a shell takes it, without --dry-run."""
    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    many = f"--nproc_per_node {runtime.world()} " * (runtime.world() > 1)
    return f"torchrun {many}{script} {shlex.join(words)}".strip()
