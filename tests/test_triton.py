"""The fused kernels: their numbers against float64, and what they compile to.

Numbers need a GPU or Triton's interpreter, which must be asked for before Triton is imported:
without a GPU, the first test runs this file once more in a process of its own. Machine code needs
neither: the compiler makes it for chips that are not there.
"""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_patch_loss import error, problem, with_grad

from kernels import patch_loss as module
from kernels.patch_loss import TILES, patch_loss

triton = pytest.importorskip("triton", reason="no Triton here: nothing to run or compile")

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_numbers = pytest.mark.skipif(
    not GPU and not INTERPRETED, reason="no GPU: runs inside test_numbers_in_the_interpreter"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_compiler = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter stands in for the compiler"
)

DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
N, V, ALIGNED, RAGGED = (
    (41, 101, 40, 37) if DEVICE == "cpu" else (391, 1013, 136, 137)
)  # widths with and without the copy engine
TAU = 0.07
SLACK = (
    1 if DEVICE == "cpu" else 5
)  # exp2, division and root are approximate on a GPU, by a few ulp
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.skipif(GPU or INTERPRETED, reason="the numbers are checked in this process")
def test_numbers_in_the_interpreter():
    quiet = ["-q", "-rs", "-W", "ignore::RuntimeWarning", "--noconftest", "-n", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, __file__],
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "no GPU: runs inside" not in done.stdout, (
        done.stdout + done.stderr
    )


# ---- numbers -------------------------------------------------------------------------------------


@pytest.fixture
def small_poisoned_chunks(monkeypatch):
    """Chunks of one row tile, narrow tiles of product 2, and buffers that start as NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "FUSED_SCRATCH", 1)
    monkeypatch.setattr(module, "ORDER_BLOCK", 16)


@pytest.fixture
def right_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its bits, multiplies the bits in a dot, and cuts instead of
    rounding: mend both."""
    if DEVICE == "cuda":
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return (
            torch.from_numpy(numpy.array(data))
            .bfloat16()
            .view(torch.int16)
            .numpy()
            .view(numpy.uint16)
        )

    def widened(x):
        return interpreter.TensorHandle(
            (x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32
        )

    def dot_of_numbers(self, a, b, *rest):
        return dot(
            self, *(widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_numbers)


def fused_problem(k, d, h_dtype=F32, w_dtype=F32):
    """problem() on the device, h by columns, w with a margin of NaN. So many rows are unlabelled,
    and NaN, that a whole chunk lies beyond the labelled ones. With k = 1, patches that are near a
    word have it as their target: p - Y nearly cancels."""
    h, w, ids, weights = problem(k, n=N, d=d, v=V)
    if k == 1:
        ids[:20, 0] = torch.arange(1, 21)
    weights[N // 2 + 2 : -7] = 0
    if h_dtype == F16:
        h = F.normalize(h) * 3  # no room for six orders of magnitude
    h[~weights.any(dim=1)] = math.nan  # whoever reads these shows it
    h, w = (
        h.T.contiguous().T.to(DEVICE, h_dtype),
        F.pad(w, (0, 8), value=math.nan).to(DEVICE, w_dtype)[:, :d],
    )
    return h, w, ids.clamp_min(0).to(DEVICE), weights.to(DEVICE)


def true(h, w, ids, weights, tau):
    """(loss, gradient) by the reference in float64; gradient 0 in unlabelled rows."""
    loss, _, grad = with_grad(h.double(), w.double(), ids, weights, tau, impl="reference")
    return loss, grad


def naive(h, w, ids, weights, tau):
    """(loss, gradient) with everything in w's dtype, up to the softmax: what one would write
    first."""
    rows = weights.any(dim=1)
    x = F.normalize(h.float()).to(w.dtype).requires_grad_()
    scores = F.normalize(x[rows], eps=1e-6) @ F.normalize(w, eps=1e-6).T / tau
    loss = (
        scores.float().logsumexp(1) - (weights[rows] * scores.gather(1, ids[rows])).sum(1)
    ).sum()
    loss.backward()
    return loss.detach(), torch.nan_to_num(x.grad.float() / h.float().norm(dim=1, keepdim=True))


def allowed(h, w, ids, weights, tau):
    """What rounding may do: (to the loss, to the gradient of each row), absolute.

    Three roundings count. x is h in w's dtype, a cosine is a float32 sum over D, E is in 16 bits
    (or 11, in TF32). Their errors are independent: a sum of terms t_k, each off by at most u t_k,
    is off by more than SURE u |t|_2 once in ten million times (Hoeffding's inequality), and never
    by more than u |t|_1.
    """
    SURE = 6
    half_ulp = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
    rows = weights.any(dim=1)
    x, w64, ids, y = h[rows].double(), w.double(), ids[rows], weights[rows].double()
    h_hat, w_hat = x * module.inverse_norm(x), w64 * module.inverse_norm(w64)
    c = h_hat @ w_hat.T
    p = torch.softmax(c / tau, 1)
    difference = p.scatter_add(1, ids, -y)

    of_x = half_ulp[w.dtype] * (h.dtype != w.dtype)
    of_c = (SURE * of_x + h.shape[1] * half_ulp[F32]) * (h_hat**2 @ w_hat.T**2).sqrt()
    of_c += 8 * half_ulp[F32] * c.abs()  # both norms'
    of_scores = of_c / tau + 4 * half_ulp[F32]  # and the exponential's
    on_average = (p * of_scores).sum(1)
    on_targets = (y * of_scores.gather(1, ids)).sum(1)
    of_loss = (on_average + on_targets).norm() + len(x) * 8 * half_ulp[F32]

    of_e = {BF16: half_ulp[BF16], F16: 2.0**-12, F32: half_ulp[F32]}[w.dtype]
    of_e = of_e * torch.minimum(difference.abs().sum(1), SURE * difference.norm(dim=1))
    of_a = of_e + 4 * on_average + on_targets  # of p, of its sum, and of both in a · h
    of_a += 2 * of_x * (difference * c).sum(1).abs()
    return of_loss, of_a / tau * module.inverse_norm(x)[:, 0]


def total_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@needs_numbers
@pytest.mark.parametrize(
    "impl, k, d, tau",
    [
        ("triton", 5, RAGGED, TAU),
        ("triton", 16, ALIGNED, 0.0131),
        ("triton", 1, RAGGED, 1.0),
        ("cublas", 5, ALIGNED, TAU),
    ],
)
def test_float32_is_the_reference(impl, k, d, tau, small_poisoned_chunks):
    arguments = fused_problem(k, d)
    true_loss, true_grad = true(*arguments, tau)
    loss, labelled, grad = with_grad(*arguments, tau, impl=impl)
    rows = arguments[3].any(dim=1)
    assert (
        loss.dtype == grad.dtype == F32
        and loss.ndim == 0
        and labelled == rows.sum()
        and labelled.dtype == torch.int64
    )
    assert error(loss, true_loss) < 2e-6 * SLACK
    assert error(grad[rows], true_grad[rows]) < 2e-5 * SLACK and not grad[~rows].any()


@needs_numbers
@pytest.mark.parametrize(
    "impl, k, d, h_dtype, w_dtype",
    [
        ("triton", 5, ALIGNED, BF16, BF16),
        ("triton", 1, RAGGED, BF16, BF16),
        ("triton", 5, ALIGNED, F32, BF16),
        ("triton", 5, ALIGNED, F16, F16),
        ("triton", 1, RAGGED, F16, F16),
        ("triton", 5, RAGGED, F32, F16),
        ("triton", 1, RAGGED, BF16, F32),
        ("cublas", 5, ALIGNED, BF16, BF16),
        ("cublas", 1, RAGGED, F16, F16),
    ],
)
def test_low_precision_is_better_than_the_naive_version(
    impl, k, d, h_dtype, w_dtype, small_poisoned_chunks, right_bfloat16
):
    arguments = fused_problem(k, d, h_dtype, w_dtype)
    rows = arguments[3].any(dim=1)
    true_loss, true_grad = true(*arguments, TAU)
    low = h_dtype if w_dtype == F32 else w_dtype
    _, naive_grad = naive(arguments[0], arguments[1].to(low), *arguments[2:], TAU)
    loss, _, grad = with_grad(*arguments, TAU, impl=impl)
    assert loss.dtype == F32 and grad.dtype == h_dtype
    of_loss, of_grad = allowed(*arguments, TAU)
    assert (loss.double() - true_loss).abs() < of_loss + 2.0**-23 * true_loss
    gap, size = (x[rows].norm(dim=1) for x in (grad.double() - true_grad, true_grad))
    assert (gap < of_grad + torch.finfo(h_dtype).eps / 2 * size).all()  # the result is rounded too
    assert total_error(grad[rows], true_grad[rows]) < 0.7 * total_error(
        naive_grad[rows], true_grad[rows]
    )
    assert not grad[~rows].any()


@needs_numbers
@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_degenerate_inputs(impl, small_poisoned_chunks):
    h, w, ids, weights = fused_problem(5, ALIGNED)
    loss, labelled, grad = with_grad(h, w, ids, torch.zeros_like(weights), TAU, impl=impl)
    assert loss == 0 and labelled == 0 and not grad.any()
    loss, labelled, grad = with_grad(h[:0], w, ids[:0], weights[:0], TAU, impl=impl)
    assert loss == 0 and labelled == 0 and grad.shape == (0, ALIGNED)

    h, ids, weights = h[:20], ids[:20], weights[:20]
    along = h[9] / h[9].norm()
    ids[12, 0] = 18
    h[10] = 0
    h[11] *= 1e-14  # shorter than SHORTEST, like the first word below
    for length in (1e-13, 1e-11):  # the second makes the largest exp by the shortest word
        w[18] = along * length
        arguments = h, w, ids, weights, 0.0131
        (true_loss, true_grad), (loss, _, grad) = true(*arguments), with_grad(*arguments, impl=impl)
        assert (
            error(loss, true_loss) < 2e-6 * SLACK
            and total_error(grad, true_grad) < 2e-5 * SLACK
            and not grad[10:12].any()
        )



@needs_numbers
@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("outside", [-1, V, 2**40])
def test_ids_outside_the_vocabulary_become_nan(impl, outside, small_poisoned_chunks):
    """In the rows that have them, and nowhere else; as padding they are nothing."""
    h, w, ids, weights = fused_problem(5, ALIGNED)
    loss, _, grad = with_grad(h, w, ids, weights, TAU, impl=impl)
    rows = weights.any(dim=1)
    assert (weights[12, 1] == 0) and rows[9]
    ids[12, 1] = outside
    assert patch_loss(h, w, ids, weights, TAU, impl=impl)[0] == loss
    ids[9, 2] = outside
    broken, labelled, other = with_grad(h, w, ids, weights, TAU, impl=impl)
    assert broken.isnan() and labelled == rows.sum() and other[9].isnan().all()
    other[9] = grad[9]
    assert torch.equal(other, grad)


@needs_numbers
def test_norms_of_words_are_made_once_and_again_after_a_change(monkeypatch):
    made, inverse_norm = [], module.inverse_norm
    monkeypatch.setattr(module, "inverse_norm", lambda x: made.append(0) or inverse_norm(x))
    h, w, ids, weights = fused_problem(5, ALIGNED)
    w = torch.nn.Parameter(w.contiguous())
    loss = with_grad(h, w, ids, weights, TAU, impl="triton")[0]
    assert with_grad(h, w, ids, weights, TAU, impl="triton")[0] == loss and len(made) == 1
    with torch.no_grad():
        w[3] *= 0.5  # a cosine does not change
    assert error(with_grad(h, w, ids, weights, TAU, impl="triton")[0], loss) < 1e-6 * SLACK
    with torch.no_grad():
        w[3] = w[4]
    changed = with_grad(h, w, ids, weights, TAU, impl="triton")[0]
    assert len(made) == 3 and w.grad is None
    assert error(changed, true(h, w.detach(), ids, weights, TAU)[0]) < 2e-6 * SLACK
    with torch.inference_mode():
        patch_loss(h, w.detach().clone(), ids, weights, TAU, impl="triton")
    before = len(module.WORD_NORMS)
    del w
    assert len(module.WORD_NORMS) == before - 1


@needs_numbers
def test_without_gradient_nothing_is_made_for_it(small_poisoned_chunks, monkeypatch):
    arguments = fused_problem(5, ALIGNED)
    loss, _, _ = with_grad(*arguments, TAU, impl="triton")
    shapes, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: shapes.append(size[0]) or empty(*size, **options)
    )
    monkeypatch.setattr(module, "gradient_kernel", None)
    without, _ = patch_loss(*arguments, TAU, impl="triton")
    assert without == loss and not without.requires_grad
    assert shapes and all(max(shape[1:], default=0) < V for shape in shapes)  # no E


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's dots")
def test_unlabelled_rows_cost_nothing(small_poisoned_chunks, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    dot, calls = InterpreterBuilder.create_dot, []
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *arguments: calls.append(0) or dot(*arguments)
    )
    arguments = fused_problem(1, RAGGED)
    labelled = int(arguments[3].any(dim=1).sum())
    first, second = TILES["interpreter", F32]
    row_tiles, in_all = triton.cdiv(labelled, first.BM), triton.cdiv(N, first.BM)
    one = triton.cdiv(V, first.BN) * triton.cdiv(RAGGED, first.BK)
    two = triton.cdiv(RAGGED, second.BN // 2) * triton.cdiv(V, second.BK)
    with_grad(*arguments, TAU, impl="triton")
    assert row_tiles < in_all and len(calls) == row_tiles * (one + two)


@needs_gpu
@pytest.mark.parametrize("impl", ["triton", "cublas"])
def test_nothing_waits_for_the_gpu(impl):
    h, w, ids, weights = fused_problem(5, ALIGNED, BF16, BF16)
    h.requires_grad_()
    patch_loss(h, w, ids, weights, TAU, impl=impl)[0].backward()  # compiles
    ids[1, 0] = V  # nor for ids that lie outside
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = patch_loss(h, w, ids, weights, TAU, impl=impl)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan()


@needs_gpu
def test_default_on_a_gpu():
    x = torch.ones(1, 1, device=DEVICE)
    expected = module.FASTEST_ON_GPU if torch.cuda.get_device_capability() >= (8, 0) else "chunked"
    assert module.default_impl(x, x) == expected and module.default_impl(x.double(), x) == "chunked"


# ---- machine code --------------------------------------------------------------------------------

SHARED_MEMORY = {
    "sm_80": 101376,
    "sm_90": 232448,
}  # bytes of a block; the first is that of sm_86 and sm_89, which use the same tiles
INSTRUCTIONS = {
    ("sm_90", 2): {"HGMMA", "UTMALDG"},
    ("sm_80", 2): {"HMMA", "LDGSTS"},
    ("sm_80", 4): {"FFMA", "LDGSTS"},
}
SHIPPED = [key for key in TILES if key[0] != "interpreter"]


@pytest.fixture
def compiled(monkeypatch):
    """compiled(kind) -> a list, to which every kernel launch from then on adds (name, binary)
    instead of running."""

    def start(kind):
        capability = int(kind[3:])

        class Driver:
            def get_current_device(self):
                return capability  # kernels are cached by device number

            def get_current_stream(self, device):
                return 0

            def get_current_target(self):
                return triton.backends.compiler.GPUTarget("cuda", capability, 32)

        launched, run = [], triton.JITFunction.run

        def compile_only(self, *args, warmup, **options):
            launched.append((self.fn.__name__, run(self, *args, warmup=True, **options)))

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        monkeypatch.setattr(module, "chip", lambda device: (kind, 132))
        return launched

    return start


def without_memory(n, d, v, dtype, h_dtype=None):
    """h, w, ids, weights of shapes and dtypes alone."""
    return (
        torch.empty(n, d, dtype=h_dtype or dtype, device="meta", requires_grad=True),
        torch.empty(v, d, dtype=dtype, device="meta"),
        torch.empty(n, 4, dtype=torch.int64, device="meta"),
        torch.empty(n, 4, device="meta"),
    )


@needs_compiler
@pytest.mark.parametrize(
    "kind, dtype, h_dtype", [*((*key, key[1]) for key in SHIPPED), ("sm_90", BF16, F32)], ids=str
)
def test_compiled_code(kind, dtype, h_dtype, compiled, tmp_path):
    """No spills, shared memory that exists, and the chip's matrix and copy instructions, as the
    ragged shape below launches them."""
    first, second = TILES[kind, dtype]
    assert first.BM == second.BM and first.BN % second.BK == 0
    launched = compiled(kind)
    module.patch_loss_triton(*without_memory(1124, 4096, 32003, dtype, h_dtype), TAU)
    binaries = {binary.hash: (name, binary) for name, binary in launched}
    assert [name for name, _ in binaries.values()] == [
        "order_kernel",
        "gather_kernel",
        "scores_kernel",
        "finish_kernel",
        "gradient_kernel",
        "gradient_kernel",  # of the last chunk: narrow
    ]
    for name, binary in binaries.values():
        (tmp_path / "cubin").write_bytes(binary.asm["cubin"])
        code = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", tmp_path / "cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
        print(f"{name}: {registers} registers, {binary.metadata.shared} bytes of shared memory")
        assert stack == 0 and "STL" not in code, (
            f"{name} spills: {registers} registers, {stack} bytes"
        )
        assert binary.metadata.shared <= SHARED_MEMORY[kind]
        if name in ("scores_kernel", "gradient_kernel"):
            assert INSTRUCTIONS[kind, dtype.itemsize] <= set(re.findall(r"\b[A-Z]+\b", code)), name


@needs_compiler
def test_launches_are_few(monkeypatch):
    """Kernels and torch's operations of a step at the first call and later ones: none but four
    kernels per chunk, the order of rows, the sum of the losses and its scaled gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    started = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.overloadpacket.__name__
            if name not in ("empty", "detach", "squeeze", "ones_like"):  # nothing of ours
                started.append(name)
            return operation(*args, **(kwargs or {}))

    monkeypatch.setattr(module, "chip", lambda device: ("sm_90", 132))
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *a, **k: started.append(self.fn.__name__)
    )
    arguments = without_memory(4608, 4096, 32000, BF16)  # five chunks
    counts = []
    for _ in range(2):
        started.clear()
        arguments[0].grad = None
        with Operations():
            module.patch_loss_triton(*arguments, TAU)[0].backward()
        counts.append(len(started))
    assert started == [
        "order_kernel",
        *["gather_kernel", "scores_kernel", "finish_kernel", "gradient_kernel"] * 5,
        "sum",
        "mul",
    ]
    assert counts == [32, 23]


@needs_compiler
@pytest.mark.parametrize("v, rows", [(32000, 1024), (151936, 1024), (400000, 384)])
def test_scratch_is_bounded(v, rows, monkeypatch):
    """What the kernels get beside inputs and gradient: within the budget, and per row of h 12
    bytes, per word 4 and a bit."""
    tensors = {}

    def collect(self, *args, **options):
        for x in args:
            x = getattr(x, "base", x)  # of a descriptor
            if torch.is_tensor(x):
                tensors[id(x)] = x

    monkeypatch.setattr(module, "chip", lambda device: ("sm_90", 132))
    monkeypatch.setattr(triton.JITFunction, "run", collect)
    buffers = {}
    for n in (18432, 40000):
        tensors.clear()
        module.patch_loss_triton(*without_memory(n, 4096, v, BF16), TAU)
        own = [x for x in tensors.values() if x.shape not in ((n, 4096), (n, 4), (v, 4096))]
        assert max(own, key=lambda x: x.nbytes).shape == (
            rows,
            -(-v // 256) * 256,
        )  # E: a tile of product 2 for each multiprocessor
        buffers[n] = sum(x.nbytes for x in own) - 12 * n
    assert buffers[18432] == buffers[40000] <= module.FUSED_SCRATCH + 4 * (v + 4096)
