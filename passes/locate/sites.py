"""Regions of the same weights become one site with many calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.graphs.nodes import inputs_of
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.provenance import modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.feature_axis import LAST, feature_axis
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.models.block_stacks import BlockPosition, block_positions
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.patterns import Match
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.site import Binding, Inspection, NearMiss, Site


class Recognized(NamedTuple):
    """A region found, the pattern that it matches, and the name of its activation."""

    call: SiteCall
    match: Match
    activation: str


def weights_of(found: SiteCall) -> list[str]:
    """The names of the weights that a region uses, in order of use."""
    names: dict[str, None] = {}
    for node in found.region.inside:
        for source in inputs_of(node):
            if source in found.recorded.flow.constant:
                names |= dict.fromkeys(sorted(found.recorded.flow.weights(source)))
    return list(names)


def identity_of(found: SiteCall) -> frozenset[str]:
    """What distinguishes a site from others: its weights and, of a weight that is a stack of matrices, which one it selects.

    A mixture of experts uses whole stacks.
    """
    flow, picked = found.recorded.flow, set[str]()
    if isinstance(found.region, Mixture):
        return frozenset(weights_of(found))
    for at in {s for node in found.region.inside for s in inputs_of(node) if s in flow.constant}:
        picks: list[str] = []
        while at.op == "call_function" and at.all_input_nodes:
            if op_name(at) in ("select", "getitem", "index"):
                picks.append(str(at.args[1:]))
            at = inputs_of(at)[0]
        picked.update([at.name + "".join(picks)] if picks else ())
    return frozenset((*weights_of(found), *picked))


def mixture_module(found: SiteCall) -> str:
    """The module that is a mixture of experts, if it is one module; "" for any other region."""
    is_module = isinstance(found.region, Mixture) and found.bound.binding.kind == "module"
    return found.bound.binding.exit if is_module else ""


def module_types(recorded: RecordedGraph) -> dict[str, str]:
    """The class of every module that runs, by path."""
    found: dict[str, str] = {}
    for node in recorded.nodes:
        for call, (_, kind) in (node.meta.get("nn_module_stack") or {}).items():
            found[recorded.paths[str(call)]] = str(kind)
    return found


def assemble(
    capture: Capture,
    groups: Mapping[frozenset[str], list[Recognized]],
    misses: list[NearMiss],
    types: Mapping[str, str],
    recorded: Mapping[str, RecordedGraph],
) -> LocatedSites:
    """One site for each group of regions that use the same weights, in the order they run."""
    paths: dict[str, list[Recognized]] = {}
    for group in groups.values():
        path = _narrowest(group[0].call)
        while path in paths:  # several MLPs in one module: distinguished by their last matrices
            path = f"{path}#{group[0].call.region.down.name}"
        paths[path] = group
    where = block_positions([path.partition("#")[0] for path in paths], types)
    sites = [_site(path, group, where[path.partition("#")[0]], capture) for path, group in paths.items()]
    located = Inspection(sites=tuple(sites), near_misses=tuple(dict.fromkeys(misses)), captured=capture.how)
    return LocatedSites(located, {path: tuple(one.call for one in group) for path, group in paths.items()}, recorded)


def parts_of_mixtures(
    groups: Mapping[frozenset[str], list[Recognized]], state: Mapping[str, Tensor]
) -> dict[frozenset[str], Rejection]:
    """The groups all of whose weights belong to a module that is a mixture in another call, with the reason against them.

    Such a group is an expert alone, where the tokens of another call visited several.
    """
    found: dict[frozenset[str], Rejection] = {}
    used = {weights: frozenset(_weights_of_all(group)) for weights, group in groups.items()}
    modules = {mixture_module(group[0].call): weights for weights, group in groups.items()}
    modules.pop("", None)
    for module, mixture in modules.items():
        held = {*mixture, *(name for name in state if name.startswith(f"{module}."))}
        reason = f"its weights are a part of the mixture {module!r}, which other tokens visit as a whole"
        for weights, group in groups.items():
            if weights != mixture and used[weights] <= held:
                found[weights] = Rejection("whole mixture", reason, group[0].call.region.down)
    return found


def _weights_of_all(group: Iterable[Recognized]) -> dict[str, Tensor]:
    """The weights of all calls of a site, by name, in order of use."""
    found: dict[str, Tensor] = {}
    for one in group:
        found |= {name: one.call.recorded.flow.weight_values[name] for name in weights_of(one.call) if name not in found}
    return found


def _narrowest(found: SiteCall) -> str:
    """The innermost module that contains every matrix of the region.

    The deeper of two answers: by module calls, and by the module tree. They differ for a module whose `forward` was called
    directly, without `__call__`.
    """
    matrices = (*found.region.ups, found.region.down)
    stacks = [[found.recorded.paths[call] for call, _ in modules_of(node)] for node in matrices]
    common = [step[0] for step in zip(*stacks, strict=False) if len(set(step)) == 1]
    parts = [(stack[-1] if stack else "").split(".") for stack in stacks]
    shared = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    return max(common[-1] if common else "", ".".join(shared), key=len)


def _site(path: str, group: list[Recognized], place: BlockPosition, capture: Capture) -> Site:
    (found, match, activation), region = group[0], group[0].call.region
    value, axis = region.down.meta["val"], feature_axis(found.recorded.flow, region, found.bound)
    bindings = _bindings(group, axis)
    modules = dict.fromkeys(m for b in bindings if b.kind in ("module", "span") for m in (*b.entries[: len(b.widths)], b.exit))
    used = _weights_of_all(group)
    unused = _unused(capture.state, modules, used)
    matrices, others = _entries([*used.values(), *(tensor for tensor in unused.values() if isinstance(tensor, nn.Parameter))])
    return Site(
        path=path,
        pattern=match.pattern,
        d_model=int(shape_of(region.down)[-1]),
        d_in=int(shape_of(region.x)[LAST if axis is None else axis]),
        d_hidden=match.d_hidden,
        activation=activation,
        axis=LAST if axis is None else axis,
        calls=len(group),
        unused_calls=_unused_calls(group, bindings, capture),
        parameters=(*used, *unused),
        modules=tuple(modules),
        weights=matrices,
        active=region.active(found.recorded.flow) if isinstance(region, Mixture) else matrices,
        biases=others,
        dtype=str(value.dtype).removeprefix("torch."),
        device=str(value.device),
        tower=place.tower,
        block=place.block,
        tower_blocks=place.blocks,
        bindings=bindings,
    )


def _bindings(group: list[Recognized], axis: int | None) -> tuple[Binding, ...]:
    """The distinct bindings of a site's calls; where its features are not on one axis, no module can be replaced."""
    if axis is None:
        why = "its features are on several axes, or on different axes in its input and its output"
        advice = "leave it out, or rewrite the exported program: `--emit graph`"
        return (Binding(kind="none", why=why, advice=advice),)
    return tuple(dict.fromkeys(one.call.bound.binding for one in group))


def _unused_calls(group: list[Recognized], bindings: tuple[Binding, ...], capture: Capture) -> int:
    """How often a site's modules run for a result that nothing reads: the canonical graph does not have what they compute."""
    recorded, exits = group[0].call.recorded, {binding.exit for binding in bindings}
    ran = max(len(capture.calls.get(path, ())) for path in exits)
    calls = [call for call, path in recorded.paths.items() if path in exits]
    read = sum(any(node in recorded.twin for node in recorded.by_call.get(call, ())) for call in calls)
    return len(group) * (ran - read) // read if capture.is_whole and ran > read > 0 else 0


def _unused(state: Mapping[str, Tensor], modules: Iterable[str], used: Iterable[str]) -> dict[str, Tensor]:
    """What the modules of a site hold and the recorded region does not use: experts that no token of the example visited."""
    inside = tuple(f"{module}." for module in modules)
    known = {id(state[name]) for name in used if name in state}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(inside) and id(tensor) not in known:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _entries(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """The number of entries of matrices, and of other tensors: biases, scales."""
    sizes = [(tensor.ndim >= 2, math.prod(tensor.shape)) for tensor in tensors]
    return sum(size for is_matrix, size in sizes if is_matrix), sum(size for is_matrix, size in sizes if not is_matrix)
