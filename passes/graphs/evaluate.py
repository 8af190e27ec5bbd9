"""Computes the values of fx nodes, one after the other, from values that are known.

Flow: nodes in order → inputs that are not known come from `source` → the op runs → its value is known to later nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from memrewrite.passes.graphs.shapes import SAMPLE, size_of

VIEW, RESHAPE = torch.ops.aten.view.default, torch.ops.aten.reshape.default


def example_size(node: fx.Node) -> int:
    """The value of a node that is a size, `SAMPLE` in place of what depends on data. Raises KeyError for other nodes."""
    value = node.meta.get("val")
    if not isinstance(value, (int, torch.SymInt)):
        raise KeyError(node)
    return size_of(value, SAMPLE)


def as_computed(_: fx.Node, value: Any, __: Mapping[fx.Node, Any]) -> Any:
    """The value itself."""
    return value


def evaluate(
    nodes: Iterable[fx.Node],
    known: Mapping[fx.Node, Any],
    *,
    source: Callable[[fx.Node], Any] = example_size,
    read_only: Collection[fx.Node] = (),
    result: Callable[[fx.Node, Any, Mapping[fx.Node, Any]], Any] = as_computed,
) -> dict[fx.Node, Any]:
    """All values known in the end: `known`, and those of `nodes` and of their inputs.

    `nodes` are `call_function` nodes in topological order; those in `known` are not computed. `source` returns the value of an
    input that is neither known nor computed. In-place ops write into copies of the values of `read_only` nodes. `result`
    returns the value that later nodes read in place of the computed one; it also gets the values known so far. What an op
    raises is passed on.
    """
    values = dict(known)
    for node in nodes:
        if node in values:
            continue
        for value in node.all_input_nodes:
            if value not in values:
                values[value] = source(value)
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            values |= {value: values[value].clone() for value in node.all_input_nodes if value in read_only}
        # A canonical graph has no `contiguous`: a view may have to copy.
        run = RESHAPE if target is VIEW else target
        args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
        values[node] = result(node, run(*args, **kwargs), values)
    return values
