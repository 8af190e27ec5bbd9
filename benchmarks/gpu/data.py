"""Inputs of the GPU benchmark: tables, slots read in several patterns, weights, and the bytes that a call must move.

Random data, never zeros: devices compress zeros, and zeros hide elements that were not written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 28  # elements sampled at a time where a temporary is needed


def table(slots: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """[N, D] sampled from N(0, 1/√D)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(slots, dim, dtype=dtype, device=device).normal_(0.0, dim**-0.5, generator=generator)


def fp8_table(slots: int, dim: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[N, D] of float8_e4m3fn and its row scales [N]; every finite code occurs."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.empty(slots, dim, dtype=torch.uint8, device=device)
    for part in codes.flatten().split(CHUNK):
        sampled = torch.randint(0, 254, part.shape, dtype=torch.uint8, device=device, generator=generator)
        part.copy_(sampled + (sampled >= 127))  # 127 and 255 are NaN
    scale = torch.rand(slots, device=device, generator=generator) * 1e-3 + 1e-3
    return codes.view(torch.float8_e4m3fn), scale


def slots_read(
    pattern: str, tokens: int, reads: int, slots: int, device: torch.device, dtype: torch.dtype = torch.int64, seed: int = 1
) -> Tensor:
    """[T, K] slots: `uniform`, `zipf` (probability ∝ 1/rank, ranks scattered), or `hot` (one slot that every token reads)."""
    generator = torch.Generator(device).manual_seed(seed)
    if pattern == "zipf":
        u = torch.rand(tokens, reads, device=device, dtype=torch.float64, generator=generator)
        rank = (torch.exp(u * math.log(slots + 1)) - 1).long().clamp_(0, slots - 1)
        return (rank * 2654435761 % slots).to(dtype)
    sampled = torch.randint(0, slots, (tokens, reads), device=device, dtype=dtype, generator=generator)
    if pattern == "hot":
        sampled[:, 0] = slots // 2
    return sampled


def weights_like(indices: Tensor, dtype: torch.dtype, seed: int = 2) -> Tensor:
    """[T, K] softmax weights."""
    generator = torch.Generator(indices.device).manual_seed(seed)
    sampled = torch.randn(indices.shape, device=indices.device, generator=generator)
    return sampled.softmax(-1).to(dtype)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 3) -> Tensor:
    """Samples of N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator).to(dtype)


def size_of(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def forward_bytes(values: Tensor, indices: Tensor, weights: Tensor) -> int:
    """Bytes of rows, slots and weights read, and output written.

    A row counts at every read: between two reads of it, more bytes are read than fit in the L2 cache.
    """
    row = values.shape[1] * values.element_size()
    return indices.numel() * row + size_of(indices, weights) + indices.shape[0] * values.shape[1] * weights.element_size()


def touched(indices: Tensor) -> int:
    """Number of distinct rows of a lookup."""
    return int(indices.unique().numel())


def backward_bytes(values: Tensor, indices: Tensor, weights: Tensor, *, dense: bool) -> int:
    """Touched rows, grad, slots and weights read; gradient rows (all of them if `dense`) and the weights' gradient written."""
    row, rows = values.shape[1] * values.element_size(), touched(indices)
    written = values.shape[0] if dense else rows
    return (rows + written + indices.shape[0]) * row + size_of(indices, weights, weights)


def update_bytes(values: Tensor, indices: Tensor, weights: Tensor, *moments: Tensor) -> int:
    """Touched rows and their state read and written, grad, slots and weights read."""
    rows = touched(indices)
    state = sum(size_of(moment) // values.shape[0] for moment in moments)
    row = values.shape[1] * values.element_size()
    grad = indices.shape[0] * values.shape[1] * weights.element_size()
    return 2 * rows * (row + state) + grad + size_of(indices, weights)
