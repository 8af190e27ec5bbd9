"""Edits a module tree or a graph by a plan, with the checks before and after the edit.

Flow: (fingerprints of every tensor → the checks before) → the edit → the checks after. A module tree in which a check fails is
as before when the function returns; a graph is never edited in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.initialize.measure import Measured, Probe
from memrewrite.passes.initialize.output_scale import NO_TOKEN, ON_META, set_scales
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import fingerprints
from memrewrite.passes.models.forward import evaluating, on_meta, warm_up
from memrewrite.passes.rewrite.edit_graph import emit_graph
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.rewrite.look import Step
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.rewrite.undo_log import UndoLog
from memrewrite.passes.verify.evidence import AfterEdit, BeforeEdit, failed
from memrewrite.passes.verify.measured_mlps import measured_graph, measured_module
from memrewrite.passes.verify.null_check import run_with_originals
from memrewrite.passes.verify.null_train_check import null_train
from memrewrite.passes.verify.verify import before_editing, verify, verify_graph
from memrewrite.plans import Plan
from memrewrite.report import Check, LayerScale


class Rewrite(NamedTuple):
    """The rewritten model (a module tree in which a check failed is as before), the checks, and how large layers start."""

    model: nn.Module
    checks: tuple[Check, ...]
    scales: tuple[LayerScale, ...] = ()


def rewrite_module(
    model: nn.Module,
    plan: Plan,
    capture: Capture,
    locations: LocatedSites,
    hosts: Mapping[str, GraphHost],
    *,
    with_checks: bool,
    step: Step,
) -> Rewrite:
    """Edit `model` in place. `hosts` are the modules whose forward becomes a graph; `step` receives the name of each stage."""
    before = BeforeEdit(model, plan, capture, locations, hosts)
    if not with_checks:
        edit, scales = _substituted(before, measured_module(before) if plan.measured else {}, step)
        edit.commit()
        return Rewrite(model, (), scales)
    step("fingerprinting every tensor")
    prints = fingerprints(model)
    step("checking the plan with the original MLPs wrapped")
    probe = Probe(s.site for s in plan.substitutions)
    with evaluating(model):
        if not before.on_meta:
            warm_up(model, capture.inputs)
        first, reached = before_editing(before, partial(_run_wrapped, before, probe), null_train, step)
    if failed(first):
        return Rewrite(model, first)
    edit, scales = _substituted(before, probe.measured(), step)
    after = AfterEdit(
        model=model,
        plan=plan,
        inputs=capture.inputs,
        layers=dict(edit.layers),
        reached=reached,
        capture=capture,
        locations=locations,
        fingerprints=prints,
    )
    try:
        with evaluating(model):
            checks = (*first, *verify(after, step))
    except BaseException:
        edit.revert()
        raise
    if failed(checks):
        edit.revert()
    edit.commit()
    return Rewrite(model, checks, scales)


def _run_wrapped(before: BeforeEdit, probe: Probe, gradients: bool) -> tuple[Any, dict[str, OriginalMLP]]:
    return run_with_originals(before, gradients=gradients, probe=None if gradients else probe)


def _substituted(before: BeforeEdit, measured: Mapping[str, Measured], step: Step) -> tuple[UndoLog, tuple[LayerScale, ...]]:
    """Place the layers, at the scales at which they start."""
    step("substituting")
    edit = substitute(before.model, before.plan, hosts=before.hosts)
    try:
        without = ON_META if before.on_meta else NO_TOKEN
        return edit, set_scales(before.plan, edit.layers, measured, without=without)
    except BaseException:
        edit.revert()
        raise


def rewrite_graph(plan: Plan, capture: Capture, locations: LocatedSites, *, with_checks: bool, step: Step) -> Rewrite:
    """Edit a copy of the captured graph; `locations` are bound to it, and `step` receives the name of each stage."""
    step("rewriting the graph")
    result, layers = emit_graph(capture.segments[0], plan, locations)
    scales: list[LayerScale] = []

    def start(measured: Mapping[str, Measured]) -> None:
        scales.extend(set_scales(plan, layers, measured, without=ON_META if on_meta(result) else NO_TOKEN))

    checks: tuple[Check, ...] = ()
    if with_checks:
        step("verifying")
        checks = verify_graph(result, layers, plan, capture, locations, start=start, step=step)
    else:
        start(measured_graph(plan, capture, locations) if plan.measured else {})
    return Rewrite(result, checks, tuple(scales))
