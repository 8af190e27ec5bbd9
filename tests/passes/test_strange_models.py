"""Models and inputs that torch accepts and few people write: each is rewritten, or refused with one error that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
from strange_models import STRANGE

import memrewrite
from memrewrite.errors import CaptureError, MemrewriteError, ModelError, SelectError, VerificationError
from memrewrite.layers.pool import find_pools

CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "inspect": memrewrite.inspect,
    "plan": lambda model, inputs: memrewrite.plan(model, tiny.recipe(), inputs),
    "parallel": lambda model, inputs: memrewrite.apply(model, tiny.recipe("parallel"), inputs),
    "replace": lambda model, inputs: memrewrite.apply(model, tiny.recipe("replace"), inputs),
}
# What `apply` in parallel answers; a model that is not named here is rewritten or refused as it may be.
ANSWERS: dict[str, tuple[type[MemrewriteError], str] | None] = {
    "plain": None,
    "zero batch": (ModelError, "get no token from the example inputs"),
    "zero tokens": (ModelError, "get no token from the example inputs"),
    "expanded": None,
    "requires grad": None,
    "with autograd history": None,
    "COO input": None,
    "CSR input": None,
    "mkldnn input": None,
    "quantized input": (CaptureError, "torch cannot trace a tensor (qint8"),
    "meta input": (ModelError, "an example input has no values"),
    "fake input": (ModelError, "an example input has no values"),
    "nested input": (ModelError, "is a nested tensor"),
    "jagged input": (ModelError, "is a nested tensor"),
    "inference input": (ModelError, "is an inference tensor"),
    "inference input of a normal model": None,
    "fake weights": (ModelError, "is a fake tensor"),
    "input is a buffer of the model": None,
    "a string": (ModelError, "the example inputs are a str"),
    "no example inputs": (ModelError, "no example inputs were given"),
    "a tuple with a generator": (ModelError, "can be read only once"),
    "a tuple with an iterator": (ModelError, "can be read only once"),
    "an object that cannot be copied": (ModelError, "cannot be copied"),
    "returns None": (SelectError, "no MLP was found"),
    "returns a sparse tensor": None,
    "raises at call 1": (ModelError, "ValueError: no more"),
    "exits at call 1": (ModelError, "SystemExit: 3"),
    "exits at call 2": (ModelError, "SystemExit: 3"),
    "recurses without end": (ModelError, "RecursionError"),
    "no parameters": (SelectError, "no MLP was found"),
    "no super().__init__()": (ModelError, "is not initialised"),
    "a lazy module": (ModelError, "has no shape yet"),
    "None": (ModelError, "not an nn.Module"),
    "not a module": (ModelError, "not an nn.Module"),
    "a class of modules": (ModelError, "not an nn.Module"),
    "dynamically quantized": (SelectError, "no MLP was found"),
    "COO weight": None,
    "CSR weight": None,
    "weight on meta": (ModelError, "a part of the model is on meta"),
    "all on meta": None,
    "sparse buffer": None,
    "conjugate buffer": None,
    "compiled": (ModelError, "the result of torch.compile"),
    "hook that exits": (ModelError, "SystemExit"),
}


def answer(name: str, call: str) -> MemrewriteError | None:
    """The error of one call; an error of another class than ours is raised. The model keeps no layer after an error."""
    model, inputs = STRANGE[name]()
    caught: MemrewriteError | None = None
    try:
        CALLS[call](model, inputs)
    except (ModelError, CaptureError, SelectError, VerificationError) as error:
        caught = error
    if caught is not None:
        assert caught.what and caught.hint  # noqa: PT018
        if hasattr(model, "_modules"):
            assert find_pools(model) is None
            assert not model._forward_pre_hooks or name.startswith("hook")
    return caught


@pytest.mark.parametrize("name", ANSWERS)
def test_a_strange_model_is_rewritten_or_refused_with_one_error(name: str) -> None:
    error, expected = answer(name, "parallel"), ANSWERS[name]
    if expected is None:
        assert error is None, error
    else:
        assert type(error) is expected[0], error
        assert expected[1] in error.what


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", STRANGE)
def test_every_call_answers_or_refuses(name: str, call: str) -> None:
    answer(name, call)
