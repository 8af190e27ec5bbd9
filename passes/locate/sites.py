"""Regions of the same weights become one site with many calls."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Any

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.provenance import modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.feature_axis import feature_axis
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.models.block_stacks import block_positions
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.patterns import Match
from memrewrite.site import Binding, Inspection, NearMiss, Site


def weights_of(found: SiteCall) -> list[str]:
    """The names of the weights a region uses, in order of use."""
    names: dict[str, None] = {}
    for node in found.region.inside:
        for source in node.all_input_nodes:
            if source in found.recorded.flow.constant:
                names |= dict.fromkeys(sorted(found.recorded.flow.weights(source)))
    return list(names)


def identity_of(found: SiteCall) -> frozenset[str]:
    """What tells a site from others: its weights and, of a weight that is a stack of matrices, which of them it takes.

    A mixture takes what its tokens choose.
    """
    flow, picked = found.recorded.flow, set[str]()
    if isinstance(found.region, Mixture):
        return frozenset(weights_of(found))
    for at in {s for node in found.region.inside for s in node.all_input_nodes if s in flow.constant}:
        picks: list[str] = []
        while at.op == "call_function" and at.all_input_nodes:
            if op_name(at) in ("select", "getitem", "index"):
                picks.append(str(at.args[1:]))
            at = at.all_input_nodes[0]
        picked.update([at.name + "".join(picks)] if picks else ())
    return frozenset((*weights_of(found), *picked))


def module_types(recorded: RecordedGraph) -> dict[str, str]:
    """The class of every module that runs, by path."""
    found: dict[str, str] = {}
    for node in recorded.segment.graph.nodes:
        for call, (_, kind) in (node.meta.get("nn_module_stack") or {}).items():
            found[recorded.paths[str(call)]] = str(kind)
    return found


def assemble(
    capture: Capture,
    groups: dict[frozenset[str], list[tuple[SiteCall, Match, str]]],
    misses: list[NearMiss],
    types: dict[str, str],
) -> LocatedSites:
    """One site for each group of regions that use the same weights, in the order they run."""
    paths: dict[str, list[tuple[SiteCall, Match, str]]] = {}
    for group in groups.values():
        path = _narrowest(group[0][0])
        while path in paths:  # several MLPs in one module: told apart by their last matrix
            path = f"{path}#{group[0][0].region.down.name}"
        paths[path] = group
    where = block_positions([path.partition("#")[0] for path in paths], types)
    sites = [_site(path, group, where[path.partition("#")[0]]) for path, group in paths.items()]
    located = Inspection(sites=tuple(sites), near_misses=tuple(dict.fromkeys(misses)), captured=capture.how)
    return LocatedSites(located, {path: tuple(found for found, _, _ in group) for path, group in paths.items()})


def _narrowest(found: SiteCall) -> str:
    """The innermost module that holds every matrix of the region.

    The deeper of two answers: by calls, and by the tree, for a module whose `forward` was called past its `__call__`.
    """
    matrices = (*found.region.ups, found.region.down)
    stacks = [[found.recorded.paths[call] for call, _ in modules_of(node)] for node in matrices]
    common = [step[0] for step in zip(*stacks, strict=False) if len(set(step)) == 1]
    parts = [(stack[-1] if stack else "").split(".") for stack in stacks]
    held = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    return max(common[-1] if common else "", ".".join(held), key=len)


def _site(path: str, group: list[tuple[SiteCall, Match, str]], place: Any) -> Site:
    found, match, activation = group[0]
    region, flow = found.region, found.recorded.flow
    names = weights_of(found)
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
