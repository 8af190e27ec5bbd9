"""The operators `torch.ops.memrewrite.*`: their schemas, their registration and their Python faces.

Each backward is an operator of its own, so that export, compile and the profiler see a gather and a scatter by name;
those of dense gradients are differentiable in their turn. Importing this module registers the operators, once in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from memrewrite.kernels import lookup_update as _update
from memrewrite.kernels import product_key_topk as _topk
from memrewrite.kernels import sparse_lookup as _lookup
from memrewrite.kernels.pending import Pending


def sparse_lookup(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    *,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Pending | None = None,
) -> Tensor:
    """Weighted sum of table rows: `y_t = sum_j weights[t, j] * values[indices[t, j]]` (eq. 1 of arXiv 2412.09764).

    values [N, D] floating; indices [T, K] int32 or int64; weights [T, K] in the dtype of values. Returns [T, D], summed in
    fp32 (float64 for float64). With `scale` [N] float32, row n is scale[n] * values[n]: values may then be of 8 bits
    (float8_e4m3fn), weights are of any floating dtype, and the output has theirs.

    Differentiable in weights, and in values as `gradient` says: "dense" [N, D]; "sparse", a COO tensor of the rows that
    were read (with some twice, the second time with zeros: it is not coalesced); "fused", no gradient: its factors are
    kept in `pending` until a fused update takes them. Saved for the backward are the inputs: O(T·K), never O(T·K·D).

    `backend`: "auto", "triton" (CUDA devices) or "torch". Raises ValueError for shapes and names, TypeError for dtypes,
    IndexError for an index outside the table on the CPU. A CUDA kernel does not check indices: one outside the table
    reads, and in the backward writes, memory that is not the table's; product keys make none.
    """
    waiting = (None, 0) if pending is None else (pending.count, pending.handle)
    out: Tensor = torch.ops.memrewrite.sparse_lookup.default(values, indices, weights, scale, gradient, backend, *waiting)
    return out


def product_key_topk(
    scores1: Tensor, scores2: Tensor, k: int, *, softmax: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best sums `scores1[i] + scores2[j]` over all pairs, and their slots `i * n2 + j` (product keys, §2.1).

    scores1 [..., n1], scores2 [..., n2]. Returns scores [..., k], sorted downward, and int64 indices [..., k]. Exact,
    in O(k log k) sums: pair (i, j) of the two sorted halves can only be among the k best if i * j <= k (1-based).
    Half types are added, and returned, in fp32. Ties come in any order ("triton": the smaller index of each half first); NaN
    counts as largest, as in `torch.topk` (sums of opposite infinities aside). With `softmax` the softmax of the k scores is
    returned in their place. Raises ValueError for k < 1, k > n1, k > n2, or unequal leading shapes.
    """
    scores, indices = torch.ops.memrewrite.product_key_topk.default(scores1, scores2, k, softmax, backend)
    return scores, indices


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
    """Adagrad with one accumulator a row, in place, on the rows that these lookups read; no gradient table is made.

    Lookup l has grads[l] [T, D] (of its output), indices[l] and weights[l] [T, K]; g_n is the sum of w * grad over all
    reads of row n. `total_n += mean(g_n²)`; `p_n = p_n (1 - lr wd) - lr g_n / (sqrt(total_n) + eps)`. values [N, D] in
    float32, bfloat16, float16 (these rounded stochastically, by `seed`) or float8_e4m3fn with `scale` [N]; total [N]
    float32. Raises ValueError and TypeError before anything is changed, IndexError as `sparse_lookup`.
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
    """Adam with one second moment a row, in place, on the rows that were read: others neither move nor decay.

    As `rowwise_adagrad_`, with `m = β1 m + (1 - β1) g`, `v = β2 v + (1 - β2) mean(g²)` and
    `p = p (1 - lr wd) - lr m / (1 - β1^step) / (sqrt(v / (1 - β2^step)) + eps)`. exp_avg (m) [N, D] float32 or bfloat16
    (rounded stochastically), exp_avg_sq (v) [N] float32; `step` counts from 1.
    """
    numbers = (lr, *betas, eps, weight_decay, step, seed, backend)
    torch.ops.memrewrite.rowwise_adam_(values, scale, exp_avg, exp_avg_sq, grads, indices, weights, *numbers)


class _Op(NamedTuple):
    """One operator: its schema, what it does, its shapes, and its gradient where it has one."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    grad: Callable[..., Any] | None = None
    context: Callable[..., Any] | None = None
    tags: tuple[torch.Tag, ...] = ()


def _nothing(*_: Any) -> None:
    """The fake of an operator that returns nothing."""


_LOOKUP = "Tensor values, Tensor indices, Tensor weights"
_TABLE = "Tensor(a!) values, Tensor(b!)? scale"
_READS = "Tensor[] grads, Tensor[] indices, Tensor[] weights"
_OPS = (
    _Op(
        f"sparse_lookup({_LOOKUP}, Tensor? scale=None, str gradient='dense', str backend='auto', "
        "Tensor? pending=None, int handle=0) -> Tensor",
        _lookup.forward,
        _lookup.forward_fake,
        _lookup.grad_of,
        _lookup.context,
    ),
    _Op(
        f"sparse_lookup_backward(Tensor grad, {_LOOKUP}, bool need_values, bool need_weights, Tensor? scale=None, "
        "str backend='auto') -> (Tensor, Tensor)",
        _lookup.backward,
        _lookup.backward_fake,
        _lookup.backward_grad,
        _lookup.backward_context,
    ),
    _Op(
        "sparse_lookup_rows(Tensor grad, Tensor indices, Tensor weights, SymInt slots, str backend='auto') -> Tensor",
        _lookup.rows,
        _lookup.rows_fake,
    ),
    _Op(
        "sparse_lookup_keep(Tensor grad, Tensor indices, Tensor weights, Tensor(a!) pending, int handle) -> ()",
        _lookup.keep,
        _nothing,
        tags=(torch.Tag.cudagraph_unsafe,),  # a replayed CUDA graph would not tell the queue
    ),
    _Op(
        f"rowwise_adagrad_({_TABLE}, Tensor(c!) total, {_READS}, float lr, float eps, float weight_decay, int seed, "
        "str backend='auto') -> ()",
        _update.adagrad,
        _nothing,
    ),
    _Op(
        f"rowwise_adam_({_TABLE}, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, {_READS}, float lr, float beta1, float beta2, "
        "float eps, float weight_decay, int step, int seed, str backend='auto') -> ()",
        _update.adam,
        _nothing,
    ),
    _Op(
        "product_key_topk(Tensor scores1, Tensor scores2, int k, bool softmax=False, str backend='auto') -> (Tensor, Tensor)",
        _topk.forward,
        _topk.forward_fake,
        _topk.grad_of,
        _topk.context,
    ),
    _Op(
        "product_key_topk_backward(Tensor grad, Tensor indices, SymInt n1, SymInt n2, str backend='auto') -> (Tensor, Tensor)",
        _topk.backward,
        _topk.backward_fake,
        _topk.backward_grad,
        _topk.backward_context,
    ),
)
# Opaque to export and compile: what a backend does inside is never traced.
_LIBRARY = Library("memrewrite", "DEF")  # type: ignore[no-untyped-call]
for _op in _OPS:
    _name = _op.schema.partition("(")[0]
    _LIBRARY.define(_op.schema, tags=_op.tags)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _op.run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # it chooses by device itself
    register_fake(f"memrewrite::{_name}", _op.fake, lib=_LIBRARY)
    if _op.grad is not None:
        register_autograd(f"memrewrite::{_name}", _op.grad, setup_context=_op.context, lib=_LIBRARY)
