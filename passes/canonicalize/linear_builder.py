"""Rewrites a node as `linear(x, weight, bias)`: permutes or computes weights, and puts layout ops around the linear.

Layout ops inserted by a rewrite carry `meta["relay"] = True`: they change the layout of one value, and `Dataflow.unviewed`
looks through them. Weights are computed by nodes that read only weights, never the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memrewrite.passes.graphs.dataflow import ORIGIN, Dataflow

aten = torch.ops.aten
Step = tuple[Any, ...]  # a layout op and its arguments after the first


@dataclass(frozen=True)
class LinearBuilder:
    """Rewrites the node `at` of a canonical graph; new nodes are inserted before it.

    Methods that rewrite `at` return True, so that a rule can return their result.
    """

    graph: fx.Graph
    flow: Dataflow
    at: fx.Node

    def is_weight(self, value: Any) -> bool:
        """True if a value is computed from weights and literals alone."""
        return isinstance(value, fx.Node) and value in self.flow.constant

    def relaid(self, weight: fx.Node, op: Any, *args: Any) -> fx.Node:
        """`op(weight, *args)`: a weight in another layout, or scaled."""
        with self.graph.inserting_before(self.at):
            relaid = self.graph.call_function(op, (weight, *args))
        if "val" in weight.meta:
            relaid.meta["val"] = op(weight.meta["val"], *args)
        self.flow.constant.add(relaid)
        return relaid

    def derived(self, op: Any, args: tuple[Any, ...], shape: Sequence[Any]) -> fx.Node:
        """`op(*args)`: a weight of a known shape, computed from others. These may differ in dtype, as casts were dropped."""
        with self.graph.inserting_before(self.at):
            derived = self.graph.call_function(op, args)
        derived.meta["val"] = self.at.meta["val"].new_empty(tuple(shape))
        self.flow.constant.add(derived)
        return derived

    def become(self, x: Any, weight: Any, bias: Any) -> bool:
        """Rewrite `at` as `linear(x, weight, bias)`."""
        self.at.target, self.at.args, self.at.kwargs = aten.linear.default, (x, weight, bias), {}
        return True

    def write(self, x: fx.Node, weight: fx.Node, bias: Any, before: Sequence[Step] = (), after: Sequence[Step] = ()) -> bool:
        """Rewrite `at` as a linear, with the layout ops `before` on its input and `after` on its output.

        The linear and the last layout op have the same recorded node.
        """
        node = self.at
        with self.graph.inserting_before(node):
            inner = self._relayed(x, before)
            if not after:
                return self.become(inner, weight, bias)
            result = self.graph.call_function(aten.linear.default, (inner, weight, bias))
            out = (*inner.meta["val"].shape[:-1], weight.meta["val"].shape[0])
            result.meta = {**node.meta, "val": node.meta["val"].new_empty(out)}
            moved = self._relayed(result, after[:-1])
        (op, *args), node.kwargs = after[-1], {}
        node.target, node.args = op, (moved, *args)
        node.meta["relay"] = True
        return True

    def _relayed(self, x: fx.Node, steps: Sequence[Step]) -> fx.Node:
        for op, *args in steps:
            value = op(x.meta["val"], *args)
            x = self.graph.call_function(op, (x, *args))
            x.meta = {**{key: kept for key, kept in self.at.meta.items() if key != ORIGIN}, "val": value, "relay": True}
        return x

    def erase_unused(self, *nodes: fx.Node) -> None:
        """Erase those of `nodes` that have no users, and the nodes that only they read."""
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node.op == "call_function" and not node.users and node.graph is self.graph and not node._erased:
                pending.extend(node.all_input_nodes)
                self.graph.erase_node(node)

    def is_own_linear(self, value: Any) -> bool:
        """True for a linear that only one node reads."""
        return isinstance(value, fx.Node) and self.flow.is_linear(value) and len(value.users) == 1


def operands_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """The input, the weight and the bias (or None) of a linear."""
    x, weight, bias = (*node.args, None)[:3]
    return x, weight, bias
