"""Copies of fx graphs in which some nodes are replaced by other values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

COPY: Any = object()  # returned by `instead` for a node to copy


def copied(
    nodes: Iterable[fx.Node],
    *,
    instead: Callable[[fx.Graph, fx.Node], Any] = lambda graph, node: COPY,
    after: Callable[[fx.Node, fx.Node], None] = lambda node, copy: None,
    into: fx.Graph | None = None,
    values: dict[fx.Node, Any] | None = None,
) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """A graph with a copy of every node, and the value of each node in it. Names are kept; no target is copied.

    Args:
        nodes: the nodes to copy, in an order in which they can run. They may read only each other and keys of `values`.
        instead: receives the new graph and a node. Returns `COPY`, or the node or constant to use instead of a copy.
        after: receives every node that is copied, and its copy.
        into: the graph that the copies are appended to; a new one if None.
        values: values that are known before; their nodes are not copied. It is extended and returned.
    """
    graph = fx.Graph() if into is None else into
    known = {} if values is None else values
    for node in nodes:
        if node in known:
            continue
        value = instead(graph, node)
        if value is COPY:
            value = graph.node_copy(node, known.__getitem__)
            after(node, value)
        known[node] = value
    return graph, known
