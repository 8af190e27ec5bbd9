"""The norm of a table's gradient that exists only as the factors of its lookups; no gradient [N, D] is materialized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memrewrite.kernels import ops as _ops  # noqa: F401 (registers the operators)
from memrewrite.kernels.pending import Factors

LEAST = 2**22  # elements of the row sums that may exist at once, if the factors have fewer


def gradient_norm(reads: Sequence[Factors], slots: int, backend: str = "auto") -> Tensor:
    """The 2-norm of `sum over lookups of weights[t, j] * grad[t]` at row `indices[t, j]`, a 0-dim tensor.

    All reads of a row are summed before the norm, in fp32 (float64 for float64). The rows' sums are computed for a slice of
    the columns at a time, so that they take about as much memory as the factors. The device is not synchronized.

    Args:
        reads: Factors of one or more lookups of the table; K may differ from lookup to lookup.
        slots: Rows of the table (N).
        backend: "auto" or the name of a backend.
    """
    count, width = min(sum(r.indices.numel() for r in reads), slots), reads[0].grad.shape[1]
    if not count or not width:
        return reads[0].grad.new_zeros(())
    columns = max(1, max(LEAST, sum(r.grad.numel() for r in reads)) // count)
    parts = [_row_sums(reads, slice(begin, begin + columns), slots, backend) for begin in range(0, width, columns)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    return norm


def _row_sums(reads: Sequence[Factors], columns: slice, slots: int, backend: str) -> Tensor:
    """The gradient's rows that are not zero, in any order, restricted to `columns`: [R, columns]."""
    same: dict[int, list[Factors]] = {}  # lookups by K: the operator takes one K
    for r in reads:
        same.setdefault(r.indices.shape[1], []).append(r)
    sums = [_rows(*_joined(group, columns), slots, backend) for group in same.values()]
    if len(sums) == 1:
        return sums[0]._values()
    found, rows = torch.cat([s._indices()[0] for s in sums]), torch.cat([s._values() for s in sums])
    return _rows(rows, found[:, None], torch.ones_like(rows[:, :1]), slots, backend)._values()


def _joined(reads: Sequence[Factors], columns: slice) -> Factors:
    wide = torch.float64 if any(torch.float64 in (r.grad.dtype, r.weights.dtype) for r in reads) else torch.float32
    grads, weights = [r.grad[:, columns].to(wide) for r in reads], [r.weights.to(wide) for r in reads]
    return Factors(torch.cat(grads), torch.cat([r.indices for r in reads]), torch.cat(weights))


def _rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int, backend: str) -> Tensor:
    rows: Tensor = torch.ops.memrewrite.sparse_lookup_rows(grad, indices, weights, slots, backend)
    return rows
