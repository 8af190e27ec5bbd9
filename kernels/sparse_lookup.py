"""The operator `sparse_lookup` and its backwards: checks, shapes and gradients.

Flow: check the call → run it on a backend. The argument `gradient` selects the table's gradient: dense, row-sparse, or none
with its factors stored in `pending` for a fused update. `ops` registers these functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels.backends import choose
from memrewrite.kernels.checks import check_range, check_reads
from memrewrite.kernels.lookup_checks import (
    NO_KEEP,
    NO_ROWS,
    NO_SCALE,
    check,
    check_backward,
    check_gradient,
    check_names,
    check_rows,
    output_dtype,
)
from memrewrite.kernels.pending import queue_of


def forward(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Tensor | None = None,
    handle: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`memrewrite::sparse_lookup`: [N, D], [T, K], [T, K] -> [T, D]; the public function is `ops.sparse_lookup`."""
    check(values, indices, weights, scale)
    dtype = output_dtype(values, weights, scale, dtype)
    check_names("sparse_lookup", gradient, backend)
    chosen = choose("sparse_lookup", backend, lambda b: b.supports(values, indices, weights, scale))
    if indices.numel() == 0 or values.shape[1] == 0:
        return weights.new_zeros(indices.shape[0], values.shape[1], dtype=dtype)
    out: Tensor = chosen.forward(values, indices, weights, scale, dtype)
    return out


def forward_fake(
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Tensor | None = None,
    handle: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Shape and dtype of `forward`."""
    check(values, indices, weights, scale)
    dtype = output_dtype(values, weights, scale, dtype)
    check_names("sparse_lookup", gradient, backend)
    return weights.new_empty(indices.shape[0], values.shape[1], dtype=dtype)


def context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs, nothing of size [T, K, D]. Called only if an input requires a gradient."""
    values, indices, weights, scale, ctx.gradient, ctx.backend, pending, ctx.handle, _ = inputs
    if ctx.needs_input_grad[3]:
        raise RuntimeError(NO_SCALE)
    if ctx.needs_input_grad[0]:
        check_gradient("sparse_lookup", values, ctx.gradient, pending, scaled=scale is not None)
    ctx.save_for_backward(values, indices, weights, scale)
    ctx.pending = pending  # not with save_for_backward: later lookups mutate it, which torch would report as an error


def grad_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of `forward`, computed by the backward operators."""
    values, indices, weights, scale = ctx.saved_tensors
    need_values, _, need_weights = ctx.needs_input_grad[:3]
    need_dense = need_values and ctx.gradient == "dense"
    rows = row_gradient(ctx, values, grad, indices, weights) if need_values and not need_dense else None
    lookup_backward = torch.ops.memrewrite.sparse_lookup_backward
    dense, grad_weights = lookup_backward(grad, values, indices, weights, need_dense, need_weights, scale, ctx.backend)
    grad_values = dense if need_dense else rows
    return grad_values, None, grad_weights if need_weights else None, None, None, None, None, None, None


def row_gradient(ctx: Any, values: Tensor, grad: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
    """The gradient of a table that is not dense, from its factors: row-sparse, or None, kept in the queue of fused updates.

    Args:
        ctx: Of the operator whose first input is the table, with `gradient`, `backend`, `pending` and `handle`.
        values: The table [N, D].
        grad: [T, D].
        indices: [T, K].
        weights: [T, K].
    """
    if ctx.gradient == "sparse":
        if torch._C._are_functorch_transforms_active():  # which cannot wrap a COO tensor
            raise RuntimeError(NO_ROWS)
        wide = grad.to(torch.promote_types(grad.dtype, values.dtype))  # the rows are stored in the dtype of this factor
        rows: Tensor = torch.ops.memrewrite.sparse_lookup_rows(wide, indices, weights, values.shape[0], ctx.backend)
        return rows.to(values.dtype)
    if torch.is_grad_enabled():
        raise RuntimeError(NO_KEEP)
    if _is_wanted(ctx.next_functions[0][0]):
        torch.ops.memrewrite.sparse_lookup_keep(grad, indices, weights, ctx.pending, ctx.handle)
    return None


def _is_wanted(table: Any) -> bool:
    """True if this backward pass reaches the table's node. `autograd.grad(loss, x)` does not, and must not train the table."""
    try:
        return bool(torch._C._will_engine_execute_node(table))
    except RuntimeError:  # raised if the gradient of the table itself was requested
        return True


# ----------------------------------------------------------------------------------------------------------- the backward


def backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    need_values: bool,
    need_weights: bool,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`memrewrite::sparse_lookup_backward`: dense gradient of values [N, D], gradient of weights [T, K], in their dtypes.

    An unneeded gradient is returned as an empty tensor [0], since an operator cannot return None for a tensor.
    """
    check_backward(grad, values, indices, weights, need_values, scale, backend)
    grad_values: Tensor | None = None
    grad_weights: Tensor | None = None
    if indices.numel() == 0 or values.shape[1] == 0:
        grad_values, grad_weights = values.new_zeros(values.shape), weights.new_zeros(weights.shape)
    elif need_values or need_weights:
        chosen = choose("sparse_lookup_backward", backend, lambda b: b.supports(values, indices, weights, scale))
        grad_values, grad_weights = chosen.backward(grad, values, indices, weights, scale, need_values, need_weights)
    return (
        grad_values if need_values and grad_values is not None else values.new_empty(0),
        grad_weights if need_weights and grad_weights is not None else weights.new_empty(0),
    )


def backward_fake(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    need_values: bool,
    need_weights: bool,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `backward`."""
    check_backward(grad, values, indices, weights, need_values, scale, backend)
    return (
        values.new_empty(values.shape if need_values else (0,)),
        weights.new_empty(weights.shape if need_weights else (0,)),
    )


def backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs, and which of the two gradients were computed."""
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted, ctx.scaled, ctx.backend = inputs[4:6], inputs[6] is not None, inputs[7]


def backward_grad(ctx: Any, grad_gv: Tensor | None, grad_gw: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order: both gradients are bilinear in (grad, values, weights), so their gradients are lookups too."""
    if ctx.scaled:
        raise RuntimeError("sparse_lookup: a table with a scale has no second derivatives; use a table without")
    grad, values, indices, weights = ctx.saved_tensors
    lookup = partial(torch.ops.memrewrite.sparse_lookup, backend=ctx.backend, dtype=grad.dtype)
    lookup_backward = partial(torch.ops.memrewrite.sparse_lookup_backward, backend=ctx.backend)
    need_grad, need_values, _, need_weights = ctx.needs_input_grad[:4]
    has_gv, has_gw = (want and grad is not None for want, grad in zip(ctx.wanted, (grad_gv, grad_gw), strict=True))
    d_grad = d_values = d_weights = None
    if need_grad and has_gv:
        d_grad = lookup(grad_gv, indices, weights)
    if need_grad and has_gw:
        through_gw = lookup(values, indices, grad_gw)
        d_grad = through_gw if d_grad is None else d_grad + through_gw
    if need_values and has_gw:
        d_values = lookup_backward(grad, values, indices, grad_gw, True, False)[0]
    if need_weights and has_gv:
        d_weights = lookup_backward(grad, grad_gv, indices, weights, False, True)[1]
    return d_grad, d_values, None, d_weights, None, None, None, None


# ------------------------------------------------------------------------------------------- sparse and fused gradients


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int, backend: str = "auto") -> Tensor:
    """`memrewrite::sparse_lookup_rows`: the gradient of values as a COO tensor [N, D] of the rows that were read, as `grad`.

    It always has min(T·K, N) rows, in ascending order; if fewer rows were read, the last one is repeated with zero gradients.
    So its size is known without synchronizing with the device, and the sum over equal rows is the gradient.
    """
    check_rows(grad, indices, weights, slots, backend)
    count, width = min(indices.numel(), slots), grad.shape[1]
    if slots == 0:
        check_range("sparse_lookup_rows", indices, slots)
    if count == 0 or width == 0:
        return _coo(indices.new_zeros(count, dtype=torch.int64), grad.new_zeros(count, width), slots)
    chosen = choose("sparse_lookup_rows", backend, lambda b: b.supports(grad, indices, weights))
    found, sums = chosen.rows(grad, indices, weights, slots)
    return _coo(found, sums, slots)


def rows_fake(grad: Tensor, indices: Tensor, weights: Tensor, slots: int, backend: str = "auto") -> Tensor:
    """Shape of `rows`."""
    check_rows(grad, indices, weights, slots, backend)
    count = torch.sym_min(indices.numel(), slots)  # type: ignore[no-untyped-call]
    return _coo(indices.new_empty(count, dtype=torch.int64), grad.new_empty(count, grad.shape[1]), slots)


def _coo(found: Tensor, sums: Tensor, slots: int) -> Tensor:
    shape = (slots, sums.shape[1])
    return torch.sparse_coo_tensor(found.unsqueeze(0), sums, shape, is_coalesced=False, check_invariants=False)


def keep(grad: Tensor, indices: Tensor, weights: Tensor, pending: Tensor, handle: int) -> None:
    """`memrewrite::sparse_lookup_keep`: adds the factors of a table's gradient to the queue `handle`; increments `pending`."""
    keep_fake(grad, indices, weights, pending, handle)
    queue_of(handle).keep(grad, indices, weights)
    pending.add_(1)


def keep_fake(grad: Tensor, indices: Tensor, weights: Tensor, pending: Tensor, handle: int) -> None:
    """The checks of `keep`."""
    check_reads("sparse_lookup_keep", grad, indices, weights)
    if pending.dtype != torch.int64 or pending.layout is not torch.strided or pending.numel() != 1:
        raise ValueError("sparse_lookup_keep: `pending` is not the counter of a queue: it must be int64 with one element")
