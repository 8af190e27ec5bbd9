"""A failed check names its cause, with a hint where the model or the recipe is it; only our own defects ask for a report."""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import ModelError, VerificationError
from memrewrite.passes.verify import mlp_locality
from memrewrite.passes.verify.evidence import checked, refuse_failed, skipped
from memrewrite.passes.verify.mlp_locality import Outcome
from memrewrite.report import Check


def with_head(forward: Callable[[Tensor], Tensor]) -> tiny.Tiny:
    """A model whose head computes `forward` of its logits."""
    model = tiny.modular()

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return forward(super().forward(x))

    model.head.__class__ = Head
    return model


def failure(model: nn.Module, recipe: dict[str, Any] | None = None, inputs: Any = None) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        memrewrite.apply(model, recipe or tiny.recipe(), (tiny.tokens(),) if inputs is None else inputs)
    assert caught.value.hint
    return caught.value


# ----------------------------------------------------------------------------------------------- not deterministic


def counting() -> Callable[[Tensor], Tensor]:
    numbers = itertools.count(1)
    return lambda x: x + next(numbers)


def alternating() -> Callable[[Tensor], Tensor]:
    numbers = itertools.count()
    return lambda x: x + next(numbers) % 2


def own_generator() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator()
    return lambda x: x + torch.rand(x.shape[-1], generator=generator)


NOT_DETERMINISTIC: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "random numbers of the system": lambda: lambda x: x + secrets.randbelow(2**20),
    "an own generator": own_generator,
    "a counter": counting,
    "a counter of two": alternating,
    "an address": lambda: lambda x: x + id(object()) % 997 * random.random(),
}


@pytest.mark.parametrize("name", NOT_DETERMINISTIC)
def test_a_model_that_does_not_repeat_is_named_as_the_cause(name: str) -> None:
    model = with_head(NOT_DETERMINISTIC[name]())
    photograph = tiny.Photograph(model)
    with pytest.raises(ModelError, match="the model is not deterministic") as caught:
        memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),))
    assert "output elements" in caught.value.what
    assert "verify: off" in str(caught.value.hint)
    assert "report" not in str(caught.value.hint)
    assert caught.value.exit_code == 2
    assert not photograph.differences(tiny.Photograph(model))


def test_a_model_with_torch_s_random_numbers_is_deterministic_from_a_seed() -> None:
    assert memrewrite.apply(with_head(lambda x: x + torch.rand_like(x)), tiny.recipe(), (tiny.tokens(),)).ok


# ----------------------------------------------------------------------------------------------- not finite, or zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_is_named_as_the_cause(bad: float) -> None:
    model = tiny.modular()
    with torch.no_grad():
        model.embed.weight.fill_(bad)
    error = failure(model)
    assert "the model itself computes" in error.what
    assert "not finite as the input of the MLP 'blocks.0.mlp'" in error.what
    assert "run the original model" in str(error.hint)
    assert "report" not in str(error.hint)


def test_inputs_of_zeros_are_named_as_the_cause() -> None:
    model = tiny.modular()
    for block in model.blocks:
        nn.init.zeros_(block.norm2.weight)
        nn.init.zeros_(block.norm2.bias)
    error = failure(model)
    assert "the input of the MLP 'blocks.0.mlp' is all zeros" in error.what
    assert error.hint == "give other example inputs"


def test_a_layer_that_overflows_is_named_as_the_cause() -> None:
    model = tiny.modular().half()
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight.fill_(6e4)
    error = failure(model, tiny.recipe("parallel"))
    assert error.report is not None
    told = {check.name: check for check in error.report.checks if check.outcome == "failed"}
    assert any("not finite" in check.sentence and check.hint for check in told.values()), told


# ----------------------------------------------------------------------------------------------- what the model does


def test_code_that_reads_a_replaced_module_is_told_what_to_try() -> None:
    class ReadsWeights(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            assert self.mlp.down.weight.isfinite().all()
            return super().forward(x)

    model = tiny.modular()
    model.blocks[0].__class__ = ReadsWeights
    error = failure(model)
    assert "the rewritten model does not run: ModelError: the model's code reads values" in error.what
    assert "placement: parallel" in str(error.hint)
    assert "report" not in str(error.hint)


def test_a_forward_that_decides_by_values_is_told_what_to_try() -> None:
    class Decides(tiny.Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return super().forward(y) if float(self.mlp(x).abs().mean()) < self.limit else y

    model = tiny.modular()
    model.blocks[1].__class__ = Decides
    x = model.embed(tiny.tokens()) + model.positions[:5]
    mean = float(model.blocks[1].mlp(model.blocks[0](x)).abs().mean())
    for limit in (mean * 0.5, mean * 2):  # with one of both, the layer's output leads to the other branch
        model.blocks[1].limit = limit
        try:
            memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),))
        except VerificationError as error:
            assert "ran" in error.what  # noqa: PT017
            assert "decides by values" in str(error.hint)  # noqa: PT017
            return
        model = tiny.modular()
        model.blocks[1].__class__ = Decides
    pytest.skip("this torch captures such a block whole")


def test_an_mlp_that_mixes_tokens_is_told_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_locality, "_outcome", lambda *_: Outcome("token 1 moved", 0.5))
    error = failure(tiny.modular())
    assert error.what == "the check 'locality' failed: in the MLP 'blocks.0.mlp' token 1 moved"
    assert "leave this MLP out of `where`" in str(error.hint)


# ----------------------------------------------------------------------------------------------- defects of memrewrite


def test_a_check_without_such_a_cause_asks_for_a_report() -> None:
    with pytest.raises(VerificationError) as caught:
        refuse_failed([skipped("a", "x"), checked("frame", False, 1, "differs")], where="model", hint="please report it")
    assert caught.value.hint == "please report it"
    with pytest.raises(VerificationError) as caught:
        refuse_failed([checked("gradient", False, 1, "none", "try this")], where="model", hint="please report it")
    assert caught.value.hint == "try this"


def test_a_passed_check_has_no_hint_and_old_reports_are_read() -> None:
    assert checked("frame", True, 1, "same", "try this").hint == ""
    old = {"name": "frame", "outcome": "failed", "number": 1, "sentence": "differs"}
    assert Check.model_validate(old).hint == ""
