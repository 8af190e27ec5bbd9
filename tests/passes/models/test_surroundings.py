"""`apply` gives the same model inside of the caller's modes as outside, and it can be trained; or it refuses to run there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memrewrite
from memrewrite.errors import ModelError

CONTEXTS: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_result_is_that_of_outside_and_can_be_trained(context: str, tmp_path: Any) -> None:
    inputs = (tiny.tokens(),)
    outside, model, base = tiny.modular(), tiny.modular(), tiny.modular()
    expected = memrewrite.apply(outside, tiny.recipe("replace"), inputs)
    memrewrite.save(outside, tmp_path / "out")
    with CONTEXTS[context]():
        report = memrewrite.apply(model, tiny.recipe("replace"), inputs)
        loaded = memrewrite.load(tmp_path / "out", base)
    assert report.checks == expected.checks
    for result in (model, loaded):
        for one, other in zip(result.parameters(), outside.parameters(), strict=True):
            assert (one.dtype, one.device, one.is_inference()) == (other.dtype, other.device, False)
            assert torch.equal(one, other)
        result(*inputs).sum().backward()
        assert result.memory.shared.values.grad.any()


def test_inside_of_modes_without_values_it_is_refused() -> None:
    model, inputs = tiny.modular(), (tiny.tokens(),)
    with FakeTensorMode(), pytest.raises(ModelError, match="inside of a FakeTensorMode"):
        memrewrite.inspect(model, inputs)
    with pytest.raises(ModelError, match=r"inside of a transform of torch\.func"):
        torch.func.grad(lambda x: (memrewrite.inspect(model, inputs), x.sum())[1])(torch.ones(3))


def test_in_compiled_code_it_runs_uncompiled() -> None:
    model, inputs = tiny.modular(), (tiny.tokens(),)

    def rewriting(x: torch.Tensor) -> torch.Tensor:
        memrewrite.apply(model, tiny.recipe("parallel"), inputs)
        return x + 1

    assert torch.equal(torch.compile(rewriting, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))
    assert "memory" in model._modules
