"""The operator `product_key_topk` and its backward: the k best of all sums of two halves, without making them all.

Top-k of each half, then the sums of the few pairs of ranks that can still win, then top-k of those. `ops` registers
these functions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels.checks import require


@lru_cache(maxsize=64)
def candidate_ranks(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """0-based ranks (i, j) with (i+1)·(j+1) <= k: any other pair is matched by k better ones (119 pairs for k = 32)."""
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


@lru_cache(maxsize=64)
def _rank_tensors(k: int) -> tuple[Tensor, Tensor]:
    """The candidates as tensors, kept on the CPU: building them anew costs as much as the rest of a one-token call."""
    ranks1, ranks2 = candidate_ranks(k)
    return torch.tensor(ranks1, device="cpu"), torch.tensor(ranks2, device="cpu")


def forward(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`memrewrite::product_key_topk`: [..., n1], [..., n2] -> [..., k] twice; `ops.product_key_topk` is its face."""
    _check(scores1, scores2, k)
    best1, slots1 = scores1.topk(k, dim=-1)  # [..., k]
    best2, slots2 = scores2.topk(k, dim=-1)
    ranks1, ranks2 = (ranks.to(scores1.device, non_blocking=True) for ranks in _rank_tensors(k))  # [C]
    dtype = _sum_dtype(scores1.dtype)
    sums = best1.to(dtype)[..., ranks1] + best2.to(dtype)[..., ranks2]  # [..., C]
    scores, chosen = sums.topk(k, dim=-1)
    indices = slots1.gather(-1, ranks1[chosen]) * scores2.shape[-1] + slots2.gather(-1, ranks2[chosen])
    return scores, indices


def forward_fake(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `forward`."""
    _check(scores1, scores2, k)
    shape = (*scores1.shape[:-1], k)
    return scores1.new_empty(shape, dtype=_sum_dtype(scores1.dtype)), scores1.new_empty(shape, dtype=torch.int64)


def context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    """Keep the chosen slots: the scores themselves are not needed again."""
    ctx.save_for_backward(output[1])
    ctx.widths = inputs[0].shape[-1], inputs[1].shape[-1]
    ctx.dtype = inputs[0].dtype


def grad_of(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """Gradient of `forward`, by the operator `product_key_topk_backward`."""
    grad1, grad2 = torch.ops.memrewrite.product_key_topk_backward(grad, *ctx.saved_tensors, *ctx.widths)
    return grad1.to(ctx.dtype), grad2.to(ctx.dtype), None


def backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """`memrewrite::product_key_topk_backward`: each score's gradient goes to both halves; -> [..., n1], [..., n2]."""
    leading = indices.shape[:-1]
    return (
        grad.new_zeros(*leading, n1).scatter_add_(-1, indices // n2, grad),
        grad.new_zeros(*leading, n2).scatter_add_(-1, indices % n2, grad),
    )


def backward_fake(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `backward`."""
    leading = indices.shape[:-1]
    return grad.new_empty(*leading, n1), grad.new_empty(*leading, n2)


def backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the chosen slots."""
    ctx.save_for_backward(inputs[1])
    ctx.n2 = inputs[3]


def backward_grad(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor, None, None, None]:
    """Second order: the backward is linear in grad, so its gradient reads both halves back."""
    (indices,) = ctx.saved_tensors
    return grad1.gather(-1, indices // ctx.n2) + grad2.gather(-1, indices % ctx.n2), None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check(scores1: Tensor, scores2: Tensor, k: int) -> None:
    """Refuse what the schema cannot; sizes go through `require`, since they may be symbols."""
    if scores1.dim() == 0 or scores1.dim() != scores2.dim():
        raise ValueError(
            "product_key_topk takes scores [..., n1] and [..., n2] with equal leading shapes, "
            f"not {tuple(scores1.shape)} and {tuple(scores2.shape)}"
        )
    if not scores1.is_floating_point() or scores1.dtype != scores2.dtype:
        raise TypeError(f"product_key_topk: both scores must share a floating dtype, not {scores1.dtype} and {scores2.dtype}")
    shape1, shape2 = tuple(scores1.shape), tuple(scores2.shape)
    for one, other in zip(shape1[:-1], shape2[:-1], strict=True):
        require(one == other, lambda: f"product_key_topk: leading shapes of {shape1} and {shape2} differ")
    if k < 1:
        raise ValueError(f"product_key_topk: k={k} is below 1")
    for n in (shape1[-1], shape2[-1]):
        require(k <= n, lambda: f"product_key_topk: k={k} is more than the {shape1[-1]} or {shape2[-1]} keys")
