"""How a model becomes graphs: whole, strict, block by block or as given; what stays unchanged; the errors."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import BATCH, BY_HAND, HIDDEN, TOKENS, VOCAB, Block, D, Stack, Up, ids, states, tokens
from torch import Tensor, fx, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import CaptureError, ModelError
from memrewrite.passes.capture.capture import capture, is_traced, recapture
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.capture.torch_export import Refused, export_program
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.models.forward import as_inputs, run
from memrewrite.passes.pipeline import inspect


def build() -> nn.Module:
    return BY_HAND["pre-norm"].build()


class Undecided(Stack):
    """Runs its blocks or not, depending on a value: torch can trace each block, but not the whole model."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if x.sum() > 1e9:
            return self.head(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class UndecidedBlock(Block):
    """A block with data-dependent control flow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().sum() > 0 else x


class Wrapper(nn.Module):
    """A model inside another, called by keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(ids)}


def undecided(*blocks: nn.Module) -> nn.Module:
    queue = iter(blocks)
    return Undecided(lambda: next(queue), len(blocks)).eval()


def paths(made: Capture) -> list[str]:
    return [site.path for site in locate(made).sites]


# ------------------------------------------------------------------------------------------------------ how it is captured


def test_a_model_is_captured_whole_and_non_strict() -> None:
    made = capture(build(), ids())
    assert made.how == "whole model, torch.export non-strict"
    assert [segment.path for segment in made.segments] == [""]


def test_strict_is_tried_when_non_strict_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.export.export

    def only_strict(*args: Any, strict: bool = False, **kwargs: Any) -> Any:
        if not strict:
            raise RuntimeError("non-strict does not work")
        return export(*args, strict=False, **kwargs)

    monkeypatch.setattr(torch.export, "export", only_strict)
    made = capture(build(), ids())
    assert made.how == "whole model, torch.export strict"
    assert paths(made) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_model_that_cannot_be_captured_whole_is_captured_block_by_block() -> None:
    made = capture(undecided(Block(Up()), Block(Up())), ids())
    assert made.how.startswith("block by block (2 blocks exported; whole model refused: non-strict: ")
    assert [(segment.path, segment.own_segments) for segment in made.segments] == [
        ("blocks.0", None),
        ("blocks.1", None),
        ("", ("blocks.0", "blocks.1")),  # the operators that ran around the blocks
    ]


def test_sites_of_blocks_have_their_full_paths() -> None:
    model = Wrapper(undecided(Block(Up()), Block(Up()))).eval()
    (first, second) = locate(capture(model, {"ids": tokens()})).sites
    assert (first.path, second.path) == ("inner.blocks.0.mlp", "inner.blocks.1.mlp")
    assert (first.tower, second.block, second.tower_blocks) == ("inner.blocks", 1, 2)
    assert set(first.parameters) == {f"inner.blocks.0.mlp.{name}" for name, _ in Up().named_parameters()}
    assert second.bindings[0].exit == "inner.blocks.1.mlp"
    model.get_submodule(first.path)


def test_sites_are_the_same_whole_and_block_by_block() -> None:
    torch.manual_seed(0)
    blocks = [Block(Up()), Block(Up(F.silu))]
    by_block = locate(capture(undecided(*blocks), ids())).sites
    queue = iter(blocks)
    whole = locate(capture(Stack(lambda: next(queue)).eval(), ids())).sites
    assert by_block == whole


def test_a_block_that_cannot_be_exported_is_recorded_as_it_ran() -> None:
    model = undecided(Block(Up()), UndecidedBlock(Up()))
    made = capture(model, ids())
    assert "1 blocks exported" in made.how
    assert "1 blocks recorded as they ran: blocks.1 (non-strict: " in made.how
    first, second = locate(made).sites
    assert second.path == "blocks.1.mlp"
    assert second.bindings[0].kind == "module"
    assert (second.pattern, second.activation, second.d_hidden) == (first.pattern, first.activation, first.d_hidden)


def test_an_mlp_outside_of_the_blocks_is_found_when_torch_refuses_the_whole_model() -> None:
    model = undecided(Block(Up()))
    model.embed = nn.Sequential(model.embed, Block(Up()))  # also a stack, which is called as a whole
    model.first = Block(Up())
    model.head.register_forward_pre_hook(lambda _, args: (model.first(*args),))
    assert paths(capture(model, ids())) == ["embed.1.mlp", "blocks.0.mlp", "first.mlp"]


def test_an_mlp_under_autocast_is_found_and_proved() -> None:
    class Cast(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = self.mlp.down(F.gelu(self.mlp.up(self.norm2(x))))
            return x + out.float()

    model = Stack(lambda: Cast(Up())).eval()
    before = model(*ids())
    made = capture(model, ids())
    assert "wrap_with_autocast" in made.how
    assert paths(made) == ["blocks.0.mlp", "blocks.1.mlp"]
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "w", "placement": "parallel"}
    rule["options"] = {"heads": 2, "topk": 4}
    assert memrewrite.apply(model, {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule]}, ids()).ok
    assert torch.equal(model(*ids()), before)


def test_on_meta_a_block_that_cannot_be_captured_is_named(caplog: pytest.LogCaptureFixture) -> None:
    queue = iter([Block(Up()), UndecidedBlock(Up())])
    model = Stack(lambda: next(queue)).to("meta").eval()  # the first block runs before the second is refused
    with caplog.at_level("WARNING", logger="memrewrite"):
        made = capture(model, ids())
    assert "1 blocks refused: blocks.1" in made.how
    assert "block blocks.1 could not be captured" in caplog.text
    assert paths(made) == ["blocks.0.mlp"]


def test_blocks_that_do_not_run_are_ignored() -> None:
    model = undecided(Block(Up()))
    model.others = nn.ModuleList([Block(Up())])
    assert [segment.path for segment in capture(model, ids()).segments] == ["blocks.0", ""]


@pytest.mark.parametrize("dynamic", [False, True])
def test_when_nothing_can_be_captured_the_error_names_the_block_and_quotes_torch(dynamic: bool) -> None:
    model = Stack(lambda: UndecidedBlock(Up())).to("meta").eval()  # nothing can run there
    with pytest.raises(CaptureError) as caught:
        capture(model, ids(), dynamic=dynamic)
    assert caught.value.where == "blocks.0"
    assert "data-dependent" in caught.value.what
    assert "with values" in str(caught.value.hint)
    assert caught.value.exit_code == 2


def test_without_blocks_the_error_names_the_model() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(UndecidedBlock(Up()).to("meta").eval(), (states(),))
    assert caught.value.where == "UndecidedBlock"


def test_a_model_without_blocks_is_recorded_as_it_ran() -> None:
    (site,) = locate(capture(UndecidedBlock(Up()).eval(), (states(),))).sites
    assert (site.path, site.bindings[0].kind, site.activation) == ("mlp", "module", "gelu")


def test_messages_of_torch_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    capture(undecided(Block(Up())), ids())
    assert capfd.readouterr() == ("", "")


def test_dynamic_shapes_are_symbolic_where_they_can_be() -> None:
    made = capture(build(), ids(), dynamic=True)
    assert "dynamic shapes" in made.how
    (program,) = [segment.program for segment in made.segments]
    other = tokens(BATCH + 1, TOKENS + 3)
    assert program.module()(other).shape == (BATCH + 1, TOKENS + 3, VOCAB)
    assert len(locate(made).sites) == 2


def test_an_edited_model_is_captured_again_by_its_block() -> None:
    model = undecided(Block(Up()), Block(Up()))
    before = capture(model, ids())
    model.blocks[1].mlp = nn.Linear(D, D)
    after = recapture(model, before.segments[1])
    assert after.path == "blocks.1"
    assert "blocks.1.mlp.weight" in after.weights.values()


# ------------------------------------------------------------------------------------------------------------ the inputs


class Scaled(nn.Module):
    """Takes a tensor, an optional mask and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(Up())

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = x * scale if mask is None else x * mask
        return self.block(x)


@pytest.mark.parametrize(
    "inputs",
    [
        states(),
        (states(),),
        [states()],
        {"x": states()},
        ((states(),), {"scale": 2.0}),
        ((), {"x": states(), "mask": torch.ones(BATCH, TOKENS, 1)}),
        (states(), torch.ones(BATCH, TOKENS, 1)),
    ],
    ids=["tensor", "tuple", "list", "dict", "args and kwargs", "kwargs alone", "two by position"],
)
def test_inputs_in_every_form(inputs: Any) -> None:
    assert paths(capture(Scaled().eval(), inputs)) == ["block.mlp"]


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        ((1, 2), (1, 2), {}),
        ({"a": 1}, (), {"a": 1}),
        (((1,), {"a": 2}), (1,), {"a": 2}),
        (([1], {}), (1,), {}),
        ((), (), {}),
    ],
)
def test_inputs_are_arguments_and_keywords(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert as_inputs(given) == (args, kwargs)


@pytest.mark.parametrize("inputs", [3, "text", None])
def test_other_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ModelError, match=f"the example inputs are a {type(inputs).__name__}") as caught:
        capture(build(), inputs)
    assert "a tuple, a dict" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("inputs", "quoted"),
    [
        ((states(),), "IndexError|RuntimeError"),
        ((tokens(), tokens()), "takes 2 positional arguments but 3 were given"),
        ({"tokens": tokens()}, "unexpected keyword argument 'tokens'"),
        ((tokens(vocab=10 * VOCAB),), "index out of range"),
    ],
)
def test_inputs_that_do_not_fit_are_the_users_error(inputs: Any, quoted: str) -> None:
    with pytest.raises(ModelError, match=quoted) as caught:
        capture(build(), inputs)
    assert caught.value.where == "Stack.forward"
    assert caught.value.hint


# ------------------------------------------------------------------------------------------------------ already traced


def test_an_exported_program_is_captured_as_it_is() -> None:
    program = torch.export.export(build(), ids())
    made = capture(program, None)
    assert made.how == "an exported program, as given"
    assert paths(made) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_graph_module_of_operators_is_captured_as_it_is() -> None:
    module = torch.export.export(build(), ids()).module()
    assert is_traced(module)
    made = capture(module, ids())
    assert made.how == "a graph module, as given"
    assert set(locate(made).sites[0].parameters) == {f"blocks.0.mlp.{name}" for name, _ in Up().named_parameters()}


class Doubled(nn.Module):
    """What `fx.symbolic_trace` can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), Up()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_a_symbolically_traced_module_is_lowered() -> None:
    traced = fx.symbolic_trace(Doubled().eval())
    assert is_traced(traced)
    made = capture(traced, (states(),))
    assert made.how == "a graph module, as given"
    assert made.is_graph
    assert {str(n.target) for n in made.segments[0].graph.nodes if n.op == "call_function"} >= {"aten.linear.default"}
    (site,) = locate(made).sites
    assert site.path == "mlp"
    assert set(site.parameters) == {f"mlp.{name}" for name, _ in Up().named_parameters()}


def test_a_symbolically_traced_module_can_be_captured_as_a_module_tree() -> None:
    made = capture(fx.symbolic_trace(Doubled().eval()), (states(),), as_module_tree=True)
    assert made.how.startswith("whole model")
    (site,) = locate(made).sites
    assert site.bindings[0].kind != "none"


def test_a_traced_program_runs_on_its_own_example_inputs() -> None:
    program = torch.export.export(build(), ids())
    passed, own = capture(program, ids()), capture(program, None)
    assert torch.equal(passed.outputs, own.outputs)


# ------------------------------------------------------------------------------------------------- what stays unchanged


@pytest.fixture(params=["whole", "block by block", "refused"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    block: Callable[[nn.Module], nn.Module] = UndecidedBlock if request.param == "refused" else Block
    return build() if request.param == "whole" else undecided(block(Up()))


def look(model: nn.Module, inputs: Any) -> None:
    try:
        inspect(model, inputs)
    except CaptureError:
        return


def test_the_rng_states_stay_unchanged(model: nn.Module) -> None:
    model.blocks[0].mlp.act = lambda h: F.gelu(h) + 0 * torch.rand_like(h)  # the forward itself consumes random numbers
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate()
    look(model, ids())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_inputs_stay_unchanged() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(Up())

        def forward(self, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
            seen["count"] += 1
            return self.block(x.mul_(2))

    inputs = (states(), {"count": torch.zeros(())})
    before = copy.deepcopy(inputs)
    capture(Writes().eval(), inputs)
    assert torch.equal(inputs[0], before[0])
    assert inputs[1] == before[1]


def test_a_block_that_mutates_its_input_is_captured_with_the_original_input() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    model = undecided(Writes(Up()))
    segment, _ = capture(model, ids()).segments
    assert torch.equal(segment.inputs[0][0], model.embed(tokens()))


def test_parameters_and_modules_stay_unchanged(model: nn.Module) -> None:
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    look(model, ids())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_no_hook_remains(model: nn.Module) -> None:
    look(model, ids())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_are_removed_when_the_inputs_do_not_fit() -> None:
    model = build()
    with pytest.raises(ModelError):
        capture(model, (states(),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_modules_mode_is_restored(model: nn.Module) -> None:
    model.train()
    model.blocks[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    look(model, ids())
    assert [module.training for module in model.modules()] == modes


def test_what_is_inspected_is_the_model_in_eval_mode() -> None:
    model = BY_HAND["sequential"].build().train()
    assert [site.activation for site in inspect(model, ids()).sites] == ["mish", "mish"]


def test_two_runs_of_a_random_forward_agree() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    inputs = as_inputs(states())
    assert torch.equal(run(Noisy(), inputs), run(Noisy(), inputs))


# ----------------------------------------------------------------------------------------------------- what is recorded


def test_the_recorded_forward_is_the_models() -> None:
    model = build()
    made = capture(model, ids())
    assert torch.equal(made.outputs, model(*ids()))


def test_every_call_of_every_module_is_recorded() -> None:
    shared = Up()
    made = capture(Stack(lambda: Block(shared)).eval(), ids())
    (call,) = made.calls["blocks.1"]
    assert (call.takes, call.alone, call.gives, call.returns) == (0, True, ((BATCH, TOKENS, D),), None)
    assert len(made.calls["blocks.0.mlp"]) == len(made.calls["blocks.1.mlp"]) == 2  # one module under two paths


def test_a_model_on_meta_needs_no_values() -> None:
    with torch.device("meta"):
        model = Stack(lambda: Block(Up())).eval()
    made = capture(model, ids())
    assert made.outputs is None
    (site, _) = locate(made).sites
    assert (site.device, site.d_hidden, site.activation, site.bindings[0].kind) == ("meta", HIDDEN, "gelu", "module")


def test_a_model_on_meta_gives_the_sites_of_the_real_one() -> None:
    real, meta = build(), build().to("meta")
    for one, other in zip(locate(capture(real, ids())).sites, locate(capture(meta, ids())).sites, strict=True):
        assert other == one.model_copy(update={"device": "meta"})


def test_a_model_on_meta_is_captured_block_by_block_too() -> None:
    class UndecidedHead(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            return logits if logits.sum() > 0 else -logits

    made = capture(UndecidedHead(lambda: Block(Up())).eval().to("meta"), ids())
    assert [segment.path for segment in made.segments] == ["blocks.0", "blocks.1"]
    assert paths(made) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_model_on_meta_with_control_flow_before_its_blocks_is_an_error() -> None:
    with pytest.raises(CaptureError, match="data-dependent") as caught:
        capture(undecided(Block(Up())).to("meta"), ids())
    assert caught.value.where == "Undecided"


ATTEMPTS = [
    f"{mode}{shapes}" for shapes in (", dynamic shapes", ", dynamic first axes", "") for mode in ("non-strict", "strict")
]


@pytest.mark.parametrize(
    ("axes", "messages", "reasons"),
    [
        (0, {}, "non-strict / strict: RuntimeError: no"),
        (0, {"strict": "other"}, "non-strict: RuntimeError: no; strict: RuntimeError: other"),
        (1, {}, "non-strict, dynamic shapes / strict, dynamic shapes / non-strict / strict: RuntimeError: no"),
        (2, {}, " / ".join(ATTEMPTS) + ": RuntimeError: no"),
        (
            2,
            {how: str(number) for number, how in enumerate(ATTEMPTS)},
            "; ".join(f"{how}: RuntimeError: {number}" for number, how in enumerate(ATTEMPTS)),
        ),
    ],
)
def test_a_refusal_has_the_reasons_of_all_attempts(
    axes: int, messages: dict[str, str], reasons: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = iter({0: ATTEMPTS[4:], 1: ATTEMPTS[:2] + ATTEMPTS[4:], 2: ATTEMPTS}[axes])
    given = []

    def fail(_: Any, args: Any, *__: Any, **___: Any) -> Any:
        given.append(args[0])
        raise RuntimeError(messages.get(next(tried), "no"))

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(Refused) as caught:
        export_program(build(), as_inputs(ids()), axes)
    assert str(caught.value) == reasons
    assert len({id(tensor) for tensor in given}) == len(given)  # no attempt sees the tensors that another one marked


def test_the_reasons_of_a_refusal_have_a_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = iter("abcdef")
    long = lambda *_, **__: (_ for _ in ()).throw(RuntimeError(next(attempts) * 5000))  # noqa: E731
    monkeypatch.setattr(torch.export, "export", long)
    with pytest.raises(Refused) as caught:
        export_program(build(), as_inputs(ids()), axes=2)
    assert len(str(caught.value)) < 900
    assert all(f": {letter * 80}" in str(caught.value) for letter in "abcdef")


def test_outputs_that_torch_cannot_trace_are_omitted_and_named() -> None:
    class Cache:
        pass

    class Cached(Stack):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids), Cache()

    made = capture(Cached(lambda: Block(Up())).eval(), ids())
    assert made.how == "whole model, torch.export non-strict, outputs of class Cache omitted"


def test_which_captures_are_of_a_given_graph() -> None:
    program, traced = torch.export.export(build(), ids()), fx.symbolic_trace(Doubled().eval())
    assert capture(program, None).is_graph
    assert capture(traced, (states(),)).is_graph
    assert not capture(traced, (states(),), as_module_tree=True).is_graph
    assert not capture(build(), ids()).is_graph
    assert not capture(undecided(UndecidedBlock(Up())), ids()).is_graph
    assert not Capture((), ((), {}), "nothing").is_graph


def test_a_given_graph_module_keeps_its_guards() -> None:
    module = torch.export.export(build(), ids()).module()
    before = str(module.graph)
    capture(module, ids())
    assert str(module.graph) == before
