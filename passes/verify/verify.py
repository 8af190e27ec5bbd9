"""Runs the checks before and after an edit, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from memrewrite.errors import ModelError, in_one_line
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.initialize.measure import Measured, Probe
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import fingerprints
from memrewrite.passes.models.forward import warm_up
from memrewrite.passes.rewrite.edit_graph import copy_of, graph_module_of
from memrewrite.passes.rewrite.look import Step, ignore
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.verify.checks import CHECKS, untouched
from memrewrite.passes.verify.evidence import AfterEdit, BeforeEdit, RewrittenModel, checked, skipped
from memrewrite.passes.verify.gradient_flow import reached
from memrewrite.passes.verify.measured_mlps import run_originals
from memrewrite.passes.verify.mlp_locality import locality
from memrewrite.passes.verify.null_check import null, refuse_unrepeatable
from memrewrite.plans import Plan
from memrewrite.report import Check

log = logging.getLogger("memrewrite")

Model = TypeVar("Model", bound=RewrittenModel)


def verify(after: AfterEdit, step: Step = ignore) -> tuple[Check, ...]:
    """All checks after the edit, in order; only a failed *coverage* for a model that does not run any more.

    `step` receives the name of each check as it begins. The caller guards the model's state: as in `capture`, what the first
    forward changes stays for the checks.
    """
    step(name_of(untouched))
    same = untouched(after)  # before the first forward, in which a model may change its own tensors
    step("verifying")
    broken = _broken(after)
    return (broken,) if broken else tuple(same if check is untouched else stepped(check, after, step) for check in CHECKS)


def stepped(check: Callable[[Model], Check], after: Model, step: Step) -> Check:
    """The outcome of a check; `step` receives its name before."""
    step(name_of(check))
    return check(after)


def name_of(check: Callable[..., Check]) -> str:
    """The name of the stage in which a check runs."""
    return f"check {check.__name__}"


def _broken(after: AfterEdit) -> Check | None:
    """A failed check if the model does not run: its code may read weights of a module that was replaced."""
    if after.on_meta:
        return None
    try:
        warm_up(after.model, after.inputs)
    except ModelError as refused:  # any error of the model's code is a finding
        log.debug("the rewritten model does not run", exc_info=True)
        hint = "where the model's code uses the replaced module, add the layer to the MLP (`placement: parallel`)"
        return checked(
            "coverage", False, 0, f"the rewritten model does not run: {in_one_line(refused.__cause__ or refused)}", hint
        )
    return None


def before_editing(
    before: BeforeEdit,
    run_wrapped: Callable[[bool], tuple[Any, dict[str, OriginalMLP]]],
    in_train_mode: Callable[[BeforeEdit], Check],
    step: Step = ignore,
) -> tuple[tuple[Check, ...], frozenset[str]]:
    """The checks before the edit, in order, up to *null* if it fails; and the sites that the outputs depend on.

    Raises `ModelError` for a model that does not repeat its outputs: no check could tell it from a wrong rewrite.
    `run_wrapped` runs the model with the original MLPs in the layers' places, with gradients if its argument is True.
    """
    sites = frozenset[str]()
    if before.on_meta:
        check = skipped("null", "the model is on meta: there are no values to compare")
    else:
        refuse_unrepeatable(before)
        check = null(before, run_wrapped(False)[0])
        if check.outcome == "failed":
            return (check,), sites
        sites = reached(*run_wrapped(True))
    step("check null_train")
    trained = in_train_mode(before)
    step(name_of(locality))
    return (check, trained, locality(before)), sites


def captured(capture: Capture) -> tuple[Check, ...]:
    """Does the program that was exported from a live model compute what the model computes? No check for other graphs."""
    far = capture.distance
    if far is None:
        return ()
    sentence = f"the exported program's outputs are {far}" + (" to" if far.exact else " from") + " the live model's"
    if not far.rounding:  # `apply` was asked to accept it
        return (skipped("capture", f"{sentence}, as was allowed"),)
    return (checked("capture", True, far.relative, sentence),)


def verify_graph(
    result: nn.Module,
    layers: Mapping[str, nn.Module],
    plan: Plan,
    capture: Capture,
    locations: LocatedSites,
    after: Sequence[Callable[[AfterEdit], Check]] = CHECKS,
    *,
    start: Callable[[Mapping[str, Measured]], None] = lambda _: None,
    step: Step = ignore,
) -> tuple[Check, ...]:
    """The checks of a graph that was rewritten to `result`, with `layers` by site path; `after` are those after the edit.

    `start` receives what the MLPs do on the example inputs, by site path, before the checks after the edit, and `step` the name
    of each check as it begins.
    """
    segment = capture.segments[0]
    original = copy_of(graph_module_of(segment))

    probe = Probe(s.site for s in plan.substitutions)

    def run_wrapped(gradients: bool) -> tuple[Any, dict[str, OriginalMLP]]:
        return run_originals(plan, capture, locations, None if gradients else probe, gradients=gradients)

    one_mode = "a graph is checked as it was given: in one mode"
    before = BeforeEdit(original, plan, capture, locations)
    first, sites = before_editing(before, run_wrapped, lambda _: skipped("null_train", one_mode), step)
    start(probe.measured())
    rewritten = AfterEdit(
        model=result,
        plan=plan,
        inputs=capture.inputs,
        layers=layers,
        reached=sites,
        capture=capture,
        locations=locations,
        fingerprints=fingerprints(original),
    )
    return (*captured(capture), *first, *(stepped(check, rewritten, step) for check in after))
