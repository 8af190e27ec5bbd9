"""Where a model's MLPs are, by dataflow alone.

Flow: every `linear` of the canonical graph is tried as a last matrix → its region is grown and held against the rules →
the patterns name it → it is bound to the live module tree → regions of the same weights become one site with many calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from memrewrite.passes.canonicalize.canonicalize import canonicalize
from memrewrite.passes.capture.segment import Capture, Segment
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.provenance import path_of, source_line
from memrewrite.passes.locate.binding import bind
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.locate.sites import assemble, identity_of, module_types
from memrewrite.passes.locate.token_probe import mixes
from memrewrite.passes.regions.activation import UNKNOWN, activation_of
from memrewrite.passes.regions.experts import Mixture, mixtures
from memrewrite.passes.regions.patterns import PATTERNS, Match
from memrewrite.passes.regions.region import Region, grow
from memrewrite.passes.regions.token_axes import Refusal
from memrewrite.site import NearMiss


def locate(capture: Capture, *, fragment: bool = False) -> LocatedSites:
    """Find every MLP of a captured model; regions that looked like one are near misses with a reason and a node.

    Of a `fragment`, a part of a model that its caller knows more about, nothing has to return to a residual stream.
    """
    groups: dict[frozenset[str], list[tuple[SiteCall, Match, str]]] = {}
    misses: list[NearMiss] = []
    types: dict[str, str] = {}
    activations: dict[Any, str] = {}
    for segment in capture.segments:
        graph = canonicalize(segment.graph, segment.weights, segment.literals)
        flow = Dataflow(graph, fragment=fragment)
        recorded = RecordedGraph(segment, flow, capture.calls)
        types |= module_types(recorded)
        for end, outcome in _outcomes(recorded):
            if isinstance(outcome, Refusal):
                misses.append(_near_miss(segment, end, outcome))
            else:
                region, match = outcome
                found = SiteCall(segment, recorded, region, bind(recorded, region))
                one = region.middle(flow) if isinstance(region, Mixture) else region
                activation = activation_of(flow, one, activations) if one else UNKNOWN
                groups.setdefault(identity_of(found), []).append((found, match, activation))
    return assemble(capture, groups, misses, types)


def _outcomes(recorded: RecordedGraph) -> Iterator[tuple[fx.Node, tuple[Region, Match] | Refusal]]:
    """What ends at which node, in the order of the graph: mixtures of experts first, then MLPs outside of them."""
    flow, outcomes, inside = recorded.flow, dict[fx.Node, tuple[Region, Match] | Refusal](), set[fx.Node]()
    for ends in mixtures(flow, lambda mixture: not mixes(recorded, mixture)):  # and no attention that chooses what it sees
        mixture = _widest_module(recorded, ends)
        outcomes[mixture.down] = _match(flow, mixture)
        inside.update(mixture.inside)
    for node in flow.graph.nodes:
        if node in outcomes:
            yield node, outcomes[node]
        elif flow.is_linear(node) and node not in inside:
            region = grow(flow, node)
            if isinstance(region, Region):
                yield node, _match(flow, region)
            elif region is not None:
                yield node, region


def _widest_module(recorded: RecordedGraph, ends: tuple[Mixture, ...]) -> Mixture:
    """Of the ends a mixture may have, the last that a module returns, or that is the sum of what two modules do.

    The first when there is none, which leaves most alone.
    """
    for mixture in reversed(ends):
        binding = bind(recorded, mixture).binding
        if (binding.kind == "module" or (binding.kind == "span" and binding.widths)) and (
            mixture is ends[0] or not mixes(recorded, mixture)
        ):
            return mixture
    return ends[0]


def _match(flow: Dataflow, region: Region) -> tuple[Region, Match] | Refusal:
    reasons = []
    for pattern in PATTERNS:
        verdict = pattern.match(flow, region)
        if isinstance(verdict, Match):
            return region, verdict
        reasons.append(f"not {pattern.name}: {verdict}")
    return Refusal("; ".join(reasons), region.down)


def _near_miss(segment: Segment, down: fx.Node, refusal: Refusal) -> NearMiss:
    path = f"{segment.path}.{path_of(down)}".strip(".")
    return NearMiss(path=path, reason=refusal.reason, node=refusal.node.name, source=source_line(refusal.node))
