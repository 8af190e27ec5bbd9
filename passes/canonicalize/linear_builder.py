"""Writes a product as `linear(x, weight, bias)`: weights laid out or computed from weights, and layout ops around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memrewrite.passes.graphs.dataflow import ORIGIN, Dataflow

aten = torch.ops.aten
Step = tuple[Any, ...]  # an op and its arguments after the first: a move of axes


def relaid_weight(graph: fx.Graph, flow: Dataflow, node: fx.Node, weight: fx.Node, turn: Any, *args: Any) -> fx.Node:
    """A weight laid out otherwise, before `node`."""
    with graph.inserting_before(node):
        turned = graph.call_function(turn, (weight, *args))
    if "val" in weight.meta:
        turned.meta["val"] = turn(weight.meta["val"], *args)
    flow.constant.add(turned)
    return turned


def derived_weight(
    graph: fx.Graph, flow: Dataflow, node: fx.Node, make: Any, args: tuple[Any, ...], shape: Sequence[Any]
) -> fx.Node:
    """A weight computed from others, of a known shape: they may be of several dtypes, now that casts are gone."""
    with graph.inserting_before(node):
        made = graph.call_function(make, args)
    made.meta["val"] = node.meta["val"].new_empty(tuple(shape))
    flow.constant.add(made)
    return made


def become_linear(node: fx.Node, x: Any, weight: Any, bias: Any) -> bool:
    """Make `node` the linear `(x, weight, bias)`; always True, so that a rule can return it."""
    node.target, node.args, node.kwargs = aten.linear.default, (x, weight, bias), {}
    return True


def relay(graph: fx.Graph, like: fx.Node, x: fx.Node, *steps: Step) -> fx.Node:
    """`x` re-laid by moves of its axes."""
    for op, *args in steps:
        value = op(x.meta["val"], *args)
        x = graph.call_function(op, (x, *args))
        x.meta = {**{key: kept for key, kept in like.meta.items() if key != ORIGIN}, "val": value, "relay": True}
    return x


def write_linear(
    graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, before: Sequence[Step], after: Sequence[Step]
) -> bool:
    """`node` becomes the moves `after` a linear of `x` moved as in `before`; it stands for the same recorded node as that."""
    with graph.inserting_before(node):
        inner = relay(graph, node, x, *before)
        if not after:
            return become_linear(node, inner, weight, bias)
        result = graph.call_function(aten.linear.default, (inner, weight, bias))
        out = (*inner.meta["val"].shape[:-1], weight.meta["val"].shape[0])
        result.meta = {**node.meta, "val": node.meta["val"].new_empty(out)}
        moved = relay(graph, node, result, *after[:-1])
    (op, *args), node.kwargs = after[-1], {}
    node.target, node.args = op, (moved, *args)
    node.meta["relay"] = True
    return True


def erase_unused(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase what nobody reads any more, and what only it read."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and node.graph is graph and not node._erased:
            pending.extend(node.all_input_nodes)
            graph.erase_node(node)


def is_own_linear(flow: Dataflow, value: Any) -> bool:
    """A linear that only one node reads."""
    return isinstance(value, fx.Node) and flow.is_linear(value) and len(value.users) == 1


def operands_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """The input, the weight and the bias (or None) of a linear."""
    x, weight, bias = (*node.args, None)[:3]
    return x, weight, bias
