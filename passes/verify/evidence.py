"""What the checks look at, and the questions several of them ask: hashes of tensors, outputs compared, outcomes spelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import Fingerprint
from memrewrite.passes.models.forward import on_meta
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.plans import Plan
from memrewrite.report import Check


@dataclass
class Evidence:
    """What the checks look at. `before` and `fingerprints` are from before the edit."""

    model: nn.Module
    plan: Plan
    before: Capture
    locations: LocatedSites
    fingerprints: Mapping[str, Fingerprint]
    reached: frozenset[str] = frozenset()  # sites that outputs depended on differentiably before
    hosts: Mapping[str, GraphHost] = field(default_factory=dict)  # the modules that become graphs
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by site path, as built

    @property
    def on_meta(self) -> bool:
        """No values to compare: the model is on `meta`."""
        return on_meta(self.model)


def new_modules(evidence: Evidence) -> list[nn.Module]:
    """The pools and the layers: what was not there before."""
    return [pools_of(evidence.model), *evidence.layers.values()]


def checked(name: str, good: bool, number: float, sentence: str) -> Check:
    """A check that was made, and how it ended."""
    return Check(name=name, outcome="passed" if good else "failed", number=number, sentence=sentence)


def skipped(name: str, why: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name=name, outcome="skipped", number=0, sentence=why)


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed."""
    return any(check.outcome == "failed" for check in checks)
