"""What a rewrite did and what was checked: checks with outcome, number and sentence; totals before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PrivateAttr

from memrewrite.cost import Cost
from memrewrite.frozen import Frozen
from memrewrite.phases import Phase
from memrewrite.plans import Plan

if TYPE_CHECKING:
    from torch import nn

Outcome = Literal["passed", "failed", "skipped"]


class Check(Frozen):
    """One named check.

    Attributes:
        name: Name of the check, such as "null" or "frame".
        outcome: "passed", "failed" or "skipped".
        number: The measured number that decided it.
        sentence: The result in words; for "skipped", the reason.
        hint: For "failed": what to try where the model, its inputs or the recipe is the cause. Empty: a defect of memrewrite.
    """

    name: str
    outcome: Outcome
    number: float
    sentence: str
    hint: str = ""


LOUD = 3  # times the rms of the MLP


class LayerScale(Frozen):
    """How large a layer's output is at its start, measured on the example inputs.

    An rms is that of a token's features, and of all tokens the median; tokens of zeros are left out.

    Attributes:
        path: Path of the site.
        stream: rms of the residual stream where the site's block begins; None outside of a block, and in graphs.
        mlp: rms of the MLP's output. None: not measured, or not finite.
        layer: rms of the layer's output, on the MLP's input. None: not measured, or not finite.
        note: Why the layer does not start as the recipe says, or "".
    """

    path: str
    stream: float | None = None
    mlp: float | None = None
    layer: float | None = None
    note: str = ""

    @property
    def loud(self) -> bool:
        """True if the layer starts with more than 3 times the rms of its MLP."""
        return self.layer is not None and self.mlp is not None and self.layer > LOUD * self.mlp

    @property
    def remark(self) -> str:
        """What is unusual about it, in words; else ""."""
        return " · ".join(filter(None, (f"more than {LOUD} times its MLP" if self.loud else "", self.note)))


class Report(Frozen):
    """The result of one rewrite. The property `model` is not part of the JSON.

    Attributes:
        plan: The plan that was applied.
        checks: Every check; empty with `verify: off`.
        parameters_before: Parameters of the whole model before the rewrite.
        parameters_after: Parameters of the whole model after it.
        before: Cost of the selected MLPs per token.
        after: Cost of the new layers per token.
        seconds: Wall-clock time of the rewrite.
        scales: How large each layer starts, in the order of the plan; empty where nothing was measured, and in reports of
            earlier versions.
        phases: What the rewrite spent its time on, in order; empty in reports of earlier versions.
    """

    plan: Plan
    checks: tuple[Check, ...]
    parameters_before: int
    parameters_after: int
    before: Cost
    after: Cost
    seconds: float
    scales: tuple[LayerScale, ...] = ()
    phases: tuple[Phase, ...] = ()
    _model: nn.Module | None = PrivateAttr(default=None)

    @property
    def model(self) -> nn.Module:
        """The rewritten model: the same object for a live module, a new GraphModule for a traced model.

        Raises:
            AttributeError: The report was read from a file.
        """
        if self._model is None:
            raise AttributeError("this report was read from a file and has no model; use memrewrite.load")
        return self._model

    def of_model(self, model: nn.Module) -> Report:
        """Set the rewritten model and return this report."""
        self._model = model
        return self

    @property
    def ok(self) -> bool:
        """True when no check failed."""
        return all(c.outcome != "failed" for c in self.checks)
