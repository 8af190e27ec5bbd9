"""The Python functions that call the operators `torch.ops.memrewrite.*`. Importing this module registers the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from memrewrite.kernels import operators as _operators  # noqa: F401 (registers the operators)
from memrewrite.kernels import product_key_topk as _topk
from memrewrite.kernels import product_keys as _keys
from memrewrite.kernels import sparse_dots as _dots
from memrewrite.kernels import sparse_lookup as _lookup
from memrewrite.kernels.direct import dispatch_adds_nothing
from memrewrite.kernels.pending import Pending


def sparse_lookup(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Pending | None = None,
) -> Tensor:
    """Weighted sum of table rows: `y_t = sum_j weights[t, j] * values[indices[t, j]]` (eq. 1 of arXiv 2412.09764).

    Differentiable in `weights` and, depending on `gradient`, in `values`; in forward mode in both, for every `gradient`. Under
    `torch.func`, the gradient of `values` is "dense" only. The backward saves only the inputs: O(T·K) memory, never O(T·K·D).
    CUDA kernels do not check indices: an index outside the table reads, and in the backward writes, memory that does not belong
    to the table. Product keys never produce such an index.

    Args:
        values: Table [N, D], floating-point.
        indices: Rows to read [T, K], int32 or int64.
        weights: Weights [T, K] in the dtype of `values` or in float32; with `scale`, any floating-point dtype of 16
            or more bits.
        scale: Row scales [N], float32: row n is `scale[n] * values[n]`. `values` may then be 8-bit (float8_e4m3fn).
        dtype: Dtype of the output, with 16 or more bits. Default: that of `values`; with `scale`, that of `weights`.
        gradient: "dense": gradient [N, D] of `values`. "sparse": a COO tensor of the rows that were read, not coalesced
            (rows may appear twice, the second time with zeros). "fused": no gradient; its factors are stored in `pending`
            until a fused update uses them.
        backend: "auto", "triton" (CUDA devices), "native" (CPU, after `memrewrite build-op`) or "torch".
        pending: Queue of the table, for "fused".

    Returns:
        [T, D] in `dtype`; products and sums are fp32 (float64 for float64).

    Raises:
        ValueError: Shapes, devices or names are wrong.
        TypeError: Dtypes are wrong.
        IndexError: On the CPU, an index is outside the table.
    """
    if dispatch_adds_nothing(values, indices, weights, scale):
        return _lookup.forward(values, indices, weights, scale, gradient, backend, dtype=dtype)
    lookup = torch.ops.memrewrite.sparse_lookup.default
    out: Tensor = lookup(values, indices, weights, scale, gradient, backend, *_waiting(pending), dtype)
    return out


def sparse_dots(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    *,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Pending | None = None,
) -> Tensor:
    """Products of table rows with a token: `out[t, j] = values[indices[t, j]] . x[t]` (u_i . x of PEER, arXiv 2407.04153).

    Differentiable as `sparse_lookup`, in `x` and `values`: the gradient of `x` is a lookup, and that of `values` has the
    factors `x` and the gradient of the output. O(T·(D + K)) memory, never O(T·K·D); the indices are checked on the CPU only.

    Args:
        values: Table [N, D], floating-point.
        indices: Rows to read [T, K], int32 or int64.
        x: Tokens [T, D] in any floating-point dtype of 16 or more bits.
        scale: Row scales [N], float32: row n is `scale[n] * values[n]`. `values` may then be 8-bit (float8_e4m3fn).
        gradient: Kind of the gradient of `values`: "dense", "sparse" or "fused", as in `sparse_lookup`.
        backend: "auto", "triton" (CUDA devices), "native" (CPU, after `memrewrite build-op`) or "torch".
        pending: Queue of the table, for "fused".

    Returns:
        [T, K], float32 (float64 for float64 values).

    Raises:
        ValueError: Shapes, devices or names are wrong.
        TypeError: Dtypes are wrong.
        IndexError: On the CPU, an index is outside the table.
    """
    if dispatch_adds_nothing(values, indices, x, scale):
        return _dots.forward(values, indices, x, scale, gradient, backend)
    dots = torch.ops.memrewrite.sparse_dots.default
    out: Tensor = dots(values, indices, x, scale, gradient, backend, *_waiting(pending))
    return out


def _waiting(pending: Pending | None) -> tuple[Tensor | None, int]:
    """A queue as two arguments of an operator."""
    return (None, 0) if pending is None else (pending.count, pending.handle)


def product_key_topk(
    scores1: Tensor, scores2: Tensor, k: int, *, softmax: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k largest sums `scores1[i] + scores2[j]` over all pairs, and their slots `i * n2 + j` (product keys, §2.1).

    Exact, with O(k log k) sums: pair (i, j) of the two sorted halves can be among the k largest only if i * j <= k (counted
    from 1). Equal sums are in any order ("triton": smaller index of each half first). NaN counts as largest, as in
    `torch.topk`, except sums of opposite infinities.

    Args:
        scores1: Scores of the first half [..., n1], floating-point.
        scores2: Scores of the second half [..., n2], same dtype and leading shape.
        k: Number of sums, from 1 to min(n1, n2).
        softmax: Return the softmax of the k sums instead of the sums.
        backend: "auto", "triton" (CUDA devices), "native" (CPU, after `memrewrite build-op`) or "torch".

    Returns:
        Sums [..., k] in descending order (fp32 for half types), and slots [..., k], int64.

    Raises:
        ValueError: k < 1, k > n1, k > n2, unequal leading shapes, or several devices.
        TypeError: The scores are not of one floating-point dtype.
    """
    if dispatch_adds_nothing(scores1, scores2):
        return _topk.forward(scores1, scores2, k, softmax, backend)
    scores, indices = torch.ops.memrewrite.product_key_topk.default(scores1, scores2, k, softmax, backend)
    return scores, indices


def product_keys(
    queries: Tensor, keys: Tensor, k: int, *, softmax: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best slots of each query by product keys (§2.1 of arXiv 2412.09764), and their weights.

    The scores of both halves, `queries @ keys.T`, then `product_key_topk`. No scores are kept for the backward, and if n is
    much larger than k, it allocates nothing of size n. Under autocast, queries and keys are converted as for `torch.bmm`.

    Args:
        queries: Queries [T, 2h, d], floating-point; of h heads, each with its two halves next to each other.
        keys: Half keys [2h, n, d], same dtype.
        k: Number of slots, from 1 to n.
        softmax: Return the softmax of the k sums; else the sums.
        backend: "auto" or the name of a backend: it selects the top-k, and the lookups of the backward.

    Returns:
        Weights [h, T, k] in descending order (fp32 for half types), and slots `i * n + j` [h, T, k], int64.

    Raises:
        ValueError: k < 1, k > n, shapes that do not fit, or several devices.
        TypeError: Queries and keys are not of one floating-point dtype.
    """
    if dispatch_adds_nothing(queries, keys):
        return _keys.forward(queries, keys, k, softmax, backend)
    weights, slots = torch.ops.memrewrite.product_keys.default(queries, keys, k, softmax, backend)
    return weights, slots


def rowwise_adagrad_(
    values: Tensor,
    scale: Tensor | None,
    total: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
    backend: str = "auto",
) -> None:
    """Adagrad with one accumulator per row, in place, on the rows that the lookups read.

    For row n, g_n is the sum of weight * grad over all its reads: `total_n += mean(g_n²)`;
    `p_n = p_n (1 - lr wd) - lr g_n / (sqrt(total_n) + eps)`. The gradient of the table is never materialized.

    Args:
        values: Table [N, D], float32, bfloat16, float16 or float8_e4m3fn; all but float32 are rounded stochastically.
        scale: Row scales [N], float32, for float8_e4m3fn; else None.
        total: Accumulators [N], float32.
        grads: Per lookup, the gradient of its output [T, D].
        indices: Per lookup, the rows it read [T, K].
        weights: Per lookup, its weights [T, K].
        lr: Learning rate.
        eps: Added to the root of the accumulator.
        weight_decay: Decoupled weight decay.
        seed: Seed of the stochastic rounding.
        backend: "auto", "triton", "native" or "torch".

    Raises:
        ValueError: Shapes, devices or names are wrong; nothing was changed.
        TypeError: Dtypes are wrong; nothing was changed.
        IndexError: On the CPU, an index is outside the table.
    """
    numbers = (lr, eps, weight_decay, seed, backend)
    torch.ops.memrewrite.rowwise_adagrad_(values, scale, total, grads, indices, weights, *numbers)


def rowwise_adam_(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    backend: str = "auto",
) -> None:
    """Adam with one second moment per row, in place, on the rows that the lookups read; other rows do not change.

    `m = β1 m + (1 - β1) g`, `v = β2 v + (1 - β2) mean(g²)` and
    `p = p (1 - lr wd) - lr m / (1 - β1^step) / (sqrt(v / (1 - β2^step)) + eps)`. Other arguments and errors as in
    `rowwise_adagrad_`.

    Args:
        exp_avg: First moments m [N, D], float32 or bfloat16 (rounded stochastically).
        exp_avg_sq: Second moments v [N], float32.
        betas: β1 and β2.
        step: Number of this step, from 1.
    """
    numbers = (lr, *betas, eps, weight_decay, step, seed, backend)
    torch.ops.memrewrite.rowwise_adam_(values, scale, exp_avg, exp_avg_sq, grads, indices, weights, *numbers)


def lazy_adam_(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor | None,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    backend: str = "auto",
) -> None:
    """Adam with one second moment per element, in place, on the rows that the lookups read; other rows do not change.

    `m = β1 m + (1 - β1) g`, `v = β2 v + (1 - β2) g²` and
    `p = p (1 - lr wd) - lr m / (1 - β1^step) / (sqrt(v / (1 - β2^step)) + eps)` (algorithm 2 of arXiv 1711.05101, on
    the rows). Other arguments and errors as in `rowwise_adam_`.

    The moments of one dtype are stored in float32, or rounded stochastically in bfloat16 or float8_e4m3fn. In 8 bits, each
    block of 128 columns of a row (the last one may be shorter) has a float32 scale: its largest absolute value / 448, or 1 for
    a block of zeros. There `exp_avg_sq` holds the root of v, for its range; a positive root is never stored as zero.

    Args:
        exp_avg: First moments m [N, D], float32, bfloat16 or float8_e4m3fn.
        exp_avg_scale: Scales of `exp_avg` [N, ceil(D / 128)], float32, for float8_e4m3fn; else None.
        exp_avg_sq: Second moments v [N, D], in the dtype of `exp_avg`; in float8_e4m3fn, sqrt(v).
        exp_avg_sq_scale: Scales of `exp_avg_sq`, as for `exp_avg`.
        betas: β1 and β2.
        step: Number of this step, from 1.
    """
    numbers = (lr, *betas, eps, weight_decay, step, seed, backend)
    states = (exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
    torch.ops.memrewrite.lazy_adam_(values, scale, *states, grads, indices, weights, *numbers)
