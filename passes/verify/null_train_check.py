"""The *null* check in train mode, from one seed: dropout draws, batch norms count, and still no bit of an output changes.

Flow: the model itself runs twice, to see whether it repeats itself → the MLPs as recorded in eval mode are lifted out with
their noise switched on → where that is not what the model does (a forward that asks `self.training`), it is captured once
more in train mode, and what the same modules do there is lifted out. The model is left as it was, and so are random states.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memrewrite.errors import CaptureError, in_one_line
from memrewrite.passes.capture.capture import recapture
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph, recorded_graph
from memrewrite.passes.models.fingerprints import differing
from memrewrite.passes.models.forward import run
from memrewrite.passes.models.state_guard import StateGuard, in_train_mode, seeded
from memrewrite.passes.verify.evidence import Evidence, checked, skipped
from memrewrite.passes.verify.null_check import Calls, originals_placed
from memrewrite.report import Check
from memrewrite.site import Binding

log = logging.getLogger("memrewrite")


class _Skip(Exception):  # noqa: N818 - a verdict, turned into a skipped check
    """The check cannot be made; the message says why."""


def null_train(evidence: Evidence) -> Check:
    """The *null* check in train mode, from one seed. Leaves the model as it was: buffers, attributes, modes, every bit."""
    if evidence.on_meta:
        return skipped("null_train", "the model is on meta: there are no values to compare")
    with in_train_mode(evidence.model) as kept:
        try:
            return _compared_in_train_mode(evidence, kept)
        except _Skip as why:
            return skipped("null_train", str(why))


def _compared_in_train_mode(evidence: Evidence, kept: StateGuard) -> Check:
    wanted = _reference(evidence, kept)
    different = differing(wanted, _run_in_train_mode(evidence, kept, evidence.locations.found, train_noise=True))
    if different:
        different = differing(wanted, _run_in_train_mode(evidence, kept, _found_in_train_mode(evidence)))
    calls = [call for s in evidence.plan.substitutions for call in evidence.locations.found[s.site.path]]
    if different and any(call.segment.own_segments is not None for call in calls):
        raise _Skip("some MLPs are known by what ran in eval mode alone, for the values that they saw there")
    if different:
        return checked("null_train", False, different, f"in train mode, from one seed, {different} output elements differ")
    quiet = differing(wanted, evidence.before.outputs) == 0
    sentence = "in train mode, from one seed, outputs are bit-equal too"
    return checked("null_train", True, 0, sentence + (" (and the same as in eval mode)" if quiet else ""))


def _reference(evidence: Evidence, kept: StateGuard) -> Any:
    """What the model itself gives in train mode. Raises `_Skip` when it gives nothing, or not the same twice."""
    try:
        outputs, again = (_run_once(evidence, kept) for _ in range(2))
    except Exception as error:
        log.debug("the model does not run in train mode", exc_info=True)
        raise _Skip(f"the model does not run in train mode: {in_one_line(error)}") from error
    different = differing(outputs, again)
    if different:
        raise _Skip(f"the model's own outputs in train mode differ between two runs from one seed, in {different} elements")
    return outputs


def _run_once(evidence: Evidence, kept: StateGuard) -> Any:
    with kept.forwards(), seeded():
        return run(evidence.model, evidence.before.inputs)


def _run_in_train_mode(evidence: Evidence, kept: StateGuard, found: Calls, *, train_noise: bool = False) -> Any:
    with originals_placed(evidence, found, train_noise=train_noise):
        return _run_once(evidence, kept)


# ------------------------------------------------------------------------------------- what modules do in train mode


def _found_in_train_mode(evidence: Evidence) -> Calls:
    """The selected MLPs as the model computes them in train mode. Raises `_Skip` where that cannot be told."""
    try:
        segments = tuple(recapture(evidence.model, segment) for segment in evidence.before.segments)
    except CaptureError as error:
        raise _Skip(f"in train mode the model computes something else, which cannot be captured: {error.what}") from error
    again = replace(evidence.before, segments=segments)
    recorded = {at.path: recorded_graph(at, again.calls) for at in segments}
    sites = [substitution.site for substitution in evidence.plan.substitutions]
    held = {site.path for site in sites if any(binding.kind == "graph" for binding in site.bindings)}  # in no module's hands
    located = locate(again).found if held else {}
    found = {}
    for path in (site.path for site in sites):
        before = evidence.locations.found[path]
        calls = located.get(path, ()) if path in held else _by_modules(before, recorded)
        if len(calls) != len(before):
            raise _Skip(f"in train mode {path!r} computes something else, which is not of one input and one output")
        drawn = next(filter(None, map(_drawn_within, calls)), None)
        if drawn is not None:
            raise _Skip(f"between the matrices of {path!r} others draw random numbers too, at {drawn.name!r}")
        found[path] = calls
    return found


def _by_modules(calls: tuple[SiteCall, ...], recorded: dict[str, RecordedGraph]) -> tuple[SiteCall, ...]:
    """The calls of one MLP in the train-mode graphs, each bound to the same modules as before; those that can be told."""
    seen: Counter[tuple[str, Binding]] = Counter()
    found = []
    for call in calls:
        key = (call.segment.path, call.bound.binding)
        at = recorded[call.segment.path]
        bound = _bound(at, call.bound.binding, seen[key])
        seen[key] += 1
        if bound is not None:
            found.append(replace(call, segment=at.segment, recorded=at, bound=bound))
    return tuple(found)


def _bound(recorded: RecordedGraph, binding: Binding, number: int) -> BoundRegion | None:
    """What the modules of a binding computed when they were called for the `number`-th time."""
    if binding.kind not in ("module", "span"):
        return None
    calls = [_calls_of(recorded, path)[number : number + 1] for path in (*binding.entries, binding.exit)]
    if not all(calls):
        return None
    made = [recorded.by_call.get(call, []) for (call,) in calls]
    nodes = {node for some in made for node in some}
    if binding.kind == "span":
        reads = {node for some in made[:-1] for node in recorded.recorded_inputs(some)}
        nodes |= _between(recorded, reads, made[-1])
    reads, gives = recorded.recorded_inputs(nodes), recorded.recorded_outputs(nodes)
    if len(reads) != 1 or len(gives) != 1:
        return None
    return BoundRegion(binding, frozenset(nodes), reads.pop(), gives.pop())


def _calls_of(recorded: RecordedGraph, path: str) -> list[str]:
    return [call for call, at in recorded.paths.items() if at == path]


def _between(recorded: RecordedGraph, start: set[RecordedNode], ends: list[RecordedNode]) -> set[RecordedNode]:
    """What is computed from `start` on the way to `ends`."""
    found: set[RecordedNode] = set()
    pending = list(recorded.recorded_inputs(ends))
    while pending:
        node = pending.pop()
        if node not in found and node not in start and node.op == "call_function":
            found.add(node)
            pending.extend(source for source in inputs_of(node) if source not in recorded.constant)
    return found


def _drawn_within(call: SiteCall) -> fx.Node | None:
    """An op that draws random numbers while an MLP is computed and is not of it: both draw from one stream, in turns."""
    position, nodes = call.recorded.position, call.bound.nodes
    first, last = min(position[n] for n in nodes - call.recorded.constant), position[call.bound.y]
    return next((n for n, at in position.items() if first < at < last and n not in nodes and _draws(n)), None)


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
