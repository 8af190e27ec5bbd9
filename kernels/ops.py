"""The operators `torch.ops.memrewrite.*`: their schemas, their registration and their Python faces.

Each backward is an operator of its own, so that export, compile and the profiler see a gather and a scatter by name;
the backwards are differentiable in their turn. Importing this module registers the operators, once in a process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from memrewrite.kernels import product_key_topk as _topk
from memrewrite.kernels import sparse_lookup as _lookup

# Opaque to export and compile: what a backend does inside is never traced.
_LIBRARY = Library("memrewrite", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "sparse_lookup(Tensor values, Tensor indices, Tensor weights) -> Tensor",
    "sparse_lookup_backward(Tensor grad, Tensor values, Tensor indices, Tensor weights, "
    "bool need_values, bool need_weights) -> (Tensor, Tensor)",
    "product_key_topk(Tensor scores1, Tensor scores2, int k) -> (Tensor, Tensor)",
    "product_key_topk_backward(Tensor grad, Tensor indices, SymInt n1, SymInt n2) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def sparse_lookup(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of table rows: `y_t = sum_j weights[t, j] * values[indices[t, j]]` (eq. 1 of arXiv 2412.09764).

    values [N, D] floating; indices [T, K] int32 or int64; weights [T, K] in the dtype of values. Returns [T, D].
    Differentiable in values (a dense gradient) and weights. Raises ValueError for shapes, TypeError for dtypes,
    IndexError for an index outside the table (on the CPU; a CUDA device asserts).
    """
    out: Tensor = torch.ops.memrewrite.sparse_lookup(values, indices, weights)
    return out


def product_key_topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums `scores1[i] + scores2[j]` over all pairs, and their slots `i * n2 + j` (product keys, §2.1).

    scores1 [..., n1], scores2 [..., n2]. Returns scores [..., k], sorted downward, and int64 indices [..., k]. Exact,
    in O(k log k) sums: pair (i, j) of the two sorted halves can only be among the k best if i * j <= k (1-based).
    Half types are added, and returned, in fp32. Ties come in any order; NaN counts as largest, as in `torch.topk`
    (sums of opposite infinities aside). Raises ValueError for k < 1, k > n1, k > n2, or unequal leading shapes.
    """
    scores, indices = torch.ops.memrewrite.product_key_topk(scores1, scores2, k)
    return scores, indices


for _op, _module in (("sparse_lookup", _lookup), ("product_key_topk", _topk)):
    for _name, _impl, _fake, _grad, _context in (
        (_op, _module.forward, _module.forward_fake, _module.grad_of, _module.context),
        (f"{_op}_backward", _module.backward, _module.backward_fake, _module.backward_grad, _module.backward_context),
    ):
        _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # one formulation for every device
        register_fake(f"memrewrite::{_name}", _fake, lib=_LIBRARY)
        register_autograd(f"memrewrite::{_name}", _grad, setup_context=_context, lib=_LIBRARY)
