"""`memrewrite.backend`: graphs of `torch.compile` are located and rewritten; the live rewrite is the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.errors import MemrewriteError, SelectError, UserError, VerificationError
from memrewrite.passes.torch_compile.backend import Backend
from memrewrite.site import Site

PLACEMENTS = ["replace", "parallel"]
NAMES = ["modular", "loose", "shared", "llama", "bert", "gpt2", "t5", "albert", "vit"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def paper(placement: str = "replace", **changes: Any) -> dict[str, Any]:
    """A recipe whose layers start as in the paper: a graph after a rewritten one reads other inputs than in the live model."""
    recipe = tiny.recipe(placement, **changes)
    if placement == "replace":
        recipe["replace"][0]["init"] = {"output": "paper"}
    return recipe


def live(name: str, placement: str = "replace") -> tuple[Any, dict[str, Any]]:
    """The same model rewritten by `apply`, and its inputs."""
    model, inputs = tiny.named(name)
    return memrewrite.apply(model, tiny.recipe(placement, verify="off"), inputs).model, inputs


def compiled(module: nn.Module, recipe: Any = None, *, then: Any = "eager", **options: Any) -> tuple[Any, Backend]:
    ours = memrewrite.backend(recipe, then=then, **options)
    return torch.compile(module, backend=ours), ours


def facts(site: Site) -> tuple[Any, ...]:
    """What is found, without names: a weight with several names may have another one here."""
    return site.pattern, site.activation, site.d_in, site.d_hidden, site.d_model, site.weights, site.biases, site.calls


def paths(ours: Backend) -> list[str]:
    return [site.path for site in ours.located.sites]


# ------------------------------------------------------------------------------------------------------- without a recipe


@pytest.mark.parametrize("name", NAMES)
def test_what_is_located_is_what_export_shows_and_nothing_changes(name: str) -> None:
    model, inputs = tiny.named(name)
    before, expected = tiny.values_of(model, inputs), memrewrite.inspect(model, inputs)
    received: list[Any] = []
    fast, ours = compiled(model, on_located=received.append)
    assert torch.equal(tiny.values_of(fast, inputs), before)
    assert [facts(site) for site in ours.located.sites] == [facts(site) for site in expected.sites]
    assert received == ours.graphs


def test_a_second_shape_is_located_once() -> None:
    model, _ = tiny.named("modular")
    fast, ours = compiled(model)
    for shape in [(2, 5), (3, 7), (4, 9)]:
        fast(tiny.tokens(*shape))
    assert len(ours.graphs) == 2
    assert paths(ours) == [f"blocks.{i}.mlp" for i in range(tiny.BLOCKS)]


def test_a_function_that_calls_a_model() -> None:
    model, inputs = tiny.named("modular")
    ours = memrewrite.backend(then="eager")
    torch.compile(lambda ids: model(ids) * 2, backend=ours)(inputs["ids"])
    assert paths(ours) == [f"model.blocks.{i}.mlp" for i in range(tiny.BLOCKS)]
    torch._dynamo.reset()
    named = memrewrite.backend(then="eager", model=model)
    torch.compile(lambda ids: model(ids) * 2, backend=named)(inputs["ids"])
    assert paths(named) == [f"blocks.{i}.mlp" for i in range(tiny.BLOCKS)]


def test_parameters_that_dynamo_keeps_in_the_graph() -> None:
    model, inputs = tiny.named("modular")
    expected, _ = live("modular")
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False):
        fast, ours = compiled(model, tiny.recipe())
        assert torch.equal(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    assert len(ours.located.sites) == tiny.BLOCKS


# ----------------------------------------------------------------------------------------------------------- rewriting


@pytest.mark.parametrize(
    ("name", "placement"), [*((name, "parallel") for name in NAMES), ("modular", "replace"), ("t5", "replace")]
)
def test_it_computes_what_the_live_rewrite_computes(name: str, placement: str) -> None:
    (expected, inputs), (model, _) = live(name, placement), tiny.named(name)
    fast, ours = compiled(model, tiny.recipe(placement))
    assert torch.equal(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    (checks,) = ours.checks
    assert {check.name for check in checks if check.outcome == "passed"} >= {"null", "coverage", "frame", "sharing", "gradient"}


@pytest.mark.parametrize(("placement", "then"), [("replace", "inductor"), ("parallel", "aot_eager")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_the_next_backend(placement: str, then: str) -> None:
    (expected, _), (model, _) = live("modular", placement), tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe(placement), then=then)
    for shape in [(2, 5), (3, 7), (5, 4)]:
        inputs = {"ids": tiny.tokens(*shape)}
        torch.testing.assert_close(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    assert len(ours.graphs) == 2


def test_a_function_as_backend_gets_the_rewritten_graph() -> None:
    model, inputs = tiny.named("modular")
    given: list[torch.fx.GraphModule] = []

    def mine(gm: torch.fx.GraphModule, examples: Any) -> Any:
        given.append(gm)
        return gm.forward

    compiled(model, tiny.recipe(), then=mine)[0](**inputs)
    targets = [str(n.target) for n in given[0].graph.nodes if n.op == "call_module"]
    assert len(targets) == tiny.BLOCKS
    assert all(target.startswith("memory_layers.") for target in targets)


def test_marked_dynamic() -> None:
    (expected, _), (model, _) = live("modular"), tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe())
    ids = tiny.tokens(2, 5)
    torch._dynamo.mark_dynamic(ids, 1)
    for shape in [ids, tiny.tokens(2, 9), tiny.tokens(2, 3)]:
        assert torch.equal(tiny.values_of(fast, {"ids": shape}), tiny.values_of(expected, {"ids": shape}))
    assert len(ours.graphs) == 1


def test_layers_and_pool_are_reused_in_later_compilations() -> None:
    model, _ = tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe())
    tiny.values_of(fast, {"ids": tiny.tokens(2, 5)})
    before, values = dict(ours.memory.named_modules()), ours.memory.pools.shared.values
    tiny.values_of(fast, {"ids": tiny.tokens(3, 7)})
    model.train()
    tiny.values_of(fast, {"ids": tiny.tokens(3, 7)})
    assert len(ours.graphs) == 3
    assert dict(ours.memory.named_modules()) == before
    assert ours.memory.pools.shared.values is values


def test_what_was_trained_does_not_fail_the_checks_of_a_new_graph() -> None:
    model, _ = tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe("parallel"))
    one = tiny.values_of(fast, {"ids": tiny.tokens(2, 5)})
    tiny.open_up(ours.memory)
    assert not torch.equal(tiny.values_of(fast, {"ids": tiny.tokens(2, 5)}), one)
    tiny.values_of(fast, {"ids": tiny.tokens(3, 7)})
    assert len(ours.checks) == 2


@pytest.mark.parametrize("then", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_the_memory_is_loaded_in_place(then: str) -> None:
    model, inputs = tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe(), then=then)
    other, theirs = compiled(copy.deepcopy(model), tiny.recipe(), then=then)
    fast(**inputs), other(**inputs)
    tiny.open_up(ours.memory)
    theirs.memory.load_state_dict(ours.memory.state_dict())
    assert torch.equal(tiny.values_of(other, inputs), tiny.values_of(fast, inputs))


@pytest.mark.parametrize(("placement", "then"), [("replace", "eager"), ("parallel", "aot_eager"), ("replace", "inductor")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_gradients_are_those_of_the_live_rewrite(placement: str, then: str) -> None:
    (expected, inputs), (model, _) = live("modular", placement), tiny.named("modular")
    tiny.open_up(expected)
    fast, ours = compiled(model, tiny.recipe(placement), then=then)
    tiny.values_of(fast, inputs)
    tiny.open_up(ours.memory)
    for each in (expected, fast):
        each(**inputs).square().mean().backward()
    torch.testing.assert_close(ours.memory.pools.shared.values.grad, expected.memory.shared.values.grad)
    for name, parameter in model.named_parameters():
        if ".mlp." not in name:
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad)
    assert all(p.grad is not None for p in ours.memory.parameters())


def test_the_memory_is_trained() -> None:
    model, inputs = tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe("parallel"))
    fast(**inputs)
    target = torch.randn(2, 5, tiny.VOCABULARY, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(memrewrite.param_groups(ours.memory, 1e-2))
    losses = []
    for _ in range(6):
        loss = (fast(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_without_gradients_and_in_inference_mode() -> None:
    (expected, inputs), (model, _) = live("modular"), tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe())
    with torch.inference_mode():
        assert torch.equal(fast(**inputs), expected(**inputs))
    assert torch.equal(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    assert not any(p.is_inference() for p in ours.memory.parameters())


# -------------------------------------------------------------------------------------------------------- broken graphs


class Broken(tiny.Tiny):
    """A graph break after the first block."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.head(self.norm(self.blocks[2](self.blocks[1](x))))


def broken() -> Broken:
    torch.manual_seed(0)
    model = tiny.modular()
    model.__class__ = Broken
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_across_a_graph_break_one_pool_is_shared(placement: str) -> None:
    (expected, inputs), model = tiny.rewritten("modular", placement), broken()
    fast, ours = compiled(model, paper(placement))
    assert torch.equal(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    assert len(ours.graphs) == 2
    assert [name for name, _ in ours.memory.named_parameters() if name.endswith("values")] == ["pools.shared.values"]
    ours.check()


@pytest.mark.parametrize("where", [{"layers": [0, 2]}, {"centred": {"count": 1}}, {"every": 3}, {"tower": "blocks"}], ids=str)
def test_across_a_graph_break_blocks_are_counted_in_the_model(where: dict[str, Any]) -> None:
    model, inputs = broken(), {"ids": tiny.tokens()}
    recipe = paper(where=where)
    expected = memrewrite.apply(tiny.modular(), recipe, inputs)
    fast, ours = compiled(model, recipe, model=model)
    tiny.values_of(fast, inputs)
    assert [s.site.path for s in ours.memory.plan] == [s.site.path for s in expected.plan.substitutions]
    torch.testing.assert_close(tiny.values_of(fast, inputs), tiny.values_of(expected.model, inputs))
    ours.check()


def test_across_a_graph_break_blocks_are_not_counted_without_the_model() -> None:
    fast, _ = compiled(broken(), tiny.recipe(where={"layers": [0]}))
    with pytest.raises(SelectError, match="blocks cannot be counted in one of them"):
        fast(tiny.tokens())


def test_a_block_the_model_does_not_have() -> None:
    model = broken()
    fast, _ = compiled(model, tiny.recipe(where={"layers": [7]}), model=model)
    with pytest.raises(SelectError, match="no block 7"):
        fast(tiny.tokens())


def test_a_rule_that_matches_nothing_in_any_graph() -> None:
    model, inputs = broken(), {"ids": tiny.tokens()}
    before = tiny.values_of(model, inputs)
    fast, ours = compiled(model, tiny.recipe(where={"path": "nowhere.*"}))
    assert torch.equal(tiny.values_of(fast, inputs), before)
    with pytest.raises(SelectError, match=r"`path: nowhere.\*` matches no MLP of 2 graphs"):
        ours.check()


def test_a_frame_that_dynamo_skips() -> None:
    """A break inside of a loop: dynamo leaves the frame to Python, and compiles what it calls, block by block."""

    class Looped(Broken):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids) + self.positions[: ids.shape[1]]
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return self.head(self.norm(x))

    model = broken()
    model.__class__ = Looped
    (expected, inputs) = tiny.rewritten("modular")
    fast, ours = compiled(model, paper(where={"tower": "blocks"}), model=model)
    assert torch.equal(tiny.values_of(fast, inputs), tiny.values_of(expected, inputs))
    assert len(ours.memory.plan) == tiny.BLOCKS
    ours.check()


@pytest.mark.parametrize("known", [False, True])
def test_blocks_compiled_one_by_one_have_their_own_layers(known: bool) -> None:
    """Dynamo runs one graph for all blocks, with their weights as inputs: one layer must not."""
    (expected, inputs), (model, _) = tiny.rewritten("modular"), tiny.named("modular")
    ours = memrewrite.backend(paper(), then="eager", model=model if known else None)
    for block in model.blocks:
        block.compile(backend=ours)
    out = tiny.values_of(model, inputs)
    assert torch.equal(out, tiny.values_of(model, inputs))
    assert torch.equal(out, tiny.values_of(expected, inputs))
    assert len(ours.memory.plan) == len({id(m) for m in ours.memory.layers.children()}) == tiny.BLOCKS
    if known:
        assert paths(ours) == [f"blocks.{i}.mlp" for i in range(tiny.BLOCKS)]


def test_the_graph_of_a_block_that_is_not_selected_does_not_run_for_others() -> None:
    model, inputs = tiny.named("modular")
    recipe = tiny.recipe(where={"layers": [2]})
    expected = memrewrite.apply(tiny.modular(), recipe, inputs).model
    ours = memrewrite.backend(recipe, then="eager", model=model)
    for block in model.blocks:
        block.compile(backend=ours)
    torch.testing.assert_close(tiny.values_of(model, inputs), tiny.values_of(expected, inputs))
    assert [s.site.path for s in ours.memory.plan] == ["blocks.2.mlp"]


# ----------------------------------------------------------------------------------------------- what graphs may contain


class Counting(nn.Module):
    """Mutates a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = tiny.MLP(8, 16)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.mean((0, 1)))
        return x + self.mlp(x + self.seen)


def test_buffers_are_mutated_once_for_each_call() -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(2, 3, 8)
    reference = memrewrite.apply(copy.deepcopy(model), paper(verify="off"), (x,)).model
    reference.seen.zero_()
    fast, ours = compiled(model, paper())
    for _ in range(2):
        assert torch.equal(fast(x), reference(x))
        assert torch.equal(model.seen, reference.seen)
    assert len(ours.checks) == 1


def test_inputs_do_not_change() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = tiny.MLP(8, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x + self.mlp(x)

    torch.manual_seed(0)
    model, x = Writes(), torch.randn(2, 3, 8)
    once = x * 2
    compiled(model, tiny.recipe())[0](x)
    assert torch.equal(x, once)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_inside_the_model(placement: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([tiny.Block(8, lambda d: tiny.MLP(d, 16), 0.0) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    model, x = Checkpointed().eval(), torch.randn(2, 3, 8)
    expected = nn.Sequential(*copy.deepcopy(model.blocks))
    memrewrite.apply(expected, tiny.recipe(placement), (x,))
    fast, ours = compiled(model, tiny.recipe(placement))
    for each in (fast, expected):
        each(x).square().mean().backward()
    assert torch.equal(fast(x), expected(x))
    torch.testing.assert_close(ours.memory.pools.shared.values.grad, expected.memory.shared.values.grad)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast_inside_the_model(placement: str) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = tiny.Block(8, lambda d: tiny.MLP(d, 16), 0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.block(x)

    torch.manual_seed(0)
    model, x = Cast().eval(), torch.randn(2, 3, 8)
    expected = nn.Sequential(copy.deepcopy(model.block))
    memrewrite.apply(expected, paper(placement), (x,))
    out = compiled(model, paper(placement))[0](x)
    around = compiled(copy.deepcopy(model.block), paper(placement))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, expected(x))
        assert torch.equal(around(x), expected(x))


def test_dropout_in_train_mode() -> None:
    model = tiny.modular(dropout=0.5).train()
    fast, ours = compiled(model, tiny.recipe("parallel"))
    torch.manual_seed(1)
    out = tiny.values_of(fast, {"ids": tiny.tokens()})
    torch.manual_seed(1)
    assert torch.equal(out, tiny.values_of(model, {"ids": tiny.tokens()}))
    assert len(ours.located.sites) == tiny.BLOCKS


def test_half_of_a_model_frozen() -> None:
    model, inputs = tiny.named("modular")
    model.requires_grad_(False)
    fast, ours = compiled(model, tiny.recipe("parallel"))
    tiny.values_of(fast, inputs)
    tiny.open_up(ours.memory)
    fast(**inputs).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert ours.memory.pools.shared.values.grad is not None


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_recipe_that_does_not_fit_is_refused_at_the_first_call() -> None:
    model, inputs = tiny.named("modular")
    fast, ours = compiled(model, tiny.recipe(where={"path": "nowhere.*"}))
    for _ in range(2):
        with pytest.raises(SelectError, match="nowhere"):
            fast(**inputs)
    assert not list(ours.memory.parameters())


def test_a_model_without_mlps() -> None:
    fast, _ = compiled(nn.Linear(8, 8), tiny.recipe())
    with pytest.raises(SelectError, match="no MLP was found"):
        fast(torch.randn(2, 8))


def test_before_the_first_run_no_rule_has_selected_anything() -> None:
    with pytest.raises(SelectError, match="matches no MLP of 0 graphs"):
        memrewrite.backend(tiny.recipe()).check()


def test_a_bad_recipe_is_refused_at_once() -> None:
    with pytest.raises(UserError):
        memrewrite.backend({"memrewrite": 1, "replace": []})


def test_a_failed_check_stops_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.passes.verify import measured_mlps

    monkeypatch.setattr(measured_mlps, "emit_originals", lambda *_: (_ for _ in ()).throw(VerificationError("broken")))
    fast, _ = compiled(tiny.modular(), tiny.recipe())
    with pytest.raises(VerificationError, match="broken"):
        fast(tiny.tokens())


def test_pools_that_do_not_fit_in_memory() -> None:
    recipe = tiny.recipe()
    recipe["pools"]["shared"] = {"keys": 65536, "value_dim": 4096}
    fast, ours = compiled(tiny.modular(), recipe)
    with pytest.raises(MemrewriteError, match="GiB"):
        fast(tiny.tokens())
    assert not list(ours.memory.parameters())
