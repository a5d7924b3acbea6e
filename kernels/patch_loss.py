"""The patch loss: softmax cross-entropy of patches against a whole vocabulary, in bounded memory.

The problem. Every patch embedding is compared with every word embedding, and the softmax over the
vocabulary is pulled towards the words that name what the patch shows. Eight images of 576 patches
against 32000 words are 147 million similarities: 0.59 GB in float32, and autograd holds several
such matrices at once. Written plainly, the loss spends its time and memory on moving numbers that
are used once. Here a block of similarities is made, used for the loss and for the gradient while it
is at hand, and overwritten by the next one.

Symbols, beside the legend of model.py: n patches, K target tokens of a patch at most.

    h (n, D)             patch embeddings, rows of H; the only input that gets a gradient
    w (V, D)             word embeddings, W, frozen: their gradient would be thrown away
    ids, weights (n, K)  Y, row by row; weight 0 is padding, a row of zeros is unlabelled
    ĥ_i, ŵ_j             h_i / |h_i| and w_j / |w_j|; a row shorter than SHORTEST counts as zero
    c_ij = ĥ_i · ŵ_j     cosine similarity
    s_ij = c_ij / tau    score
    total_i = sum_j exp(s_ij),    p_ij = exp(s_ij) / total_i

Loss. Summed over the labelled patches (the caller divides by their number, over all ranks at once):

    loss_i = ln total_i - sum_j Y_ij s_ij

No running maximum. A softmax usually subtracts the largest score of a row, because exp would
overflow. Tiled, this maximum is only known at the end, so everything summed so far is rescaled with
every tile. A cosine is at most 1, so here total_i <= V exp(1 / tau). Float32 holds this while
1 / tau + ln V stays below 88.4, at V = 151936 for every tau >= 0.0131. The sums over the vocabulary
are then plain sums, and tiles can be added in any order.

Gradient. Differentiating loss_i by the scores gives p_ij - Y_ij. The chain rule through
s_ij = ĥ_i · ŵ_j / tau, and then through ĥ = h / |h|, gives

    a_i = (sum_j p_ij ŵ_j - sum_j Y_ij ŵ_j) / tau        by ĥ_i
    g_i = (a_i - (a_i · ĥ_i) ĥ_i) / |h_i|                by h_i

The first sum is attention with ĥ_i / tau as query, and the words ŵ as both keys and values. The
second line removes the part along h_i, since the length of a patch does not change its cosines.
That needs one number per row, a_i · ĥ_i.

Gradient in the forward pass. g_i needs the same exp(s_ij) as the loss. The backward pass only
brings one factor for the whole sum, so g is formed at once and multiplied later. This takes two
matrix products (scores, and their weighted sum of words) where a backward pass that computes the
scores again takes three, and nothing of size n x V is kept for it.

Unit words. A normalised copy of the whole w is not needed. The chunked path normalises each tile of
words in the buffer to which it is copied anyway. The Triton kernels multiply by the raw words and
put 1 / |w_j| where it costs one multiplication per score.

Where to read on: the reference is the definition in ten lines; the chunked path is the same with
bounded memory, for CPUs; the fused path is the one for GPUs. All return the same numbers, up to
rounding. docs/kernel.md has times.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                                     # builds of torch for CPUs come without it
    triton = None

SHORTEST = 1e-12                # norm below which a row has no direction, and gets no gradient
SCRATCH_BYTES = 64 * 2**20      # working memory of the chunked path, beside its gradient
LARGEST_TILE = 4096             # words per tile: smaller ones cost calls, larger ones room for rows
FUSED_SCRATCH = 320 * 2**20     # of the fused path: 1024 rows at D = 4096, V = 151936 in bfloat16
ORDER_BLOCK = 1024              # rows that order_kernel looks at together
FASTEST_ON_GPU = "triton"       # its default; "cublas" took 7% longer or more on an H100


# ---- Parts that all versions share ---------------------------------------------------------------


def compute_dtype(h):
    """The dtype of all arithmetic: float32, or float64 for float64 input."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def inverse_norm(x):
    """1 / |x| of each row, 0 for a row shorter than SHORTEST: (n, D) -> (n, 1)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=compute_dtype(x))
    return (norm > SHORTEST) / norm.clamp_min(SHORTEST)


def check_overflow(tau, v, dtype):
    """Raise a ValueError if a sum of `v` exponentials of 1 / tau could exceed `dtype`."""
    largest = math.log(torch.finfo(dtype).max) - 0.25                    # a margin for rounding
    if 1 / tau + math.log(v) > largest:
        bound = 1 / (largest - math.log(v))
        raise ValueError(f"tau: {tau:g} is too small, exp(1 / tau) overflows; use tau >="
                         f" {bound:.4f} at V = {v}, or impl='reference'")


def labelled_rows(weights):
    """Indices of the rows with a target: (n, K) -> (labelled,)."""
    return (weights != 0).any(dim=1).nonzero().squeeze(1)


def target_words(w, ids, weights, dtype):
    """sum_j Y_ij ŵ_j, exact in `dtype`: (n, D). One column of targets at a time, so that no (n, K,
    D) exists; a token that occurs twice in a row is simply added twice."""
    total = torch.zeros(len(ids), w.shape[1], dtype=dtype, device=w.device)
    for token, share in zip(ids.T, weights.to(dtype).T):                 # both (n,)
        word = w[token].to(dtype)                                        # (n, D)
        total.addcmul_(word, inverse_norm(word) * share[:, None])
    return total


# ---- Reference: the definition, with the full matrix ---------------------------------------------


def patch_loss_ref(h, w, ids, weights, tau):
    """The loss as it is defined above, differentiable by autograd -> (loss_sum, labelled)."""
    dtype = compute_dtype(h)
    rows = labelled_rows(weights)
    h, w, ids, weights = h[rows].to(dtype), w.to(dtype), ids[rows], weights[rows].to(dtype)

    h_hat = h * inverse_norm(h)                                          # (n, D)
    w_hat = w * inverse_norm(w)                                          # (V, D)
    scores = h_hat @ w_hat.T / tau                                       # (n, V)
    target = (weights * scores.gather(1, ids)).sum(dim=1)                # (n,)
    return (scores.logsumexp(dim=1) - target).sum(), torch.tensor(len(rows), device=h.device)


def patch_loss_ref_grad(h, w, ids, weights, tau):
    """The gradient of loss_sum by h, as derived above, with the full matrix -> (n, D) as h."""
    dtype = compute_dtype(h)
    rows = labelled_rows(weights)
    x, w, ids, weights = h[rows].to(dtype), w.to(dtype), ids[rows], weights[rows].to(dtype)

    h_inverse = inverse_norm(x)                                          # (n, 1)
    h_hat = x * h_inverse                                                # (n, D)
    w_hat = w * inverse_norm(w)                                          # (V, D)
    p = torch.softmax(h_hat @ w_hat.T / tau, dim=1)                      # (n, V)
    a = p.scatter_add(1, ids, -weights) @ w_hat / tau                    # (n, D)    by ĥ
    g = (a - (a * h_hat).sum(dim=1, keepdim=True) * h_hat) * h_inverse   # (n, D)    by h

    grad = torch.zeros_like(h)
    grad[rows] = g.to(h.dtype)
    return grad


# ---- Chunked: rows in chunks, the vocabulary in tiles, loss and gradient in one sweep ------------
#
#     for each chunk of labelled patches:
#         total = 0; A = 0
#         for each tile of words:
#             E = exp(ĥ ŵ^T / tau)            # (rows, tile), made in place in one buffer
#             total += row sums of E
#             A += E ŵ                        # the attention sum, not yet divided
#         loss += sum(ln total - target scores)
#         a = (A / total - target words) / tau;  g = (a - (a · ĥ) ĥ) / |h|


def block_sizes(d, v, bytes_each):
    """(rows per chunk, words per tile) whose buffers fit into SCRATCH_BYTES."""
    numbers = SCRATCH_BYTES // bytes_each
    tile = max(1, min(v, LARGEST_TILE, numbers // (4 * d)))  # a quarter for the tile of words
    # a row: its scores, and about six vectors of width D
    rows = max(1, (numbers - tile * d) // (tile + 6 * d))
    return rows, tile


def chunked_sweep(h, w, ids, weights, tau, need_grad):
    """-> (loss_sum, gradient of loss_sum by h in h's dtype or None, number of labelled rows)."""
    dtype, (v, d) = compute_dtype(h), w.shape
    labelled = labelled_rows(weights)  # unlabelled patches cost nothing from here on
    most_rows, most_words = block_sizes(d, v, dtype.itemsize)
    most_rows = min(most_rows, len(labelled))
    scores_buffer = torch.empty(most_rows, most_words, dtype=dtype, device=h.device)
    words_buffer = torch.empty(most_words, d, dtype=dtype, device=h.device)

    loss_sum = torch.zeros((), dtype=dtype, device=h.device)
    grad = torch.zeros_like(h) if need_grad else None

    for first_row in range(0, len(labelled), max(1, most_rows)):
        rows = labelled[first_row:first_row + most_rows]                 # (r,)
        h_hat = h[rows].to(dtype)                                        # (r, D)
        h_inverse = inverse_norm(h_hat)                                  # (r, 1)
        h_hat = h_hat * h_inverse                                        # (r, D)
        query = h_hat / tau                                              # (r, D)
        total = torch.zeros(len(rows), 1, dtype=dtype, device=h.device)  # (r, 1)
        attended = torch.zeros_like(h_hat) if need_grad else None        # (r, D)

        for first_word in range(0, v, most_words):
            words = w[first_word:first_word + most_words]                # (t, D)
            # (t, D)    low precision is raised here, tile by tile
            w_hat = words_buffer[:len(words)].copy_(words)
            w_hat.mul_(inverse_norm(w_hat))
            # (r, t)
            e = torch.mm(query, w_hat.T, out=scores_buffer[:len(rows), :len(words)]).exp_()
            total += e.sum(dim=1, keepdim=True)
            if need_grad:
                attended.addmm_(e, w_hat)

        target = target_words(w, ids[rows], weights[rows], dtype)        # (r, D)
        loss_sum += total.log().sum() - (query * target).sum()
        if need_grad:
            a = attended.div_(total).sub_(target).div_(tau)                  # (r, D)    by ĥ
            a.addcmul_(h_hat, (a * h_hat).sum(dim=1, keepdim=True), value=-1)
            grad[rows] = a.mul_(h_inverse).to(h.dtype)                   # (r, D)    by h

    return loss_sum, grad, torch.tensor(len(labelled), device=h.device)


class GradientInForward(torch.autograd.Function):
    """A sweep as a differentiable function of h: the gradient is made in the forward pass, and
    scaled in the backward pass."""

    @staticmethod
    def forward(ctx, sweep, h, w, ids, weights, tau):
        loss_sum, grad, labelled = sweep(h, w, ids, weights, tau, need_grad=True)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(labelled)
        ctx.set_materialize_grads(False)                        # no zeros for `labelled`
        return loss_sum, labelled

    @staticmethod
    @once_differentiable
    def backward(ctx, factor, _):
        grad, = ctx.saved_tensors
        # not in place: with retain_graph this runs again
        return None, grad * factor, None, None, None, None


def run_sweep(sweep, h, w, ids, weights, tau):
    """A sweep, with the gradient only if someone will ask for it -> (loss_sum, labelled)."""
    check_overflow(tau, len(w), compute_dtype(h))
    if torch.is_grad_enabled() and h.requires_grad:
        return GradientInForward.apply(sweep, h, w, ids, weights, tau)
    with torch.no_grad():
        loss_sum, _, labelled = sweep(h, w, ids, weights, tau, need_grad=False)
    return loss_sum, labelled


def patch_loss_chunked(h, w, ids, weights, tau):
    """The same loss in bounded memory -> (loss_sum, labelled). ValueError: exp could overflow."""
    return run_sweep(chunked_sweep, h, w, ids, weights, tau)


# ---- Fused: Triton kernels for GPUs --------------------------------------------------------------
#
# A Triton kernel is a function that one *program* runs; a launch starts many programs, each with
# its own program_id, and each works on whole tiles at once. A tile lives in registers and shared
# memory (on chip, fast, small), a tensor in device memory (slow, large). A score is made on chip by
# a matrix product, and on chip it turns into everything that will be asked of it: nothing but E,
# the operand of the second product, is written (in 16 bits for bfloat16 words), and nothing else of
# size rows x V exists.
#
#     order:  the labelled patches, first; count: how many they are    # one program
#     for each chunk of R rows:                               # on the host; below, a kernel each
#         gather:     x = h[order[chunk]], 1 / |h|            # a program per row; unlabelled: zeros
#         scores:     for each (row tile i, word tile j):     # product 1
#                         c = (x_i w_j^T) / |h| / |w|         # sum over D in steps of BK
#                         p = exp(c / tau)                    # not yet divided by the total
#                         E[i, j] = p unit / |w|              # only if a gradient is wanted
#                         total_part[j, i], q_part[j, i] = row sums of p and of p c
#         finish:     total, q = sums of the parts over j     # a program per row
#                     t_k = cosine with the k-th target, in float32
#                     loss = ln total - sum_k Y_k t_k / tau
#                     E[row, target] = (p - Y total) unit / |w_target|
#         gradient:   for each (row tile i, column tile j):   # product 2
#                         a = (E_i w_j) / (unit total)        # sum over V in steps of BK
#                         grad[order[i], j] = (a - (q / total - sum_k Y_k t_k) ĥ) / (tau |h|)
#
# The projection. The gradient needs (sum_j (p_ij - Y_ij) ŵ_j) · ĥ_i, which looks like one more sum
# over D. But ŵ_j · ĥ_i = c_ij, so that it is q_i / total_i - sum_k Y_ik t_ik: a by-product of
# scores that were at hand.
#
# The targets. In a fitted patch p_ij - Y_ij nearly cancels. Had E been rounded to 16 bits
# before Y was taken off, the rounding error would be all that is left of it. So the few target
# entries are computed again in float32, from gathered rows, and overwrite what product 1 wrote. A
# token that occurs twice in a row gets its two shares added by both writers: equal values.
#
# Range of E. Product 2 multiplies by raw words, so E carries 1 / |w_j|. Bfloat16 and float32 reach
# from 1e-38 to 3e38, and exp(s) from exp(-76) = 1e-33 to exp(76) = 1e33 where the temperature is
# allowed at all: no shift of the exponent is better centred than none. A short word could still
# overflow; so E is in units of 1 / unit, where `unit` is the norm of the shortest word that has a
# direction, and at most 1: p unit / |w_j| <= p. What matters of E underflows only where all cosines
# of a patch are below -0.7, at the smallest tau, and word lengths differ by ten orders of
# magnitude. A word shorter than SHORTEST has 1 / |w| = 0: it adds exp(0) to the total and nothing
# to E.
#
# Dtypes. Both products run in w's dtype with float32 sums. h enters as it is if it has that dtype,
# else as ĥ, rounded to it (a length could be out of range, a direction is not). E is bfloat16 for
# bfloat16 words. Float16 ends at 65504, too soon for exp(s): with float16 words E is float32, and
# product 2 runs in TF32, which holds every float16 exactly, at half the speed. Float32 words give
# IEEE float32, or TF32 if torch.set_float32_matmul_precision asks for it. The rest is always
# float32.
#
# No waiting. The count of labelled patches stays on the GPU: the host launches for n rows, and
# programs whose rows lie beyond the count have nothing to do. Nothing here may read a tensor on the
# host, or boolean-index with one.
#
# Scratch. R rows of x and E: the most that fit into FUSED_SCRATCH, but no more than give one tile
# of product 2 to each multiprocessor: at D = 4096 on 132 of them 1024 rows, 75 MB at V = 32000, 325
# MB at V = 151936, whatever n is. Besides 12 bytes per row of h and 4 per word, and the gradient.

# without Triton the kernels are plain functions that nobody calls
jit = triton.jit if triton else lambda function: function


@jit
def load_tile(x, row, column, rows, columns, stride, R: tl.constexpr, C: tl.constexpr,
              TMA: tl.constexpr):
    """x[row:row + R, column:column + C], zeros outside of (rows, columns): (R, C). A tensor
    descriptor has the copy engine fetch it; a plain pointer needs 64-bit offsets, since row *
    stride may exceed 2^31, and a mask."""
    if TMA:
        tile = x.load([row, column])
    else:
        o_row = row + tl.arange(0, R)
        o_column = column + tl.arange(0, C)
        m_tile = (o_row < rows)[:, None] & (o_column < columns)[None, :]
        o_tile = o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
        tile = tl.load(x + o_tile, mask=m_tile, other=0.0)
    return tile


@jit
def rounded(e, dtype: tl.constexpr, TF32: tl.constexpr):
    """Float32 numbers on their way into E: to E's dtype; for a product in TF32 to its 11
    significant bits, since the matrix units do not round but cut the other 13 off, and all errors
    would have the same sign."""
    if TF32:
        e = ((e.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return e.to(dtype)


@jit
def order_kernel(weights, order, count, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """order (N,): the labelled rows as they come, behind them the others from the end backwards;
    count: the number of the former. One program, since where a row goes depends on all before."""
    o_k = tl.arange(0, BLOCK_K)
    labelled_before = tl.zeros((), tl.int32)
    for first in range(0, N, BLOCK):
        o_row = first + tl.arange(0, BLOCK)
        m_row = o_row < N
        shares = tl.load(weights + o_row.to(tl.int64)[:, None] * K + o_k[None, :],
                         mask=m_row[:, None] & (o_k < K)[None, :], other=0.0)
        labelled = tl.max((shares != 0).to(tl.int32), 1)                             # (BLOCK,)
        upto = labelled_before + tl.cumsum(labelled, 0)
        place = tl.where(labelled > 0, upto - 1, N - 1 - (o_row - upto))
        tl.store(order + place, o_row.to(tl.int64), mask=m_row)
        labelled_before += tl.sum(labelled, 0)
    tl.store(count, labelled_before.to(tl.int64))


@jit
def gather_kernel(h, order, count, x, x_inverse, h_inverse, loss, grad, first, D, stride_row,
                  stride_column, stride_x, SHORTEST: tl.constexpr, SAME: tl.constexpr,
                  GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """A labelled row of h into the chunk: x = h if the dtypes are the SAME, else ĥ; with zeros up
    to the width of x. One program per row. x_inverse: what turns x into ĥ; h_inverse: 1 / |h|; both
    0 for a row without direction. An unlabelled row has no loss and no gradient."""
    i_row = tl.program_id(0)
    o_column = tl.arange(0, BLOCK)
    source = tl.load(order + first + i_row)
    if first + i_row >= tl.load(count):
        tl.store(loss + first + i_row, 0.0)
        if GRAD:
            nothing = tl.zeros((BLOCK,), grad.dtype.element_ty)
            tl.store(grad + source * D + o_column, nothing, mask=o_column < D)
        return
    o_h = source * stride_row + o_column.to(tl.int64) * stride_column
    b_h = tl.load(h + o_h, mask=o_column < D, other=0.0)
    b_value = b_h.to(tl.float32)
    norm = tl.sqrt(tl.sum(b_value * b_value, 0))
    inverse = tl.where(norm > SHORTEST, 1.0 / tl.maximum(norm, SHORTEST), 0.0)
    if not SAME:
        b_value *= inverse
    b_value = b_value.to(x.dtype.element_ty)
    tl.store(x + i_row * stride_x + o_column, b_value, mask=o_column < stride_x)
    tl.store(x_inverse + i_row, inverse if SAME else tl.where(inverse > 0, 1.0, 0.0))
    tl.store(h_inverse + i_row, inverse)


@jit
def scores_kernel(x, w, e, x_inverse, w_inverse, unit, total_part, q_part, count, first, R, V, D,
                  stride_w, log2_per_cosine, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  GRAD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                  TF32: tl.constexpr):
    """Product 1 and its epilogue. Programs take tiles in turn, the rows fastest, so that those at
    work at a time share words; flattened, the two loops let the copy engine fetch for the next tile
    during the epilogue of this one. Whole tiles fit into x (R, multiple of BK), e (R, multiple of
    BN) and w_inverse (multiple of BN,). Parts (word tiles, R)."""
    # none if the chunk lies beyond the count
    row_tiles = tl.cdiv(tl.minimum(tl.load(count).to(tl.int32) - first, R), BM)
    tiles = row_tiles * tl.cdiv(V, BN)
    width = tl.cdiv(D, BK) * BK
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        i_row = tile % row_tiles
        i_word = tile // row_tiles
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            b_x = load_tile(x, i_row * BM, k, R, width, width, BM, BK, TMA)          # (BM, BK)
            b_w = load_tile(w, i_word * BN, k, V, D, stride_w, BN, BK, TMA)          # (BN, BK)
            acc = tl.dot(b_x, b_w.T, acc, input_precision=PRECISION)

        o_row = i_row * BM + tl.arange(0, BM)
        o_word = i_word * BN + tl.arange(0, BN)
        b_inverse = tl.load(w_inverse + o_word)
        c = acc * tl.load(x_inverse + o_row)[:, None] * b_inverse[None, :]  # (BM, BN) cosines
        m_word = tl.arange(0, BN) < V - i_word * BN  # as o_word < V, in fewer registers
        # beyond the vocabulary there is no exp(0) either
        p = tl.where(m_word[None, :], tl.exp2(c * log2_per_cosine), 0.0)
        tl.store(total_part + i_word * R + o_row, tl.sum(p, 1))
        if GRAD:
            tl.store(q_part + i_word * R + o_row, tl.sum(p * c, 1))
            b_e = p * (b_inverse * tl.load(unit))[None, :]
            if TMA:
                e.store([i_row * BM, i_word * BN], rounded(b_e, e.dtype, TF32))
            else:
                stride_e = tl.cdiv(V, BN) * BN
                o_e = o_row.to(tl.int64)[:, None] * stride_e + o_word[None, :]
                tl.store(e + o_e, rounded(b_e, e.dtype.element_ty, TF32))


@jit
def finish_kernel(x, w, e, ids, weights, order, x_inverse, h_inverse, w_inverse, unit, total_part,
                  q_part, scale, along, loss, count, first, R, V, D, K, stride_x, stride_w,
                  stride_e, parts, per_tau, log2_per_cosine, BLOCK: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_PARTS: tl.constexpr, GRAD: tl.constexpr,
                  TF32: tl.constexpr):
    """Loss of one row, its target entries in E, and the two numbers of g = scale (E w) - along x.
    One program per row. An id outside the vocabulary makes both NaN, and is not read."""
    i_row = tl.program_id(0)
    if first + i_row >= tl.load(count):
        return
    source = tl.load(order + first + i_row)
    o_part = tl.arange(0, BLOCK_PARTS)
    total = tl.sum(tl.load(total_part + o_part * R + i_row, mask=o_part < parts, other=0.0), 0)

    o_k = tl.arange(0, BLOCK_K)
    b_ids = tl.load(ids + source * K + o_k, mask=o_k < K, other=-1)                  # (BLOCK_K,)
    b_shares = tl.load(weights + source * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    o_column = tl.arange(0, BLOCK)
    b_x = tl.load(x + i_row * stride_x + o_column, mask=o_column < D, other=0.0).to(tl.float32)
    inverse = tl.load(x_inverse + i_row)
    target = 0.0                                                                     # sum_k Y_k t_k
    for k in range(K):
        token = tl.load(ids + source * K + k)
        share = tl.load(weights + source * K + k).to(tl.float32)
        inside = (token >= 0) & (token < V)
        share = tl.where(inside | (share == 0), share, float("nan"))
        token = tl.where(inside, token, 0)                                           # padding
        word_inverse = tl.load(w_inverse + token)
        b_word = tl.load(w + token * stride_w + o_column, mask=o_column < D, other=0.0)
        b_word = b_word.to(tl.float32)
        c = tl.sum(b_x * b_word, 0) * inverse * word_inverse
        target += share * c
        if GRAD:
            # a repeated token: all of its shares
            y = tl.sum(tl.where(b_ids == token, b_shares, 0.0), 0)
            entry = (tl.exp2(c * log2_per_cosine) - y * total) * (word_inverse * tl.load(unit))
            entry = rounded(entry, e.dtype.element_ty, TF32)                         # padding: p
            tl.store(e + i_row.to(tl.int64) * stride_e + token, entry)
    tl.store(loss + first + i_row, tl.log(total) - target * per_tau)
    if GRAD:
        q = tl.sum(tl.load(q_part + o_part * R + i_row, mask=o_part < parts, other=0.0), 0)
        outer = tl.load(h_inverse + i_row) * per_tau
        tl.store(scale + i_row, outer / total / tl.load(unit))
        tl.store(along + i_row, outer * (q / total - target) * inverse)


@jit
def gradient_kernel(e, w, grad, order, x, scale, along, count, first, R, V, D, stride_w, stride_x,
                    stride_e, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    TMA: tl.constexpr, PRECISION: tl.constexpr):
    """Product 2: g = scale (E w) - along x, written to those rows of grad (n, D) that x is from."""
    rows = tl.minimum(tl.load(count).to(tl.int32) - first, R)
    row_tiles = tl.cdiv(rows, BM)
    tiles = row_tiles * tl.cdiv(D, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        i_row = tile % row_tiles
        i_column = tile // row_tiles
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, V, BK):
            # (BM, BK), zero beyond V
            b_e = load_tile(e, i_row * BM, k, R, stride_e, stride_e, BM, BK, TMA)
            b_w = load_tile(w, k, i_column * BN, V, D, stride_w, BK, BN, TMA)  # (BK, BN)
            acc = tl.dot(b_e, b_w.to(b_e.dtype), acc, input_precision=PRECISION)

        o_row = i_row * BM + tl.arange(0, BM)
        o_column = i_column * BN + tl.arange(0, BN)
        m_row = o_row < rows
        m_tile = m_row[:, None] & (o_column < D)[None, :]
        o_x = o_row.to(tl.int64)[:, None] * stride_x + o_column[None, :]
        b_x = tl.load(x + o_x, mask=m_tile, other=0.0).to(tl.float32)
        g = acc * tl.load(scale + o_row)[:, None] - b_x * tl.load(along + o_row)[:, None]
        source = tl.load(order + first + o_row, mask=m_row, other=0)
        o_grad = source[:, None] * D + o_column[None, :]
        tl.store(grad + o_grad, g.to(grad.dtype.element_ty), mask=m_tile)


# The same with both products left to cuBLAS, to compare with: the dot products of a chunk are then
# written in float32 and read again, and all n rows are multiplied, since cuBLAS cannot look at a
# count that lies on the GPU.


@jit
def exp_kernel(dots, e, x_inverse, w_inverse, unit, total_part, q_part, count, first, V, stride_e,
               log2_per_cosine, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """The epilogue of product 1 for dots (R, V) in float32; one program, so one part, per row."""
    i_row = tl.program_id(0)
    if first + i_row >= tl.load(count):
        return
    inverse = tl.load(x_inverse + i_row)
    total = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    for first_word in range(0, V, BLOCK):
        o_word = first_word + tl.arange(0, BLOCK)
        m_word = o_word < V
        b_inverse = tl.load(w_inverse + o_word, mask=m_word, other=0.0)
        c = tl.load(dots + i_row.to(tl.int64) * V + o_word, mask=m_word, other=0.0)
        c = c * inverse * b_inverse
        p = tl.where(m_word, tl.exp2(c * log2_per_cosine), 0.0)
        total += p
        if GRAD:
            q += p * c
            b_e = p * (b_inverse * tl.load(unit))
            b_e = b_e.to(e.dtype.element_ty)
            tl.store(e + i_row.to(tl.int64) * stride_e + o_word, b_e, mask=m_word)
    tl.store(total_part + i_row, tl.sum(total, 0))
    if GRAD:
        tl.store(q_part + i_row, tl.sum(q, 0))


@jit
def project_kernel(attended, x, grad, order, scale, along, count, first, D, stride_x,
                   BLOCK: tl.constexpr):
    """The epilogue of product 2 for attended = E w (R, D) in float32. One program per row."""
    i_row = tl.program_id(0)
    if first + i_row >= tl.load(count):
        return
    source = tl.load(order + first + i_row)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < D
    b_x = tl.load(x + i_row * stride_x + o_column, mask=m_column, other=0.0).to(tl.float32)
    g = tl.load(attended + i_row * D + o_column, mask=m_column, other=0.0) * tl.load(scale + i_row)
    g = g - b_x * tl.load(along + i_row)
    tl.store(grad + source * D + o_column, g.to(grad.dtype.element_ty), mask=m_column)


def cublas_product(a, b):
    """a b with float32 sums, written as float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


class Tile(NamedTuple):
    """How a product is cut up: BM x BN results per tile, BK terms of their sums per step, `stages`
    steps in flight, by `warps`."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


FUSED_DTYPES = torch.bfloat16, torch.float16, torch.float32

# (product 1, product 2) by chip and dtype of w, compiled without register spills. "sm_90" is Hopper
# with its copy engine (TMA), whose tensor descriptors need rows of w that start at multiples of 16
# bytes; "sm_80" serves every other case, with pointers and masks. (A D that is no multiple of 16,
# which no language model has, is right but slow: narrow loads and stores, and product 2 spills.)
# Product 2 steps through tiles of E that product 1 wrote: the BN of the one is a multiple of the BK
# of the other.
TILES = {
    ("sm_90", torch.bfloat16): (Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    ("sm_90", torch.float16): (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("sm_80", torch.bfloat16): (Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 4)),
    ("sm_80", torch.float16): (Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 3)),
    ("sm_80", torch.float32): (Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
    # tests on a CPU: many tiles, chunks and rounds in small tensors
    **{("interpreter", dtype): (Tile(16, 32, 16, 1, 1), Tile(16, 32, 16, 1, 1))
       for dtype in FUSED_DTYPES},
}


def chip(device):
    """(kind as in TILES, multiprocessors)."""
    if device.type == "cpu":
        return "interpreter", 5
    properties = torch.cuda.get_device_properties(device)
    kind = "sm_90" if (properties.major, properties.minor) == (9, 0) else "sm_80"
    return kind, properties.multi_processor_count


def launch_plan(h, w):
    """-> (tile of product 1, of product 2, use of TMA, programs that share the tiles) for h (n, D)
    and w (V, D)."""
    kind, multiprocessors = chip(w.device)
    aligned = w.data_ptr() % 16 == 0 and w.stride(0) * w.itemsize % 16 == 0
    if kind == "sm_90" and not (aligned and (kind, w.dtype) in TILES):
        kind = "sm_80"
    first, second = TILES[kind, w.dtype]
    # a tile of the gradient passes through shared memory, beside what
    if kind == "sm_90" and h.dtype.itemsize > w.dtype.itemsize:
        # is loaded for the next: in float32 half as wide a tile fits
        second = second._replace(BN=second.BN // 2)
    programs = multiprocessors * (2 if kind == "sm_80" else 1)
    return first, second, aligned and kind != "sm_80", programs


def check_fused(h, w):
    """Raise a ValueError of one line if the fused kernels cannot run here."""
    if triton is None:
        raise ValueError("impl: 'triton' and 'cublas' need the package triton; use impl='chunked'")
    if h.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("impl: 'triton' and 'cublas' need a GPU, or TRITON_INTERPRET=1 in the"
                         " environment; use impl='chunked'")
    for name, dtype in (("h", h.dtype), ("w", w.dtype)):
        if dtype not in FUSED_DTYPES:
            raise ValueError(f"{name}: impl 'triton' and 'cublas' take bfloat16, float16 and"
                             f" float32, got {dtype}; use impl='chunked'")


WORD_NORMS = WeakTensorKeyDictionary()          # w: (version, width, word_norms), until w is gone


def word_norms(w, width):
    """1 / |w_j|, zeros from V on: (width,), and the norm of the shortest word that has a direction,
    at most 1: (). W is frozen: made once, and again when w is another tensor or was written to
    (what is written through w.data goes unseen)."""
    version = None if w.is_inference() else w._version
    if version is None or WORD_NORMS.get(w, ())[:2] != (version, width):
        inverse = torch.nn.functional.pad(inverse_norm(w).squeeze(1), (0, width - len(w)))
        made = version, width, inverse, 1 / inverse.max().clamp_min(1)
        if version is None:
            return made[2:]
        WORD_NORMS[w] = made
    return WORD_NORMS[w][2:]


def fused_sweep(h, w, ids, weights, tau, need_grad, cublas=False):
    """The pseudo-code above -> (loss_sum, its gradient by h in h's dtype or None, labelled)."""
    check_fused(h, w)
    (n, d), v, k = h.shape, len(w), ids.shape[1]
    words, w = w, w.detach() if w.stride(1) == 1 else w.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    # exp(c / tau) = 2^(c log2(e) / tau)
    per_tau, log2_per_cosine = 1 / tau, math.log2(math.e) / tau
    e_dtype = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    second_precision = "tf32" if w.dtype == torch.float16 else precision
    tf32 = e_dtype == torch.float32 and second_precision == "tf32"

    tile, second, tma, programs = launch_plan(h, w)
    BM, BN, BK = tile.BM, tile.BN, tile.BK
    parts = 1 if cublas else triton.cdiv(v, BN)
    stride_x, stride_e = triton.cdiv(d, BK) * BK, triton.cdiv(v, BN) * BN
    bytes_per_row = stride_x * w.itemsize + need_grad * stride_e * e_dtype.itemsize
    bytes_per_row += 8 * parts + cublas * 4 * v
    row_tiles = min(FUSED_SCRATCH // (BM * bytes_per_row), programs // triton.cdiv(d, second.BN),
                    triton.cdiv(n, BM))
    R = BM * max(1, row_tiles)

    def numbers(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=h.device)

    def tiles(matrix, rows, columns):
        if not tma or matrix is None or cublas:
            return matrix
        return TensorDescriptor.from_tensor(matrix, [rows, columns])

    w_inverse, unit = word_norms(words, stride_e)
    order, count = numbers(n, dtype=torch.int64), numbers(dtype=torch.int64)    # stay on the device
    x, x_inverse, h_inverse = numbers(R, stride_x, dtype=w.dtype), numbers(R), numbers(R)
    e = numbers(R, stride_e, dtype=e_dtype) if need_grad else None
    total_part, q_part = numbers(parts, R), numbers(parts, R)
    scale, along = numbers(R), numbers(R)
    loss, grad = numbers(n), numbers(n, d, dtype=h.dtype) if need_grad else None
    first_tiles = tiles(x, BM, BK), tiles(w, BN, BK), tiles(e, BM, BN)   # the same for all chunks
    narrow = second._replace(BN=second.BN // 2)
    second_tiles = {own: (tiles(e, BM, own.BK), tiles(w, own.BK, own.BN))
                    for own in (second, narrow)}
    block_d, block_k, block_parts = (triton.next_power_of_2(max(1, size))
                                     for size in (stride_x, k, parts))

    with torch.cuda.device_of(h):  # Triton launches on the current device
        order_kernel[(1,)](weights, order, count, n, k, BLOCK=ORDER_BLOCK,
                           BLOCK_K=block_k)
        for first in range(0, n, R):
            rows = (min(R, n - first),)                                  # at most: `count` decides
            gather_kernel[rows](
                h, order, count, x, x_inverse, h_inverse, loss, grad, first, d, *h.stride(),
                stride_x, SHORTEST=SHORTEST, SAME=h.dtype == w.dtype, GRAD=need_grad,
                BLOCK=block_d)
            if cublas:
                dots = cublas_product(x[:, :d], w.T)                     # (R, V)
                exp_kernel[rows](
                    dots, e, x_inverse, w_inverse, unit, total_part, q_part, count, first, v,
                    stride_e, log2_per_cosine, BLOCK=min(4096, triton.next_power_of_2(v)),
                    GRAD=need_grad)
            else:
                scores_kernel[(programs,)](
                    *first_tiles, x_inverse, w_inverse, unit, total_part, q_part, count, first, R,
                    v, d, w.stride(0), log2_per_cosine, BM=BM, BN=BN, BK=BK, GRAD=need_grad,
                    TMA=tma, PRECISION=precision, TF32=tf32, num_warps=tile.warps,
                    num_stages=tile.stages)
            finish_kernel[rows](
                x, w, e, ids, weights, order, x_inverse, h_inverse, w_inverse, unit, total_part,
                q_part, scale, along, loss, count, first, R, v, d, k, stride_x, w.stride(0),
                stride_e, parts, per_tau, log2_per_cosine, BLOCK=block_d, BLOCK_K=block_k,
                BLOCK_PARTS=block_parts, GRAD=need_grad, TF32=tf32)
            if need_grad and cublas:
                attended = cublas_product(e[:, :v], w.to(e_dtype))       # (R, D)
                project_kernel[rows](attended, x, grad, order, scale, along, count, first, d,
                                     stride_x, BLOCK=block_d)
            elif need_grad:
                full = 2 * triton.cdiv(rows[0], BM) * triton.cdiv(d, second.BN) > programs
                own = second if full else narrow            # or half of the programs had no tile
                gradient_kernel[(programs,)](
                    *second_tiles[own], grad, order, x, scale, along, count, first, R, v, d,
                    w.stride(0), stride_x, stride_e, BM=BM, BN=own.BN, BK=own.BK, TMA=tma,
                    PRECISION=second_precision, num_warps=own.warps, num_stages=own.stages)
    return loss.sum(), grad, count


def patch_loss_triton(h, w, ids, weights, tau):
    """The same loss by the kernels above -> (loss_sum, labelled)."""
    return run_sweep(fused_sweep, h, w, ids, weights, tau)


def patch_loss_cublas(h, w, ids, weights, tau):
    """The same loss with cuBLAS for the products -> (loss_sum, labelled)."""
    return run_sweep(functools.partial(fused_sweep, cublas=True), h, w, ids, weights, tau)


# ---- Public functions ----------------------------------------------------------------------------

IMPLEMENTATIONS = {"triton": patch_loss_triton, "cublas": patch_loss_cublas,
                   "chunked": patch_loss_chunked, "reference": patch_loss_ref}


def default_impl(*tensors):
    """The implementation that patch_loss takes for tensors like these: the fused kernels on NVIDIA
    GPUs since Ampere, else "chunked"."""
    fused = triton and torch.version.cuda and all(
        x.is_cuda and x.dtype != torch.float64
        and torch.cuda.get_device_capability(x.device) >= (8, 0) for x in tensors)
    return FASTEST_ON_GPU if fused else "chunked"


def check_inputs(h, w, ids, weights):
    """Raise a ValueError of one line that names the argument, if shapes or dtypes do not fit."""
    if h.ndim != 2 or not h.is_floating_point():
        raise ValueError(f"h: expected floating-point (n, D), got {h.dtype} {tuple(h.shape)}")
    if w.ndim != 2 or w.shape[1] != h.shape[1] or len(w) == 0 or not w.is_floating_point():
        raise ValueError(f"w: expected floating-point (V, {h.shape[1]}) with V >= 1, got {w.dtype}"
                         f" {tuple(w.shape)}")
    if ids.ndim != 2 or len(ids) != len(h) or ids.dtype != torch.int64:
        raise ValueError(f"ids: expected int64 ({len(h)}, K), got {ids.dtype} {tuple(ids.shape)}")
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ValueError(f"weights: expected floating-point {tuple(ids.shape)} as ids, got"
                         f" {weights.dtype} {tuple(weights.shape)}")


def in_vocabulary(ids, weights, v):
    """-> (ids with 0 in place of padding, weights). ValueError: ids outside the vocabulary, on a
    CPU. Elsewhere the answer would have to be waited for; there they become id 0 with weight NaN:
    no memory is read out of bounds, and the loss shows it."""
    ids = ids.masked_fill(weights == 0, 0)
    outside = (ids < 0) | (ids >= v)
    if ids.device.type == "cpu" and outside.any():
        raise ValueError(f"ids: {ids.min().item()} to {ids.max().item()} lie outside the vocabulary"
                         f" of {v} words")
    return ids.masked_fill(outside, 0), weights.masked_fill(outside, math.nan)


def patch_loss(h, w, ids, weights, tau, *, impl=None):
    """Softmax cross-entropy of patches against the vocabulary; each patch has a distribution.

    h        (n, D) patch embeddings, any floating dtype; differentiable
    w        (V, D) word embeddings, any floating dtype; a constant, it never gets a gradient
    ids      (n, K) int64 target tokens; may repeat within a row; anything where the weight is 0
    weights  (n, K) float target distribution; 0 = padding, a row of zeros = unlabelled patch
    tau      temperature of the softmax over cosine similarities
    impl     "triton" (default on a GPU), "cublas" (to compare with it), "chunked" (default on a
             CPU) or "reference" (the full n x V matrix)

    Returns (loss_sum, labelled): the sum of loss_i over the labelled rows, a scalar in float32
    (float64 if h is), and their number, a 0-d int64 tensor. Nothing labelled gives 0 with a
    gradient of zeros. Raises ValueError for wrong shapes, ids outside the vocabulary (on a GPU and
    in the fused kernels, where looking would mean waiting, they give a loss of NaN instead), an
    unknown or unavailable impl, and a tau too small for float32 (all but "reference"). "triton" and
    "cublas" never wait.
    """
    impl = impl or default_impl(h, w)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if not tau > 0:
        raise ValueError(f"tau: expected a positive number, got {tau}")
    check_inputs(h, w, ids, weights)
    if impl not in ("triton", "cublas"):                    # they look for themselves
        ids, weights, w = *in_vocabulary(ids, weights, len(w)), w.detach()
    # autocast would round the products to low precision
    with torch.autocast(h.device.type, enabled=False):
        return IMPLEMENTATIONS[impl](h, w, ids, weights, tau)


def cosine_loss(h, w, ids, weights):
    """The plain cosine pull -> (sum over the labelled rows of 1 - sum_j Y_ij c_ij, labelled).
    Arguments as in patch_loss; only the target rows of w are read. Unlabelled rows are computed as
    zeros, since to leave them out is to wait for a GPU to name them."""
    check_inputs(h, w, ids, weights)
    ids, weights = in_vocabulary(ids, weights, len(w))
    dtype = compute_dtype(h)
    labelled = (weights != 0).any(dim=1)                                 # (n,)
    x = h.to(dtype).masked_fill(~labelled[:, None], 0)                   # (n, D)
    target = target_words(w.detach(), ids, weights, dtype)               # (n, D)
    cosine = (x * inverse_norm(x) * target).sum(dim=1)                   # (n,)
    return (labelled.to(dtype) - cosine).sum(), labelled.sum()
