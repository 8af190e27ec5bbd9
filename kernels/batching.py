"""The operators under `torch.vmap`: a batch of calls is one call with more tokens, more heads or a longer table.

A batch of lookups in one table has the tokens of all of them. A batch of tables is one table: row n of table b is row b·N + n.
`kernels/operators.py` registers the functions; each gets the inputs and the batched dimension of each input, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]
Halves = tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]
_OPS = torch.ops.memrewrite


def _reads_of(name: str) -> Callable[..., tuple[Tensor, int]]:
    """The rule of an operator that reads a table for tokens. The tables of a batch may differ if their gradient is dense."""

    def batched(
        info: Any, dims: Dims, values: Tensor, indices: Tensor, of_tokens: Tensor, scale: Tensor | None = None, *others: Any
    ) -> tuple[Tensor, int]:
        if dims[0] is not None and others and others[0] != "dense":
            raise RuntimeError(f'{name}: a batch of tables has no {others[0]} gradient; under vmap use gradient="dense"')
        values, scale, indices = _reads(info.batch_size, dims[0] is not None, dims, values, indices, scale)
        out = getattr(_OPS, name)(values, indices, _joined(of_tokens, dims[2], info.batch_size), scale, *others)
        return _parts(out, info.batch_size), 0

    return batched


sparse_lookup, sparse_dots = _reads_of("sparse_lookup"), _reads_of("sparse_dots")


def sparse_lookup_backward(
    info: Any,
    dims: Dims,
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    need_values: bool,
    need_weights: bool,
    scale: Tensor | None = None,
    *others: Any,
) -> Halves:
    """The gradients of each call of a batch; that of a shared table is one gradient per call."""
    size, at = info.batch_size, (dims[1], dims[2], None, *dims[6:7])
    values, scale, indices = _reads(size, need_values or dims[1] is not None, at, values, indices, scale)
    grad, weights = _joined(grad, dims[0], size), _joined(weights, dims[3], size)
    both = _OPS.sparse_lookup_backward(grad, values, indices, weights, need_values, need_weights, scale, *others)
    return _halves(both, (need_values, need_weights), (0, 0), size)


def product_key_topk(
    info: Any, dims: Dims, scores1: Tensor, scores2: Tensor, *others: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The batch is one more leading dimension."""
    halves = [_first(scores, dim, info.batch_size) for scores, dim in ((scores1, dims[0]), (scores2, dims[1]))]
    return _OPS.product_key_topk(*halves, *others), (0, 0)


def product_key_topk_backward(
    info: Any, dims: Dims, grad: Tensor, indices: Tensor, *others: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """The batch is one more leading dimension."""
    inputs = [_first(tensor, dim, info.batch_size) for tensor, dim in ((grad, dims[0]), (indices, dims[1]))]
    return _OPS.product_key_topk_backward(*inputs, *others), (0, 0)


def product_keys(
    info: Any, dims: Dims, queries: Tensor, keys: Tensor, *others: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """With shared keys, the batch has the tokens of all calls; else the heads of all calls."""
    size, shared = info.batch_size, dims[1] is None
    if shared:
        best = _OPS.product_keys(_joined(queries, dims[0], size), keys, *others)  # [h, B·T, k]
    else:
        best = _OPS.product_keys(_joined(queries, dims[0], size, 1), _joined(keys, dims[1], size), *others)  # [B·h, T, k]
    at = 1 if shared else 0
    return (_parts(best[0], size, at), _parts(best[1], size, at)), (at, at)


def product_keys_backward(
    info: Any,
    dims: Dims,
    grad: Tensor,
    slots: Tensor,
    queries: Tensor,
    keys: Tensor,
    need_queries: bool,
    need_keys: bool,
    *others: Any,
) -> Halves:
    """As `product_keys`; gradients of shared keys are one gradient per call, so that these are heads, too."""
    size, shared = info.batch_size, dims[3] is None and not need_keys
    tokens, heads = (1, 0) if shared else (0, 1)  # where the batch joins [h, T, k], and [T, 2h, d]
    grad, slots, queries = (
        _joined(tensor, dim, size, at)
        for tensor, dim, at in ((grad, dims[0], tokens), (slots, dims[1], tokens), (queries, dims[2], heads))
    )
    keys = keys if shared else _joined(keys, dims[3], size)
    both = _OPS.product_keys_backward(grad, slots, queries, keys, need_queries, need_keys, *others)
    return _halves(both, (need_queries, need_keys), (heads, 0), size)


def _reads(
    size: int, several: bool, dims: Dims, values: Tensor, indices: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Table [B·N, D] or, of one table, [N, D]; scale; indices [B·T, K]. `dims`: of values, indices, weights and scale."""
    of_scale = dims[3] if len(dims) > 3 else None
    if not several and of_scale is None:
        return values, scale, _joined(indices, dims[1], size)
    values, indices = _first(values, dims[0], size), _first(indices, dims[1], size)
    rows = values.shape[1]
    begins = torch.arange(size, device=indices.device).view(-1, 1, 1) * rows
    moved = indices + begins
    if indices.device.type == "cpu":  # an index outside its own table must not read the next one
        moved = torch.where((indices < 0) | (indices >= rows), -1, moved)
    scale = None if scale is None else _joined(scale, of_scale, size)
    return values.flatten(0, 1), scale, moved.flatten(0, 1)


def _first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with its batch as the first dimension."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _joined(tensor: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """The tensor with its batch joined to dimension `at`: as many times as long."""
    return _first(tensor, dim, size).movedim(0, at).flatten(at, at + 1)


def _parts(tensor: Tensor, size: int, at: int = 0) -> Tensor:
    """The opposite: dimension `at` becomes the batch and the part of each call."""
    shape = tensor.shape
    return tensor.reshape(*shape[:at], size, shape[at] // size, *shape[at + 1 :])


def _halves(both: tuple[Tensor, Tensor], needed: tuple[bool, bool], at: tuple[int, int], size: int) -> Halves:
    """Two gradients, each with its batch at `at`; one that is not needed is empty."""
    first, second = (_parts(one, size, dim) if need else one for one, need, dim in zip(both, needed, at, strict=True))
    return (first, second), (at[0] if needed[0] else None, at[1] if needed[1] else None)
