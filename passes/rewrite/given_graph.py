"""Finds where located MLPs start and end in the graph that the user gave, which may be at torch level.

Flow: the nodes of the given graph with the value of the MLP's input or output, in any layout → the pair of them with only
the MLP's nodes in between, of equal token layouts where there is one → the site is bound to that pair. Other values in between
may be read elsewhere: their nodes stay. An MLP inside of a module that the graph calls has no such pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from memrewrite.errors import SelectError
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph

_SIZES = (int, torch.SymInt)  # values of nodes that are not tensors: a user of a size reads no element of the tensor


def given_names(segment: Segment) -> dict[str, str]:
    """For nodes of a segment's graph, by name: the first node of the given graph with the same value."""
    names: dict[str, str] = {}
    for given, lowered in segment.values.items():
        names.setdefault(lowered, given)
    return names


class GivenGraph:
    """The nodes of a given graph, indexed by value, and the located MLPs bound to them. Built once for one `locate`."""

    def __init__(self, located: LocatedSites) -> None:
        self._located = located
        self._by_value: dict[int, dict[fx.Node | None, list[RecordedNode]]] = {}  # by the id of a recorded graph
        self._bound: dict[str, tuple[SiteCall | None, ...]] = {}

    def all_hidden(self) -> bool:
        """Whether there are MLPs, and each is inside of a module or function that the given graph calls."""
        calls = [call for path in self._located.found for call in self._calls(path)]
        return bool(calls) and not any(calls)

    def bound(self, paths: Iterable[str]) -> LocatedSites:
        """The located sites, those at `paths` bound to nodes of the given graph.

        Raises `SelectError` for an MLP inside of a module or function that the given graph calls.
        """
        found = dict(self._located.found)
        for path in paths:
            calls = self._calls(path)
            found[path] = tuple(call for call in calls if call is not None)
            if len(found[path]) < len(calls):
                raise SelectError(
                    f"the MLP at {path!r} is inside of a module or function that the graph calls",
                    where=self._located.found[path][0].bound.y.name,
                    hint="leave it out, or trace into that module",
                )
        return replace(self._located, found=found)

    def _calls(self, path: str) -> tuple[SiteCall | None, ...]:
        """Every call of a site, bound to nodes of the given graph; None for one that has none."""
        if path not in self._bound:
            self._bound[path] = tuple(self._bind(call) for call in self._located.found[path])
        return self._bound[path]

    def _bind(self, call: SiteCall) -> SiteCall | None:
        recorded, bound = call.recorded, call.bound
        xs, ys = self._with_value_of(recorded, bound.x), self._with_value_of(recorded, bound.y)
        own = {*bound.nodes, *xs, *ys}
        pairs = [(x, y) for y in ys for x in xs]
        for x, y in sorted(pairs, key=lambda pair: shape_of(pair[0])[:-1] != shape_of(pair[1])[:-1]):
            nodes = _between(recorded, x, y, own)
            if nodes is not None and recorded.recorded_outputs(nodes).intersection(ys) == {y}:
                return replace(call, bound=bound._replace(nodes=frozenset(nodes), x=x, y=y))
        return None

    def _with_value_of(self, recorded: RecordedGraph, end: RecordedNode) -> list[RecordedNode]:
        """The nodes of the given graph with the value of `end`, in any layout; `end` itself is first."""
        by_value = self._by_value.get(id(recorded))
        if by_value is None:
            by_value = self._by_value[id(recorded)] = {}
            names, is_given = given_names(recorded.segment), not recorded.segment.values
            for node in recorded.position:
                if is_given or node.name in names:
                    by_value.setdefault(recorded.canonical_value(node), []).append(node)
        same = by_value.get(recorded.canonical_value(end), [])
        return sorted(same, key=lambda node: node is not end)


def _between(recorded: RecordedGraph, x: RecordedNode, y: RecordedNode, own: set[RecordedNode]) -> set[RecordedNode] | None:
    """The nodes on the paths from `x` to `y`, without those of weights and sizes; None when a path leaves `own`."""
    inside, pending = {y}, [y]
    while pending:
        for source in inputs_of(pending.pop()):
            if source is x or source in inside or source in recorded.constant or isinstance(source.meta.get("val"), _SIZES):
                continue
            if source not in own or source.op != "call_function":
                return None
            inside.add(source)
            pending.append(source)
    return inside if x not in inside else None
