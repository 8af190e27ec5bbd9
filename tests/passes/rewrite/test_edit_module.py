"""Layers are placed in the module tree, in place; until it is committed, every edit can be undone."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import ModelError, SelectError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.memory_plus import MemoryPlus
from memrewrite.layers.pool import Pool, Pools
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import layers_of, substitute
from memrewrite.passes.rewrite.hooks import ZeroStub

PLACEMENTS = ("replace", "parallel")


def edited(name: str, placement: str) -> tuple[nn.Module, dict[str, Any], Any, Any]:
    """A model of the table, substituted and not committed; its inputs, the plan and the edit."""
    (model, inputs), plan = tiny.named(name), tiny.plan_of(name, placement)
    return model, inputs, plan, substitute(model, plan)


def calls_of_layers(model: nn.Module, inputs: dict[str, Any]) -> int:
    seen: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in model.modules() if isinstance(m, MemoryLayer)]
    tiny.values_of(model, inputs)
    for hook in hooks:
        hook.remove()
    return len(seen)


# -------------------------------------------------------------------------------------------------- where layers are placed

SITES = [  # model, how the first site is reached, layers, calls of layers in one forward
    ("modular", "module", 3, 3),
    ("sequential", "module", 3, 3),
    ("loose", "span", 3, 3),
    ("shared", "module", 1, 3),
    ("llama", "module", 3, 3),
    ("bert", "span", 3, 3),
    ("gpt2", "module", 3, 3),
    ("t5", "module", 4, 4),
    ("albert", "span", 1, 3),
    ("vit", "module", 2, 2),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("name", "kind", "layers", "calls"), SITES, ids=[row[0] for row in SITES])
def test_every_kind_of_binding(name: str, kind: str, layers: int, calls: int, placement: str) -> None:
    model, inputs = tiny.named(name)
    before = tiny.values_of(model, inputs)
    report = memrewrite.apply(model, tiny.recipe(placement), inputs)
    assert report.model is model
    assert report.plan.substitutions[0].site.bindings[0].kind == kind
    assert sum(isinstance(m, MemoryLayer) for m in model.modules()) == layers
    assert calls_of_layers(model, inputs) == calls
    assert torch.equal(tiny.values_of(model, inputs), before) == (placement == "parallel")


@pytest.mark.parametrize("name", ["modular", "loose", "shared", "albert"])
def test_layers_of_finds_what_was_placed(name: str) -> None:
    for placement in PLACEMENTS:
        model, _, plan, edit = edited(name, placement)
        assert layers_of(model, plan) == edit.layers


def test_a_replaced_mlp_leaves_none_of_its_parameters() -> None:
    model, _, plan, _ = edited("loose", "replace")
    names = dict(model.named_parameters())
    assert not [name for s in plan.substitutions for name in s.site.parameters if name in names]
    assert isinstance(model.blocks[0].up, ZeroStub)


def test_a_layer_in_parallel_gets_gradients() -> None:
    model, inputs = tiny.rewritten("loose", "parallel")
    tiny.open_up(model)
    model(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pools_of(model).parameters())


def test_a_layer_reads_what_the_mlp_read() -> None:
    model, inputs = tiny.named("loose")
    read: list[torch.Tensor] = []
    hook = model.blocks[0].up.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tiny.values_of(model, inputs)
    hook.remove()
    memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    model.blocks[0].down.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tiny.values_of(model, inputs)
    assert torch.equal(read[0], read[1])


def test_only_what_was_selected_changes() -> None:
    model, inputs = tiny.named("modular")
    kept = model.blocks[0].mlp
    memrewrite.apply(model, tiny.recipe(where={"layers": [1]}), inputs)
    assert model.blocks[0].mlp is kept
    assert isinstance(model.blocks[1].mlp, MemoryLayer)


# ---------------------------------------------------------------------------------------------------------- the pool


def test_one_pool_on_the_root_module() -> None:
    model, _ = tiny.rewritten("modular")
    assert isinstance(model.memory, Pools)
    assert [n for n in model.state_dict() if n.endswith(".values")] == ["memory.shared.values"]
    assert {id(m.pool) for m in model.modules() if isinstance(m, MemoryLayer)} == {id(model.memory.shared)}


def test_a_model_with_an_attribute_memory() -> None:
    model, inputs = tiny.named("modular")
    model.memory = nn.Linear(2, 2)
    report = memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    assert report.plan.root == "memrewrite_memory"
    assert isinstance(model.memory, nn.Linear)
    assert isinstance(model.memrewrite_memory, Pools)


def test_an_mlp_with_an_attribute_memory_is_refused_and_does_not_change() -> None:
    model, inputs = tiny.named("modular")
    model.blocks[1].mlp.memory = 3
    photograph = tiny.Photograph(model)
    with pytest.raises(ModelError, match="already has an attribute 'memory'"):
        memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    assert not photograph.differences(tiny.Photograph(model))


def test_an_already_rewritten_model_is_refused() -> None:
    model, inputs = tiny.rewritten("modular")
    with pytest.raises(ModelError, match="already rewritten"):
        memrewrite.apply(model, tiny.recipe(), inputs)


def test_two_pools_two_tables() -> None:
    model, inputs = tiny.named("modular")
    rules = [
        {"where": {"layers": [n]}, "with": "memory_plus", "pool": pool, "options": {"heads": 1, "topk": 2}}
        for n, pool in enumerate(("one", "other"))
    ]
    pools = {"one": {"keys": 4}, "other": {"keys": 6, "seed": 1}}
    memrewrite.apply(model, {"memrewrite": 1, "pools": pools, "replace": rules}, inputs)
    assert model.blocks[0].mlp.pool is model.memory.one
    assert model.blocks[1].mlp.pool is model.memory.other


# --------------------------------------------------------------------------------------------- memory, device, dtype


@pytest.mark.parametrize("name", ["modular", "loose"])
def test_replaced_weights_are_freed(name: str) -> None:
    model, inputs = tiny.named(name)
    sites = memrewrite.inspect(model, inputs).sites
    old = [weakref.ref(model.get_parameter(n)) for site in sites for n in site.parameters]
    report = memrewrite.apply(model, tiny.recipe(), inputs)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    assert report.ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_new_parameters_have_the_sites_dtype(dtype: torch.dtype, placement: str) -> None:
    model, inputs = tiny.named("modular")
    memrewrite.apply(model.to(dtype), tiny.recipe(placement), inputs)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_pool_may_have_another_dtype() -> None:
    model, inputs = tiny.named("modular")
    memrewrite.apply(model, tiny.recipe(pools={"shared": {"keys": 8, "dtype": "bfloat16"}}), inputs)
    assert model.memory.shared.values.dtype == torch.bfloat16
    assert model.blocks[0].mlp.gate.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["modular", "loose", "llama"])
def test_a_model_on_meta_stays_there(name: str) -> None:
    model, inputs = tiny.named(name)
    model.to("meta")
    report = memrewrite.apply(model, tiny.recipe(), inputs)
    assert report.ok
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_new_modules_follow_the_models_mode(training: bool, placement: str) -> None:
    model, inputs = tiny.named("loose")
    model.train(training)
    model.norm.train(not training)  # a module keeps its own mode
    memrewrite.apply(model, tiny.recipe(placement), inputs)
    assert model.norm.training is not training
    assert all(m.training == training for m in model.modules() if m is not model.norm)


# ------------------------------------------------------------------------------------------------------- determinism


def test_the_same_recipe_gives_the_same_values_for_any_rng_state() -> None:
    one, inputs = tiny.named("modular")
    memrewrite.apply(one, tiny.recipe(), inputs)
    model, inputs = tiny.named("modular")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(one.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_another_seed_or_another_site_gives_other_values() -> None:
    model, _ = tiny.rewritten("modular")
    other, inputs = tiny.named("modular")
    memrewrite.apply(other, tiny.recipe(pools={"shared": {"keys": 8, "seed": 1}}, verify="off"), inputs)
    query = lambda m, i: m.blocks[i].mlp.product_keys.query.weight  # noqa: E731
    assert not torch.equal(model.memory.shared.values, other.memory.shared.values)
    assert not torch.equal(query(model, 0), query(other, 0))
    assert not torch.equal(query(model, 0), query(model, 1))


def test_every_replacement_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "memrewrite"):
        tiny.rewritten("modular")
        tiny.rewritten("bert", "parallel")
    messages = [r.getMessage() for r in caplog.records if "the MLP" in r.getMessage()]
    assert messages[:3] == [f"memory_plus replaces the MLP blocks.{i}.mlp" for i in range(3)]
    assert all(line.startswith("memory_plus is added to the MLP encoder.layer.") for line in messages[3:])
    assert len(messages) == 6


# --------------------------------------------------------------------------------------------------------- undo


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["modular", "sequential", "loose", "shared", "bert", "albert"])
def test_revert_restores_everything(name: str, placement: str) -> None:
    model, inputs = tiny.named(name)
    before, photograph = tiny.values_of(model, inputs), tiny.Photograph(model)
    edit = substitute(model, tiny.plan_of(name, placement))
    assert photograph.differences(tiny.Photograph(model))
    edit.revert()
    assert not photograph.differences(tiny.Photograph(model))
    assert torch.equal(tiny.values_of(model, inputs), before)


def test_the_users_own_hooks_survive() -> None:
    model, inputs = tiny.named("loose")
    seen: list[str] = []
    model.blocks[0].norm2.register_forward_hook(lambda *_: seen.append("ours"))
    photograph = tiny.Photograph(model)
    edit = substitute(model, tiny.plan_of("loose", "parallel"))
    seen.clear()
    tiny.values_of(model, inputs)
    assert seen == ["ours"]
    edit.revert()
    assert not photograph.differences(tiny.Photograph(model))


BREAKS = [(MemoryPlus, "__init__"), (MemoryPlus, "reset_parameters"), (Pool, "__init__"), (Pool, "reset_parameters")]


@pytest.mark.parametrize(("owner", "method"), BREAKS, ids=[f"{o.__name__}.{m}" for o, m in BREAKS])
@pytest.mark.parametrize("name", ["modular", "loose"])
def test_an_error_during_the_edit_reverts_it(monkeypatch: pytest.MonkeyPatch, name: str, owner: type, method: str) -> None:
    model, plan = tiny.named(name)[0], tiny.plan_of(name, "parallel")
    photograph = tiny.Photograph(model)
    real, calls = getattr(owner, method), []

    def breaks(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > (1 if owner is MemoryPlus else 0):
            raise MemoryError("no memory left")
        real(*args, **kwargs)

    monkeypatch.setattr(owner, method, breaks)
    with pytest.raises(MemoryError):
        substitute(model, plan)
    assert not photograph.differences(tiny.Photograph(model))


def test_a_plan_of_another_model_is_refused_and_nothing_changes() -> None:
    bert, plan = tiny.bert(), tiny.plan_of("bert", "parallel")
    broken = plan.substitutions[2].site.model_copy(
        update={"bindings": (plan.substitutions[2].site.bindings[0].model_copy(update={"exit": "encoder.layer.9"}),)}
    )
    last = plan.substitutions[2].model_copy(update={"site": broken})
    photograph = tiny.Photograph(bert)
    with pytest.raises(SelectError, match=r"no module 'encoder\.layer\.9'"):
        substitute(bert, plan.model_copy(update={"substitutions": (*plan.substitutions[:2], last)}))
    assert not photograph.differences(tiny.Photograph(bert))


@pytest.mark.parametrize("name", ["llama", "loose", "sequential"])
def test_a_plan_of_a_different_architecture_is_refused(name: str) -> None:
    plan, other = tiny.plan_of(name), tiny.modular()
    photograph = tiny.Photograph(other)
    with pytest.raises(SelectError, match="the model has no"):
        substitute(other, plan)
    assert not photograph.differences(tiny.Photograph(other))


def test_weights_that_are_buffers_have_a_device_too() -> None:
    model, inputs = tiny.named("modular")
    for block in model.blocks:  # as in quantized layers
        weight = block.mlp.up.weight.detach()
        del block.mlp.up.weight
        block.mlp.up.register_buffer("weight", weight)
    assert memrewrite.apply(model, tiny.recipe(), inputs).ok


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_root_that_calls_every_child_it_has(placement: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(tiny.Block(8, lambda d: tiny.MLP(d, 16), 0.0), tiny.Loose(8, 0.0)).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    report = memrewrite.apply(model, tiny.recipe(placement), (x,))
    assert report.ok
    assert list(dict(model.named_children())) == ["0", "1", "memory"]
    assert torch.equal(model(x), before) == (placement == "parallel")


# ------------------------------------------------------------------------------------------------- convolutions as MLPs


class Convolved(nn.Module):
    """A block on [batch, channels, height, width], its MLP two 1x1 convolutions: one module, or two of the block."""

    def __init__(self, width: int, one_module: bool) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.GroupNorm(1, width)
        up, down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.mlp = nn.Sequential(up, nn.GELU(), down) if one_module else None
        self.up, self.down = (None, None) if one_module else (up, down)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        h = self.norm(x)
        return x + (self.mlp(h) if self.mlp is not None else self.down(torch.relu(self.up(h))))


@pytest.mark.parametrize("placement", ["parallel", "replace"])
@pytest.mark.parametrize("one_module", [True, False])
def test_layers_read_channels_on_the_axis_of_the_model(one_module: bool, placement: str) -> None:
    torch.manual_seed(0)
    blocks = (Convolved(24, one_module) for _ in range(2))
    model = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.Identity(), *blocks).eval()
    image = torch.randn(2, 3, 32, 28)
    before = model(image)
    report = memrewrite.apply(model, tiny.recipe(placement), (image,))
    assert report.ok
    assert [(s.site.d_in, s.site.d_model, s.site.axis) for s in report.plan.substitutions] == [(24, 24, 1)] * 2
    assert torch.equal(model(image), before) == (placement == "parallel")
    if placement == "replace" and one_module:  # each pixel's output depends on that pixel alone
        layer, x = layers_of(model, report.plan)["2.mlp"], torch.randn(1, 24, 3, 5)
        alone = [layer(x[:, :, i : i + 1, j : j + 1]) for i in range(3) for j in range(5)]
        torch.testing.assert_close(layer(x).flatten(2), torch.cat(alone, -1).flatten(2))
