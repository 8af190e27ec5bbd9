"""`memrewrite plan` shows how large layers would start: what `apply` then measures."""

from __future__ import annotations

import pytest
import tiny
import torch

import memrewrite
from memrewrite.passes import forecast as forecasts
from memrewrite.passes.forecast import forecast


def recipe() -> dict[str, object]:
    """One layer each: matched, as in the paper, at zero."""
    rules = [tiny.recipe(where={"layers": [number]})["replace"][0] for number in range(3)]
    rules[1]["init"], rules[2]["init"] = {"output": "paper"}, {"output": "zero"}
    return tiny.recipe() | {"replace": rules}


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_the_forecast_is_what_apply_measures(emit: str) -> None:
    model, inputs = tiny.modular(), (tiny.tokens(),)
    given = torch.export.export(model, inputs) if emit == "graph" else model
    before = tiny.Photograph(model)
    plan, scales = forecast(given, recipe(), inputs)
    assert not before.differences(tiny.Photograph(model))
    report = memrewrite.apply(given, recipe(), inputs)
    assert (plan, scales) == (report.plan, report.scales)
    assert [scale.note for scale in scales] == [""] * 3


def test_a_large_pool_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "ENTRIES", 16 * tiny.WIDTH)
    plan, scales = forecast(tiny.modular(), recipe(), (tiny.tokens(),))
    assert plan == memrewrite.plan(tiny.modular(), recipe(), (tiny.tokens(),))
    assert [scale.note for scale in scales] == ["", "measured with 4² slots", ""]
    assert scales[0].layer == pytest.approx(scales[0].mlp)


def test_a_model_on_meta_has_no_forecast() -> None:
    with torch.device("meta"):
        model = tiny.modular()
    assert forecast(model, recipe(), (tiny.tokens(),))[1] == ()
