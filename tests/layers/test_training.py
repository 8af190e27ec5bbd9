"""Values have their own learning rate, and every parameter is in exactly one group."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

import memrewrite
from memrewrite.layers.pool import Pool


def ids(groups: list[dict[str, Any]]) -> list[int]:
    return [id(p) for group in groups for p in group["params"]]


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("name", ["modular", "shared", "gpt2"])
def test_the_groups_contain_every_parameter_exactly_once(name: str, placement: str) -> None:
    model, _ = tiny.rewritten(name, placement)
    found = ids(memrewrite.param_groups(model, 1e-3))
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


def test_values_learn_ten_times_as_fast_and_do_not_decay() -> None:
    model, _ = tiny.rewritten("modular")
    rest, values = memrewrite.param_groups(model, 1e-3)
    assert values["params"] == [model.memory.shared.values]
    assert (rest["lr"], values["lr"]) == (1e-3, pytest.approx(1e-2))
    assert (rest["weight_decay"], values["weight_decay"]) == (0.1, 0.0)


def test_rates_and_decays_can_be_set() -> None:
    model, _ = tiny.rewritten("modular")
    rest, values = memrewrite.param_groups(model, 1e-3, 0.0, weight_decay=0.2, value_decay=0.3)
    assert values["lr"] == 0.0
    assert (rest["weight_decay"], values["weight_decay"]) == (0.2, 0.3)


def test_frozen_parameters_are_omitted() -> None:
    model, _ = tiny.rewritten("modular", "parallel")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory" in name)
    found = ids(memrewrite.param_groups(model, 1e-3))
    assert set(found) == {id(p) for n, p in model.named_parameters() if "memory" in n}
    model.memory.shared.values.requires_grad_(False)
    assert memrewrite.param_groups(model, 1e-3)[1]["params"] == []


def test_every_table_is_among_the_values() -> None:
    model, inputs = tiny.named("modular")
    rules = [
        {"where": {"layers": [n]}, "with": "memory_plus", "pool": pool, "options": {"heads": 1, "topk": 2}}
        for n, pool in enumerate(("one", "other"))
    ]
    recipe = {"memrewrite": 1, "pools": {"one": {"keys": 4}, "other": {"keys": 4}}, "replace": rules, "verify": "off"}
    memrewrite.apply(model, recipe, inputs)
    values = memrewrite.param_groups(model, 1e-3)[1]["params"]
    assert {id(p) for p in values} == {id(m.values) for m in model.modules() if isinstance(m, Pool)}


def test_a_model_without_memory_has_an_empty_second_group() -> None:
    rest, values = memrewrite.param_groups(tiny.modular(), 1e-3)
    assert values["params"] == []
    assert len(rest["params"]) == len(list(tiny.modular().parameters()))


def fitted(model: nn.Module, inputs: dict[str, Any], steps: int = 12) -> list[float]:
    """Losses of a regression on a random target."""
    target = torch.randn(2, 5, tiny.VOCABULARY, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model.train(), 3e-3))
    losses = []
    for _ in range(steps):
        loss = (model(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("name", ["modular", "loose"])
def test_the_loss_falls(name: str, placement: str) -> None:
    losses = fitted(*tiny.rewritten(name, placement))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_the_memory_alone_learns(placement: str) -> None:
    model, inputs = tiny.rewritten("modular", placement)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory" in name or (placement == "replace" and ".mlp." in name))
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = fitted(model, inputs)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert losses[-1] < losses[0]
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_layer_that_starts_at_zero_leaves_zero_and_then_its_values_learn() -> None:
    model, inputs = tiny.rewritten("modular", "parallel")
    values = model.memory.shared.values
    start = values.clone()
    fitted(model, inputs, steps=1)
    assert torch.equal(values, start)  # the first gradient reaches the output projection alone
    fitted(model, inputs, steps=2)
    assert not torch.equal(values, start)


def test_training_is_repeatable() -> None:
    assert fitted(*tiny.rewritten("modular")) == fitted(*tiny.rewritten("modular"))
