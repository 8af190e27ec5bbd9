"""Where a model's MLPs are, by dataflow alone.

Flow: every `linear` of the canonical graph is tried as a last matrix → its region is grown and held against the rules →
the patterns name it → it is bound to the live module tree → regions of the same weights become one site with many calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import fx

from memrewrite.passes.canonicalize.canonicalize import normalize
from memrewrite.passes.capture.capture import Capture, Segment
from memrewrite.passes.graphs.dataflow import Dataflow, modules_of, op_name, path_of, shape_of, source_line
from memrewrite.passes.locate.binding import Bound, bind
from memrewrite.passes.locate.feature_axis import feature_axis
from memrewrite.passes.locate.recorded_graph import Recorded
from memrewrite.passes.locate.token_probe import mixes
from memrewrite.passes.models.block_stacks import places
from memrewrite.passes.regions.activation import UNKNOWN, activation_of
from memrewrite.passes.regions.experts import Mixture, mixtures
from memrewrite.passes.regions.patterns import PATTERNS, Match
from memrewrite.passes.regions.region import Region, grow
from memrewrite.passes.regions.token_axes import Refusal
from memrewrite.site import Binding, Located, NearMiss, Site


@dataclass(frozen=True)
class Found:
    """One region found: where it is in which segment's recorded graph. A site has one for each call."""

    segment: Segment
    recorded: Recorded
    region: Region
    bound: Bound


@dataclass(frozen=True)
class Locations:
    """What `locate` found, with the graph regions behind each site (`found[site.path]`, one for each call)."""

    located: Located
    found: Mapping[str, tuple[Found, ...]]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in the order they run."""
        return self.located.sites


def locate(capture: Capture, *, fragment: bool = False) -> Locations:
    """Find every MLP of a captured model; regions that looked like one are near misses with a reason and a node.

    Of a `fragment`, a part of a model that its caller knows more about, nothing has to return to a residual stream.
    """
    groups: dict[frozenset[str], list[tuple[Found, Match, str]]] = {}
    misses: list[NearMiss] = []
    types: dict[str, str] = {}
    activations: dict[Any, str] = {}
    for segment in capture.segments:
        graph = normalize(segment)
        flow = Dataflow(graph, fragment=fragment)
        recorded = Recorded(segment, flow, capture.calls)
        types |= _types(recorded)
        for end, outcome in _outcomes(recorded):
            if isinstance(outcome, Refusal):
                misses.append(_near_miss(segment, end, outcome))
            else:
                region, match = outcome
                found = Found(segment, recorded, region, bind(recorded, region))
                one = region.middle(flow) if isinstance(region, Mixture) else region
                activation = activation_of(flow, one, activations) if one else UNKNOWN
                groups.setdefault(_identity(found), []).append((found, match, activation))
    return _assemble(capture, groups, misses, types)


def _outcomes(recorded: Recorded) -> Iterator[tuple[fx.Node, tuple[Region, Match] | Refusal]]:
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


def _widest_module(recorded: Recorded, ends: tuple[Mixture, ...]) -> Mixture:
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


def _weights(found: Found) -> list[str]:
    """The names of the weights a region uses, in order of use."""
    names: dict[str, None] = {}
    for node in found.region.inside:
        for source in node.all_input_nodes:
            if source in found.recorded.flow.constant:
                names |= dict.fromkeys(sorted(found.recorded.flow.weights(source)))
    return list(names)


def _identity(found: Found) -> frozenset[str]:
    """What tells a site from others: its weights and, of a weight that is a stack of matrices, which of them it takes.

    A mixture takes what its tokens choose.
    """
    flow, picked = found.recorded.flow, set[str]()
    if isinstance(found.region, Mixture):
        return frozenset(_weights(found))
    for at in {s for node in found.region.inside for s in node.all_input_nodes if s in flow.constant}:
        picks: list[str] = []
        while at.op == "call_function" and at.all_input_nodes:
            if op_name(at) in ("select", "getitem", "index"):
                picks.append(str(at.args[1:]))
            at = at.all_input_nodes[0]
        picked.update([at.name + "".join(picks)] if picks else ())
    return frozenset((*_weights(found), *picked))


def _types(recorded: Recorded) -> dict[str, str]:
    """The class of every module that runs, by path."""
    found: dict[str, str] = {}
    for node in recorded.segment.graph.nodes:
        for call, (_, kind) in (node.meta.get("nn_module_stack") or {}).items():
            found[recorded.paths[str(call)]] = str(kind)
    return found


def _assemble(
    capture: Capture,
    groups: dict[frozenset[str], list[tuple[Found, Match, str]]],
    misses: list[NearMiss],
    types: dict[str, str],
) -> Locations:
    paths: dict[str, list[tuple[Found, Match, str]]] = {}
    for group in groups.values():
        path = _narrowest(group[0][0])
        while path in paths:  # several MLPs in one module: told apart by their last matrix
            path = f"{path}#{group[0][0].region.down.name}"
        paths[path] = group
    where = places([path.partition("#")[0] for path in paths], types)
    sites = [_site(path, group, where[path.partition("#")[0]]) for path, group in paths.items()]
    located = Located(sites=tuple(sites), near_misses=tuple(dict.fromkeys(misses)), captured=capture.how)
    return Locations(located, {path: tuple(found for found, _, _ in group) for path, group in paths.items()})


def _narrowest(found: Found) -> str:
    """The innermost module that holds every matrix of the region.

    The deeper of two answers: by calls, and by the tree, for a module whose `forward` was called past its `__call__`.
    """
    matrices = (*found.region.ups, found.region.down)
    stacks = [[found.recorded.paths[call] for call, _ in modules_of(node)] for node in matrices]
    common = [step[0] for step in zip(*stacks, strict=False) if len(set(step)) == 1]
    parts = [(stack[-1] if stack else "").split(".") for stack in stacks]
    held = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    return max(common[-1] if common else "", ".".join(held), key=len)


def _site(path: str, group: list[tuple[Found, Match, str]], place: Any) -> Site:
    found, match, activation = group[0]
    region, flow = found.region, found.recorded.flow
    names = _weights(found)
    sizes = {name: math.prod(flow.held[name].shape) for name in names}
    matrices = {name for name in names if flow.held[name].ndim >= 2}
    weights, value = sum(sizes[n] for n in matrices), region.down.meta["val"]
    axis = feature_axis(flow, region, found.bound)
    bindings = dict.fromkeys(f.bound.binding for f, _, _ in group)
    if axis is None:
        bindings = {
            Binding(
                kind="none", why="its features lie on several axes, or on another one in its input than in its output"
            ): None
        }
    modules = dict.fromkeys(m for b in bindings if b.kind in ("module", "span") for m in (*b.entries[: len(b.widths)], b.exit))
    return Site(
        path=path,
        pattern=match.pattern,
        d_model=int(shape_of(region.down)[-1]),
        d_in=int(shape_of(region.x)[-1 if axis is None else axis]),
        d_hidden=match.d_hidden,
        activation=activation,
        axis=-1 if axis is None else axis,
        calls=len(group),
        parameters=tuple(names),
        modules=tuple(modules),
        weights=weights,
        active=region.active(flow) if isinstance(region, Mixture) else weights,
        biases=sum(sizes[n] for n in sizes if n not in matrices),
        dtype=str(value.dtype).removeprefix("torch."),
        device=str(value.device),
        tower=place.tower,
        block=place.block,
        tower_blocks=place.blocks,
        bindings=tuple(bindings),
    )
