"""Shapes of node values; symbolic sizes count as in the example."""

from __future__ import annotations

import torch
from torch import fx

UNBACKED = 1_000_003  # stands for a size that depends on data


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor value, symbolic sizes by their size in the example; () where it has none."""
    val = node.meta.get("val")
    return sizes_of(val) if isinstance(val, torch.Tensor) else ()


def sizes_of(value: torch.Tensor) -> tuple[int, ...]:
    """A tensor's shape, symbolic sizes by their size in the example."""
    return tuple(_size(n) for n in value.shape)


def _size(n: int | torch.SymInt) -> int:
    """A size without guarding on it. One that depends on data has no example: a prime that equals no other size."""
    hint = n if isinstance(n, int) else n.node.hint
    return UNBACKED if hint is None else int(hint)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)
