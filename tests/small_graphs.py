"""Small canonical graphs, written op by op, for tests of what `passes/regions` answers about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memrewrite.passes.graphs.dataflow import WEIGHT, Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode

aten = torch.ops.aten


class SmallGraph:
    """A graph that grows by one node for each call. Every node has its value, on `meta`, as `canonicalize` leaves it."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> CanonicalNode:
        """A tensor that the model receives."""
        return self._placeholder("x", torch.empty(shape, dtype=dtype, device="meta"))

    def weight(self, *shape: int) -> CanonicalNode:
        """A parameter of the model."""
        node = self._placeholder("w", torch.empty(shape, device="meta"))
        node.meta[WEIGHT] = node.name
        return node

    def _placeholder(self, name: str, value: torch.Tensor) -> CanonicalNode:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return CanonicalNode(node)

    def op(self, target: Any, *args: Any, **kwargs: Any) -> CanonicalNode:
        """One op on nodes and constants: an overload, or a packet of which the default overload is meant."""
        overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
        node = self.graph.call_function(overload, args, kwargs)
        values = [fx.map_arg(each, lambda n: n.meta["val"]) for each in (args, kwargs)]
        node.meta["val"] = overload(*values[0], **values[1])
        return CanonicalNode(node)

    def linear(self, x: CanonicalNode, features: int) -> CanonicalNode:
        """A product with a new weight, over the last axis."""
        return self.op(aten.linear, x, self.weight(features, x.meta["val"].shape[-1]))

    def flow(self, *outputs: fx.Node) -> Dataflow:
        """The finished graph."""
        self.graph.output(outputs)
        return Dataflow(self.graph)


def inside(flow: Dataflow, x: fx.Node, y: fx.Node) -> list[CanonicalNode]:
    """All nodes after `x`, up to `y`, that depend on the model's input, in graph order."""
    first, last = flow.order[x], flow.order[y]
    nodes = [node for node, at in flow.order.items() if first < at <= last and node.op == "call_function"]
    return [CanonicalNode(node) for node in nodes if node not in flow.constant]
