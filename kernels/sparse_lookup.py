"""The operator `sparse_lookup` and its backward: checks, shapes, gradients, and the choice of a backend.

A call is checked, then handed to the first backend that supports it. `ops` registers these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrewrite.kernels import cpu
from memrewrite.kernels.checks import require

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS: tuple[ModuleType, ...] = (cpu,)  # read top to bottom; `cpu` takes every call and stays last


def forward(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`memrewrite::sparse_lookup`: [N, D], [T, K], [T, K] -> [T, D]; `ops.sparse_lookup` is its public face."""
    _check(values, indices, weights)
    if indices.numel() == 0 or values.shape[1] == 0:
        return values.new_zeros(indices.shape[0], values.shape[1])
    out: Tensor = _backend(values, indices, weights).forward(values, indices, weights)
    return out


def forward_fake(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Shape and dtype of `forward`."""
    _check(values, indices, weights)
    return values.new_empty(indices.shape[0], values.shape[1])


def context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """Keep the inputs themselves: nothing of size [T, K, D] is saved."""
    ctx.save_for_backward(*inputs)


def grad_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    """Gradient of `forward`, by the operator `sparse_lookup_backward`."""
    need_values, _, need_weights = ctx.needs_input_grad
    grad_values, grad_weights = torch.ops.memrewrite.sparse_lookup_backward(grad, *ctx.saved_tensors, need_values, need_weights)
    return grad_values if need_values else None, None, grad_weights if need_weights else None


def backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, need_values: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """`memrewrite::sparse_lookup_backward`: dense gradient of values [N, D], gradient of weights [T, K].

    An unneeded gradient comes back as an empty [0] tensor, since an operator cannot return None for a tensor.
    """
    _check(values, indices, weights, grad)
    grad_values: Tensor | None = None
    grad_weights: Tensor | None = None
    if indices.numel() == 0 or values.shape[1] == 0:
        grad_values, grad_weights = values.new_zeros(values.shape), weights.new_zeros(weights.shape)
    else:
        backend = _backend(values, indices, weights)
        grad_values, grad_weights = backend.backward(grad, values, indices, weights, need_values, need_weights)
    return (
        grad_values if need_values and grad_values is not None else values.new_empty(0),
        grad_weights if need_weights and grad_weights is not None else weights.new_empty(0),
    )


def backward_fake(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, need_values: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `backward`."""
    _check(values, indices, weights, grad)
    return (
        values.new_empty(values.shape if need_values else (0,)),
        weights.new_empty(weights.shape if need_weights else (0,)),
    )


def backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, and which of the two gradients were computed."""
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted = inputs[4:]


def backward_grad(ctx: Any, grad_gv: Tensor, grad_gw: Tensor) -> tuple[Tensor | None, ...]:
    """Second order: gV and gw are bilinear in (grad, values, weights), so their gradients are lookups again."""
    lookup, lookup_backward = torch.ops.memrewrite.sparse_lookup, torch.ops.memrewrite.sparse_lookup_backward
    grad, values, indices, weights = ctx.saved_tensors
    need_grad, need_values, _, need_weights = ctx.needs_input_grad[:4]
    has_gv, has_gw = ctx.wanted
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
    return d_grad, d_values, None, d_weights, None, None


def _backend(values: Tensor, indices: Tensor, weights: Tensor) -> ModuleType:
    return next(backend for backend in BACKENDS if backend.supports(values, indices, weights) is None)


def _check(values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor | None = None) -> None:
    """Refuse what the schema cannot; sizes go through `require`, since they may be symbols."""
    if values.dim() != 2 or indices.dim() != 2 or weights.dim() != 2:
        raise ValueError(
            "sparse_lookup takes values [N, D], indices [T, K] and weights [T, K], "
            f"not {tuple(values.shape)}, {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sparse_lookup: indices must be int32 or int64, not {indices.dtype}")
    if not values.is_floating_point() or weights.dtype != values.dtype:
        raise TypeError(
            f"sparse_lookup: values and weights must share a floating dtype, not {values.dtype} and {weights.dtype}"
        )
    _check_sizes("weights", tuple(weights.shape), tuple(indices.shape))
    if grad is not None:
        if grad.dim() != 2 or grad.dtype != values.dtype:
            raise TypeError(f"sparse_lookup_backward: grad must be [T, D] of {values.dtype}, not {grad.dtype}")
        _check_sizes("grad", tuple(grad.shape), (indices.shape[0], values.shape[1]))


def _check_sizes(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        require(one == other, lambda: f"sparse_lookup: {name} is {found}, not {wanted}")
