"""The reads of a table by lookups, sorted by slot, the gradients of its rows, and table rows of any dtype as fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**18  # table elements that are converted or computed at once: they fit in the cache


class Reads(NamedTuple):
    """The reads of one or more lookups of a table, stably sorted by slot."""

    slots: Tensor  # [M]
    first: Tensor  # bool [M]: True for a slot's first read
    tokens: Tensor  # int64 [M]: row of grad
    weights: Tensor  # [M]
    grad: Tensor  # [sum of T, D]


def sorted_reads(grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]) -> Reads:
    """The reads of lookups, each with gradients [T, D], indices [T, K] and weights [T, K]."""
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


def row_gradients(
    grads: list[Tensor], indices: list[Tensor], weights: list[Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that were read, int64 [R], in ascending order, with their gradients [R, D] in `dtype`; a few rows at a time.

    The number of rows depends on the data: on a GPU, each step waits for the device.
    """
    reads = sorted_reads([g.to(dtype) for g in grads], indices, [w.to(dtype) for w in weights])
    starts = reads.first.nonzero().squeeze(1)  # [U]
    ends = torch.cat([starts[1:], starts.new_tensor([reads.slots.numel()])])
    per_call = max(1, CHUNK // reads.grad.shape[1])
    for begin in range(0, starts.numel(), per_call):
        chosen = slice(begin, begin + per_call)
        low, high = int(starts[begin]), int(ends[chosen][-1])
        bags, psw = reads.tokens[low:high], reads.weights[low:high]
        sums = F.embedding_bag(bags, reads.grad, starts[chosen] - low, per_sample_weights=psw, mode="sum")
        yield reads.slots[starts[chosen]], sums


def wide_rows(values: Tensor, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values[indices]` as a copy in `dtype`; 8-bit floats are gathered as uint8, which torch supports."""
    bits = values.view(torch.uint8) if values.itemsize == 1 else values
    rows = bits.index_select(0, indices.reshape(-1)).view(*indices.shape, -1)
    return rows.view(values.dtype).to(dtype)


def in_pieces(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices (views) of the same rows of every tensor, as many rows as give `CHUNK` elements at `width` elements per row."""
    rows = max(1, CHUNK // max(1, width))
    for begin in range(0, tensors[0].shape[0], rows):
        yield tuple(tensor[begin : begin + rows] for tensor in tensors)
