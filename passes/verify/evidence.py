"""What the checks look at before and after an edit, and how they report their outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from memrewrite.errors import VerificationError
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import Fingerprint
from memrewrite.passes.models.forward import Inputs, on_meta
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.plans import Plan
from memrewrite.report import Check, Outcome, Report


@dataclass(frozen=True)
class BeforeEdit:
    """The original model, its capture, and the MLPs that the plan selects."""

    model: nn.Module
    plan: Plan
    capture: Capture  # of the original
    locations: LocatedSites
    hosts: Mapping[str, GraphHost] = field(default_factory=dict)  # the modules whose forward becomes a graph, by path

    @property
    def on_meta(self) -> bool:
        """Whether the model is on `meta`: there are no values to compare."""
        return on_meta(self.model)


@dataclass(frozen=True)
class RewrittenModel:
    """A rewritten model, as far as it can be checked without the original."""

    model: nn.Module
    plan: Plan
    inputs: Inputs
    layers: Mapping[str, nn.Module]  # by site path, with their hooks
    reached: frozenset[str] = frozenset()  # sites that the original's outputs depend on differentiably, where they are known

    @property
    def on_meta(self) -> bool:
        """Whether the model is on `meta`: there are no values to compare."""
        return on_meta(self.model)

    def new_modules(self) -> list[nn.Module]:
        """The pools and the layers."""
        return [pools_of(self.model), *self.layers.values()]


@dataclass(frozen=True, kw_only=True)
class AfterEdit(RewrittenModel):
    """A rewritten model, with what is known about the original."""

    capture: Capture  # of the original
    locations: LocatedSites
    fingerprints: Mapping[str, Fingerprint]  # of the original's tensors


def checked(name: str, good: bool, number: float, sentence: str, hint: str = "") -> Check:
    """The outcome of a check that ran; `hint`: what to try if it failed because of the model, its inputs or the recipe."""
    outcome: Outcome = "passed" if good else "failed"
    return Check(name=name, outcome=outcome, number=number, sentence=sentence, hint="" if good else hint)


def skipped(name: str, why: str) -> Check:
    """The outcome of a check that could not run, and the reason."""
    return Check(name=name, outcome="skipped", number=0, sentence=why)


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed."""
    return any(check.outcome == "failed" for check in checks)


def refuse_failed(checks: Iterable[Check], *, where: str, hint: str, report: Report | None = None) -> None:
    """Raise `VerificationError` for the first check that failed, with the `report` of all checks where there is one.

    `hint` is for a check that names no cause outside of memrewrite.
    """
    first = next((check for check in checks if check.outcome == "failed"), None)
    if first is not None:
        error = VerificationError(f"the check {first.name!r} failed: {first.sentence}", where=where, hint=first.hint or hint)
        raise error if report is None else error.with_report(report)
