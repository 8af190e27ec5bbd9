"""Two kinds of fx node, so that mypy reports where a node of one graph is used as a node of the other.

`canonicalize` copies a recorded graph into a canonical one. The nodes of both are of class `fx.Node`, but a recorded node is
never an operand, a user or a key in the canonical graph, and the other way round.
"""

from __future__ import annotations

from typing import NewType, TypeVar, cast

from torch import fx

CanonicalNode = NewType("CanonicalNode", fx.Node)  # of a graph that `canonicalize` returned
RecordedNode = NewType("RecordedNode", fx.Node)  # of a `Segment`'s graph, as captured
Node = TypeVar("Node", CanonicalNode, RecordedNode)


def inputs_of(node: Node) -> list[Node]:
    """The nodes that a node reads: of the same graph, so of the same kind."""
    return cast(list[Node], node.all_input_nodes)


def users_of(node: Node) -> list[Node]:
    """The nodes that read a node, in the order in which they were added to the graph."""
    return cast(list[Node], list(node.users))


def canonical_nodes(graph: fx.Graph) -> list[CanonicalNode]:
    """The nodes of a canonical graph, in order."""
    return cast(list[CanonicalNode], list(graph.nodes))


def recorded_nodes(graph: fx.Graph) -> list[RecordedNode]:
    """The nodes of a recorded graph, in order."""
    return cast(list[RecordedNode], list(graph.nodes))
