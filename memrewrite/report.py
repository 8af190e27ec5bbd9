"""What a rewrite did and what was proved about it: checks with outcome, number and sentence; totals before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PrivateAttr

from memrewrite.cost import Cost
from memrewrite.frozen import Frozen
from memrewrite.plans import Plan

if TYPE_CHECKING:
    from torch import nn

Outcome = Literal["passed", "failed", "skipped"]


class Check(Frozen):
    """One named check: how it ended, the number it rests on, and a sentence. `skipped` says why in the sentence."""

    name: str
    outcome: Outcome
    number: float
    sentence: str


class Report(Frozen):
    """The outcome of one rewrite. `model` is the rewritten model (not part of the JSON)."""

    plan: Plan
    checks: tuple[Check, ...]
    parameters_before: int
    parameters_after: int
    before: Cost  # of the selected MLPs, per token
    after: Cost  # of what took their place, per token
    seconds: float
    _model: nn.Module | None = PrivateAttr(default=None)

    @property
    def model(self) -> nn.Module:
        """The rewritten model: the same object for a live module, a new GraphModule for a traced one."""
        if self._model is None:
            raise AttributeError("this report was read from a file and holds no model; use memrewrite.load")
        return self._model

    def of_model(self, model: nn.Module) -> Report:
        """This report, holding the rewritten model."""
        self._model = model
        return self

    @property
    def ok(self) -> bool:
        """True when no check failed."""
        return all(c.outcome != "failed" for c in self.checks)
