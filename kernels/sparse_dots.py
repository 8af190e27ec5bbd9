"""The operator `sparse_dots`: `out[t, j] = values[indices[t, j]] . x[t]`, its checks, shapes and gradients.

The backward of `sparse_lookup` computes it as the gradient of the weights, and its own gradients are lookups: that of x is a
`sparse_lookup`, that of the table the one of a lookup. So it needs no kernel of its own. `ops` registers these functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels.backends import choose
from memrewrite.kernels.checks import check_range
from memrewrite.kernels.lookup_checks import NO_SCALE, check_dots, check_gradient, check_names
from memrewrite.kernels.sparse_lookup import row_gradient


def forward(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Tensor | None = None,
    handle: int = 0,
) -> Tensor:
    """`memrewrite::sparse_dots`: [N, D], [T, K], [T, D] -> [T, K]; the public function is `ops.sparse_dots`."""
    out = forward_fake(values, indices, x, scale, gradient, backend)  # the kernels read its shape and dtype only
    chosen = choose("sparse_dots", backend, lambda b: b.supports(values, indices, out, scale))
    if indices.numel() == 0 or values.shape[1] == 0:
        return out.zero_()
    check_range("sparse_dots", indices, values.shape[0])  # here, since the backward would name itself
    dots: Tensor = chosen.backward(x, values, indices, out, scale, False, True)[1]
    return dots


def forward_fake(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    gradient: str = "dense",
    backend: str = "auto",
    pending: Tensor | None = None,
    handle: int = 0,
) -> Tensor:
    """Shape and dtype of `forward`."""
    check_dots(values, indices, x, scale)
    check_names("sparse_dots", gradient, backend)
    return x.new_empty(indices.shape, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)


def context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs. Called only if an input requires a gradient."""
    values, indices, x, scale, ctx.gradient, ctx.backend, pending, ctx.handle = inputs
    if ctx.needs_input_grad[3]:
        raise RuntimeError(NO_SCALE)
    if ctx.needs_input_grad[0]:
        check_gradient("sparse_dots", values, ctx.gradient, pending, scaled=scale is not None)
    ctx.save_for_backward(values, indices, x, scale)
    ctx.pending = pending  # as in `sparse_lookup.context`


def grad_of(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`: that of x is a lookup with the weights `grad`, that of the table has the factors x and `grad`."""
    values, indices, x, scale = ctx.saved_tensors
    need_values, _, need_x = ctx.needs_input_grad[:3]
    grad_values = grad_x = None
    if need_values and ctx.gradient == "dense":
        backward = torch.ops.memrewrite.sparse_lookup_backward
        grad_values = backward(x, values, indices, grad, True, False, None, ctx.backend)[0]
    elif need_values:
        grad_values = row_gradient(ctx, values, x, indices, grad)
    if need_x:
        lookup, waiting = torch.ops.memrewrite.sparse_lookup, (ctx.pending, ctx.handle)
        grad_x = lookup(values, indices, grad, scale, ctx.gradient, ctx.backend, *waiting, x.dtype)
    return grad_values, None, grad_x, None, None, None, None, None
