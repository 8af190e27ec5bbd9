"""Runs a model with its selected MLPs wrapped, so that what they do on the example inputs is measured."""

from __future__ import annotations

from typing import Any

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.initialize.measure import Measured, Probe
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.forward import evaluating, on_meta, run, warm_up
from memrewrite.passes.rewrite.edit_graph import emit_originals, graph_module_of
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.verify.evidence import BeforeEdit
from memrewrite.passes.verify.null_check import run_with_originals, watching
from memrewrite.plans import Plan


def measured_module(before: BeforeEdit) -> dict[str, Measured]:
    """What the MLPs of a live model do on its inputs, by site path; nothing on meta. The model is as before afterwards."""
    probe = Probe(s.site for s in before.plan.substitutions)
    if not before.on_meta:
        with evaluating(before.model):
            warm_up(before.model, before.capture.inputs)
            run_with_originals(before, probe=probe)
    return probe.measured()


def measured_graph(plan: Plan, capture: Capture, locations: LocatedSites) -> dict[str, Measured]:
    """What the MLPs of a captured graph do on its inputs, by site path; nothing on meta."""
    probe = Probe(s.site for s in plan.substitutions)
    if not on_meta(graph_module_of(capture.segments[0])):
        run_originals(plan, capture, locations, probe)
    return probe.measured()


def run_originals(
    plan: Plan, capture: Capture, locations: LocatedSites, probe: Probe | None, *, gradients: bool = False
) -> tuple[Any, dict[str, OriginalMLP]]:
    """A captured graph's outputs with every selected MLP replaced by itself, and these by site path; `probe` records them."""
    wrapped_graph, wrapped = emit_originals(capture.segments[0], plan, locations)
    with watching(probe, wrapped_graph, wrapped):
        return run(wrapped_graph, capture.inputs, gradients=gradients), wrapped
