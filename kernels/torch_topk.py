"""The k largest of all sums of two halves, in plain torch, without computing all sums."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def candidate_ranks(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """0-based ranks (i, j) with (i+1)·(j+1) <= k: for any other pair there are k pairs at least as large (119 for k = 32)."""
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


@lru_cache(maxsize=64)
def _rank_tensors(k: int) -> tuple[Tensor, Tensor]:
    """The candidates as CPU tensors, cached: building them takes as long as the rest of a one-token call."""
    ranks1, ranks2 = candidate_ranks(k)
    return torch.tensor(ranks1, device="cpu"), torch.tensor(ranks2, device="cpu")


def _device_ranks(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The candidates, computed on the device: CUDA graphs cannot capture a copy from the host."""
    counts = k // torch.arange(1, k + 1, device=device)  # [k]: candidates with each rank in half 1
    first = counts.cumsum(0) - counts
    number = torch.arange(sum(k // i for i in range(1, k + 1)), device=device)  # [C]
    ranks1 = torch.searchsorted(first, number, right=True) - 1
    return ranks1, number - first[ranks1]


def topk(scores1: Tensor, scores2: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Top-k of each half, then the sums of the candidate pairs of ranks, then top-k of those."""
    best1, slots1 = scores1.topk(k, dim=-1)  # [..., k]
    best2, slots2 = scores2.topk(k, dim=-1)
    ranks1, ranks2 = _rank_tensors(k) if scores1.is_cpu else _device_ranks(k, scores1.device)  # [C]
    dtype = torch.promote_types(scores1.dtype, torch.float32)
    sums = best1.to(dtype)[..., ranks1] + best2.to(dtype)[..., ranks2]  # [..., C]
    scores, chosen = sums.topk(k, dim=-1)
    indices = slots1.gather(-1, ranks1[chosen]) * scores2.shape[-1] + slots2.gather(-1, ranks2[chosen])
    return scores.softmax(-1) if softmax else scores, indices


def topk_backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Adds each score's gradient to both halves: [..., k] -> [..., n1], [..., n2]."""
    leading = indices.shape[:-1]
    return (
        grad.new_zeros(*leading, n1).scatter_add_(-1, indices // n2, grad),
        grad.new_zeros(*leading, n2).scatter_add_(-1, indices % n2, grad),
    )
