"""Layers of a model that was on meta when it was rewritten are scaled to the MLPs that stayed in it."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import starts
import tiny
import torch
from torch import nn

import memrewrite
from memrewrite.errors import ModelError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pool
from memrewrite.passes.rewrite.edit_module import layers_of

INPUTS = (tiny.tokens(),)


def from_meta(where: dict[str, Any], init: Any = None) -> tuple[Any, memrewrite.Report]:
    """A model that was rewritten on meta, then given the values of `mup`, and its report."""
    with torch.device("meta"):
        model = tiny.modular()
    recipe = tiny.recipe(where=where)
    recipe["replace"][0]["init"] = init or {}
    report = memrewrite.apply(model, recipe, INPUTS)
    model.to_empty(device="cpu").load_state_dict(starts.mup().state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (MemoryLayer, Pool)):
            module.reset_parameters(generator)
    return model, report


def test_layers_are_matched_to_the_mlps_that_stayed() -> None:
    model, report = from_meta({"layers": [1]}, {"output": 0.5})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scales = memrewrite.match_outputs(model, INPUTS)
    original = starts.mup()
    sites = memrewrite.inspect(original, INPUTS).sites
    calls = [starts.calls_of(original, {"ids": INPUTS[0]}, site) for site in sites]
    (layer,) = layers_of(model, report.plan).values()
    assert isinstance(layer, MemoryLayer)
    target = median(starts.rms(calls[number][1], tiny.WIDTH) for number in (0, 2))
    with torch.no_grad():
        assert starts.rms(layer(calls[1][0]), tiny.WIDTH) == pytest.approx(0.5 * target, rel=0.02)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"blocks.1.mlp.value_proj.weight"}  # its bias is zero
    saved = memrewrite.Report.model_validate_json(model.memory.record.report)
    assert saved.scales == scales
    again = memrewrite.match_outputs(model, INPUTS)
    assert again[0].layer == pytest.approx(scales[0].layer, rel=1e-5)


def test_without_mlps_layers_are_matched_to_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = from_meta({"all": True})
    scales = memrewrite.match_outputs(model, INPUTS)
    for scale in scales:
        assert scale.stream is not None
        assert scale.layer == pytest.approx(0.1 * scale.stream, rel=1e-4)
        assert "no MLP stayed in 'blocks'" in scale.note
    assert sum("no MLP stayed" in message for message in caplog.messages) == tiny.BLOCKS


def test_other_starts_are_kept() -> None:
    model, _ = from_meta({"all": True}, {"output": "paper"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(scale.note == "" for scale in memrewrite.match_outputs(model, INPUTS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_cannot_be_matched() -> None:
    with torch.device("meta"):
        model: nn.Module = tiny.modular()
    memrewrite.apply(model, tiny.recipe(), INPUTS)
    with pytest.raises(ModelError, match="on meta") as caught:
        memrewrite.match_outputs(model, INPUTS)
    assert "to_empty" in str(caught.value.hint)
    with pytest.raises(ModelError, match="no memory pool"):
        memrewrite.match_outputs(tiny.modular(), INPUTS)
