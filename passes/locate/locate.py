"""Finds a model's MLPs, by dataflow alone.

Flow: mixtures of experts are found first → every other `linear` of the canonical graph is tried as a last matrix: its region
is grown and checked against the rules → the patterns name it → it is bound to the live module tree → regions of the same
weights become one site with many calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memrewrite.passes.capture.segment import Capture, Segment
from memrewrite.passes.graphs.nodes import CanonicalNode, canonical_nodes
from memrewrite.passes.graphs.provenance import path_of, source_line
from memrewrite.passes.locate.binding import BoundRegion, bind
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph, recorded_graph
from memrewrite.passes.locate.sites import Recognized, assemble, identity_of, mixture_module, module_types, parts_of_mixtures
from memrewrite.passes.locate.token_probe import mixes
from memrewrite.passes.locate.within_one_block import in_two_blocks
from memrewrite.passes.regions.activation import UNKNOWN, activation_of
from memrewrite.passes.regions.experts import Mixture, mixtures
from memrewrite.passes.regions.patterns import matched
from memrewrite.passes.regions.region import Region, attempt
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.site import NearMiss


def locate(capture: Capture, *, fragment: bool = False) -> LocatedSites:
    """Find every MLP of a captured model; regions that looked like one are near misses with a rule, a reason and a node.

    In a `fragment`, a part of a model about which its caller knows more, no output has to return to a residual stream.
    """
    groups: dict[frozenset[str], list[Recognized]] = {}
    of_module: dict[str, frozenset[str]] = {}
    misses: list[NearMiss] = []
    types: dict[str, str] = {}
    activations: dict[Any, str] = {}
    graphs: dict[str, RecordedGraph] = {}
    for segment in capture.segments:
        recorded = graphs[segment.path] = recorded_graph(segment, capture.calls, fragment=fragment)
        types |= module_types(recorded)
        for end, outcome in _outcomes(recorded):
            one = _recognized(recorded, *outcome, types, activations) if isinstance(outcome, tuple) else outcome
            if isinstance(one, Recognized):
                weights, module = identity_of(one.call), mixture_module(one.call)
                if module:  # calls of it may visit different experts
                    weights = of_module.setdefault(module, weights)
                groups.setdefault(weights, []).append(one)
            elif one.near_miss:
                misses.append(_near_miss(segment, end, one))
    for weights, part in parts_of_mixtures(groups, capture.state).items():
        misses.append(_near_miss(groups.pop(weights)[0].call.segment, part.node, part))
    return assemble(capture, groups, misses, types, graphs)


def _outcomes(recorded: RecordedGraph) -> Iterator[tuple[CanonicalNode, tuple[Region, BoundRegion | None] | Rejection]]:
    """What ends at which node, in graph order. A mixture of experts comes with its binding, a smaller region without one."""
    flow, inside = recorded.flow, set[CanonicalNode]()
    found: dict[CanonicalNode, tuple[Region, BoundRegion | None]] = {}
    for ends in mixtures(flow, lambda mixture: not mixes(recorded, mixture)):  # nor is it an attention that selects tokens
        mixture, bound = _widest_module(recorded, ends)
        found[mixture.down] = mixture, bound
        inside.update(mixture.inside)
    for node in canonical_nodes(flow.graph):
        if node in found:
            yield node, found[node]
        elif flow.is_linear(node) and node not in inside:
            region = attempt(flow, node)
            yield node, (region, None) if isinstance(region, Region) else region


def _widest_module(recorded: RecordedGraph, ends: tuple[Mixture, ...]) -> tuple[Mixture, BoundRegion]:
    """Of the regions a mixture may be, the widest that one module or the sum of two returns, with its binding.

    The first, which is the narrowest, when there is none.
    """
    for mixture in reversed(ends[1:]):
        bound = bind(recorded, mixture)
        whole = bound.binding.kind == "module" or (bound.binding.kind == "span" and bool(bound.binding.widths))
        if whole and not mixes(recorded, mixture):
            return mixture, bound
    return ends[0], bind(recorded, ends[0])


def _recognized(
    recorded: RecordedGraph, region: Region, bound: BoundRegion | None, types: Mapping[str, str], activations: dict[Any, str]
) -> Recognized | Rejection:
    """A region with its pattern and activation, or why it is no site."""
    match = matched(recorded.flow, region)
    if isinstance(match, Rejection):
        return match
    rejection = in_two_blocks(recorded, region, types)
    if rejection is not None:
        return rejection
    one = region.middle(recorded.flow) if isinstance(region, Mixture) else region
    activation = activation_of(recorded.flow, one, activations) if one else UNKNOWN
    return Recognized(SiteCall(recorded.segment, recorded, region, bound or bind(recorded, region)), match, activation)


def _near_miss(segment: Segment, down: CanonicalNode, rejection: Rejection) -> NearMiss:
    path, node = f"{segment.path}.{path_of(down)}".strip("."), rejection.node
    return NearMiss(path=path, reason=rejection.reason, node=node.name, source=source_line(node), rule=rejection.rule)
