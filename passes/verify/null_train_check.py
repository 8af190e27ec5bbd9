"""The *null* check in train mode, from one seed: dropout and batch norms are active, and no bit of the outputs changes.

Flow: the model itself runs twice, to see whether its outputs repeat → it runs with the MLPs recorded in eval mode, their
dropout switched on → where outputs differ (a forward that reads `self.training`), it is captured again in train mode, and
runs with the MLPs recorded there. The model and the RNG states are as before afterwards.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memrewrite.errors import CaptureError, ModelError, in_one_line
from memrewrite.passes.capture.capture import recapture
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph, recorded_graph
from memrewrite.passes.models.fingerprints import differing
from memrewrite.passes.models.forward import in_mode, run
from memrewrite.passes.verify.evidence import BeforeEdit, checked, skipped
from memrewrite.passes.verify.null_check import Calls, originals_placed, run_guarded
from memrewrite.report import Check
from memrewrite.site import Binding

log = logging.getLogger("memrewrite")


class _Skip(Exception):  # noqa: N818 - turned into a skipped check
    """The check cannot run; the message is the reason."""


def null_train(before: BeforeEdit) -> Check:
    """The *null* check in train mode, from one seed. The model is as before afterwards: buffers, attributes, modes."""
    if before.on_meta:
        return skipped("null_train", "the model is on meta: there are no values to compare")
    with in_mode(before.model, training=True):
        try:
            return _compared_in_train_mode(before)
        except _Skip as why:
            return skipped("null_train", str(why))


def _compared_in_train_mode(before: BeforeEdit) -> Check:
    reference = _reference(before)
    different = differing(reference, _run_in_train_mode(before, before.locations.found, train_noise=True))
    if different:
        different = differing(reference, _run_in_train_mode(before, _found_in_train_mode(before)))
    calls = [call for s in before.plan.substitutions for call in before.locations.found[s.site.path]]
    if different and any(call.segment.own_segments is not None for call in calls):
        raise _Skip("some MLPs were recorded as they ran in eval mode, which is valid for the values of that run alone")
    if different:
        return checked("null_train", False, different, f"in train mode, from one seed, {different} output elements differ")
    same_as_eval = differing(reference, before.capture.outputs) == 0
    sentence = "in train mode, from one seed, outputs are bit-equal too"
    return checked("null_train", True, 0, sentence + (" (and the same as in eval mode)" if same_as_eval else ""))


def _reference(before: BeforeEdit) -> Any:
    """The model's own outputs in train mode. Raises `_Skip` when it does not run, or its outputs do not repeat."""
    try:
        outputs, again = (run(before.model, before.capture.inputs) for _ in range(2))
    except ModelError as error:
        log.debug("the model does not run in train mode", exc_info=True)
        raise _Skip(f"the model does not run in train mode: {in_one_line(error.__cause__ or error)}") from error
    different = differing(outputs, again)
    if different:
        raise _Skip(f"the model's own outputs in train mode differ between two runs from one seed, in {different} elements")
    return outputs


def _run_in_train_mode(before: BeforeEdit, found: Calls, *, train_noise: bool = False) -> Any:
    with originals_placed(before, found, train_noise=train_noise):
        return run_guarded(before)


# ------------------------------------------------------------------------------------------ MLPs in train mode


def _found_in_train_mode(before: BeforeEdit) -> Calls:
    """The selected MLPs as recorded in train mode. Raises `_Skip` where they cannot be captured or compared."""
    try:
        segments = tuple(recapture(before.model, segment) for segment in before.capture.segments)
    except CaptureError as error:
        raise _Skip(f"in train mode the model computes something else, which cannot be captured: {error.what}") from error
    capture = replace(before.capture, segments=segments)
    recorded = {segment.path: recorded_graph(segment, capture.calls) for segment in segments}
    sites = [substitution.site for substitution in before.plan.substitutions]
    in_hosts = {site.path for site in sites if any(binding.kind == "graph" for binding in site.bindings)}
    located = locate(capture).found if in_hosts else {}  # no module's calls identify these MLPs: they are located again
    found = {}
    for path in (site.path for site in sites):
        in_eval = before.locations.found[path]
        calls = located.get(path, ()) if path in in_hosts else _by_modules(in_eval, recorded)
        if len(calls) != len(in_eval):
            raise _Skip(f"in train mode {path!r} computes something else, which is not of one input and one output")
        random = next(filter(None, map(_random_op_between, calls)), None)
        if random is not None:
            raise _Skip(f"between the matrices of {path!r} other code consumes random numbers too, at {random.name!r}")
        found[path] = calls
    return found


def _by_modules(calls: tuple[SiteCall, ...], recorded: dict[str, RecordedGraph]) -> tuple[SiteCall, ...]:
    """The calls of one MLP in the train-mode graphs, each bound to the same modules as in eval mode, where that is possible."""
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
    computed = [recorded.by_call.get(call, []) for (call,) in calls]
    nodes = {node for some in computed for node in some}
    if binding.kind == "span":
        reads = {node for some in computed[:-1] for node in recorded.recorded_inputs(some)}
        nodes |= _between(recorded, reads, computed[-1])
    reads, gives = recorded.recorded_inputs(nodes), recorded.recorded_outputs(nodes)
    if len(reads) != 1 or len(gives) != 1:
        return None
    return BoundRegion(binding, frozenset(nodes), reads.pop(), gives.pop())


def _calls_of(recorded: RecordedGraph, path: str) -> list[str]:
    return [call for call, at in recorded.paths.items() if at == path]


def _between(recorded: RecordedGraph, start: set[RecordedNode], ends: list[RecordedNode]) -> set[RecordedNode]:
    """The nodes that `ends` depend on and that are not in `start` nor before it."""
    found: set[RecordedNode] = set()
    pending = list(recorded.recorded_inputs(ends))
    while pending:
        node = pending.pop()
        if node not in found and node not in start and node.op == "call_function":
            found.add(node)
            pending.extend(source for source in inputs_of(node) if source not in recorded.constant)
    return found


def _random_op_between(call: SiteCall) -> fx.Node | None:
    """An op that consumes random numbers between the MLP's first and last op and is not part of it, if there is one.

    Run in one piece, the MLP would then sample other numbers than the model does.
    """
    position, nodes = call.recorded.position, call.bound.nodes
    first, last = min(position[n] for n in nodes - call.recorded.constant), position[call.bound.y]
    return next((n for n, at in position.items() if first < at < last and n not in nodes and _is_random(n)), None)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
