"""Sets of recorded nodes around a region, such as those of a module call: what they read and what is read of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from memrewrite.passes.graphs.nodes import CanonicalNode, RecordedNode
from memrewrite.passes.locate.recorded_graph import RecordedGraph


class Area:
    """A recorded part of the graph around one region: the inputs and outputs of its nodes, computed once.

    `routing` are canonical values that only choose experts: they are not counted as inputs.
    """

    def __init__(self, recorded: RecordedGraph, routing: set[CanonicalNode], nodes: Iterable[RecordedNode]) -> None:
        self.recorded, self.routing, self.nodes = recorded, routing, frozenset(nodes)

    @cached_property
    def inputs(self) -> frozenset[RecordedNode]:
        """What the nodes read from outside, except what only chooses experts."""
        read = self.recorded.recorded_inputs(self.nodes)
        return frozenset(node for node in read if self.recorded.canonical_value(node) not in self.routing)

    @cached_property
    def outputs(self) -> frozenset[RecordedNode]:
        """The nodes that are read outside."""
        return frozenset(self.recorded.recorded_outputs(self.nodes))

    def reads_only(self, value: CanonicalNode) -> bool:
        """True if the one input is the canonical value `value`, in any layout."""
        return len(self.inputs) == 1 and self.recorded.canonical_value(next(iter(self.inputs))) is value

    def computes_only(self, value: CanonicalNode) -> bool:
        """True if the one output is the canonical value `value`, in any layout."""
        return len(self.outputs) == 1 and self.recorded.canonical_value(next(iter(self.outputs))) is value


class CallArea(Area):
    """The nodes of one module call."""

    def __init__(self, recorded: RecordedGraph, routing: set[CanonicalNode], call: str) -> None:
        super().__init__(recorded, routing, recorded.by_call[call])
        self.call, self.path = call, recorded.paths[call]

    @cached_property
    def last(self) -> int:
        """The position of its last node."""
        return self.recorded.position[self.recorded.by_call[self.call][-1]]

    @cached_property
    def plain(self) -> bool:
        """True if its module is called with its tensor first, and returns one tensor."""
        return self.recorded.input_argument(self.call) == 0 and self.recorded.returns_one_tensor(self.call)
