"""The patch loss: softmax cross-entropy of image patches against a whole vocabulary, without the similarity matrix.

The problem. Every patch embedding is compared with every word embedding, and the softmax over the vocabulary is pulled
towards the words that name what the patch shows. Eight images of 576 patches against 32000 words are 147 million
similarities: 0.59 GB in float32, and autograd holds several such matrices at once.
Written plainly, the loss spends its time and memory on moving numbers that are used once. Here a block of similarities is
made, used for the loss and for the gradient while it is at hand, and overwritten by the next one.

Symbols. n patches, D width of the language model, V vocabulary size, K most target tokens of a patch.

    h (n, D)             patch embeddings; the only input that gets a gradient
    w (V, D)             word embeddings, frozen
    ids, weights (n, K)  Y, the target distribution, row by row; weight 0 = padding, a row of zeros = unlabelled
    ĥ_i, ŵ_j             h_i / |h_i| and w_j / |w_j|; a row shorter than SHORTEST has no direction and counts as zero
    c_ij = ĥ_i · ŵ_j     cosine similarity
    s_ij = c_ij / tau    score, tau being the temperature
    Z_i = sum_j exp(s_ij),    p_ij = exp(s_ij) / Z_i

Loss. Summed over the labelled patches (the caller divides by their number, over all ranks at once):

    loss_i = ln Z_i - sum_j Y_ij s_ij

No running maximum. A softmax usually subtracts the largest score of a row, because exp would overflow. Tiled, this maximum is
only known at the end, so that everything summed so far is rescaled with every tile. A cosine is at most 1, so here
Z_i <= V exp(1 / tau). Float32 holds this while 1 / tau + ln V stays below 88.4, at V = 151936 for every tau >= 0.0131. The sums
over the vocabulary are then plain sums, and tiles can be added in any order.

Gradient. Differentiating loss_i by the scores gives p_ij - Y_ij. The chain rule through s_ij = ĥ_i · ŵ_j / tau, and then
through ĥ = h / |h|, gives

    a_i = (sum_j p_ij ŵ_j - sum_j Y_ij ŵ_j) / tau        by ĥ_i
    g_i = (a_i - (a_i · ĥ_i) ĥ_i) / |h_i|                by h_i

The first sum is attention with the query ĥ_i / tau and with keys and values K = V = ŵ. The second line removes the part along h_i,
since the length of a patch does not change its cosines. That needs one number per row, a_i · ĥ_i.

Gradient in the forward pass. g_i needs the same exp(s_ij) as the loss. The backward pass only brings one factor for the whole
sum, so g can be formed at once and multiplied later. This takes two matrix products (scores, and their weighted sum of words)
where a backward pass that computes the scores again takes three, and nothing of size n x V is kept for it.

Unit words. A normalised copy of the whole w is not needed: each tile of words is normalised in the buffer to which it is copied
(and raised to float32) anyway. Dividing the exponentials by |w_j| instead would save a pass over the tile, but exp(1 / tau)
divided by a tiny norm overflows.
"""

import math

import torch
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12                # norm below which a row has no direction: its cosines are 0, and it gets no gradient
SCRATCH_BYTES = 64 * 2**20      # working memory of the chunked path, beside the gradient that it returns
LARGEST_TILE = 4096             # words per tile: smaller ones cost calls, larger ones leave less room for rows


# ---------------------------------------------------------------------------------------------------------------------
# Parts that all versions share


def compute_dtype(h):
    """The dtype of all arithmetic: float32, or float64 for float64 input."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def inverse_norm(x):
    """1 / |x| of each row, 0 for a row shorter than SHORTEST: (n, D) -> (n, 1)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (norm > SHORTEST) / norm.clamp_min(SHORTEST)


def labelled_rows(weights):
    """Indices of the rows with a target: (n, K) -> (labelled,)."""
    return (weights != 0).any(dim=1).nonzero().squeeze(1)


def target_words(w, ids, weights, dtype):
    """sum_j Y_ij ŵ_j, exact in `dtype`: (n, D). One column of targets at a time, so that no (n, K, D) exists; a token that
    occurs twice in a row is simply added twice."""
    total = torch.zeros(len(ids), w.shape[1], dtype=dtype, device=w.device)
    for token, share in zip(ids.T, weights.to(dtype).T):                 # both (n,)
        word = w[token].to(dtype)                                        # (n, D)
        total.addcmul_(word, inverse_norm(word) * share[:, None])
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Reference: the definition, with the full matrix


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
    """The gradient of loss_sum by h, as it is derived above, with the full matrix -> (n, D) in h's dtype."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Chunked: rows in chunks, the vocabulary in tiles, loss and gradient in one sweep
#
#     for each chunk of labelled patches:
#         Z = 0; A = 0
#         for each tile of words:
#             E = exp(ĥ ŵ^T / tau)            # (rows, tile), made in place in one buffer
#             Z += row sums of E
#             A += E ŵ                        # the attention sum, not yet divided by Z
#         loss += sum(ln Z - target scores)
#         a = (A / Z - target words) / tau;  g = (a - (a · ĥ) ĥ) / |h|


def block_sizes(d, v, bytes_each):
    """(rows per chunk, words per tile) whose buffers fit into SCRATCH_BYTES."""
    numbers = SCRATCH_BYTES // bytes_each
    tile = max(1, min(v, LARGEST_TILE, numbers // (4 * d)))              # a quarter for the tile of words
    rows = max(1, (numbers - tile * d) // (tile + 6 * d))                # a row: its scores, and about six vectors of width D
    return rows, tile


def chunked_sweep(h, w, ids, weights, tau, need_grad):
    """-> (loss_sum, gradient of loss_sum by h in h's dtype, or None)."""
    dtype, (v, d) = compute_dtype(h), w.shape
    labelled = labelled_rows(weights)                                    # unlabelled patches cost nothing from here on
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
        z = torch.zeros(len(rows), 1, dtype=dtype, device=h.device)      # (r, 1)
        attended = torch.zeros_like(h_hat) if need_grad else None        # (r, D)

        for first_word in range(0, v, most_words):
            words = w[first_word:first_word + most_words]                # (t, D)
            w_hat = words_buffer[:len(words)].copy_(words)               # (t, D)    low precision is raised here, tile by tile
            w_hat.mul_(inverse_norm(w_hat))
            e = torch.mm(query, w_hat.T, out=scores_buffer[:len(rows), :len(words)]).exp_()     # (r, t)
            z += e.sum(dim=1, keepdim=True)
            if need_grad:
                attended.addmm_(e, w_hat)

        target = target_words(w, ids[rows], weights[rows], dtype)        # (r, D)
        loss_sum += z.log().sum() - (query * target).sum()
        if need_grad:
            a = attended.div_(z).sub_(target).div_(tau)                  # (r, D)    by ĥ
            a.addcmul_(h_hat, (a * h_hat).sum(dim=1, keepdim=True), value=-1)
            grad[rows] = a.mul_(h_inverse).to(h.dtype)                   # (r, D)    by h

    return loss_sum, grad


class ChunkedPatchLoss(torch.autograd.Function):
    """The sweep above as a differentiable function of h: the gradient is made in the forward pass, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, h, w, ids, weights, tau):
        loss_sum, grad = chunked_sweep(h, w, ids, weights, tau, need_grad=True)
        ctx.save_for_backward(grad)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        grad, = ctx.saved_tensors
        return grad * factor, None, None, None, None                     # not in place: with retain_graph this runs again


def patch_loss_chunked(h, w, ids, weights, tau):
    """The same loss in bounded memory -> (loss_sum, labelled). Raises ValueError if exp could overflow."""
    largest = math.log(torch.finfo(compute_dtype(h)).max) - 0.25         # a margin for rounding
    if 1 / tau + math.log(len(w)) > largest:
        bound = 1 / (largest - math.log(len(w)))
        raise ValueError(f"tau: {tau:g} is too small, exp(1 / tau) overflows; use tau >= {bound:.4f} at V = {len(w)}, or impl='reference'")
    if torch.is_grad_enabled() and h.requires_grad:
        loss_sum = ChunkedPatchLoss.apply(h, w, ids, weights, tau)
    else:
        loss_sum, _ = chunked_sweep(h, w, ids, weights, tau, need_grad=False)
    return loss_sum, (weights != 0).any(dim=1).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Triton: here will stand the fused kernel, as impl="triton". It keeps the sweep above and moves it on chip: the first product
# with exp, row sums and the rounding of E to bfloat16 as its epilogue, then the second product. Rounded to bfloat16, E
# must hold the target entries already subtracted, or their rounding error would dominate the gradient of a fitted patch.


# ---------------------------------------------------------------------------------------------------------------------
# Public functions

IMPLEMENTATIONS = {"chunked": patch_loss_chunked, "reference": patch_loss_ref}


def check_inputs(h, w, ids, weights):
    """Raise a ValueError of one line that names the argument; return the ids with 0 in place of padding."""
    if h.ndim != 2 or not h.is_floating_point():
        raise ValueError(f"h: expected floating-point (n, D), got {h.dtype} {tuple(h.shape)}")
    if w.ndim != 2 or w.shape[1] != h.shape[1] or len(w) == 0 or not w.is_floating_point():
        raise ValueError(f"w: expected floating-point (V, {h.shape[1]}) with V >= 1, got {w.dtype} {tuple(w.shape)}")
    if ids.ndim != 2 or len(ids) != len(h) or ids.dtype != torch.int64:
        raise ValueError(f"ids: expected int64 ({len(h)}, K), got {ids.dtype} {tuple(ids.shape)}")
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ValueError(f"weights: expected floating-point {tuple(ids.shape)} as ids, got {weights.dtype} {tuple(weights.shape)}")
    ids = ids.masked_fill(weights == 0, 0)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < len(w):
        raise ValueError(f"ids: {ids.min().item()} to {ids.max().item()} lie outside the vocabulary of {len(w)} words")
    return ids


def patch_loss(h, w, ids, weights, tau, *, impl=None):
    """Softmax cross-entropy of patches against the vocabulary, with a target distribution per patch.

    h        (n, D) patch embeddings, any floating dtype; differentiable
    w        (V, D) word embeddings, any floating dtype; a constant, it never gets a gradient
    ids      (n, K) int64 target tokens; may repeat within a row; anything where the weight is 0
    weights  (n, K) float target distribution; 0 = padding, a row of zeros = unlabelled patch
    tau      temperature of the softmax over cosine similarities
    impl     "chunked" (default) or "reference" (the full n x V matrix)

    Returns (loss_sum, labelled): the sum of loss_i over the labelled rows, a scalar in float32 (float64 if h is), and their
    number, a 0-d int64 tensor. Nothing labelled gives 0 with a gradient of zeros. Raises ValueError for wrong shapes, ids outside
    the vocabulary, an unknown impl, and a tau too small for "chunked".
    """
    impl = impl or "chunked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if not tau > 0:
        raise ValueError(f"tau: expected a positive number, got {tau}")
    ids = check_inputs(h, w, ids, weights)
    with torch.autocast(h.device.type, enabled=False):                   # autocast would round the products to low precision
        return IMPLEMENTATIONS[impl](h, w.detach(), ids, weights, tau)


def cosine_loss(h, w, ids, weights):
    """The plain cosine pull -> (sum over the labelled rows of 1 - sum_j Y_ij c_ij, labelled). Arguments as in patch_loss; only the
    target rows of w are read."""
    ids = check_inputs(h, w, ids, weights)
    dtype = compute_dtype(h)
    rows = labelled_rows(weights)
    x = h[rows].to(dtype)                                                # (n, D)
    target = target_words(w.detach(), ids[rows], weights[rows], dtype)   # (n, D)
    cosine = (x * inverse_norm(x) * target).sum(dim=1)                   # (n,)
    return (1 - cosine).sum(), torch.tensor(len(rows), device=h.device)
