"""Benchmark of the patch loss: time, memory and error beside everything else that computes it.

    python kernels/bench.py                     # every case of this machine, the important first
    python kernels/bench.py --budget 500        # stops before 500 s; the same command goes on
    python kernels/bench.py --tiles             # a GPU: the kernels with other tile sizes
    python kernels/bench.py --report            # measures nothing: table and JSON anew

Compared: our implementations; the plain definition, eager and compiled; its chunks with the
gradient formed in the forward pass, compiled; Liger-Kernel; Cut Cross-Entropy;
F.linear_cross_entropy; and as a floor two bare torch.mm, the scores and their weighted sum of
words, without a loss. On a GPU also a pretraining step of LLaVA-1.5-7B's shape.
CUDA_VISIBLE_DEVICES= measures a GPU machine's CPU.

Time: median of `--repeats` calls, after a fifth as many to warm up, on three sets of random inputs
in turn, provider after provider; all of it twice, so that the difference shows the noise. On a GPU:
CUDA events, L2 overwritten before each call. Memory: peak above what was there before the call; on
a CPU (Linux) resident memory. Error: relative to float64; if one of ours misses its gate, the exit
status is 1. Whatever a provider raises is its row; delete its line to have it measured again.

reads:  OUT/rows.jsonl: what is there is not measured again (same device, case, patch_loss.py)
writes: OUT/rows.jsonl (a line per row, as it comes), OUT/bench.json, OUT/bench.txt (the table)
"""
# Peers, wanted here alone: pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1. torch has
# F.linear_cross_entropy from 2.13 on. A peer that is missing is a row that says so.
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # `python kernels/bench.py` has only kernels/ on its path

import runtime  # noqa: E402
from data import IGNORE, IMAGE_TOKEN  # noqa: E402
from kernels import patch_loss as kernel  # noqa: E402
from kernels.patch_loss import (  # noqa: E402
    IMPLEMENTATIONS, TILES, Tile, compute_dtype, patch_loss, patch_loss_ref_grad)
from runtime import InputError  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BOTH = "forward+backward"
ANYWHERE = ("chunked", "reference")             # ours without kernels: all that a CPU has
GATES = {"bfloat16": 5e-3, "float32": 1e-5}     # largest error of ours, by the lower precision

# ---- cases and inputs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One problem. run: BOTH or "forward" are timed, "check" is not; edge: an odd input."""
    n: int
    d: int
    v: int
    k: int = 4
    tau: float = 0.07
    h: str = "bfloat16" if CUDA else "float32"
    w: str = "bfloat16" if CUDA else "float32"
    labelled: float = 1.0
    run: str = BOTH
    edge: str = ""


def cases(shapes: list[list[int]]) -> list[Case]:
    """The important ones first; all are a main shape with something changed."""
    def vary(base, **values):
        return [dataclasses.replace(base, **dict(zip(values, each)))
                for each in zip(*values.values())]

    usual = [(1152, 512, 32000), (1152, 576, 49152)]
    if CUDA:
        usual = [(4608, 4096, 32000), (18432, 4096, 32000), (4608, 4096, 128256)]
    main = [Case(*shape) for shape in shapes or usual]
    base = main[0]
    small = dataclasses.replace(base, n=min(515, base.n), v=min(32003, base.v + 3), run="check")
    found = main + vary(small, edge=["nothing labelled", "duplicate targets", "zero-norm word"])
    found += vary(small, h=["float32"], w=["float32"])
    found += [dataclasses.replace(case, run="forward") for case in main]
    if not shapes and CUDA:
        found += vary(base, n=[1152, 2304, 9216]) + vary(base, tau=[0.02], h=["float32"])
        found += vary(main[1], labelled=[0.25]) + vary(base, k=[1, 16])
    elif not shapes:
        found += vary(base, n=[288, 576, 2304]) + vary(base, v=[8000, 16000, 64000])
        found += vary(base, labelled=[0.25])
    return list(dict.fromkeys(found))


class Inputs(NamedTuple):
    """What a provider gets; w_hat, the unit rows of w, is made beforehand for who wants it."""
    h: torch.Tensor            # (n, D), requires grad
    w: torch.Tensor            # (V, D)
    w_hat: torch.Tensor        # (V, D)
    ids: torch.Tensor          # (n, K)
    weights: torch.Tensor      # (n, K)
    tau: float


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs: words of unequal length, as in language models, and patches at a cosine of 0.4
    from the sum of their words, as after some training: the softmax is neither flat nor a spike."""
    torch.manual_seed(seed)
    with DEVICE:
        w = 0.02 * torch.randn(case.v, case.d) * (0.2 * torch.randn(case.v, 1)).exp()
        w = w.to(getattr(torch, case.w))
        ids = torch.randint(case.v, (case.n, case.k))
        weights = torch.full((case.n, case.k), 1 / case.k)
        weights[torch.randperm(case.n)[round(case.n * case.labelled):]] = 0
        if case.edge == "nothing labelled":
            weights.zero_()
        elif case.edge == "duplicate targets":
            ids[:, -1] = ids[:, 0]
        elif case.edge == "zero-norm word":
            w[0], ids[::7, 0] = 0, 0
        w_hat = F.normalize(w.float(), dim=1).to(w.dtype)
        towards = F.normalize(F.embedding_bag(ids, w_hat, mode="sum").float(), dim=1)
        h = F.normalize(torch.randn(case.n, case.d), dim=1) + 0.45 * towards
        h = (h * (0.5 * torch.randn(case.n, 1)).exp()).to(getattr(torch, case.h))
    return Inputs(h.requires_grad_(), w, w_hat, ids, weights, case.tau)


# ---- providers -----------------------------------------------------------------------------------
#
# Each is a function of Inputs -> the mean loss over the labelled patches, differentiable in h. What
# the peers have in common, from h to x = ĥ / tau and from single to multiple targets, is timed with
# them; on a GPU it is compiled, as a careful user would.

fused = torch.compile(dynamic=False) if CUDA else lambda function: function
if CUDA:
    torch._dynamo.config.recompile_limit = 64   # beyond it a function would run uncompiled


@fused
def query(h, tau, dtype):
    """x = ĥ / tau: (n, D) in the dtype of W."""
    return (F.normalize(h.to(compute_dtype(h)), dim=1) / tau).to(dtype)


def target_words(w_hat, ids, weights):
    """sum_j Y_ij ŵ_j: (n, D)."""
    return F.embedding_bag(ids, w_hat, mode="sum", per_sample_weights=weights.to(w_hat.dtype))


def definition(x, w_hat, ids, weights):
    """The summed loss with the whole matrix: the product in W's dtype, the rest in float32."""
    scores = (x @ w_hat.T).to(compute_dtype(x))                                     # (n, V)
    target = (x.to(scores.dtype) * target_words(w_hat, ids, weights)).sum(1)        # (n,)
    return ((scores.logsumexp(1) - target) * (weights != 0).any(1)).sum()


@fused
def with_gradient(x, value, gradient):
    """`value`, whose gradient by x is known."""
    return value + ((x - x.detach()) * gradient).sum()


compiled, compiled_chunk = fused(definition), fused(torch.func.grad_and_value(definition))


def chunked(x, w_hat, ids, weights, rows):
    """The definition by chunks of rows, loss and gradient at once."""
    chunks = [(x[i:i + rows].detach(), w_hat, ids[i:i + rows], weights[i:i + rows])
              for i in range(0, len(x), rows)]
    if not torch.is_grad_enabled():
        return sum(compiled(*chunk) for chunk in chunks)
    gradients, values = zip(*(compiled_chunk(*chunk) for chunk in chunks))
    return with_gradient(x, sum(values), torch.cat(gradients))


@fused
def correction(x, w_hat, ids, weights, first):
    """What turns a mean cross-entropy with the single target t0 into our loss, exactly: the mean
    of x · (ŵ_t0 - sum_j Y_ij ŵ_j)."""
    labelled = (weights != 0).any(1)
    apart = w_hat[first] * labelled[:, None] - target_words(w_hat, ids, weights)    # (n, D)
    return (x.to(compute_dtype(x)) * apart).sum() / labelled.sum()


def ours(impl):
    """One of our implementations."""
    def loss(i):
        total, labelled = patch_loss(i.h, i.w, i.ids, i.weights, i.tau, impl=impl)
        return total / labelled.clamp_min(1)
    return loss


def plain(function):
    """From a summed loss of (x, w_hat, ids, weights)."""
    return lambda i: (function(query(i.h, i.tau, i.w.dtype), i.w_hat, i.ids, i.weights)
                      / (i.weights != 0).any(1).sum())


def single_target(cross_entropy):
    """From a cross_entropy(x, w_hat, targets), the mean over rows whose target is not IGNORE."""
    def loss(i):
        x, first = query(i.h, i.tau, i.w.dtype), i.ids[:, 0]        # any word is corrected exactly
        targets = first.where((i.weights != 0).any(1), IGNORE)
        more = correction(x, i.w_hat, i.ids, i.weights, first)
        return cross_entropy(x, i.w_hat, targets) + more
    return loss


def imported(module, function, *arguments, **options):
    """A peer's function, imported when it is called: without the package its row says so."""
    if not CUDA:
        raise RuntimeError("needs a GPU")
    return getattr(import_module(module), function)(*arguments, **options)


def torch_chunked(x, w_hat, targets, rows):
    """torch's own, whose default is to choose the number of rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(x, w_hat, targets, options=options)


class Provider(NamedTuple):
    """setting: "" is its default; unit_w: it needs w_hat, whose bytes are then reported."""
    name: str
    setting: str
    loss: Callable
    unit_w: bool = True


def providers(case: Case) -> list[Provider]:
    """Everyone who takes part."""
    count = round(case.n * case.labelled)

    def bare_products(i):                       # of as many rows as are labelled
        scores = i.h.detach()[:count].to(i.w.dtype) @ i.w_hat.T     # (count, V)
        return scores @ i.w_hat if torch.is_grad_enabled() else scores

    def family(name, form, function, option, values):               # its default first
        return [Provider(name, f"{option}={v}" * (j > 0), form(partial(function, **{option: v})))
                for j, v in enumerate(values)]

    small = case.n * case.v <= 4608 * 32003
    impls = [i for i in IMPLEMENTATIONS if i not in ANYWHERE or small] if CUDA else ANYWHERE
    liger = partial(imported, "liger_kernel.transformers.functional",
                    "liger_fused_linear_cross_entropy")
    cut = partial(imported, "cut_cross_entropy", "linear_cross_entropy")
    peers = [Provider("naive", "", plain(definition))]
    if CUDA:
        peers += [Provider("naive, compiled", "", plain(compiled))]
        peers += family("chunked, compiled", plain, chunked, "rows", (1024, 2048, 4096))
    peers += family("liger-kernel", single_target, liger, "chunk_mem_const", (1, 2, 4, 8))
    peers += family("cut-cross-entropy", single_target, cut, "filter_eps", ("high", None))
    rows = (None, *(r for r in (256, 1024, 4096) if r < case.n))
    peers += family("F.linear_cross_entropy", single_target, torch_chunked, "rows", rows)
    own = [Provider(f"ours: {impl}", "", ours(impl), False) for impl in impls]
    return [*own, *peers, Provider("torch.mm", "", bare_products, False)]


# ---- error, memory and time ----------------------------------------------------------------------


@contextlib.contextmanager
def noted(row: dict):
    """What is raised inside becomes the row's error; a GPU that fails for good ends the run."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if CUDA and row["error"]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def step(loss, inputs: Inputs, backward: bool) -> torch.Tensor:
    """One call, with the backward pass if it is wanted and there is one."""
    inputs.h.grad = None
    with torch.set_grad_enabled(backward):
        value = loss(inputs)
    if value.requires_grad:
        value.backward()
    return value.detach()


def truth(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, its gradient by h) in float64."""
    arguments = i.h.detach().double(), i.w.double(), i.ids, i.weights, i.tau
    total, labelled = patch_loss(*arguments, impl="reference")
    count = labelled.clamp_min(1)
    return total / count, patch_loss_ref_grad(*arguments) / count


def errors(case: Case, provider: Provider, inputs: Inputs, expected) -> dict:
    """Errors of loss and gradient (absolute where the truth is 0), and whether ours pass."""
    if provider.name == "torch.mm":             # the floor computes no loss
        return {}
    value = step(provider.loss, inputs, case.run != "forward")
    found = {}
    for name, got, want in zip(("loss_error", "grad_error"), (value, inputs.h.grad), expected):
        if got is not None:
            scale = want.norm() if want.any() else 1
            error = ((got.double() - want).norm() / scale).item()
            found[name] = error if math.isfinite(error) else str(error)
    if not provider.name.startswith("ours"):
        return found
    gate = max(GATES[case.h], GATES[case.w])
    passed = all(isinstance(e, float) and e <= gate for e in found.values())
    return found | dict(gate=gate, passed=passed)


def peak_memory(call) -> int | None:
    """Peak bytes during the call, above what was there before. None: a CPU that is not Linux."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    if sys.platform != "linux":
        return None
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)                # GNU C: what is free goes back
    Path("/proc/self/clear_refs").write_text("5")       # the peak restarts at what is resident now
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@cache
def l2_filler() -> torch.Tensor:
    """Many times the size of any L2 cache."""
    return torch.empty(2**30, dtype=torch.int8, device=DEVICE)


def milliseconds(call) -> float:
    """The time of one call."""
    if not CUDA:
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    l2_filler().zero_()                         # nobody finds inputs in L2, and Python runs ahead
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_all(calls: dict, rows: dict, repeats: int) -> None:
    """Interleaved: in each repeat every provider once, another one first each time.

    calls {name: function of the repeat's number}; rows {name: row} get time_ms: [median, p10, p90]
    of two rounds after a warm-up.
    """
    names = list(calls)
    for count in (max(1, repeats // 5), repeats, repeats):
        taken = {name: [] for name in names}
        for repeat in range(count):
            for name in names[repeat % len(names):] + names[:repeat % len(names)]:
                if not rows[name]["error"]:
                    with noted(rows[name]):
                        taken[name].append(milliseconds(partial(calls[name], repeat)))
        for name, row in rows.items():
            if not row["error"]:
                times = torch.tensor(taken[name])
                quantiles = [float(times.quantile(q)) for q in (0.5, 0.1, 0.9)]
                row["time_ms"] = [*row.get("time_ms", []), quantiles][-2:]


def measure_case(case: Case, wanted: list[Provider], repeats: int, write) -> None:
    """A row for each provider."""
    if CUDA:
        torch.compiler.reset()                  # a new shape is compiled anew
    sets, backward = [make_inputs(case, seed) for seed in range(3)], case.run != "forward"
    expected = truth(sets[0])
    rows = {p: dict(case=dataclasses.asdict(case), provider=p.name, setting=p.setting, error=None)
            for p in wanted}
    calls = {p: lambda repeat, loss=p.loss: step(loss, sets[repeat % 3], backward) for p in wanted}
    try:
        for p, row in rows.items():
            with noted(row):
                row |= errors(case, p, sets[0], expected)
                row["unit_w_bytes"] = sets[0].w_hat.nbytes * p.unit_w
                sets[0].h.grad = None
                if case.run != "check":
                    row["memory_bytes"] = peak_memory(partial(calls[p], 0))
        if case.run != "check":
            time_all(calls, rows, repeats)
    except BaseException:                       # a dead GPU, Ctrl-C: only failures are kept as rows
        rows = {p: row for p, row in rows.items() if row["error"]}
        raise
    finally:
        for row in rows.values():
            write(row)


# ---- other tiles, and a whole training step ------------------------------------------------------

CANDIDATES = {                                  # for product 1 (scores) and 2 (gradient)
    0: [Tile(128, 256, 64, 8, 2), Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 128, 8, 3), Tile(256, 128, 64, 8, 3), Tile(64, 256, 64, 4, 4)],
    1: [Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 2), Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 128, 8, 3), Tile(256, 128, 64, 8, 3), Tile(64, 256, 64, 4, 4)]}


def measure_tiles(case: Case, repeats: int, write) -> None:
    """The fused loss with one product's tile changed, beside what is shipped."""
    key, inputs = (kernel.chip(DEVICE)[0], getattr(torch, case.w)), make_inputs(case, 0)
    shipped, expected = TILES[key], truth(inputs)
    pairs = [shipped] + [tuple(tile if i == product else own for i, own in enumerate(shipped))
                         for product, own in CANDIDATES.items() for tile in own]
    for pair in pairs:
        setting = " | ".join("x".join(map(str, tile)) for tile in pair)
        row = dict(case=dataclasses.asdict(case), provider="ours: triton", setting=setting,
                   error=None)
        provider, TILES[key] = Provider("ours: triton", setting, ours("triton"), False), pair
        with noted(row):
            row |= errors(case, provider, inputs, expected)
        time_all({0: lambda _, loss=provider.loss: step(loss, inputs, True)}, {0: row}, repeats)
        write(row)
    TILES[key] = shipped


# What the method costs where it is used: a pretraining step of LLaVA-1.5-7B's shape with random
# weights. No labels: no patch loss; caption-only: it is only measured; patch-aligned.
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
              num_attention_heads=16, image_size=336, patch_size=14)
LLM = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
           num_attention_heads=32)
MICRO, TOKENS = (32, 16, 8, 4), 40              # micro-batches to try, tokens of a caption
VARIANTS = {"no labels": (0.0, 0), "caption-only": (0.0, 1), "patch-aligned": (0.3, 1)}


def random_model(vision: dict, llm: dict):
    """The model of model.py around random backbones, without folders to read it from."""
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from model import PatchAlignedModel
    from projector import mlp2x_gelu

    with DEVICE:
        model, dtype = PatchAlignedModel.__new__(PatchAlignedModel), runtime.precision(DEVICE)
        torch.nn.Module.__init__(model)
        encoder = AutoModel.from_config(CLIPVisionConfig(**vision), dtype=dtype)
        model.encoder = getattr(encoder, "vision_model", encoder).requires_grad_(False)
        words = AutoModelForCausalLM.from_config(LlamaConfig(**llm), dtype=dtype)
        model.llm = words.requires_grad_(False)
        side = vision["image_size"] // vision["patch_size"]
        model.projector = mlp2x_gelu(vision["hidden_size"], llm["hidden_size"], (side, side), 1)
    model.config = dict(feature_layer=-2, patch_loss="softmax", tau=0.07)
    model.encoder_patches, model.encoder_options, model.patchified = side * side, {}, False
    return model.train()


def measure_step(repeats: int, write, vision=VISION, llm=LLM) -> None:
    """A row per variant, at the largest micro-batch that fits all; memory: weights included."""
    model = random_model(vision, llm)
    parameters, P, V = list(model.projector.parameters()), model.encoder_patches, llm["vocab_size"]
    optimizer, side = torch.optim.AdamW(parameters, lr=1e-3), vision["image_size"]

    def train(_, images, weight, labelled):
        model.config["patch_weight"] = weight
        optimizer.zero_grad(set_to_none=True)   # first: a call without memory leaves some
        with DEVICE:
            caption = torch.randint(V, (images, TOKENS))
            ones = torch.ones(images, 1 + P + TOKENS, dtype=torch.long)
            rows = torch.arange(images)[:, None] * ones.shape[1]
            batch = dict(
                pixel_values=torch.randn(images, 3, side, side), first_label=1 + P,
                places=(rows + torch.arange(1, 1 + P)).flatten(),
                input_ids=torch.cat([ones[:, :1], ones[:, :P] * IMAGE_TOKEN, caption], 1),
                labels=torch.cat([ones[:, :1 + P] * IGNORE, caption], 1),
                patch_ids=torch.randint(V, (images, P, 4)),
                patch_weights=torch.full((images, P, 4), labelled / 4))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            sums = model(batch)
        patch = sums["patch_loss"] / sums["patches"].clamp_min(1)
        (sums["caption_loss"] / sums["caption_tokens"] + weight * patch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for images in MICRO:
        tokens = images * (1 + P + TOKENS)
        rows = {name: dict(case={"step": "7b"}, provider=name, setting="", error=None,
                           images=images, tokens=tokens) for name in VARIANTS}
        calls = {name: partial(train, images=images, weight=weight, labelled=share)
                 for name, (weight, share) in VARIANTS.items()}
        for name, row in rows.items():
            with noted(row):
                base = torch.cuda.memory_allocated() if CUDA else 0
                row["memory_bytes"] = base + (peak_memory(partial(calls[name], 0)) or 0)
        if not any(row["error"] for row in rows.values()):
            break
    time_all(calls, rows, max(1, repeats // 5))
    for row in rows.values():
        write(row)


# ---- rows and report -----------------------------------------------------------------------------


def machine() -> dict:
    """What is measured, and with what."""
    found = runtime.machine()
    versions = {d.name: d.version for d in metadata.distributions()}
    source = (ROOT / "kernels" / "patch_loss.py").read_bytes()
    peers = {name: versions.get(name) for name in ("triton", "liger-kernel", "cut-cross-entropy")}
    device = found["hardware"] + f", {torch.get_num_threads()} threads" * (not CUDA)
    return found | peers | dict(device=device, patch_loss=hashlib.sha256(source).hexdigest()[:12])


def read_rows(path: Path) -> list[dict]:
    """The whole lines of the file; a killed run may leave half of one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def key(row: dict, source: bool = True) -> str:
    """What a row is about; with `source`, another patch_loss.py makes another row of ours."""
    own = source and ("step" in row["case"] or row["provider"].startswith("ours"))
    return json.dumps([row["device"], row["case"], row["provider"], row["setting"],
                       own and row["patch_loss"]])


def title(case: dict) -> str:
    """A case in words."""
    return ", ".join(f"{name.upper() if name in 'vkd' else name} {value}"
                     for name, value in case.items() if value != "")


def speed(row: dict) -> float:
    """Median of the first round; infinite without one."""
    return row["time_ms"][0][0] if row.get("time_ms") else math.inf


def table(rows: list[dict]) -> str:
    """Every case of every device, fastest first."""
    parts, mib = [], 2**20
    for device, case in dict.fromkeys((r["device"], json.dumps(r["case"])) for r in rows):
        own = sorted((r for r in rows if r["device"] == device and json.dumps(r["case"]) == case),
                     key=speed)
        floor = next((speed(r) for r in own if r["provider"] == "torch.mm"), math.inf)
        lines = [["", "ms", "p10", "p90", "again", "of torch.mm", "MiB", "+ unit W", "loss error",
                  "grad error", ""]]
        for r in own:
            first, again = r.get("time_ms") or [[None] * 3] * 2
            memory, unit_w = r.get("memory_bytes"), r.get("unit_w_bytes")
            passed = {True: "passed", False: f"FAILED gate {r.get('gate')}"}
            passed = passed.get(r.get("passed"), "")
            share = floor / speed(r) if math.isfinite(floor) and first[0] else None
            error = [f"{e:.1e}" if isinstance(e := r.get(name), float) else e
                     for name in ("loss_error", "grad_error")]
            lines.append([", ".join(filter(None, (r["provider"], r["setting"]))), *first, again[0],
                          share and f"{share:.0%}", memory and round(memory / mib),
                          unit_w and round(unit_w / mib), *error, r["error"] or passed])
        parts.append(f"{device}: {title(json.loads(case))}\n{runtime.table(lines)}")
    return "\n\n".join(parts)


def report(out: Path) -> list[dict]:
    """Write bench.json and bench.txt from the newest rows of each kind -> those rows."""
    lines = read_rows(out / "rows.jsonl")
    rows = list({key(r, source=False): r for r in lines if "case" in r}.values())
    if not rows:
        raise InputError(f"{out / 'rows.jsonl'} holds no measurements; run without --report")
    machines = [r for r in lines if "case" not in r]
    with runtime.atomic(out / "bench.json") as path:
        path.write_text(json.dumps(dict(machines=machines, rows=rows), indent=1) + "\n")
    with runtime.atomic(out / "bench.txt") as path:
        path.write_text(table(rows) + "\n")
    runtime.log(table(rows))
    return rows


# ---- main ----------------------------------------------------------------------------------------


@dataclass
class Args:
    """Flags of bench.py."""

    out: str = "runs/bench"
    """folder for rows.jsonl, bench.json and bench.txt"""
    budget: float = 0
    """seconds: no case is begun that might not end in time; 0: no limit"""
    shapes: str = ""
    """other main shapes n x D x V, as 1152x512x32000,1152x576x49152"""
    repeats: int = 0
    """timed calls per provider, twice over; 0: 50 on a GPU, 7 on a CPU"""
    tiles: bool = False
    """try other tile sizes of the kernels (GPU)"""
    report: bool = False
    """measure nothing, make the report anew"""


def measure_all(jobs: list, args: Args) -> None:
    """What is not in rows.jsonl yet, job by job, as far as the budget goes."""
    path, here = Path(args.out) / "rows.jsonl", machine()
    repeats = args.repeats or (50 if CUDA else 7)
    rows, stamp = read_rows(path), {name: here[name] for name in ("device", "patch_loss")}
    known = {key(row) for row in rows if "case" in row}
    with runtime.atomic(path) as temporary:     # rewritten, without half a line at its end
        temporary.write_text("".join(json.dumps(row) + "\n" for row in [*rows, here]))

    def write(row):
        with path.open("a") as file:
            file.write(json.dumps(stamp | row) + "\n")

    began, longest = time.time(), 60.0 * CUDA   # the first case's length is not known yet
    for i, job in enumerate(jobs):
        case = {"step": "7b"} if job == "7b" else dataclasses.asdict(job)
        everyone = [Provider(n, "", None) for n in VARIANTS] if job == "7b" else providers(job)
        wanted = [p for p in everyone if key(stamp | dict(
            case=case, provider=p.name, setting=p.setting)) not in known]
        started = time.time()
        if not wanted and not args.tiles:
            continue
        if args.budget and started - began + 1.3 * longest > args.budget:
            runtime.log(f"stopped after {started - began:.0f} s with {len(jobs) - i} cases to go;"
                        " the same command goes on")
            break
        runtime.log(f"{i + 1}/{len(jobs)}  {title(case)}: {len(wanted)} rows")
        if job == "7b":
            measure_step(repeats, write)
        elif args.tiles:
            measure_tiles(job, repeats, write)
        else:
            measure_case(job, wanted, repeats, write)
        longest = max(longest, time.time() - started)


def main(args: Args) -> None:
    """Measure what is missing, then report."""
    shapes = [shape.split("x") for shape in args.shapes.split(",") if shape]
    if not all(len(own) == 3 and all(n.isdecimal() and int(n) for n in own) for own in shapes):
        raise InputError(f"--shapes {args.shapes}: expected n x D x V, such as 1152x512x32000,"
                         " several separated by commas")
    runtime.check_lowest(args, budget=0, repeats=0)
    if args.tiles and not CUDA:
        raise InputError("--tiles needs a GPU")
    if not args.report:
        jobs = cases([[int(n) for n in shape] for shape in shapes])
        jobs = [job for job in jobs if job.run == BOTH][:3] if args.tiles else jobs
        step_of_7b = ["7b"] * (CUDA and not args.shapes and not args.tiles)
        measure_all([*jobs[:10], *step_of_7b, *jobs[10:]], args)
    own = [row for row in report(Path(args.out)) if row["provider"].startswith("ours")]
    failed = sum(not row.get("passed") for row in own)
    said = f"{failed} rows of ours FAILED" if failed else "all of ours passed"
    runtime.log(f"wrote {args.out}/bench.json and bench.txt; {said}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run(main, Args, __doc__)
