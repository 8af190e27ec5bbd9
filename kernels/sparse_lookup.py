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
from memrewrite.kernels.checks import one_device, require
from memrewrite.kernels.pending import queue_of

GRADIENTS = ("dense", "sparse", "fused")
NO_ROWS = (
    'sparse_lookup: a table with gradient "sparse" has first derivatives in reverse mode only, and none under torch.func; '
    'use gradient "dense"'
)
NO_KEEP = (
    'sparse_lookup: a table with gradient "fused" has no second derivatives, and no gradient under torch.func: '
    '`loss.backward()` trains it; use gradient "dense"'
)
NO_SCALE = "sparse_lookup: the scale of a table has no derivative; differentiate with respect to the values or the weights"


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
    _check(values, indices, weights, scale)
    dtype = _output_dtype(values, weights, scale, dtype)
    if gradient not in GRADIENTS:
        raise ValueError(f"sparse_lookup: there is no gradient {gradient!r}; try one of {', '.join(GRADIENTS)}")
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
    _check(values, indices, weights, scale)
    dtype = _output_dtype(values, weights, scale, dtype)
    return weights.new_empty(indices.shape[0], values.shape[1], dtype=dtype)


def _output_dtype(values: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the output. Raises TypeError if it is not floating-point, or has 8 bits."""
    dtype = dtype or (values.dtype if scale is None else weights.dtype)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise TypeError(f"sparse_lookup: the output's dtype must be floating, with 16 or more bits, not {dtype}")
    return dtype


def context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs, nothing of size [T, K, D]. Called only if an input requires a gradient."""
    values, indices, weights, scale, ctx.gradient, ctx.backend, pending, ctx.handle, _ = inputs
    if ctx.needs_input_grad[3]:
        raise RuntimeError(NO_SCALE)
    if ctx.needs_input_grad[0]:
        _check_gradient(values, ctx.gradient, pending)
    ctx.save_for_backward(values, indices, weights, scale)
    ctx.pending = pending  # not with save_for_backward: later lookups mutate it, which torch would report as an error


def grad_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of `forward`, computed by the backward operators."""
    values, indices, weights, scale = ctx.saved_tensors
    need_values, _, need_weights = ctx.needs_input_grad[:3]
    grad_values = None
    if need_values and ctx.gradient == "fused":
        if torch.is_grad_enabled():
            raise RuntimeError(NO_KEEP)
        if _is_wanted(ctx.next_functions[0][0]):
            torch.ops.memrewrite.sparse_lookup_keep(grad, indices, weights, ctx.pending, ctx.handle)
    elif need_values and ctx.gradient == "sparse":
        if torch._C._are_functorch_transforms_active():  # which cannot wrap a COO tensor
            raise RuntimeError(NO_ROWS)
        grad_values = torch.ops.memrewrite.sparse_lookup_rows(grad, indices, weights, values.shape[0], ctx.backend)
        grad_values = grad_values.to(values.dtype)
    need_dense = need_values and ctx.gradient == "dense"
    lookup_backward = torch.ops.memrewrite.sparse_lookup_backward
    dense, grad_weights = lookup_backward(grad, values, indices, weights, need_dense, need_weights, scale, ctx.backend)
    grad_values = dense if need_dense else grad_values
    return grad_values, None, grad_weights if need_weights else None, None, None, None, None, None, None


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
    _check(values, indices, weights, scale, grad)
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
    _check(values, indices, weights, scale, grad)
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
    count, width = min(indices.numel(), slots), grad.shape[1]
    if count == 0 or width == 0:
        return _coo(indices.new_zeros(count, dtype=torch.int64), grad.new_zeros(count, width), slots)
    chosen = choose("sparse_lookup_rows", backend, lambda b: b.supports(grad, indices, weights))
    found, sums = chosen.rows(grad, indices, weights, slots)
    return _coo(found, sums, slots)


def rows_fake(grad: Tensor, indices: Tensor, weights: Tensor, slots: int, backend: str = "auto") -> Tensor:
    """Shape of `rows`."""
    count = torch.sym_min(indices.numel(), slots)  # type: ignore[no-untyped-call]
    return _coo(indices.new_empty(count, dtype=torch.int64), grad.new_empty(count, grad.shape[1]), slots)


def _coo(found: Tensor, sums: Tensor, slots: int) -> Tensor:
    shape = (slots, sums.shape[1])
    return torch.sparse_coo_tensor(found.unsqueeze(0), sums, shape, is_coalesced=False, check_invariants=False)


def keep(grad: Tensor, indices: Tensor, weights: Tensor, pending: Tensor, handle: int) -> None:
    """`memrewrite::sparse_lookup_keep`: adds the factors of a table's gradient to the queue `handle`; increments `pending`."""
    queue_of(handle).keep(grad, indices, weights)
    pending.add_(1)


# ---------------------------------------------------------------------------------------------------------------- checks


def _check(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None, grad: Tensor | None = None) -> None:
    """Raise ValueError or TypeError for wrong inputs; sizes are checked by `require`, since they may be symbolic."""
    if values.dim() != 2 or indices.dim() != 2 or weights.dim() != 2:
        raise ValueError(
            "sparse_lookup needs values [N, D], indices [T, K] and weights [T, K], "
            f"not {tuple(values.shape)}, {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    one_device("sparse_lookup", values, indices, weights, scale, grad)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sparse_lookup: indices must be int32 or int64, not {indices.dtype}")
    if scale is None:
        known = weights.dtype in (values.dtype, torch.float32)
        if not values.is_floating_point() or not known or values.itemsize == 1:
            raise TypeError(
                "sparse_lookup: values must have a floating dtype (8-bit values need a `scale`), and weights the same or "
                f"float32, not {values.dtype} and {weights.dtype}"
            )
    elif scale.dtype != torch.float32 or not values.is_floating_point() or not weights.is_floating_point():
        raise TypeError(f"sparse_lookup: scale must be float32, not {scale.dtype}, and values and weights floating")
    _check_sizes("weights", tuple(weights.shape), tuple(indices.shape))
    if scale is not None:
        _check_sizes("scale", tuple(scale.shape), (values.shape[0],))
    if grad is not None:
        if grad.dim() != 2 or not grad.is_floating_point() or grad.itemsize == 1:
            raise TypeError(
                "sparse_lookup_backward: grad must be [T, D] of a floating dtype with 16 or more bits, "
                f"not {tuple(grad.shape)} of {grad.dtype}"
            )
        _check_sizes("grad", tuple(grad.shape), (indices.shape[0], values.shape[1]))


def _check_gradient(values: Tensor, gradient: str, pending: Tensor | None) -> None:
    if gradient == "fused" and pending is None:
        raise ValueError("sparse_lookup: a fused gradient needs the queue of its table: call the `Pool`, not the operator")
    if gradient != "fused" and values.itemsize == 1:
        raise ValueError(f'sparse_lookup: values of {values.dtype} cannot have a gradient tensor; use gradient="fused"')


def _check_sizes(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if len(found) != len(wanted):
        raise ValueError(f"sparse_lookup: {name} is {found}, not {wanted}")
    for one, other in zip(found, wanted, strict=True):
        require(one == other, lambda: f"sparse_lookup: {name} is {found}, not {wanted}")
