"""Values have their own learning rate, and every parameter is in exactly one group."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import memrewrite
from memrewrite.errors import ModelError, UserError
from memrewrite.fused import DEFAULT_RULE
from memrewrite.layers.contract import MemoryLayer
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


@pytest.mark.parametrize("name", ["modular", "gpt2"])
def test_queries_and_keys_can_have_a_rate_of_their_own(name: str) -> None:
    model, inputs = tiny.named(name)
    recipe = tiny.recipe(verify="off")
    recipe["replace"][0]["options"]["qk_norm"] = True
    memrewrite.apply(model, recipe, inputs)
    groups = memrewrite.param_groups(model, 1e-2, key_lr=1e-4, weight_decay=0.2)
    assert [group["name"] for group in groups] == ["rest", "keys", "values"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.2), (1e-4, 0.2), (pytest.approx(0.1), 0.0)]
    everything = {id(p): name for name, p in model.named_parameters()}
    found = [[everything[i] for i in ids([group])] for group in groups]
    assert sorted(name for names in found for name in names) == sorted(everything.values())
    assert found[1] == [name for name in everything.values() if ".product_keys." in name]
    assert {name.rpartition(".product_keys.")[2] for name in found[1]} == {
        *("keys", "query.weight", "query.bias", "query_norm.weight", "key_norm.weight")
    }
    assert found[2] == ["memory.shared.values"]


def test_frozen_queries_and_keys_leave_an_empty_group() -> None:
    model, _ = tiny.rewritten("modular")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".product_keys." not in name)
    rest, keys, values = memrewrite.param_groups(model, 1e-3, key_lr=1e-4)
    assert (keys["params"], values["params"]) == ([], [model.memory.shared.values])
    assert len(rest["params"]) == sum(p.requires_grad for p in model.parameters()) - 1
    torch.optim.AdamW([rest, keys, values]).step()


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


@dataclass(frozen=True)
class Slow(memrewrite.RowwiseAdam):
    value_lr_factor: float = 4.0


@pytest.mark.parametrize("gradient", ["dense", "fused"])
def test_the_rate_of_the_values_is_that_of_the_rule(gradient: str) -> None:
    model, inputs = tiny.named("modular")
    memrewrite.apply(model, tiny.recipe(pools={"shared": {"keys": 8, "gradient": gradient}}, verify="off"), inputs)
    assert memrewrite.param_groups(model, 1e-3, rule=Slow())[1]["lr"] == 4e-3
    assert memrewrite.param_groups(model, 1e-3, 0.5, rule=Slow())[1]["lr"] == 0.5
    default = DEFAULT_RULE.value_lr_factor if gradient == "fused" else 10
    assert memrewrite.param_groups(model, 1e-3)[1]["lr"] == pytest.approx(default * 1e-3)


# ------------------------------------------------------------------------------------------------------------ schedules


def rates(values: Any, steps: int = 3) -> list[list[float]]:
    """The rates of both groups before each step and after the last, with a base rate that halves at each step."""
    optimizer = torch.optim.AdamW(memrewrite.param_groups(tiny.rewritten("modular")[0], 1.0, 8.0))
    scheduler = memrewrite.schedule(optimizer, lambda step: 0.5**step, values)
    found = [scheduler.get_last_lr()]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize(
    ("values", "wanted"),
    [("fixed", [8, 8, 8, 8]), ("same", [8, 4, 2, 1]), (lambda step: min(1.0, (step + 1) / 2), [4, 8, 8, 8])],
    ids=["fixed", "same", "function"],
)
def test_the_values_have_a_schedule_of_their_own(values: Any, wanted: list[float]) -> None:
    assert rates(values) == [[0.5**step, value] for step, value in enumerate(wanted)]


def test_the_rate_of_queries_and_keys_follows_the_schedule() -> None:
    """Each group keeps its own rate at the start; queries and keys have the factor of the rest, not that of the values."""
    optimizer = torch.optim.AdamW(memrewrite.param_groups(tiny.rewritten("modular")[0], 1.0, 8.0, key_lr=0.25))
    scheduler = memrewrite.schedule(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"rest": 0.5, "keys": 0.125, "values": 8.0}


def test_a_schedule_needs_the_groups_and_a_known_course() -> None:
    model = tiny.rewritten("modular")[0]
    with pytest.raises(UserError, match='no parameter group named "values"'):
        memrewrite.schedule(torch.optim.AdamW(model.parameters()), lambda step: 1.0)
    with pytest.raises(UserError, match="'constant'"):
        memrewrite.schedule(torch.optim.AdamW(memrewrite.param_groups(model, 1e-3)), lambda step: 1.0, "constant")


def test_a_resumed_schedule_continues() -> None:
    first = torch.optim.AdamW(memrewrite.param_groups(tiny.rewritten("modular")[0], 1.0, 8.0))
    second = torch.optim.AdamW(memrewrite.param_groups(tiny.rewritten("modular")[0], 1.0, 8.0))
    one, other = (memrewrite.schedule(each, lambda step: 0.5**step) for each in (first, second))
    for _ in range(3):
        first.step()
        one.step()
    stream = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "scheduler": one.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    second.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["scheduler"])
    for optimizer, scheduler in ((first, one), (second, other)):
        optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups] == [1 / 16, 8]


# ------------------------------------------------------------------------------------------------------- what is trained


def memory_names(model: nn.Module) -> set[str]:
    """Names of the parameters of pools and layers."""
    mine = {id(p) for m in model.modules() if isinstance(m, (Pool, MemoryLayer)) for p in m.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in mine}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("name", ["modular", "loose", "llama", "gpt2", "t5"])
def test_freezing_leaves_the_memory(name: str, placement: str) -> None:
    model, _ = tiny.rewritten(name, placement)
    everything = set(dict(model.named_parameters()))
    count = memrewrite.freeze(model)
    assert trained_names(model) == memory_names(model)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert memrewrite.freeze(model, "all") == sum(p.numel() for p in model.parameters())
    assert trained_names(model) == everything


def test_freezing_refuses() -> None:
    model = tiny.modular()
    with pytest.raises(ModelError, match="nothing would be trained"):
        memrewrite.freeze(model)
    with pytest.raises(UserError, match="'memory'"):
        memrewrite.freeze(model, "memory")  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())


def test_integers_are_never_trained() -> None:
    model, _ = tiny.rewritten("modular")
    model.extra = nn.Parameter(torch.arange(3), requires_grad=False)
    memrewrite.freeze(model, "all")
    assert "extra" not in trained_names(model)


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("name", ["modular", "loose"])
def test_a_recipe_freezes_what_it_does_not_train_and_a_saved_model_stays_so(
    name: str, placement: str, emit: Any, tmp_path: Path
) -> None:
    """All checks pass; a model whose graph was emitted keeps its own flags."""
    model, inputs = tiny.named(name)
    report = memrewrite.apply(model, tiny.recipe(placement, train="memory_only"), inputs, emit=emit)
    assert {check.outcome for check in report.checks} <= {"passed", "skipped"}
    assert report.plan.train == "memory_only"
    wanted = memory_names(report.model)
    assert trained_names(report.model) == wanted
    if emit == "graph":
        assert all(p.requires_grad for p in model.parameters())
        assert torch.equal(report.model.get_parameter("embed.weight"), model.embed.weight)
    memrewrite.save(report.model, tmp_path / "saved")
    loaded = memrewrite.load(tmp_path / "saved", tiny.named(name)[0] if emit == "module" else None, trust_code=True)
    assert trained_names(loaded) == wanted
    losses = fitted(report.model, inputs)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["modular", "loose", "llama"])
def test_a_model_that_is_frozen_already_can_be_rewritten(name: str) -> None:
    """The checks pass, new parameters are trained, and `train: all` unfreezes nothing."""
    model, inputs = tiny.named(name)
    model.requires_grad_(False)
    report = memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    assert next(check.outcome for check in report.checks if check.name == "gradient") == "passed"
    assert trained_names(model) == memory_names(model)


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
