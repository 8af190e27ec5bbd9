"""Reference implementations of the operators in plain torch; tests compare every kernel with them.

Deliberately slow and memory-intensive: each function is the formula itself, differentiable, in any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_lookup(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`y_t = sum_j weights[t, j] * values[indices[t, j]]`: the lookup of eq. (1); [N, D], [T, K], [T, K] -> [T, D]."""
    wide = torch.promote_types(values.dtype, weights.dtype)
    return torch.einsum("tk,tkd->td", weights.to(wide), values[indices.long()].to(wide))


def sparse_dots(values: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """`out[t, j] = values[indices[t, j]] . x[t]`: [N, D], [T, K], [T, D] -> [T, K]."""
    wide = torch.promote_types(values.dtype, x.dtype)
    return torch.einsum("td,tkd->tk", x.to(wide), values[indices.long()].to(wide))


def product_key_topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums `scores1[i] + scores2[j]` and their slots `i * n2 + j`: [..., n1], [..., n2] -> two [..., k]."""
    sums = scores1.unsqueeze(-1) + scores2.unsqueeze(-2)  # [..., n1, n2]
    return sums.flatten(-2).topk(k, dim=-1)


def table_gradient(grads: list[Tensor], indices: list[Tensor], weights: list[Tensor], slots: int) -> Tensor:
    """The table's dense gradient [slots, D]: `g_n = sum of w[t, j] * grad[t]` over all reads of row n in all lookups."""
    wide = torch.promote_types(grads[0].dtype, weights[0].dtype)
    total = grads[0].new_zeros(slots, grads[0].shape[1], dtype=wide)
    for grad, index, weight in zip(grads, indices, weights, strict=True):
        for j in range(index.shape[1]):
            total.index_add_(0, index[:, j], weight[:, j, None] * grad)
    return total


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root: on some CPUs, torch's fp32 root is off by one bit in a fifth of all cases."""
    return x.double().sqrt().to(x.dtype)


def rowwise_adagrad(
    values: Tensor, total: Tensor, gradient: Tensor, touched: Tensor, lr: float, eps: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New values [N, D] and accumulators [N] from a dense gradient; rows outside `touched` (bool [N]) do not change."""
    sums = total + gradient.square().mean(-1)
    new = values * (1 - lr * weight_decay) - lr * gradient / (root(sums) + eps).unsqueeze(-1)
    return torch.where(touched.unsqueeze(-1), new, values), torch.where(touched, sums, total)


def rowwise_adam(
    state: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    touched: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """New values [N, D], exp_avg [N, D] and exp_avg_sq [N] from the old ones and a dense gradient."""
    values, exp_avg, exp_avg_sq = state
    mean = betas[0] * exp_avg + (1 - betas[0]) * gradient
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient.square().mean(-1)
    below = root(square / (1 - betas[1] ** step)) + eps
    new = values * (1 - lr * weight_decay) - lr * (mean / (1 - betas[0] ** step)) / below.unsqueeze(-1)
    rows = touched.unsqueeze(-1)
    return torch.where(rows, new, values), torch.where(rows, mean, exp_avg), torch.where(touched, square, exp_avg_sq)


def lazy_adam(
    state: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    touched: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """New values, exp_avg and exp_avg_sq, all [N, D], from the old ones and a dense gradient."""
    values, exp_avg, exp_avg_sq = state
    mean = betas[0] * exp_avg + (1 - betas[0]) * gradient
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient.square()
    below = root(square / (1 - betas[1] ** step)) + eps
    new = values * (1 - lr * weight_decay) - lr * (mean / (1 - betas[0] ** step)) / below
    rows = touched.unsqueeze(-1)
    return torch.where(rows, new, values), torch.where(rows, mean, exp_avg), torch.where(rows, square, exp_avg_sq)
