"""The graph emitter: a model that arrives traced leaves as a new graph module that runs, trains and exports again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import fx, nn

import memrewrite
from memrewrite.errors import MemrewriteError, VerificationError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pools
from memrewrite.passes.substitute import pools_of

NAMES = ["modular", "loose", "shared", "bert", "t5"]
PLACEMENTS = ["replace", "parallel"]
FORMS = {
    "program": lambda program: program,
    "module": lambda program: program.module(),
    "aten": lambda program: program.run_decompositions().module(check_guards=False),
}


def traced(name: str, form: str = "program") -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.named(name)
    return FORMS[form](torch.export.export(model, (), inputs)), inputs


def emitted(name: str, placement: str = "replace", **changes: Any) -> tuple[Any, dict[str, Any]]:
    program, inputs = traced(name)
    report = memrewrite.apply(program, tiny.recipe(placement, **{"verify": "off", **changes}), inputs)
    return report.model, inputs


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_becomes_a_graph_module(name: str, placement: str) -> None:
    program, inputs = traced(name)
    before = tiny.values_of(program.module(), inputs)
    report = memrewrite.apply(program, tiny.recipe(placement), inputs)
    assert report.ok
    assert isinstance(report.model, fx.GraphModule)
    assert torch.equal(tiny.values_of(report.model, inputs), before) == (placement == "parallel")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_form_a_traced_model_has(form: str, placement: str) -> None:
    given, inputs = traced("modular", form)
    report = memrewrite.apply(given, tiny.recipe(placement), inputs)
    assert report.ok
    assert len(report.plan.substitutions) == tiny.BLOCKS
    assert report.model is not given


def test_an_exported_program_brings_its_own_inputs() -> None:
    program, inputs = traced("modular")
    report = memrewrite.apply(program, tiny.recipe())
    assert tiny.values_of(report.model, inputs).shape == (2, 5, tiny.VOCABULARY)


@pytest.mark.parametrize("form", ["program", "module"])
def test_what_was_given_is_left_alone(form: str) -> None:
    given, inputs = traced("modular", form)
    module = given.module() if form == "program" else given
    code, before, photograph = module.code, tiny.values_of(module, inputs), tiny.Photograph(module)
    memrewrite.apply(given, tiny.recipe(), inputs)
    module = given.module() if form == "program" else given
    assert module.code == code
    assert torch.equal(tiny.values_of(module, inputs), before)
    if form == "module":
        assert not photograph.differences(tiny.Photograph(module))


def test_unused_weights_are_gone() -> None:
    graph, _ = emitted("modular")
    names = [name for name, _ in graph.named_parameters()]
    assert not [name for name in names if ".mlp." in name]
    assert [name for name in names if name.endswith("values")] == ["memory.shared.values"]


def test_beside_an_mlp_its_weights_stay() -> None:
    graph, _ = emitted("modular", "parallel")
    assert sum(".mlp." in name for name, _ in graph.named_parameters()) == 4 * tiny.BLOCKS


def test_layers_are_called_as_modules_and_share_one_table() -> None:
    graph, _ = emitted("shared")
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    assert len(calls) == tiny.BLOCKS
    layers = [graph.get_submodule(str(n.target)) for n in calls]
    assert {type(layer).kind for layer in layers} == {"memory_plus"}
    assert {id(layer) for layer in layers} == {id(layers[0])}
    assert isinstance(graph.memory, Pools)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_trains(placement: str) -> None:
    graph, inputs = emitted("loose", placement)
    graph.train()
    target = torch.randn(2, 5, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(memrewrite.param_groups(graph, 1e-2))
    losses = []
    for _ in range(8):
        loss = (graph(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert pools_of(graph).shared.values.grad is not None


def test_train_and_eval_reach_the_layers() -> None:
    graph, _ = emitted("modular")
    layers = [m for m in graph.modules() if isinstance(m, MemoryLayer)]
    assert len(layers) == tiny.BLOCKS
    graph.train()
    assert all(layer.training for layer in layers)
    graph.eval()
    assert not any(layer.training for layer in layers)


def test_it_exports_again() -> None:
    graph, inputs = emitted("modular", "parallel")
    tiny.open_up(graph)
    program = torch.export.export(graph, (), inputs)
    assert torch.equal(tiny.values_of(program.module(), inputs), tiny.values_of(graph, inputs))
    assert [name for name in program.state_dict if name.endswith("values")] == ["memory.shared.values"]


def test_a_copy_is_whole_and_independent() -> None:
    graph, inputs = emitted("modular")
    before, copied = tiny.values_of(graph, inputs), copy.deepcopy(graph)
    with torch.no_grad():
        copied.memory.shared.values.zero_()
    assert torch.equal(tiny.values_of(graph, inputs), before)
    assert not torch.equal(tiny.values_of(copied, inputs), before)


def test_it_is_not_rewritten_twice() -> None:
    graph, inputs = emitted("modular")
    with pytest.raises(MemrewriteError, match="already rewritten"):
        memrewrite.apply(graph, tiny.recipe(), inputs)


# --------------------------------------------------------------------------------------- a live model, emitted as graph


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["modular", "loose", "bert"])
def test_a_live_model_as_a_graph_runs_at_other_sizes(name: str, placement: str) -> None:
    model, inputs = tiny.named(name)
    photograph = tiny.Photograph(model)
    report = memrewrite.apply(model, tiny.recipe(placement), inputs, emit="graph")
    assert isinstance(report.model, fx.GraphModule)
    assert not photograph.differences(tiny.Photograph(model))
    (key,) = inputs
    for batch, length in [(2, 5), (3, 9), (1, 2)]:
        other = {key: tiny.tokens(batch, length)}
        out = tiny.values_of(report.model, other)
        assert out.shape[:2] == (batch, length)
        if placement == "parallel":
            torch.testing.assert_close(out, tiny.values_of(model, other))


def test_a_fixed_size_in_the_model_stays_fixed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.position = tiny.MLP(8, 16), nn.Parameter(torch.randn(5, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.position
            return x + self.mlp(x)

    report = memrewrite.apply(Fixed(), tiny.recipe(), (torch.randn(2, 5, 8),), emit="graph")
    assert report.model(torch.randn(7, 5, 8)).shape == (7, 5, 8)


# ------------------------------------------------------------------------------------------------ fx.symbolic_trace


class Residual(nn.Module):
    """What `fx.symbolic_trace` can trace: two MLPs, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), tiny.MLP(8, 16), tiny.MLP(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(self.norm(x))
        return x + self.two(self.norm(x))


def test_a_symbolic_trace_is_a_module_tree_with_generated_code() -> None:
    torch.manual_seed(0)
    model, x = fx.symbolic_trace(Residual().eval()), torch.randn(2, 5, 8)
    report = memrewrite.apply(model, tiny.recipe(), (x,))
    assert report.ok
    assert report.model is model
    assert len(report.plan.substitutions) == 2


def test_a_symbolic_trace_in_parallel_is_refused_and_left_alone() -> None:
    """`torch.export` interprets a graph module: modules that hooks call have no stack of their own, `frame` cannot tell."""
    torch.manual_seed(0)
    model, x = fx.symbolic_trace(Residual().eval()), torch.randn(2, 5, 8)
    photograph = tiny.Photograph(model)
    with pytest.raises(VerificationError, match="'frame' failed"):
        memrewrite.apply(model, tiny.recipe("parallel"), (x,))
    assert not photograph.differences(tiny.Photograph(model))
