"""Shapes of node values; symbolic sizes count as in the example."""

from __future__ import annotations

import torch
from torch import fx

# A size that depends on data has no value in the example. The two stand-ins serve different purposes:
UNBACKED = 1_000_003  # where shapes are compared: a prime that equals no other size, and that callers can test for
SAMPLE = 4  # where values are computed: small, and put into expressions of symbols, so that `2 * u0` and `u0` fit together


def shape_of(node: fx.Node, sample: int | None = None) -> tuple[int, ...]:
    """The shape of a node's tensor value, as `sizes_of` returns it; () if the value is no tensor."""
    val = node.meta.get("val")
    return sizes_of(val, sample) if isinstance(val, torch.Tensor) else ()


def sizes_of(value: torch.Tensor, sample: int | None = None) -> tuple[int, ...]:
    """A tensor's shape, each size as `size_of` returns it."""
    return tuple(size_of(n, sample) for n in value.shape)


def size_of(size: int | torch.SymInt, sample: int | None = None) -> int:
    """A size as in the example, without a guard on it.

    A size that depends on data is `UNBACKED`; or, with `sample`, its expression with each such symbol equal to `sample`.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    if sample is None:
        return UNBACKED
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, sample)))


def is_tensor(node: fx.Node) -> bool:
    """True if the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)
