"""The checks before and after the edit, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import fingerprints
from memrewrite.passes.models.forward import run
from memrewrite.passes.rewrite.edit_graph import copy_of, emit_originals, traced_module
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.passes.verify.checks import CHECKS
from memrewrite.passes.verify.evidence import Evidence, checked, skipped
from memrewrite.passes.verify.gradient_flow import reached
from memrewrite.passes.verify.mlp_locality import locality
from memrewrite.passes.verify.null_check import null
from memrewrite.plans import Plan
from memrewrite.report import Check

log = logging.getLogger("memrewrite")


def verify(evidence: Evidence) -> tuple[Check, ...]:
    """Every check after the edit, in order; a model that does not run any more has failed the first."""
    broken = _broken(evidence)
    return (broken,) if broken else tuple(check(evidence) for check in CHECKS)


def _broken(evidence: Evidence) -> Check | None:
    """The model's own code may ask a module that is gone for its weights."""
    if evidence.on_meta:
        return None
    try:
        run(evidence.model, evidence.before.inputs)
    except Exception as error:  # whatever the model raises is the finding
        log.debug("the rewritten model does not run", exc_info=True)
        hint = "where its code uses the replaced module, put the layer beside it (`placement: parallel`)"
        return checked("coverage", False, 0, f"the rewritten model does not run: {type(error).__name__}: {error}; {hint}")
    return None


def before_editing(
    evidence: Evidence,
    run_wrapped: Callable[[bool], tuple[Any, dict[str, OriginalMLP]]],
    in_train_mode: Callable[[Evidence], Check],
) -> tuple[Check, ...]:
    """The checks with the original MLPs wrapped, up to one that fails; and which sites the outputs depend on."""
    if evidence.on_meta:
        check = skipped("null", "the model is on meta: there are no values to compare")
    else:
        check = null(evidence, run_wrapped(False)[0])
        if check.outcome == "failed":
            return (check,)
        evidence.reached = reached(*run_wrapped(True))
    return check, in_train_mode(evidence), locality(evidence)


def prove_graph(
    result: nn.Module,
    layers: Mapping[str, nn.Module],
    made: Plan,
    before: Capture,
    locations: LocatedSites,
    after: Sequence[Callable[[Evidence], Check]] = CHECKS,
) -> tuple[Check, ...]:
    """The checks of a graph that was rewritten to `result`, with `layers` by site path; `after` are those after the edit."""
    segment = before.segments[0]
    original = copy_of(traced_module(segment))
    evidence = Evidence(original, made, before, locations, fingerprints(original))

    def run_wrapped(gradients: bool) -> tuple[Any, dict[str, OriginalMLP]]:
        wrapped_graph, wrapped = emit_originals(segment, made, locations)
        return run(wrapped_graph, before.inputs, gradients=gradients), wrapped

    one_mode = "a graph is proved as it was given: in one mode"
    first = before_editing(evidence, run_wrapped, lambda _: skipped("null_train", one_mode))
    evidence = replace(evidence, model=result, layers=layers)
    return (*first, *(check(evidence) for check in after))
