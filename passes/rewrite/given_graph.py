"""Where in a given graph an MLP lies, that was found in it or in the graph it was lowered to: from which value to which.

Flow: the nodes of the given graph that carry the MLP's input or output, in whatever layout → the pair of them between which
exactly the MLP's nodes lie, tokens laid out alike → the site is bound to these. An MLP inside of a module that the graph
calls as one has none.
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

_SIZES = (int, torch.SymInt)  # values of nodes that are no tensors: whoever reads one reads no other value


def given_names(segment: Segment) -> dict[str, str]:
    """For nodes of a segment's graph: the node of the given graph that has this value, the first of several."""
    names: dict[str, str] = {}
    for given, made in segment.values.items():
        names.setdefault(made, given)
    return names


def anchored(locations: LocatedSites, paths: Iterable[str]) -> LocatedSites:
    """The locations with the sites at `paths` bound to what the given graph can name.

    Raises `SelectError` for an MLP that lies inside of a module or function which the given graph calls as one.
    """
    found: dict[str, tuple[SiteCall, ...]] = dict(locations.found)
    named = _Named()
    for path in paths:
        calls = tuple(named.anchor(call) for call in found[path])
        if None in calls:
            raise SelectError(
                f"the MLP at {path!r} lies inside of something that the graph calls as one",
                where=found[path][0].bound.y.name,
                hint="leave it out, or trace into that module",
            )
        found[path] = tuple(call for call in calls if call is not None)
    return replace(locations, found=found)


def all_hidden(locations: LocatedSites) -> bool:
    """Whether there are MLPs, and each lies inside of something that the given graph calls as one."""
    named = _Named()
    calls = [call for found in locations.found.values() for call in found]
    return bool(calls) and not any(named.anchor(call) for call in calls)


class _Named:
    """The nodes that the given graphs have, by the value they carry."""

    def __init__(self) -> None:
        self._by_value: dict[int, dict[fx.Node | None, list[RecordedNode]]] = {}

    def anchor(self, found: SiteCall) -> SiteCall | None:
        """The MLP between nodes that have a name; None when there are none."""
        recorded, bound = found.recorded, found.bound
        xs, ys = self._carrying(recorded, bound.x), self._carrying(recorded, bound.y)
        own = {*bound.nodes, *xs, *ys}
        for y in ys:
            for x in xs:
                nodes = _between(recorded, x, y, own) if shape_of(x)[:-1] == shape_of(y)[:-1] else None
                if nodes is not None and recorded.recorded_outputs(nodes) == {y}:
                    return replace(found, bound=bound._replace(nodes=frozenset(nodes), x=x, y=y))
        return None

    def _carrying(self, recorded: RecordedGraph, end: RecordedNode) -> list[RecordedNode]:
        """The nodes that carry the value of `end`, laid out as it is or otherwise; itself first."""
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
    """The nodes on the ways from `x` to `y`, weights' arithmetic aside; None when a way leaves `own`."""
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
