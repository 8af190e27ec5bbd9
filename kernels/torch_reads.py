"""The reads that lookups made of a table, sorted by the slot that was read; and rows of any dtype, widened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**18  # elements of a table's rows that are widened or computed at once: they stay in the cache


class Reads(NamedTuple):
    """The reads of one or more lookups of a table, sorted by slot; those of one slot in the order they were made."""

    slots: Tensor  # [M]
    first: Tensor  # bool [M]: the slot's first read
    tokens: Tensor  # int64 [M], a row of grad
    weights: Tensor  # [M]
    grad: Tensor  # [sum of T, D]


def sorted_reads(grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]) -> Reads:
    """Lookups with gradients [T, D], indices [T, K] and weights [T, K] each, as one list of reads."""
    slots, order = torch.cat([index.reshape(-1).long() for index in indices]).sort(stable=True)
    begins = [0]
    for grad in grads:
        begins.append(begins[-1] + grad.shape[0])
    tokens = [
        torch.arange(index.numel(), device=index.device) // index.shape[1] + begin
        for index, begin in zip(indices, begins, strict=False)
    ]
    first = torch.ones_like(slots, dtype=torch.bool)
    first[1:] = slots[1:] != slots[:-1]
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    return Reads(slots, first, torch.cat(tokens)[order], flat[order], torch.cat(grads))


def wide_rows(values: Tensor, indices: Tensor) -> Tensor:
    """`values[indices]` in fp32, a copy; torch gathers 8-bit numbers as the bytes they are."""
    bits = values.view(torch.uint8) if values.itemsize == 1 else values
    rows = bits.index_select(0, indices.reshape(-1)).view(*indices.shape, -1)
    return rows.view(values.dtype).float()


def in_pieces(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of every tensor at a time: as many as make `CHUNK` elements of `width` each. Views."""
    rows = max(1, CHUNK // max(1, width))
    for begin in range(0, tensors[0].shape[0], rows):
        yield tuple(tensor[begin : begin + rows] for tensor in tensors)
