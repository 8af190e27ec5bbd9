"""What the operators mean, in a few lines of plain torch: every kernel is held against these.

Slow and memory-hungry on purpose: each function is the formula itself, differentiable, in any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_lookup(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`y_t = sum_j weights[t, j] * values[indices[t, j]]`: the lookup of eq. (1); [N, D], [T, K], [T, K] -> [T, D]."""
    return torch.einsum("tk,tkd->td", weights, values[indices.long()])


def product_key_topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums `scores1[i] + scores2[j]` and their slots `i * n2 + j`: [..., n1], [..., n2] -> two [..., k]."""
    sums = scores1.unsqueeze(-1) + scores2.unsqueeze(-2)  # [..., n1, n2]
    return sums.flatten(-2).topk(k, dim=-1)
