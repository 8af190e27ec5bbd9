"""Other libraries wrap a model, or put modules of their own in the place of ours: what trains is what is read and saved."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
from torch import nn

import memrewrite
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pools, find_pools

PLACEMENTS = ["replace", "parallel"]


def named(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of `tiny`; "bare": its MLPs are parameters of its blocks, which become graphs."""
    if name == "bare":
        torch.manual_seed(0)
        return tiny.Tiny([families.Block(families.Bare()) for _ in range(2)], families.D).eval(), {"ids": tiny.tokens()}
    return tiny.named(name)


def rewritten(
    name: str = "llama", placement: str = "parallel", kind: str = "memory_plus", **pool: Any
) -> tuple[Any, dict[str, Any]]:
    """A rewritten model whose layers all have nonzero output."""
    model, inputs = named(name)
    recipe = tiny.recipe(placement, verify="off")
    recipe["pools"]["shared"] |= pool
    recipe["replace"][0]["with"] = kind
    memrewrite.apply(model, recipe, inputs)
    tiny.open_up(model)
    return model, inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    out = model(**inputs)
    first: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return first


def trained(model: Any, inputs: dict[str, Any], steps: int = 3) -> None:
    """A few steps of the parameters that require gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model.train(), inputs).square().mean().backward()
        optimizer.step()
    model.eval()


def values(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return run(model, inputs).clone()


# ---------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_modules_to_save_trains_the_table_that_is_read(placement: str, kind: str, tmp_path: Path) -> None:
    model, inputs = rewritten(placement=placement, kind=kind)
    base = copy.deepcopy(model)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["memory"])
    wrapped = peft.get_peft_model(model, config)
    before = values(wrapped, inputs)
    assert torch.equal(before, values(base, inputs))
    table = wrapped.base_model.model.memory.shared.values
    assert table.requires_grad
    start = table.detach().clone()
    trained(wrapped, inputs)
    assert not torch.equal(table, start)
    after = values(wrapped, inputs)
    assert not torch.equal(after, before)
    with torch.no_grad():  # the trained table is the one that is read
        table.neg_()
        assert not torch.equal(values(wrapped, inputs), after)
        table.neg_()
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(values(peft.PeftModel.from_pretrained(base, tmp_path), inputs), after)
    with wrapped.disable_adapter():
        assert torch.equal(values(wrapped, inputs), before)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(values(merged, inputs), after)
    assert torch.equal(merged.state_dict()["memory.shared.values"], table)


@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer"])
def test_a_table_as_target_parameter_is_refused(kind: str) -> None:
    """torch parametrizes no parameter of the name `values`. The module in the pool's place is called, so it raises."""
    model, inputs = rewritten(kind=kind)
    config = peft.LoraConfig(target_modules=[], target_parameters=["memory.shared.values"], r=2)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(KeyError, match="values"):
        run(wrapped, inputs)


def test_fused_updates_train_the_copy_of_a_table(tmp_path: Path) -> None:
    model, inputs = rewritten(gradient="fused")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["memory"]))
    before, table = values(wrapped, inputs), wrapped.base_model.model.memory.shared.values
    start, optimizer = table.detach().clone(), torch.optim.Adam(memrewrite.param_groups(wrapped, lr=1e-2))
    memrewrite.fuse(optimizer, wrapped)
    for _ in range(3):
        optimizer.zero_grad()
        run(wrapped.train(), inputs).square().mean().backward()
        optimizer.step()
    assert not torch.equal(table, start)
    assert not torch.equal(values(wrapped.eval(), inputs), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_apply_on_a_peft_model(placement: str, tmp_path: Path) -> None:
    """The pool is part of the model inside: it stays when the adapters are merged."""
    model, inputs = tiny.named("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    memrewrite.apply(wrapped, tiny.recipe(placement), inputs)
    tiny.open_up(wrapped)
    expected = values(wrapped, inputs)
    assert find_pools(model) is model.memory
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(values(merged, inputs), expected)
    memrewrite.save(merged, tmp_path / "saved")
    assert torch.equal(values(memrewrite.load(tmp_path / "saved"), inputs), values(merged, inputs))


# ------------------------------------------------------------------------------------------------------------- wrappers


class Wrapper(nn.Module):
    """What trainers, pipelines and parallelism do: a module whose only child is the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [Wrapper, lambda m: Wrapper(Wrapper(m)), lambda m: Wrapper(nn.Sequential(m))]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=["once", "twice", "sequential"])
@pytest.mark.parametrize("name", ["llama", "modular", "loose", "shared", "bare"])
def test_apply_on_a_wrapper(name: str, wrap: Any, placement: str, tmp_path: Path) -> None:
    if name in ("llama", "bare") and wrap is WRAPPERS[2]:
        pytest.skip("a Sequential calls its child with one argument by position")
    model, inputs = named(name)
    wrapped = wrap(model)
    given = inputs if wrap is not WRAPPERS[2] else tuple(inputs.values())
    memrewrite.apply(wrapped, tiny.recipe(placement), given)
    assert find_pools(model) is model.memory
    tiny.open_up(wrapped)
    expected = values(model, inputs)
    memrewrite.save(model, tmp_path / "saved")  # the model inside, without its wrapper
    base = None if name == "llama" else named(name)[0]
    assert torch.equal(values(memrewrite.load(tmp_path / "saved", base), inputs), expected)


@pytest.mark.parametrize("wrap", WRAPPERS[:2], ids=["once", "twice"])
@pytest.mark.parametrize("name", ["llama", "loose", "bare"])
def test_save_of_a_wrapper_saves_the_model_inside(name: str, wrap: Any, tmp_path: Path) -> None:
    model, inputs = rewritten(name)
    memrewrite.save(wrap(model), tmp_path / "saved")
    base = None if name == "llama" else named(name)[0]
    assert torch.equal(values(memrewrite.load(tmp_path / "saved", base), inputs), values(model, inputs))


def test_save_of_a_compiled_model(tmp_path: Path) -> None:
    model, inputs = rewritten()
    memrewrite.save(torch.compile(model), tmp_path / "saved")
    assert torch.equal(values(memrewrite.load(tmp_path / "saved"), inputs), values(model, inputs))


# ------------------------------------------------------------------------------------------- a module in another's place


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_pools_that_stand_at_their_name_are_read(placement: str) -> None:
    model, inputs = rewritten("loose", placement)
    before = values(model, inputs)
    other = copy.deepcopy(model.memory)
    with torch.no_grad():
        other.shared.values.neg_()
    model.memory, first = other, model.memory
    changed = values(model, inputs)
    assert not torch.equal(changed, before)
    model.memory = first
    assert torch.equal(values(model, inputs), before)
    model.memory.shared = other.shared
    assert torch.equal(values(model, inputs), changed)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_reads_what_stands_at_its_own_name(copier: Any) -> None:
    model, inputs = rewritten("loose")
    copied = copier(model)
    expected = values(model, inputs)
    with torch.no_grad():
        copied.memory = copy.deepcopy(copied.memory)
        copied.memory.shared.values.neg_()
    assert torch.equal(values(model, inputs), expected)
    assert not torch.equal(values(copied, inputs), expected)


@pytest.mark.parametrize("name", ["modular", "sequential", "loose"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_copy_of_one_layer_takes_its_place(name: str, placement: str) -> None:
    model, inputs = rewritten(name, placement)
    before = values(model, inputs)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, MemoryLayer):
                setattr(parent, child, copy.deepcopy(module))
    assert torch.equal(values(model, inputs), before)
    assert {id(m.pool) for m in model.modules() if isinstance(m, MemoryLayer)} == {id(model.memory.shared)}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MemoryLayer):
                module.scale_output(0.0)
    assert not torch.equal(values(model, inputs), before)


def test_a_part_is_used_when_its_model_is_gone() -> None:
    wrapper, inputs = nn.ModuleDict({"inner": tiny.named("modular")[0]}), tiny.named("modular")[1]
    inner = wrapper["inner"]
    memrewrite.apply(inner, tiny.recipe("parallel"), inputs)
    tiny.open_up(inner)
    block, x = inner.blocks[0], torch.randn(2, 3, tiny.WIDTH)
    expected = block(x)
    del inner, wrapper
    gc.collect()
    assert torch.equal(block(x), expected)


def test_a_model_is_freed_without_the_cycle_collector() -> None:
    """A model is large: it must not wait for a collection because its layers refer to it."""
    model, inputs = rewritten("loose")
    values(model, inputs)
    alive = weakref.ref(model.memory.shared.values)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_pools_are_found_in_a_wrapper() -> None:
    model, _ = rewritten()
    assert isinstance(find_pools(Wrapper(model)), Pools)
