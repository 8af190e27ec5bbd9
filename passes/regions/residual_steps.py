"""Whether a region contains two steps of the residual stream: then it spans two blocks, and is no single MLP.

Flow: every value inside has a level, the number of steps between the region's input and it: a sum of a value of the stream
with a function of that value is one step further. A value at level 2, or one at level 1 that the stream goes on from outside
of the region, rejects it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.graphs.ops import TERMS, op_name
from memrewrite.passes.graphs.shapes import is_tensor, shape_of
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.passes.regions.residual_stream import carries_features

NONE = -1  # the level of what does not carry the stream, or reads none of it through a product


def spans_blocks(
    flow: Dataflow, x: CanonicalNode, y: CanonicalNode, inside: Iterable[CanonicalNode], products: Collection[CanonicalNode]
) -> Rejection | None:
    """Reject a region, `x` to `y`, in which the stream takes two steps.

    `inside` are its nodes in graph order, without `x`; `products` those of them that multiply by weights. A function without
    a product is no step: norms, scales and activations of the stream remain at its level.
    """
    steps = _Steps(flow, x, products)
    nodes = tuple(inside)
    for node in nodes:
        steps.visit(node)
        if steps.level_of(node) > 1:
            return _rejected(node)
    own = {*nodes}
    if steps.through.get(y, NONE) > 0:
        for node in nodes:
            if node is not y and steps.level_of(node) == 1 and any(user not in own for user in node.users):
                return _rejected(node)
    return None


def _rejected(total: CanonicalNode) -> Rejection:
    reason = f"it contains `{total.name}`, a residual sum that a further step of the residual stream starts from or ends at"
    return Rejection("one block", reason, total)


class _Steps:
    """How far the stream has come at each value, and at what a value is computed from."""

    def __init__(self, flow: Dataflow, x: CanonicalNode, products: Collection[CanonicalNode]) -> None:
        self.flow, self.products, self.size = flow, products, math.prod(shape_of(x))
        self.level: dict[CanonicalNode, int] = {x: 0}  # of the values that carry the stream: x, and what is added to it
        self.reach: dict[CanonicalNode, int] = {}  # the highest level among all values that a node is computed from
        self.through: dict[CanonicalNode, int] = {}  # the same, of those that it reads through a product

    def visit(self, node: CanonicalNode) -> None:
        """Set the levels of a node from those of its operands."""
        sources = [self.flow.unviewed(source) for source in self.flow.activations(node)]
        self.reach[node] = max((max(self.level_of(one), self.reach.get(one, NONE)) for one in sources), default=NONE)
        if node in self.products:
            self.through[node] = self.reach[node]
            return
        self.through[node] = max((self.through.get(one, NONE) for one in sources), default=NONE)
        if is_tensor(node) and math.prod(shape_of(node)) == self.size and carries_features(node):
            level = self.sum_of(sources) if op_name(node) in TERMS else self.scaled(sources)
            if level != NONE:
                self.level[node] = level

    def level_of(self, node: CanonicalNode) -> int:
        """The level of a value of the stream; `NONE` for other values."""
        return self.level.get(node, NONE)

    def sum_of(self, terms: list[CanonicalNode]) -> int:
        """The level of a sum: one more than its terms of the stream when another term is a function of these."""
        highest = max(map(self.level_of, terms), default=NONE)
        others = [term for term in terms if self.level_of(term) < highest]
        further = any(self.through.get(term, NONE) >= highest for term in others)
        return highest + 1 if further else highest

    def scaled(self, operands: list[CanonicalNode]) -> int:
        """The level of a norm, view or scale: of its largest operands, if all of these carry the stream."""
        large = [one for one in operands if math.prod(shape_of(one)) == self.size]
        return min(map(self.level_of, large), default=NONE)
