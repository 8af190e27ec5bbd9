"""Graph to graph: a model given as a graph becomes a new graph module that runs, trains and exports again."""

from __future__ import annotations

import copy
import io
import operator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import fx, nn
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import MemrewriteError, SelectError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pools
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.layer_call import add_output

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
def test_the_given_graph_does_not_change(form: str) -> None:
    given, inputs = traced("modular", form)
    module = given.module() if form == "program" else given
    code, before, photograph = module.code, tiny.values_of(module, inputs), tiny.Photograph(module)
    memrewrite.apply(given, tiny.recipe(), inputs)
    module = given.module() if form == "program" else given
    assert module.code == code
    assert torch.equal(tiny.values_of(module, inputs), before)
    if form == "module":
        assert not photograph.differences(tiny.Photograph(module))


def test_unused_weights_are_removed() -> None:
    graph, _ = emitted("modular")
    names = [name for name, _ in graph.named_parameters()]
    assert not [name for name in names if ".mlp." in name]
    assert [name for name in names if name.endswith("values")] == ["memory.shared.values"]


def test_in_parallel_the_mlp_keeps_its_weights() -> None:
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
    assert copied.memory.record.plan == graph.memory.record.plan
    assert torch.equal(copied.memory.record.inputs[1]["ids"], inputs["ids"])  # to export it again
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


class FlatMLP(nn.Module):
    """An MLP that receives its tokens in two axes and returns them in one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.up(x)).flatten(0, 1)
        return self.down(hidden)


class Flattening(nn.Module):
    """Two MLPs on one residual stream: one that flattens its tokens, and one on the flattened stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.flat, self.mlp = nn.LayerNorm(8), FlatMLP(), tiny.MLP(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1) + self.flat(self.norm(x))
        return x + self.mlp(self.norm(x))


FLATTENING = {
    "live": lambda model, x: (model, {"emit": "graph"}),
    "program": lambda model, x: (torch.export.export(model, (x,)), {}),
    "symbolic": lambda model, x: (fx.symbolic_trace(model), {}),
}


@pytest.mark.parametrize("form", FLATTENING)
def test_a_layer_is_added_to_an_mlp_that_flattens_its_tokens(form: str) -> None:
    model, x = Flattening().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    given, options = FLATTENING[form](model, x)
    report = memrewrite.apply(given, tiny.recipe("parallel"), (x,), **options)
    assert [site.site.path for site in report.plan.substitutions] == ["flat", "mlp"]
    assert report.ok
    assert torch.equal(report.model(x), before)
    tiny.open_up(report.model)
    assert not torch.allclose(report.model(x), before)
    targets = [n.target for n in report.model.graph.nodes if "memory" in str([s.target for s in n.all_input_nodes])]
    assert [target is add_output for target in targets] == [True, False]  # a plain add where the layouts are equal
    program = torch.export.export(report.model, (x,))
    assert torch.equal(program.module()(x), report.model(x))
    assert torch.equal(copy.deepcopy(report.model)(x), report.model(x))


def test_a_graph_with_an_mlp_that_flattens_its_tokens_is_saved_and_computes_what_the_live_model_computes(
    tmp_path: Path,
) -> None:
    model, x = Flattening().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    graph = memrewrite.apply(model, tiny.recipe("parallel"), (x,), emit="graph").model
    live = memrewrite.apply(model, tiny.recipe("parallel"), (x,)).model
    for rewritten in (graph, live):
        tiny.open_up(rewritten)
    loaded = memrewrite.load(memrewrite.save(graph, tmp_path / "graph"), trust_code=True)
    other = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(graph(other), loaded(other))
    torch.testing.assert_close(graph(other), live(other))


def test_a_layer_does_not_replace_an_mlp_that_flattens_its_tokens() -> None:
    model, x = Flattening().eval(), torch.randn(2, 5, 8)
    with pytest.raises(SelectError, match=r"\(2, 5, 8\) and its output \(10, 8\): a layer cannot replace it"):
        memrewrite.apply(model, tiny.recipe(), (x,), emit="graph")


# ------------------------------------------------------------------------------------------------ fx.symbolic_trace


class Residual(nn.Module):
    """What `fx.symbolic_trace` can trace: two MLPs, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), tiny.MLP(8, 16), tiny.MLP(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(self.norm(x))
        return x + self.two(self.norm(x))


class ManyForms(nn.Module):
    """MLPs as modules, as functions on the root's own weights in a flattened layout, and by methods; dropout outside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.dropout = nn.LayerNorm(8), tiny.MLP(8, 16), nn.Dropout(0.5)
        self.up, self.down = nn.Parameter(torch.randn(16, 8) / 3), nn.Parameter(torch.randn(8, 16) / 3)
        self.left, self.right = nn.Parameter(torch.randn(8, 16) / 3), nn.Parameter(torch.randn(16, 8) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.one(self.norm(x)))
        batch, length, width = x.size()
        rows = self.norm(x).view(-1, width)
        x = x + F.linear(F.silu(F.linear(rows, self.up)), self.down).view(batch, length, width)
        return x.add(self.norm(x).matmul(self.left).relu_().matmul(self.right))


class InPlace(nn.Module):
    """An in-place op on the hidden values, and an in-place add on the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        hidden = self.up(x)
        hidden.relu_()
        x += self.down(hidden)
        return x


class Gated(nn.Module):
    """One matrix for gate and up, in two chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Called(nn.Module):
    """A leaf for tracers: the MLP's modules called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = tiny.MLP(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Tracer(fx.Tracer):
    """Treats modules of the given classes as leaves."""

    def __init__(self, *leaves: type[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def traced_at_leaves(model: nn.Module, *leaves: type[nn.Module]) -> fx.GraphModule:
    return fx.GraphModule(model.eval(), Tracer(*leaves).trace(model))


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build()


def calls_in(module: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in module.graph.nodes]


TRACED = [Residual, ManyForms, InPlace, Gated, Called]
SITES = {Residual: 2, ManyForms: 3, InPlace: 1, Gated: 1, Called: 1}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("build", TRACED)
def test_a_symbolic_trace_is_rewritten_at_torch_level(build: Any, placement: str) -> None:
    model, x = fx.symbolic_trace(seeded(build).eval()), torch.randn(2, 5, 8)
    given, before, photograph = calls_in(model), model(x), tiny.Photograph(model)
    report = memrewrite.apply(model, tiny.recipe(placement), (x,))
    assert report.ok
    assert len(report.plan.substitutions) == SITES[build]
    assert report.model is not model
    assert not photograph.differences(tiny.Photograph(model))
    assert torch.equal(report.model(x), before) == (placement == "parallel")
    kept = [entry for entry in calls_in(report.model) if "memory_layers" not in entry[1] and entry[1] != str(operator.add)]
    assert set(kept) <= set(given)
    if placement == "parallel":
        assert kept == [entry for entry in given if entry[1] != str(operator.add)]
        assert set(model.state_dict()) <= set(report.model.state_dict())
    else:
        replaced = {name for s in report.plan.substitutions for name in s.site.parameters}
        assert set(model.state_dict()) - set(report.model.state_dict()) == replaced


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_computes_what_the_live_rewrite_of_its_model_computes(placement: str) -> None:
    model, x = seeded(Residual).eval(), torch.randn(2, 5, 8)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    live = memrewrite.apply(model, tiny.recipe(placement), (x,)).model
    graph = memrewrite.apply(traced, tiny.recipe(placement), (x,)).model
    for size in [(2, 5, 8), (3, 9, 8)]:
        other = torch.randn(size)
        assert torch.equal(graph(other), live(other))


def test_modes_and_dropout_outside_of_the_sites_still_work() -> None:
    model, x = fx.symbolic_trace(seeded(ManyForms)), torch.randn(2, 5, 8)
    model.train()
    graph = memrewrite.apply(model, tiny.recipe("parallel"), (x,)).model
    assert all(module.training for module in (*model.modules(), *graph.modules()))
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), graph(x))
    assert all(module.training for module in model.modules())


def test_a_torch_level_graph_trains_copies_and_is_not_rewritten_twice() -> None:
    x = torch.randn(2, 5, 8)
    graph = memrewrite.apply(fx.symbolic_trace(seeded(ManyForms)), tiny.recipe(), (x,)).model
    graph(x).square().mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert torch.equal(copy.deepcopy(graph).eval()(x), graph.eval()(x))
    with pytest.raises(MemrewriteError, match="already rewritten"):
        memrewrite.apply(graph, tiny.recipe(), (x,))


def test_attributes_that_a_user_set_are_kept() -> None:
    model, x = fx.symbolic_trace(seeded(Residual).eval()), torch.randn(2, 5, 8)
    model.config = {"width": 8}
    assert memrewrite.apply(model, tiny.recipe(), (x,)).model.config == {"width": 8}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_module_that_is_the_mlp_may_be_a_leaf(placement: str) -> None:
    model, x = traced_at_leaves(seeded(Called), tiny.MLP), torch.randn(2, 5, 8)
    report = memrewrite.apply(model, tiny.recipe(placement), (x,))
    assert report.ok
    calls = [target for op, target in calls_in(report.model) if op == "call_module"]
    assert ("mlp" in calls) == (placement == "parallel")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_graph_that_only_calls_the_modules_with_mlps_is_a_module_tree(placement: str, tmp_path: Path) -> None:
    model, x = traced_at_leaves(seeded(lambda: nn.Sequential(Called(), Called())), Called), torch.randn(2, 5, 8)
    before = model(x)
    report = memrewrite.apply(model, tiny.recipe(placement), (x,))
    assert report.model is model
    assert torch.equal(model(x), before) == (placement == "parallel")
    loaded = memrewrite.load(memrewrite.save(model, tmp_path / "graph"), trust_code=True)
    assert torch.equal(loaded(x), model(x))


def test_an_mlp_inside_of_a_leaf_is_refused_by_name_where_others_are_not() -> None:
    model, x = traced_at_leaves(seeded(lambda: nn.Sequential(Called(), Residual())), Called), torch.randn(2, 5, 8)
    assert len(memrewrite.inspect(model, (x,)).sites) == 3
    with pytest.raises(SelectError, match=r"'0'.* is inside of a module or function that the graph calls"):
        memrewrite.apply(model, tiny.recipe(), (x,))
    report = memrewrite.apply(model, tiny.recipe(where={"regex": "^1"}), (x,))
    assert report.ok


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_traced_block_in_a_live_model(placement: str) -> None:
    model = seeded(lambda: nn.Sequential(fx.symbolic_trace(Residual()), Residual())).eval()
    x = torch.randn(2, 5, 8)
    before = model(x)
    report = memrewrite.apply(model, tiny.recipe(placement), (x,))
    assert report.model is model
    assert len(report.plan.substitutions) == 4
    assert torch.equal(model(x), before) == (placement == "parallel")


def test_a_graph_that_does_not_run_on_its_inputs() -> None:
    with pytest.raises(MemrewriteError, match="does not run on its example inputs"):
        memrewrite.inspect(fx.symbolic_trace(Residual()), (torch.randn(2, 5, 7),))


# ----------------------------------------------------------------------------------------- every form of exported program


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


PROGRAMS = {
    "strict": lambda model, inputs: torch.export.export(model, (), inputs, strict=True),
    "decomposed": lambda model, inputs: torch.export.export(model, (), inputs).run_decompositions(),
    "loaded": lambda model, inputs: saved_and_loaded(torch.export.export(model, (), inputs)),
    "training": lambda model, inputs: torch.export.export(model.train(), (), inputs),
    "core": lambda model, inputs: torch.export.export(model, (), inputs).run_decompositions(core_aten_decompositions()),
}


@pytest.mark.parametrize("form", PROGRAMS)
@pytest.mark.parametrize("name", ["modular", "llama", "bert", "vit"])  # torch does not decompose every model
def test_every_mlp_is_found_and_verified_in_every_form_of_program(name: str, form: str) -> None:
    (model, inputs), (live, _) = tiny.named(name), tiny.named(name)
    program = PROGRAMS[form](model, inputs)
    report = memrewrite.apply(program, tiny.recipe("parallel"), inputs)
    wanted = memrewrite.inspect(live, inputs)
    assert [s.site.path for s in report.plan.substitutions] == [site.path for site in wanted.sites]
    assert report.ok
    assert {check.name for check in report.checks if check.outcome == "passed"} >= {"null", "frame", "coverage", "untouched"}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_program_with_dynamic_shapes_keeps_them(placement: str, decomposed: bool) -> None:
    model, inputs = tiny.named("modular")
    dims = {"ids": {0: torch.export.Dim("batch", min=2, max=9), 1: torch.export.Dim("length", min=2, max=30)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dims)
    program = program.run_decompositions() if decomposed else program
    graph = memrewrite.apply(program, tiny.recipe(placement), inputs).model
    live = memrewrite.apply(model, tiny.recipe(placement, verify="off"), inputs).model
    for batch, length in [(2, 5), (3, 9), (4, 2)]:
        other = {"ids": tiny.tokens(batch, length)}
        torch.testing.assert_close(tiny.values_of(graph, other), tiny.values_of(live, other))
