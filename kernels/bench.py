"""Benchmark of the patch loss: time, memory and error beside everything else that computes it, and what it adds to a training step.

    python kernels/bench.py                                # every case of this machine, GPU or CPU, the important ones first
    python kernels/bench.py --budget 500                   # stops cleanly before 500 s; the same command again goes on
    python kernels/bench.py --report                       # measures nothing: table, JSON and picture anew

Compared: our implementations; the plain definition, eager and compiled; its chunks with the gradient formed in the forward pass,
compiled; Liger-Kernel; Cut Cross-Entropy; F.linear_cross_entropy; and as a floor two bare torch.mm, the scores and their weighted sum
of words, without a loss. On a CPU without the compiled forms. CUDA_VISIBLE_DEVICES= measures the CPU of a machine with a GPU.

Time: median of `--repeats` calls after a fifth as many to warm up, on three sets of random inputs in turn, provider after provider in
each repeat; all of it twice, so that the difference shows the noise. On a GPU: CUDA events, L2 overwritten before each call. Memory:
peak above what was there before the call, with the gradient; on a CPU (Linux) resident memory, in a process of its own. Error: relative
to float64, with NaN in uninitialised memory; if one of ours misses its gate, the exit status is 1. Whatever a provider raises is its
row; delete its line to have it measured again.

Cost, estimated, not measured: on one H200 15 minutes, two calls of --budget 500; --full, every combination of the settings, 3 hours more.
On 2 CPU cores 20 minutes, the two main shapes first.

reads:  OUT/rows.jsonl: what is there is not measured again (same device, same case; for ours also the same patch_loss.py)
writes: OUT/rows.jsonl (a line per row, appended as it comes), OUT/bench.json, OUT/bench.txt (the table), OUT/bench.png
"""
# Peers, wanted here alone and therefore not in requirements.txt:      pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1
# F.linear_cross_entropy comes with torch 2.13. A peer that is missing is a row that says so.
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                  # `python kernels/bench.py` has only kernels/ on its path

import runtime  # noqa: E402
from data import IGNORE, IMAGE_TOKEN, InputError  # noqa: E402
from kernels.measure import BOTH, CUDA, DEVICE, Rows, in_own_process, machine, noted, peak_memory, poisoned_memory, report, time_all, title  # noqa: E402
from kernels.patch_loss import IMPLEMENTATIONS, compute_dtype, labelled_rows, patch_loss, patch_loss_ref_grad  # noqa: E402

ANYWHERE = ("chunked", "reference")                            # ours without kernels: all that a CPU has; on a GPU only at small shapes
GATES = {"bfloat16": 5e-3, "float32": 1e-5}                    # largest error of ours, by the lower precision of h and w

# ------------------------------------------------------------------------------------------------------------- cases and inputs


@dataclass(frozen=True)
class Case:
    """One problem. `run`: BOTH or "forward" are timed, "check" is not; `edge`: an irregularity of the inputs."""
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


def cases(shapes: list[list[int]], full: bool) -> list[Case]:
    """The important ones first; all are a main shape with something changed. `shapes`: others than the usual main ones."""
    def vary(base, **values):
        return [dataclasses.replace(base, **dict(zip(values, each))) for each in zip(*values.values())]

    usual = [(4608, 4096, 32000), (18432, 4096, 32000), (4608, 4096, 128256)] if CUDA else [(1152, 512, 32000), (1152, 576, 49152)]
    main = [Case(*shape) for shape in shapes or usual]
    base = main[0]
    small = dataclasses.replace(base, n=min(515, base.n), v=min(32003, base.v + 3), run="check")
    edges = vary(small, edge=["nothing labelled", "duplicate targets", "zero-norm word"])
    listed = main + edges + vary(small, h=["float32"], w=["float32"]) + [dataclasses.replace(case, run="forward") for case in main]
    more = vary(base, n=[4608, 4603], v=[151936, 32003])
    if not shapes and not CUDA:
        listed += vary(base, n=[288, 576, 2304]) + vary(base, v=[8000, 16000, 64000]) + vary(base, labelled=[0.25])
    if not shapes and CUDA:
        listed += (vary(main[1], labelled=[0.25]) + more + vary(base, n=[1152, 2304, 9216]) + vary(base, tau=[0.02])
                   + vary(base, k=[1, 16]) + vary(base, h=["float32"]))
    if full:
        listed += [Case(c.n, c.d, c.v, *rest[:3], "bfloat16", *rest[3:]) for c, *rest in itertools.product(
            main + more, (1, 4, 16), (0.07, 0.02), ("bfloat16", "float32"), (1.0, 0.25), (BOTH, "forward"))]
    return list(dict.fromkeys(listed))


class Inputs(NamedTuple):
    """What a provider gets; w_hat, the unit rows of w in w's dtype, is made beforehand for those who want it."""
    h: torch.Tensor            # (n, D), requires grad
    w: torch.Tensor            # (V, D)
    w_hat: torch.Tensor        # (V, D)
    ids: torch.Tensor          # (n, K)
    weights: torch.Tensor      # (n, K)
    tau: float


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs: words of deviation 0.02 and unequal length, as in language models; patches at a cosine of 0.4 from the sum of
    their words, as after some training, so that the softmax is neither flat nor a single spike."""
    torch.manual_seed(seed)
    with DEVICE:
        w = (0.02 * torch.randn(case.v, case.d) * (0.2 * torch.randn(case.v, 1)).exp()).to(getattr(torch, case.w))
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
        h = (F.normalize(torch.randn(case.n, case.d), dim=1) + 0.45 * towards) * (0.5 * torch.randn(case.n, 1)).exp()
    return Inputs(h.to(getattr(torch, case.h)).requires_grad_(), w, w_hat, ids, weights, case.tau)


# -------------------------------------------------------------------------------------------------------------------- providers
#
# Each is a function of Inputs -> the mean loss over the labelled patches, differentiable in h. What the peers have in common, from h
# to x = ĥ / tau and from single to multiple targets, is timed with them; on a GPU it is compiled, as a careful user would.

fused = torch.compile(dynamic=False) if CUDA else lambda function: function
if CUDA:
    torch._dynamo.config.recompile_limit = 64                  # beyond it a function would run uncompiled; a case has about ten shapes


@fused
def query(h, tau, dtype):
    """x = ĥ / tau: (n, D) in the dtype of W."""
    return (F.normalize(h.to(compute_dtype(h)), dim=1) / tau).to(dtype)


def target_words(w_hat, ids, weights):
    """sum_j Y_ij ŵ_j: (n, D)."""
    return F.embedding_bag(ids, w_hat, mode="sum", per_sample_weights=weights.to(w_hat.dtype))


def definition(x, w_hat, ids, weights):
    """The summed loss with the whole matrix of scores: the product in the dtype of W, the rest in float32."""
    scores = (x @ w_hat.T).to(compute_dtype(x))                                              # (n, V)
    target = (x.to(scores.dtype) * target_words(w_hat, ids, weights)).sum(1)                 # (n,)
    return ((scores.logsumexp(1) - target) * (weights != 0).any(1)).sum()


@fused
def with_gradient(x, value, gradient):
    """`value`, whose gradient by x is known."""
    return value + ((x - x.detach()) * gradient).sum()


compiled, compiled_chunk = fused(definition), fused(torch.func.grad_and_value(definition))


def chunked(x, w_hat, ids, weights, rows):
    """The definition by chunks of rows, loss and gradient at once."""
    chunks = [(x[i:i + rows].detach(), w_hat, ids[i:i + rows], weights[i:i + rows]) for i in range(0, len(x), rows)]
    if not torch.is_grad_enabled():
        return sum(compiled(*chunk) for chunk in chunks)
    gradients, values = zip(*(compiled_chunk(*chunk) for chunk in chunks))
    return with_gradient(x, sum(values), torch.cat(gradients))


@fused
def correction(x, w_hat, ids, weights, first):
    """What turns a mean cross-entropy with the single target t0 into our loss, exactly: the mean of x · (ŵ_t0 - sum_j Y_ij ŵ_j)."""
    labelled = (weights != 0).any(1)
    apart = w_hat[first] * labelled[:, None] - target_words(w_hat, ids, weights)             # (n, D)
    return (x.to(compute_dtype(x)) * apart).sum() / labelled.sum()


def ours(impl):
    """One of our implementations."""
    def loss(i):
        total, labelled = patch_loss(i.h, i.w, i.ids, i.weights, i.tau, impl=impl)
        return total / labelled.clamp_min(1)
    return loss


def plain(function):
    """From a summed loss of (x, w_hat, ids, weights)."""
    return lambda i: function(query(i.h, i.tau, i.w.dtype), i.w_hat, i.ids, i.weights) / (i.weights != 0).any(1).sum()


def single_target(cross_entropy):
    """From a cross_entropy(x, w_hat, targets), the mean over the rows whose target is not IGNORE."""
    def loss(i):
        x = query(i.h, i.tau, i.w.dtype)                                                     # (n, D)
        first = i.ids[:, 0]                                                                  # (n,) t0; any word is corrected exactly
        targets = first.where((i.weights != 0).any(1), IGNORE)
        return cross_entropy(x, i.w_hat, targets) + correction(x, i.w_hat, i.ids, i.weights, first)
    return loss


def compacted(loss):
    """The labelled rows alone, for those that compute all rows and then ignore some."""
    def on_rows(i):
        rows = labelled_rows(i.weights)
        return loss(i._replace(h=i.h[rows], ids=i.ids[rows], weights=i.weights[rows]))
    return on_rows


def imported(module, function, *arguments, **options):
    """A peer's function, imported when it is called: without the package, or a GPU, its row says so."""
    if not CUDA:
        raise RuntimeError("needs a GPU")
    return getattr(import_module(module), function)(*arguments, **options)


def torch_chunked(x, w_hat, targets, rows):
    """torch's own, whose default is to choose the number of rows; without options it is not chunked."""
    return F.linear_cross_entropy(x, w_hat, targets, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows))


class Provider(NamedTuple):
    """`setting`: "" is its own default; `unit_w`: it needs w_hat, whose bytes are then reported beside its memory."""
    name: str
    setting: str
    loss: Callable
    unit_w: bool = True


def providers(case: Case) -> list[Provider]:
    """Everyone who takes part."""
    count = round(case.n * case.labelled)

    def bare_products(i):                                      # of as many rows as are labelled
        scores = i.h.detach()[:count].to(i.w.dtype) @ i.w_hat.T                              # (count, V)
        return scores @ i.w_hat if torch.is_grad_enabled() else scores                       # (count, D)

    def family(name, form, function, option, values):          # a provider per value, its default first
        return [Provider(name, f"{option}={v}" * (j > 0), form(partial(function, **{option: v}))) for j, v in enumerate(values)]

    impls = [i for i in IMPLEMENTATIONS if i not in ANYWHERE or case.n * case.v <= 4608 * 32003] if CUDA else ANYWHERE
    liger = partial(imported, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    cut = partial(imported, "cut_cross_entropy", "linear_cross_entropy")
    peers = [Provider("naive", "", plain(definition))]
    if CUDA:
        peers += [Provider("naive, compiled", "", plain(compiled))]
        peers += family("chunked, compiled", plain, chunked, "rows", (1024, 2048, 4096))
    peers += family("liger-kernel", single_target, liger, "chunk_mem_const", (1, 2, 4, 8) if CUDA else (1,))
    peers += family("cut-cross-entropy", single_target, cut, "filter_eps", ("high", None) if CUDA else ("high",))
    peers += family("F.linear_cross_entropy", single_target, torch_chunked, "rows", (None, *(r for r in (256, 1024, 4096) if r < case.n)))
    if case.labelled < 1:
        peers += [p._replace(name=p.name + ", compacted", loss=compacted(p.loss)) for p in peers]
    return [*(Provider(f"ours: {impl}", "", ours(impl), False) for impl in impls), *peers, Provider("torch.mm", "", bare_products, False)]


# ------------------------------------------------------------------------------------------------------- error, memory and time


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
    return total / labelled.clamp_min(1), patch_loss_ref_grad(*arguments) / labelled.clamp_min(1)


def errors(case: Case, provider: Provider, inputs: Inputs, expected) -> dict:
    """Errors of loss and gradient (absolute where the truth is 0), and whether ours pass. The floor computes no loss."""
    if provider.name == "torch.mm":
        return {}
    with poisoned_memory():
        value = step(provider.loss, inputs, case.run != "forward")
    found = dict(zip(("loss_error", "grad_error"), [
        ((got.double() - want).norm() / (want.norm() if want.any() else 1)).item()
        for got, want in zip((value, inputs.h.grad), expected) if got is not None]))
    row = {name: error if math.isfinite(error) else str(error) for name, error in found.items()}
    if provider.name.startswith("ours"):
        gate = max(GATES[case.h], GATES[case.w])
        row |= dict(gate=gate, passed=all(error <= gate for error in found.values()))        # NaN does not pass
    return row


def cpu_memory(case: Case, name: str, setting: str) -> int | None:
    """Peak bytes of one call of a provider."""
    loss = next(p.loss for p in providers(case) if (p.name, p.setting) == (name, setting))
    step(loss, make_inputs(dataclasses.replace(case, n=8, v=64), 0), True)                   # libraries load, threads start
    inputs = make_inputs(case, 0)
    return peak_memory(partial(step, loss, inputs, case.run != "forward"))


def measure_case(case: Case, wanted: list[Provider], repeats: int, write) -> None:
    """A row for each provider."""
    if CUDA:
        torch.compiler.reset()                                 # a new shape is compiled anew, and does not count towards a limit
    sets = [make_inputs(case, seed) for seed in range(3)]
    expected = truth(sets[0])
    rows = {p: dict(case=dataclasses.asdict(case), provider=p.name, setting=p.setting, error=None) for p in wanted}
    calls = {p: lambda repeat, loss=p.loss: step(loss, sets[repeat % 3], case.run != "forward") for p in wanted}
    try:
        for p, row in rows.items():
            with noted(row):
                row |= errors(case, p, sets[0], expected) | dict(unit_w_bytes=sets[0].w_hat.nbytes * p.unit_w)
                sets[0].h.grad = None
                if case.run != "check":
                    row["memory_bytes"] = peak_memory(partial(calls[p], 0)) if CUDA else in_own_process(cpu_memory, case, p.name, p.setting)
        if case.run != "check":
            time_all(calls, rows, repeats)
    except BaseException:                                      # a dead GPU, Ctrl-C: the failures are rows, the others are measured again
        rows = {p: row for p, row in rows.items() if row["error"]}
        raise
    finally:
        for row in rows.values():
            write(row)


# --------------------------------------------------------------------------------------------------------- a whole training step
#
# What the method costs where it is used: a pretraining step of LLaVA-1.5-7B's shape with random weights, backbones frozen. Three
# variants: no labels, so no patch loss; pretrain.py --patch-weight 0, which only measures the patch loss; and patch-aligned.

SIZES = {"7b": (                                               # vision encoder, language model, micro-batches to try, caption tokens
    dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14),
    dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32), (32, 16, 8, 4), 40)}
VARIANTS = {"no labels": (0.0, 0), "caption-only": (0.0, 1), "patch-aligned": (0.3, 1)}      # patch_weight, labelled share
STEP = [Provider(name, "", None) for name in VARIANTS]


def random_model(vision: dict, llm: dict):
    """The model of model.py around random backbones, without the folders that it is otherwise read from."""
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from model import PatchAlignedModel  # here, not above: the rest of the benchmark needs no transformers
    from projector import mlp2x_gelu

    with DEVICE:
        model, dtype = PatchAlignedModel.__new__(PatchAlignedModel), runtime.precision(DEVICE)
        torch.nn.Module.__init__(model)
        encoder = AutoModel.from_config(CLIPVisionConfig(**vision), dtype=dtype)
        model.encoder = getattr(encoder, "vision_model", encoder).requires_grad_(False)
        model.llm = AutoModelForCausalLM.from_config(LlamaConfig(**llm), dtype=dtype).requires_grad_(False)
        side = vision["image_size"] // vision["patch_size"]
        model.projector = mlp2x_gelu(vision["hidden_size"], llm["hidden_size"], (side, side), 1)
    model.config = dict(feature_layer=-2, patch_loss="softmax", tau=0.07)
    model.encoder_patches, model.encoder_options, model.patchified = side * side, {}, False
    return model.train()


def measure_step(size: str, repeats: int, write) -> None:
    """A row per variant, at the largest micro-batch that fits all of them. Memory: the peak of the whole step, weights included."""
    vision, llm, batches, tokens = SIZES[size]
    model = random_model(vision, llm)
    parameters, P, V = list(model.projector.parameters()), model.encoder_patches, llm["vocab_size"]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def train(_, images, weight, labelled):
        model.config["patch_weight"] = weight
        optimizer.zero_grad(set_to_none=True)                  # first, since a call that ran out of memory leaves some
        with DEVICE:
            caption, ones = torch.randint(V, (images, tokens)), torch.ones(images, 1 + P + tokens, dtype=torch.long)
            rows, columns = torch.arange(images)[:, None] * ones.shape[1], torch.arange(1, 1 + P)
            batch = dict(pixel_values=torch.randn(images, 3, vision["image_size"], vision["image_size"]),
                         places=(rows + columns).flatten(), first_label=1 + P,             # as data.collate reads them off
                         input_ids=torch.cat([ones[:, :1], ones[:, :P] * IMAGE_TOKEN, caption], 1),
                         labels=torch.cat([ones[:, :1 + P] * IGNORE, caption], 1),
                         patch_ids=torch.randint(V, (images, P, 4)), patch_weights=torch.full((images, P, 4), labelled / 4))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            sums = model(batch)
        loss = sums["caption_loss"] / sums["caption_tokens"] + weight * sums["patch_loss"] / sums["patches"].clamp_min(1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for images in batches:
        row = dict(case={"step": size}, setting="", error=None, images=images, tokens=images * (1 + P + tokens))
        rows = {name: dict(row, provider=name) for name in VARIANTS}
        calls = {name: partial(train, images=images, weight=weight, labelled=share) for name, (weight, share) in VARIANTS.items()}
        for name, row in rows.items():
            with noted(row):
                base = torch.cuda.memory_allocated() if CUDA else 0
                row["memory_bytes"] = base + peak_memory(partial(calls[name], 0))
        if not any(row["error"] for row in rows.values()):
            break
    time_all(calls, rows, max(1, repeats // 5))
    for row in rows.values():
        write(row)


# -------------------------------------------------------------------------------------------------------------------------- main


@dataclass
class Args:
    """Flags of bench.py."""

    out: str = "runs/bench"
    """folder for rows.jsonl, bench.json, bench.txt and bench.png"""
    budget: float = 0
    """seconds: no case is begun that might not end in time; 0: no limit"""
    shapes: str = ""
    """other main shapes n x d x V, as 1152x512x32000,1152x576x49152"""
    full: bool = False
    """every combination of shape, K, tau, dtype, labelled share and pass (GPU)"""
    repeats: int = 0
    """timed calls per provider, twice over; 0: 50 on a GPU, 7 on a CPU"""
    report: bool = False
    """measure nothing, make the report anew"""


def main(args: Args) -> None:
    """Measure what is missing, then report."""
    shapes = [shape.split("x") for shape in args.shapes.split(",") if shape]
    if not all(len(shape) == 3 and all(size.isdecimal() and int(size) > 0 for size in shape) for shape in shapes):
        raise InputError(f"--shapes {args.shapes}: expected n x d x V, such as 1152x512x32000, several separated by commas")
    if args.budget < 0 or args.repeats < 0:
        raise InputError("--budget and --repeats cannot be negative")
    if args.full and not CUDA:
        raise InputError("--full needs a GPU")
    if not args.report:
        measure_all(cases([[int(size) for size in shape] for shape in shapes], args.full), args)
    failed = sum(not row.get("passed") for row in report(Path(args.out)) if row["provider"].startswith("ours"))
    runtime.log(f"wrote {args.out}/bench.json, .txt and .png; {f'{failed} rows of ours FAILED' if failed else 'all of ours passed'}")
    if failed:
        sys.exit(1)


def measure_all(jobs: list[Case], args: Args) -> None:
    """What is not in rows.jsonl yet, job by job, as far as the budget goes."""
    rows, repeats = Rows(Path(args.out), machine(ROOT / "kernels" / "patch_loss.py")), args.repeats or (50 if CUDA else 7)
    jobs = [*jobs[:10], *["7b"] * (CUDA and not args.shapes), *jobs[10:]]                    # the training step after the main shapes
    began, longest = time.time(), 60.0 * CUDA                  # the first case's length is not known yet
    for i, job in enumerate(jobs):
        case, everyone = ({"step": job}, STEP) if job in SIZES else (dataclasses.asdict(job), providers(job))
        wanted = [p for p in everyone if rows.lacks(case, p.name, p.setting)]
        started = time.time()
        if not wanted:
            continue
        if args.budget and started - began + 1.3 * longest > args.budget:
            runtime.log(f"stopped after {started - began:.0f} s with {len(jobs) - i} cases to go; the same command goes on")
            break
        runtime.log(f"{i + 1}/{len(jobs)}  {title(case)}: {len(wanted)} rows")
        if job in SIZES:
            measure_step(job, repeats, rows.write)
        else:
            measure_case(job, wanted, repeats, rows.write)
        longest = max(longest, time.time() - started)


if __name__ == "__main__":
    runtime.run(main, Args, __doc__, InputError)
