"""The dataflow of a canonical graph: which values are constant, which weights they come from, what is only a view.

Flow: one walk over the nodes marks what is computed from weights alone → methods answer for single nodes.
"""

from __future__ import annotations

import math

from torch import fx

from memrewrite.passes.graphs.nodes import CanonicalNode, inputs_of
from memrewrite.passes.graphs.ops import SIZES, VIEWS, op_name
from memrewrite.passes.graphs.shapes import shape_of

WEIGHT = "weight"  # node.meta key of a placeholder: the name of its parameter or buffer
ORIGIN = "origin"  # node.meta key of a canonical node: the recorded node that it represents
LITERAL = "literal"  # node.meta key of a placeholder: its constant tensor
MAX_ACTIVATION_OPS = 32  # in one activation function written with elementary ops


class Dataflow:
    """Facts of one canonical graph, computed once, in time linear in its nodes."""

    def __init__(self, graph: fx.Graph, *, fragment: bool = False) -> None:
        self.graph, self.fragment = graph, fragment  # the residual stream of a fragment may be outside of it
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.constant: set[fx.Node] = set()  # computed from weights, literals and sizes alone
        for node in graph.nodes:
            derived = node.op == "call_function" and all(source in self.constant for source in node.all_input_nodes)
            if WEIGHT in node.meta or LITERAL in node.meta or derived or op_name(node) in SIZES:
                self.constant.add(node)
        self.weight_values = {node.meta[WEIGHT]: node.meta["val"] for node in graph.nodes if WEIGHT in node.meta}
        self._roots: dict[fx.Node, CanonicalNode] = {}

    def activations(self, node: fx.Node) -> list[CanonicalNode]:
        """The inputs of a node that depend on the model's inputs."""
        return [source for source in inputs_of(CanonicalNode(node)) if source not in self.constant]

    def weights(self, node: fx.Node) -> set[str]:
        """Names of the weights a constant value is computed from."""
        found: set[str] = set()
        pending, seen = [node], {node}
        while pending:
            at = pending.pop()
            if WEIGHT in at.meta:
                found.add(at.meta[WEIGHT])
            for source in at.all_input_nodes if op_name(at) not in SIZES else ():
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return found

    def unviewed(self, node: fx.Node) -> CanonicalNode:
        """The value behind views that keep the last axis and layout ops that `canonicalize` inserted."""
        if node not in self._roots:
            at = CanonicalNode(node)
            while self._relays(at):
                at = inputs_of(at)[0]
            self._roots[node] = at
        return self._roots[node]

    def _relays(self, node: fx.Node) -> bool:
        if node.meta.get("relay"):
            return True
        if op_name(node) not in VIEWS:
            return False
        source = node.all_input_nodes[0]
        before, after = shape_of(source), shape_of(node)
        return bool(before and after) and before[-1] == after[-1] and math.prod(before) == math.prod(after)

    def is_linear(self, node: fx.Node) -> bool:
        """True for a canonical `linear` of an activation and a constant weight."""
        return op_name(node) == "linear" and node.args[0] not in self.constant and node.args[1] in self.constant


def nodes_between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes that lead from `start`, which is not among them, to `end`, each by its first input."""
    nodes: list[fx.Node] = []
    while end is not start:
        nodes.append(end)
        end = end.all_input_nodes[0]
    return nodes[::-1]
