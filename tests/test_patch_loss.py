"""The patch loss against float64, in ragged chunks and tiles: no size below is a multiple of a
chunk, a tile, or another size."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import patch_loss as module
from kernels.patch_loss import cosine_loss, patch_loss, patch_loss_ref_grad

ROOT = Path(__file__).resolve().parent.parent
N, D, V = 53, 37, 211
TAU = 0.07


@pytest.fixture(autouse=True)
def small_poisoned_blocks(monkeypatch):
    """A budget of 16 kB, and buffers that start as NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan)
    )
    monkeypatch.setattr(module, "SCRATCH_BYTES", 16384)
    assert module.block_sizes(D, V, 4) == (
        12,
        27,
    )  # 49 labelled rows in 5 chunks, 211 words in 8 tiles
    assert module.block_sizes(D, V, 8) == (6, 13)  # 9 chunks, 17 tiles; the last of each is short


def problem(k=5, seed=0, dtype=torch.float64, n=N, d=D, v=V):
    """h, w, ids, weights with every irregularity: unlabelled rows, padding, repeated tokens, a zero
    word, lengths from 1e-3 to 1e3."""
    torch.manual_seed(seed)
    h = (
        torch.randn(n, d, dtype=torch.float64)
        * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    )
    w = torch.randn(v, d, dtype=torch.float64) * 0.02 + 0.01
    w[17] = 0
    h[:20] += (
        60 * h[:20].norm(dim=1, keepdim=True) * w[1:21]
    )  # some patches are near words, as after training
    ids = torch.randint(v, (n, k))
    weights = torch.rand(n, k, dtype=torch.float64)
    ids[3, -1] = ids[3, 0]  # a repeated token
    ids[5, 0] = 17  # the zero word as a target
    if k > 1:
        weights[::4, 1] = 0
        ids[::4, 1] = -100  # padding may hold anything
    weights /= weights.sum(dim=1, keepdim=True)
    weights[[0, 7, 8, n - 1]] = 0  # unlabelled
    weights[9] *= 1.7  # a row need not sum to 1
    return h.to(dtype), w.to(dtype), ids, weights


def with_grad(h, *rest, **options):
    h = h.detach().clone().requires_grad_()
    loss, labelled = patch_loss(h, *rest, **options)
    loss.backward()
    return loss.detach(), labelled, h.grad


def error(got, want):
    """Largest relative error of a row: rows differ in scale by six orders of magnitude."""
    got, want = got.double(), want.double()
    scale = want.norm(dim=1) if want.ndim == 2 else want.abs()
    gap = (got - want).norm(dim=1) if want.ndim == 2 else (got - want).abs()
    return (gap / scale.clamp_min(1e-30)).max().item()


def by_definition(h, w, ids, weights, tau):
    """Written from the definition with a dense Y and no shared code, for one labelled row after
    another."""
    total = 0.0
    for x, tokens, shares in zip(h, ids, weights):
        if shares.any():
            c = F.cosine_similarity(x[None], w, dim=1, eps=1e-30)
            y = torch.zeros(len(w), dtype=w.dtype)
            for token, share in zip(tokens.tolist(), shares.tolist()):
                if share:
                    y[token] += share
            total = total + torch.logsumexp(c / tau, dim=0) - (y * c / tau).sum()
    return total


def test_reference_is_the_definition_and_its_derived_gradient_is_autograds():
    h, w, ids, weights = problem()
    loss, labelled, grad = with_grad(h, w, ids, weights, TAU, impl="reference")
    h.requires_grad_()
    definition = by_definition(h, w, ids, weights, TAU)
    definition.backward()
    assert labelled == N - 4 and labelled.dtype == torch.int64 and labelled.ndim == 0
    assert error(loss, definition.detach()) < 1e-13 and error(grad, h.grad) < 1e-10
    assert error(patch_loss_ref_grad(h.detach(), w, ids.clamp_min(0), weights, TAU), h.grad) < 1e-10


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("tau", [1.0, 0.07, 0.0131])
def test_chunked_is_the_reference(dtype, tolerance, k, tau):
    h, w, ids, weights = problem(k, dtype=dtype)
    true_loss, true_labelled, true_grad = with_grad(
        h.double(), w.double(), ids, weights, tau, impl="reference"
    )
    loss, labelled, grad = with_grad(h, w, ids, weights, tau)
    assert loss.dtype == grad.dtype == dtype and loss.ndim == 0 and labelled == true_labelled
    assert error(loss, true_loss) < tolerance / 10
    assert error(grad, true_grad) < tolerance
    assert not grad[[0, 7, 8, N - 1]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_better_than_the_naive_version(dtype):
    h, w, ids, weights = problem()
    h = F.normalize(h) * 3  # float16 has no room for six orders of magnitude
    h, w = h.to(dtype), w.to(dtype)
    true_loss, _, true_grad = with_grad(h.double(), w.double(), ids, weights, TAU, impl="reference")
    loss, _, grad = with_grad(h, w, ids, weights, TAU)

    x = h.clone().requires_grad_()
    scores = F.normalize(x) @ F.normalize(w).T / TAU  # everything in low precision
    naive = (
        weights.any(1)
        * (scores.float().logsumexp(1) - (weights * scores.gather(1, ids.clamp_min(0))).sum(1))
    ).sum()
    naive.backward()

    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert error(loss, true_loss) < min(1e-6, error(naive.detach(), true_loss))
    assert error(grad, true_grad) < min(
        torch.finfo(dtype).eps / 2, error(x.grad, true_grad) / 2
    )  # only the last rounding is left


def test_unlabelled_rows_cost_nothing_and_no_gradient_costs_half():
    h, w, ids, weights = problem(dtype=torch.float32)
    unlabelled = ~weights.any(dim=1)
    h[unlabelled] = math.nan  # whoever reads these shows it
    h.requires_grad_()
    product = 2 * (N - 4) * D * V
    inplace = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}

    def count(call):
        with FlopCounterMode(display=False, custom_mapping=inplace) as counter:
            loss = call()
        return loss, counter.get_total_flops()

    loss, flops = count(lambda: patch_loss(h, w, ids, weights, TAU)[0])
    assert flops == 2 * product
    _, flops = count(lambda: loss.backward())
    assert flops == 0 and h.grad.isfinite().all() and not h.grad[unlabelled].any()
    with torch.no_grad():
        without, flops = count(lambda: patch_loss(h, w, ids, weights, TAU)[0])
    assert flops == product and without == loss and not without.requires_grad
    assert not patch_loss(h.detach(), w.clone().requires_grad_(), ids, weights, TAU)[
        0
    ].requires_grad  # w is a constant


def test_backward_scales_and_may_run_twice():
    h, w, ids, weights = problem()
    _, _, grad = with_grad(h, w, ids, weights, TAU)
    x = h.clone().requires_grad_()
    loss = (
        3 * patch_loss(2 * x, w, ids, weights, TAU)[0] / 7
    )  # 2 h: same cosines, half the gradient by 2 h
    loss.backward(retain_graph=True)
    assert error(x.grad, grad * 3 / 7) < 1e-11
    loss.backward()
    assert error(x.grad, grad * 6 / 7) < 1e-11


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_degenerate_inputs_stay_finite(impl):
    h, w, ids, weights = problem(dtype=torch.float32)
    loss, labelled, grad = with_grad(h, w, ids, torch.zeros_like(weights), TAU, impl=impl)
    assert loss == 0 and labelled == 0 and not grad.any()
    loss, labelled, grad = with_grad(h[:0], w, ids[:0], weights[:0], TAU, impl=impl)
    assert loss == 0 and labelled == 0 and grad.shape == (0, D)

    w[18] = h[30] / h[30].norm() * 1e-30  # too short to have a direction, and along a patch
    h[31] = 0
    loss, _, grad = with_grad(h, w, ids, weights, 0.0131, impl=impl)
    assert loss.isfinite() and grad.isfinite().all() and not grad[31].any()
    w[18] = h[30] / h[30].norm() * 1e-5  # short, yet a word: the largest exp there is
    loss, _, grad = with_grad(h, w, ids, weights, 0.0131, impl=impl)
    true_loss, _, true_grad = with_grad(
        h.double(), w.double(), ids, weights, 0.0131, impl="reference"
    )
    grad, true_grad = (torch.cat([g[:31], g[32:]]) for g in (grad, true_grad))
    assert error(loss, true_loss) < 1e-5 and (grad - true_grad).norm() < 1e-5 * true_grad.norm()


def test_autocast_does_not_lower_the_precision():
    h, w, ids, weights = problem(dtype=torch.float32)
    for impl in ("chunked", "reference"):
        _, _, plain = with_grad(h, w, ids, weights, TAU, impl=impl)
        x = h.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = patch_loss(x, w, ids, weights, TAU, impl=impl)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.equal(x.grad, plain)


def test_bad_arguments_are_named():
    h, w, ids, weights = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^tau: 0.01 .* tau >= 0.0120 at V = 211"):
        patch_loss(h, w, ids, weights, 0.01)
    assert patch_loss(h.double(), w.double(), ids, weights, 0.01)[0].isfinite()  # float64 holds it
    assert patch_loss(h, w, ids, weights, 0.01, impl="reference")[0].isfinite()
    bad = {
        "tau": (h, w, ids, weights, 0.0),
        "h": (h[0], w, ids, weights, TAU),
        "w": (h, w[:, :-1], ids, weights, TAU),
        "weights": (h, w, ids, weights[:, :-1], TAU),
    }
    for name, arguments in bad.items():
        with pytest.raises(ValueError, match=f"^{name}: .*$"):
            patch_loss(*arguments)
    for wrong in (ids[:-1], ids.int(), ids + V, ids - V):
        with pytest.raises(ValueError, match="^ids: .*$"):
            patch_loss(h, w, wrong, weights, TAU)
    with pytest.raises(ValueError, match="^impl: .*chunked, reference"):
        patch_loss(h, w, ids, weights, TAU, impl="fast")
    with pytest.raises(
        ValueError, match="^impl: 'triton' and 'cublas' need .*chunked'$"
    ):  # a GPU, or Triton at all
        patch_loss(h, w, ids, weights, TAU, impl="triton")


def test_triton_is_optional():
    """Builds of torch for CPUs come without it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.patch_loss import patch_loss\n"
        "x = torch.eye(3); ids = torch.arange(3)[:, None]\n"
        "print(patch_loss(x, x, ids, x[:, :1], 1.0)[0].item())\n"
        "patch_loss(x, x, ids, x[:, :1], 1.0, impl='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)
    assert done.stderr.endswith(
        "ValueError: impl: 'triton' and 'cublas' need the package triton; use impl='chunked'\n"
    )


def test_cosine_loss():
    h, w, ids, weights = problem()
    h[0] = math.nan  # unlabelled
    h.requires_grad_()
    loss, labelled = cosine_loss(h, w, ids, weights)
    loss.backward()
    x = h.detach().clone().requires_grad_()
    cosine = torch.nan_to_num(F.normalize(x)) @ F.normalize(w).T
    rows = weights.any(dim=1)
    expected = (1 - (weights * cosine.gather(1, ids.clamp_min(0))).sum(dim=1))[rows].sum()
    expected.backward()
    assert labelled == N - 4 and error(loss.detach(), expected.detach()) < 1e-13
    assert error(h.grad[rows], x.grad[rows]) < 1e-11 and not h.grad[~rows].any()


def test_no_block_exceeds_the_budget():
    h, w, ids, weights = problem(dtype=torch.float32)
    h.requires_grad_()
    ours = {x.untyped_storage().data_ptr() for x in (h, w, ids, weights)}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in ours:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        patch_loss(h, w, ids, weights, TAU)[0].backward()
    assert 0 < largest <= module.SCRATCH_BYTES < w.nbytes < (N - 4) * V * 4


def test_default_budget_gives_blocks_worth_multiplying(monkeypatch):
    monkeypatch.undo()
    for d, v in ((512, 32000), (4096, 32000), (4096, 151936)):
        rows, tile = module.block_sizes(d, v, 4)
        assert rows >= 256 and tile >= 256
    assert module.block_sizes(D, V, 4)[1] == V  # a small vocabulary is one tile
