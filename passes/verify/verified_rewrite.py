"""Edits a module tree or a graph by a plan, with the checks before and after the edit.

Flow: (fingerprints of every tensor → the checks before) → the edit → the checks after. A module tree in which a check fails is
as before when the function returns; a graph is never edited in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import fingerprints
from memrewrite.passes.models.forward import evaluating, warm_up
from memrewrite.passes.rewrite.edit_graph import emit_graph
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.verify.evidence import AfterEdit, BeforeEdit, failed
from memrewrite.passes.verify.null_check import run_with_originals
from memrewrite.passes.verify.null_train_check import null_train
from memrewrite.passes.verify.verify import before_editing, verify, verify_graph
from memrewrite.plans import Plan
from memrewrite.report import Check

Step = Callable[[str], None]  # receives the name of a stage as it begins


class Rewrite(NamedTuple):
    """The rewritten model (a module tree in which a check failed is as before), and the checks."""

    model: nn.Module
    checks: tuple[Check, ...]


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
    if not with_checks:
        step("substituting")
        substitute(model, plan, hosts=hosts).commit()
        return Rewrite(model, ())
    step("fingerprinting every tensor")
    prints = fingerprints(model)
    step("checking the plan with the original MLPs wrapped")
    before = BeforeEdit(model, plan, capture, locations, hosts)
    with evaluating(model):
        if not before.on_meta:
            warm_up(model, capture.inputs)
        first, reached = before_editing(before, lambda gradients: run_with_originals(before, gradients=gradients), null_train)
    if failed(first):
        return Rewrite(model, first)
    step("substituting")
    edit = substitute(model, plan, hosts=hosts)
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
    step("verifying")
    try:
        with evaluating(model):
            checks = (*first, *verify(after))
    except BaseException:
        edit.revert()
        raise
    if failed(checks):
        edit.revert()
    edit.commit()
    return Rewrite(model, checks)


def rewrite_graph(plan: Plan, capture: Capture, locations: LocatedSites, *, with_checks: bool, step: Step) -> Rewrite:
    """Edit a copy of the captured graph; `locations` are bound to it, and `step` receives the name of each stage."""
    step("rewriting the graph")
    result, layers = emit_graph(capture.segments[0], plan, locations)
    if not with_checks:
        return Rewrite(result, ())
    step("verifying")
    return Rewrite(result, verify_graph(result, layers, plan, capture, locations))
