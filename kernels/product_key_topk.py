"""The operator `product_key_topk` and its backward: checks, shapes and gradients. `ops` registers these functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels.backends import choose, require_known
from memrewrite.kernels.checks import check_range, is_wide, one_device, require, same_shape


def forward(scores1: Tensor, scores2: Tensor, k: int, softmax: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`memrewrite::product_key_topk`: [..., n1], [..., n2] -> [..., k] twice; public: `ops.product_key_topk`."""
    _check(scores1, scores2, k)
    chosen = choose("product_key_topk", backend, lambda b: b.supports_topk(scores1, scores2, k))
    if scores1.numel() == 0:
        shape = (*scores1.shape[:-1], k)
        return scores1.new_empty(shape, dtype=_sum_dtype(scores1.dtype)), scores1.new_empty(shape, dtype=torch.int64)
    best: tuple[Tensor, Tensor] = chosen.topk(scores1, scores2, k, softmax)
    return best


def forward_fake(
    scores1: Tensor, scores2: Tensor, k: int, softmax: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `forward`."""
    _check(scores1, scores2, k)
    require_known("product_key_topk", backend)
    shape = (*scores1.shape[:-1], k)
    return scores1.new_empty(shape, dtype=_sum_dtype(scores1.dtype)), scores1.new_empty(shape, dtype=torch.int64)


def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the chosen slots, and with `softmax` its result; no scores."""
    scores1, scores2, _, ctx.softmax, ctx.backend = inputs
    ctx.save_for_backward(output[1], output[0] if ctx.softmax else None)
    ctx.widths, ctx.dtype = (scores1.shape[-1], scores2.shape[-1]), scores1.dtype


def grad_of(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of `forward`, computed by the operator `product_key_topk_backward`."""
    indices, s = ctx.saved_tensors
    if ctx.softmax:
        grad = s * (grad - (s * grad).sum(-1, keepdim=True))
    grad1, grad2 = torch.ops.memrewrite.product_key_topk_backward(grad, indices, *ctx.widths, ctx.backend)
    return grad1.to(ctx.dtype), grad2.to(ctx.dtype), None, None, None


def backward(grad: Tensor, indices: Tensor, n1: int, n2: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`memrewrite::product_key_topk_backward`: adds each score's gradient to both halves; -> [..., n1], [..., n2]."""
    _check_backward(grad, indices, n1, n2, backend)
    check_slots("product_key_topk_backward", indices, n1, n2)
    leading = indices.shape[:-1]
    if indices.numel() == 0:
        return grad.new_zeros(*leading, n1), grad.new_zeros(*leading, n2)
    scores1, scores2 = grad.new_empty(0, n1), grad.new_empty(0, n2)  # same widths as in the forward
    chosen = choose("product_key_topk_backward", backend, lambda b: b.supports_topk(scores1, scores2, indices.shape[-1]))
    halves: tuple[Tensor, Tensor] = chosen.topk_backward(grad, indices, n1, n2)
    return halves


def backward_fake(grad: Tensor, indices: Tensor, n1: int, n2: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `backward`."""
    _check_backward(grad, indices, n1, n2, backend)
    leading = indices.shape[:-1]
    return grad.new_empty(*leading, n1), grad.new_empty(*leading, n2)


def backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the chosen slots."""
    ctx.save_for_backward(inputs[1])
    ctx.n2 = inputs[3]


def backward_grad(ctx: Any, grad1: Tensor | None, grad2: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order: the backward is linear in grad, so its gradient gathers from both halves."""
    (indices,) = ctx.saved_tensors
    halves = (grad1, indices // ctx.n2), (grad2, indices % ctx.n2)
    parts = [grad.gather(-1, places) for grad, places in halves if grad is not None]
    return torch.stack(parts).sum(0), None, None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(scores1: Tensor, scores2: Tensor, k: int) -> None:
    """Raise ValueError or TypeError for wrong inputs; sizes are checked by `require`, since they may be symbolic."""
    if scores1.dim() == 0 or scores1.dim() != scores2.dim():
        raise ValueError(
            "product_key_topk needs scores [..., n1] and [..., n2] with equal leading shapes, "
            f"not {tuple(scores1.shape)} and {tuple(scores2.shape)}"
        )
    one_device("product_key_topk", scores1, scores2)
    if not is_wide(scores1) or scores1.dtype != scores2.dtype:
        raise TypeError(
            "product_key_topk: both scores must share a floating dtype of 16 or more bits, not "
            f"{scores1.dtype} and {scores2.dtype}"
        )
    shape1, shape2 = tuple(scores1.shape), tuple(scores2.shape)
    for one, other in zip(shape1[:-1], shape2[:-1], strict=True):
        require(one == other, lambda: f"product_key_topk: leading shapes of {shape1} and {shape2} differ")
    if k < 1:
        raise ValueError(f"product_key_topk: k={k} is below 1")
    for n in (shape1[-1], shape2[-1]):
        require(k <= n, lambda: f"product_key_topk: k={k} is more than the {shape1[-1]} or {shape2[-1]} keys")


def _check_backward(grad: Tensor, indices: Tensor, n1: int, n2: int, backend: str) -> None:
    """Raise ValueError or TypeError for wrong inputs of the backward."""
    op = "product_key_topk_backward"
    one_device(op, grad, indices)
    if indices.dim() == 0:
        raise ValueError(f"{op}: indices must be [..., k], not a single number")
    if not is_wide(grad) or indices.dtype != torch.int64:
        raise TypeError(
            f"{op}: grad must have a floating dtype of 16 or more bits, and indices int64, not {grad.dtype} and {indices.dtype}"
        )
    same_shape(op, "grad", tuple(grad.shape), tuple(indices.shape))
    for n in (n1, n2):
        require(n >= 0, lambda: f"{op}: a half has no {n1} or {n2} keys")
    require_known(op, backend)


def check_slots(op: str, slots: Tensor, n1: int, n2: int) -> None:
    """Raise IndexError for a slot that is no pair of keys, on the CPU only."""
    check_range(op, slots, n1 * n2, "{} pairs of keys")
