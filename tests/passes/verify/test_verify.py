"""Every check fails when it must: a table of wrong rewrites, each with the check that must fail.

The mutations simulate mistakes in `substitute`: each is applied right after it, and reverted with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memrewrite
from memrewrite.errors import VerificationError
from memrewrite.kernels import ops
from memrewrite.layers.references import ModuleAt
from memrewrite.layers.value_table import Table
from memrewrite.passes.rewrite.edit_module import AddMemory
from memrewrite.passes.rewrite.hooks import ZeroStub
from memrewrite.passes.rewrite.undo_log import UndoLog
from memrewrite.passes.verify import null_check, verified_rewrite
from memrewrite.report import Report

CHECKS = ["null", "null_train", "locality", "coverage", "untouched", "frame", "sharing", "tokenwise", "gradient", "identity"]
Mutation = Callable[[Any, UndoLog], None]


# -------------------------------------------------------------------------------------------------------- mutations


def _set(owner: Any, name: str, value: Any, edit: UndoLog) -> None:
    """Set an attribute until the edit is reverted."""
    had, old = name in vars(owner) or name in getattr(owner, "_modules", {}), getattr(owner, name, None)
    setattr(owner, name, value)
    edit.done(lambda: setattr(owner, name, old) if had else delattr(owner, name))


def _hooked(handle: Any, edit: UndoLog) -> None:
    edit.done(handle.remove)


def _layer(edit: UndoLog, number: int = 0) -> Any:
    return list(edit.layers.values())[number]


def one_bit_changed(model: Any, edit: UndoLog) -> None:
    bits = model.norm.weight.detach().view(torch.int32)
    bits[3] ^= 1
    edit.done(lambda: bits[3].bitwise_xor_(1))


def a_buffer_changed(model: Any, edit: UndoLog) -> None:
    old = model.positions.clone()
    model.positions[31] += 1  # a row that no example input reaches
    edit.done(lambda: model.positions.copy_(old))


def another_parameter_frozen(model: Any, edit: UndoLog) -> None:
    model.norm.weight.requires_grad_(False)
    edit.done(lambda: model.norm.weight.requires_grad_(True))


def a_stray_parameter(model: Any, edit: UndoLog) -> None:
    model.register_parameter("stray", nn.Parameter(torch.zeros(3)))
    edit.done(lambda: delattr(model, "stray"))


def the_head_untied(model: Any, edit: UndoLog) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    edit.done(lambda: setattr(model.head, "weight", model.embed.weight))


def the_old_mlp_kept_elsewhere(model: Any, edit: UndoLog) -> None:
    model.old = tiny.MLP(tiny.WIDTH, 2 * tiny.WIDTH)
    edit.done(lambda: delattr(model, "old"))


def replaced_weights_stay(model: Any, edit: UndoLog) -> None:
    """The first matrix still computes, and its result is unused."""
    block, up = model.blocks[0], tiny.loose().blocks[0].up
    up._forward_pre_hooks = block.up._forward_pre_hooks
    up._forward_pre_hooks_with_kwargs = block.up._forward_pre_hooks_with_kwargs
    assert isinstance(block.up, ZeroStub)
    _set(block, "up", up, edit)


def a_norm_is_skipped(model: Any, edit: UndoLog) -> None:
    _set(model.blocks[1].norm1, "forward", lambda x: x, edit)


def dropout_outside_changed(model: Any, edit: UndoLog) -> None:
    _set(model.blocks[2].dropout, "p", 0.5, edit)


def an_output_is_scaled(model: Any, edit: UndoLog) -> None:
    _hooked(model.blocks[0].attention.register_forward_hook(lambda m, args, out: out * 1.001), edit)


def blocks_swapped(model: Any, edit: UndoLog) -> None:
    first, second = model.blocks[0], model.blocks[1]
    model.blocks[0], model.blocks[1] = second, first
    edit.done(lambda: (model.blocks.__setitem__(0, first), model.blocks.__setitem__(1, second)))


def layers_swapped(model: Any, edit: UndoLog) -> None:
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    _set(model.blocks[0], "mlp", second, edit)
    _set(model.blocks[1], "mlp", first, edit)


def reads_another_value(model: Any, edit: UndoLog) -> None:
    """The layer reads the residual stream before the norm."""
    seen: list[Any] = []
    _hooked(model.blocks[0].norm2.register_forward_pre_hook(lambda m, args: seen.append(args[0])), edit)
    _hooked(_layer(edit).register_forward_pre_hook(lambda m, args: (seen.pop(),) if seen else None), edit)


def never_called(model: Any, edit: UndoLog) -> None:
    (key, hook), *_ = model.blocks[0].mlp._forward_hooks.items()
    assert isinstance(hook, AddMemory)
    del model.blocks[0].mlp._forward_hooks[key]


def called_twice(model: Any, edit: UndoLog) -> None:
    layer = _layer(edit)
    _hooked(model.blocks[0].norm2.register_forward_hook(lambda m, args, out: out if layer(out) is None else None), edit)


def added_twice(model: Any, edit: UndoLog) -> None:
    _hooked(model.blocks[0].mlp.register_forward_hook(AddMemory(ModuleAt(_layer(edit)), None)), edit)


def added_doubled(model: Any, edit: UndoLog) -> None:
    _hooked(_layer(edit).register_forward_hook(lambda m, args, out: 2 * out), edit)
    hooks = model.blocks[0].mlp._forward_hooks
    (key, add), *_ = hooks.items()
    hooks[key] = lambda m, args, out: out + 2 * add.layer()(args[0])


def computed_and_not_added(model: Any, edit: UndoLog) -> None:
    hooks = model.blocks[0].mlp._forward_hooks
    (key, add), *_ = hooks.items()
    hooks[key] = lambda m, args, out: out if add.layer()(args[0]) is not None else None


def mlp_dropped_next_to_the_layer(model: Any, edit: UndoLog) -> None:
    hooks = model.blocks[0].mlp._forward_hooks
    (key, add), *_ = hooks.items()
    hooks[key] = lambda m, args, out: add.layer()(args[0])


def a_table_of_its_own(model: Any, edit: UndoLog) -> None:
    _layer(edit, 1)._pool = ModuleAt(copy.deepcopy(_layer(edit, 1).pool))


def a_table_with_two_names(model: Any, edit: UndoLog) -> None:
    _set(model.blocks[0], "table", model.memory.shared, edit)


def output_detached(model: Any, edit: UndoLog) -> None:
    _hooked(_layer(edit, 2).register_forward_hook(lambda m, args, out: out.detach()), edit)


def values_not_finite(model: Any, edit: UndoLog) -> None:
    with torch.no_grad():
        model.memory.shared.values.fill_(float("nan"))


def table_detached(model: Any, edit: UndoLog) -> None:
    """The outputs depend on the table, and it gets no gradient; every other parameter does."""
    pool = model.memory.shared
    _set(pool, "forward", lambda indices, weights, dtype=None: ops.sparse_lookup(pool.values.detach(), indices, weights), edit)


def table_gradient_not_finite(model: Any, edit: UndoLog) -> None:
    edit.done(model.memory.shared.values.register_hook(lambda grad: grad * float("nan")).remove)


def table_gradient_zero(model: Any, edit: UndoLog) -> None:
    edit.done(model.memory.shared.values.register_hook(lambda grad: grad * 0).remove)


def does_not_start_at_zero(model: Any, edit: UndoLog) -> None:
    nn.init.constant_(_layer(edit).value_proj.bias, 1e-3)


def wrong_residual(model: Any, edit: UndoLog) -> None:
    """The block adds its input a second time."""
    _hooked(model.blocks[1].register_forward_hook(lambda m, args, out: out + args[0]), edit)


def residual_lost(model: Any, edit: UndoLog) -> None:
    """The layer's output replaces the residual stream: the stream before it is subtracted."""
    seen: list[Any] = []
    _hooked(model.blocks[0].norm2.register_forward_pre_hook(lambda m, args: seen.append(args[0])), edit)
    _hooked(model.blocks[0].register_forward_hook(lambda m, args, out: out - seen.pop()), edit)


def inputs_swapped(model: Any, edit: UndoLog) -> None:
    """The second layer reads what the first one read."""
    seen: list[Any] = []
    _hooked(_layer(edit, 0).register_forward_pre_hook(lambda m, args: seen.append(args[0])), edit)
    _hooked(_layer(edit, 1).register_forward_pre_hook(lambda m, args: (seen.pop(),)), edit)


def stale_weights(model: Any, edit: UndoLog) -> None:
    """One module has its weight from before the last step of training."""
    qkv = model.blocks[1].attention.qkv
    new = qkv.weight
    qkv.weight = nn.Parameter(new.detach() - 1e-4)
    edit.done(lambda: setattr(qkv, "weight", new))


def lost_bias(model: Any, edit: UndoLog) -> None:
    out = model.blocks[2].attention.out
    bias, out.bias = out.bias, None
    edit.done(lambda: setattr(out, "bias", bias))


def bias_ignored(model: Any, edit: UndoLog) -> None:
    """It is still registered, and nothing adds it."""
    out = model.blocks[2].attention.out
    _set(out, "forward", lambda x: nn.functional.linear(x, out.weight), edit)


def tokens_mixed_before_the_layer(model: Any, edit: UndoLog) -> None:
    _hooked(model.blocks[0].norm2.register_forward_hook(lambda m, args, out: out + out.mean(1, keepdim=True)), edit)


def tokens_shifted_before_the_layer(model: Any, edit: UndoLog) -> None:
    """Every layer's input is shifted by one token."""
    _hooked(model.blocks[0].norm2.register_forward_hook(lambda m, args, out: out.roll(1, 1)), edit)


def tokens_shifted_at_the_layer(model: Any, edit: UndoLog) -> None:
    _hooked(_layer(edit).register_forward_pre_hook(lambda m, args: (args[0].roll(1, 1),)), edit)


def tokens_mixed_after_the_layer(model: Any, edit: UndoLog) -> None:
    _hooked(_layer(edit).register_forward_hook(lambda m, args, out: out + out.mean(1, keepdim=True)), edit)


def dropout_in_train_mode_only(model: Any, edit: UndoLog) -> None:
    """A block has no dropout any more; eval mode does not show it."""
    _set(model.blocks[0], "dropout", nn.Identity(), edit)


MUTATIONS: list[tuple[str, str, Mutation, str]] = [  # model, placement, mutation, the check that must fail
    ("modular", "parallel", never_called, "coverage"),
    ("modular", "parallel", added_twice, "coverage"),
    ("modular", "replace", called_twice, "coverage"),
    ("modular", "replace", one_bit_changed, "untouched"),
    ("modular", "parallel", one_bit_changed, "untouched"),
    ("modular", "replace", a_buffer_changed, "untouched"),
    ("modular", "replace", another_parameter_frozen, "untouched"),
    ("modular", "replace", a_stray_parameter, "untouched"),
    ("modular", "replace", the_head_untied, "frame"),
    ("modular", "replace", the_old_mlp_kept_elsewhere, "untouched"),
    ("loose", "replace", replaced_weights_stay, "untouched"),
    ("modular", "replace", a_norm_is_skipped, "frame"),
    ("modular", "parallel", a_norm_is_skipped, "frame"),
    ("loose", "replace", dropout_outside_changed, "frame"),
    ("modular", "replace", an_output_is_scaled, "frame"),
    ("modular", "replace", blocks_swapped, "frame"),
    ("modular", "replace", layers_swapped, "frame"),
    ("modular", "replace", reads_another_value, "frame"),
    ("modular", "parallel", reads_another_value, "frame"),
    ("modular", "parallel", added_doubled, "frame"),
    ("modular", "parallel", computed_and_not_added, "frame"),
    ("modular", "parallel", mlp_dropped_next_to_the_layer, "frame"),
    ("modular", "replace", a_table_of_its_own, "sharing"),
    ("modular", "replace", a_table_with_two_names, "sharing"),
    ("modular", "replace", output_detached, "gradient"),
    ("modular", "parallel", output_detached, "gradient"),
    ("modular", "replace", values_not_finite, "gradient"),
    ("modular", "replace", table_detached, "gradient"),
    ("modular", "parallel", table_detached, "gradient"),
    ("modular", "replace", table_gradient_not_finite, "gradient"),
    ("modular", "replace", table_gradient_zero, "gradient"),
    ("modular", "parallel", does_not_start_at_zero, "identity"),
    ("modular", "replace", wrong_residual, "frame"),
    ("modular", "parallel", wrong_residual, "identity"),
    ("modular", "replace", residual_lost, "frame"),
    ("modular", "replace", inputs_swapped, "frame"),
    ("modular", "parallel", inputs_swapped, "frame"),
    ("modular", "replace", stale_weights, "untouched"),
    ("modular", "parallel", stale_weights, "identity"),
    ("modular", "replace", lost_bias, "untouched"),
    ("modular", "replace", bias_ignored, "frame"),
    ("loose", "replace", bias_ignored, "frame"),
    ("modular", "replace", tokens_mixed_before_the_layer, "frame"),
    ("modular", "replace", tokens_shifted_before_the_layer, "frame"),
    ("modular", "parallel", tokens_shifted_before_the_layer, "identity"),
    ("modular", "replace", tokens_shifted_at_the_layer, "tokenwise"),
    ("modular", "parallel", tokens_shifted_at_the_layer, "tokenwise"),
    ("modular", "replace", tokens_mixed_after_the_layer, "tokenwise"),
    ("loose", "replace", dropout_in_train_mode_only, "frame"),
]


@pytest.mark.parametrize(
    ("name", "placement", "mutation", "check"), MUTATIONS, ids=[f"{m.__name__}-{p}" for _, p, m, _ in MUTATIONS]
)
def test_a_broken_rewrite_is_caught_and_undone(
    monkeypatch: pytest.MonkeyPatch, name: str, placement: str, mutation: Mutation, check: str
) -> None:
    model, inputs = tiny.named(name)
    before, photograph = tiny.values_of(model, inputs), tiny.Photograph(model)
    real = verified_rewrite.substitute

    def broken(model: nn.Module, plan: Any, **options: Any) -> UndoLog:
        edit = real(model, plan, **options)
        mutation(model, edit)
        return edit

    monkeypatch.setattr(verified_rewrite, "substitute", broken)
    failure = refused(model, tiny.recipe(placement), inputs)
    assert check in failed(failure), failure.report
    assert not photograph.differences(tiny.Photograph(model))
    assert torch.equal(tiny.values_of(model, inputs), before)


def refused(model: Any, recipe: Any, inputs: Any) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        memrewrite.apply(model, recipe, inputs)
    assert caught.value.exit_code == 1
    assert caught.value.hint
    return caught.value


def failed(failure: VerificationError) -> list[str]:
    assert failure.report is not None
    assert not failure.report.ok
    return [check.name for check in failure.report.checks if check.outcome == "failed"]


# ------------------------------------------------------------------------------------------------- the null check


@pytest.mark.parametrize("name", ["modular", "loose"])
def test_a_wrong_region_is_caught_before_anything_is_edited(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, inputs = tiny.named(name)
    photograph, real = tiny.Photograph(model), null_check.OriginalMLP

    class Wrong(real):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for node in self.calls[0].graph.nodes:
                if "gelu" in str(node.target):
                    node.target = torch.ops.aten.relu.default
            self.calls[0].recompile()

    monkeypatch.setattr(null_check, "OriginalMLP", Wrong)
    monkeypatch.setattr(verified_rewrite, "substitute", lambda *_: pytest.fail("it was edited"))
    failure = refused(model, tiny.recipe(), inputs)
    assert failed(failure) == ["null"]
    assert not photograph.differences(tiny.Photograph(model))


def test_an_error_while_verifying_undoes_the_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.named("loose")
    photograph = tiny.Photograph(model)
    monkeypatch.setattr(verified_rewrite, "verify", lambda *_: [][0])
    with pytest.raises(IndexError):
        memrewrite.apply(model, tiny.recipe(), inputs)
    assert not photograph.differences(tiny.Photograph(model))


# --------------------------------------------------------------------------------------------------------- in graphs


def rewired(result: fx.GraphModule) -> None:
    """One layer reads what another read."""
    first, second, *_ = [n for n in result.graph.nodes if n.op == "call_module"]
    second.args = first.args


def a_norm_bypassed(result: fx.GraphModule) -> None:
    norm = next(n for n in result.graph.nodes if "layer_norm" in str(n.target))
    norm.replace_all_uses_with(norm.args[0])


def epsilon_changed(result: fx.GraphModule) -> None:
    norm = next(n for n in result.graph.nodes if "layer_norm" in str(n.target))
    norm.args = (*norm.args[:4], 1e-3)


@pytest.mark.parametrize("mutation", [rewired, a_norm_bypassed, epsilon_changed])
def test_a_broken_graph_is_caught(monkeypatch: pytest.MonkeyPatch, mutation: Callable[[Any], None]) -> None:
    model, inputs = tiny.named("modular")
    program = torch.export.export(model, (), inputs)
    before, real = str(program.graph), verified_rewrite.emit_graph

    def broken(*args: Any) -> Any:
        result, layers = real(*args)
        mutation(result)
        result.recompile()
        return result, layers

    monkeypatch.setattr(verified_rewrite, "emit_graph", broken)
    assert "frame" in failed(refused(program, tiny.recipe(), inputs))
    assert str(program.graph) == before


# --------------------------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_every_check_has_a_name_and_a_sentence(placement: str) -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, tiny.recipe(placement), inputs)
    assert [check.name for check in report.checks] == CHECKS
    assert {c.name for c in report.checks if c.outcome == "skipped"} == ({"identity"} if placement == "replace" else set())
    assert all(check.sentence for check in report.checks)


def test_a_report_reads_back_from_json() -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, tiny.recipe(), inputs)
    again = Report.model_validate_json(report.model_dump_json())
    assert again.model_dump() == report.model_dump()
    with pytest.raises(AttributeError, match=r"memrewrite\.load"):
        _ = again.model


def test_the_report_counts_the_parameters() -> None:
    model, inputs = tiny.named("modular")
    before = sum(p.numel() for p in model.parameters())
    report = memrewrite.apply(model, tiny.recipe(), inputs)
    after = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert report.after.parameters - report.before.parameters == after - before


def test_verify_off_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.named("modular")
    monkeypatch.setattr(verified_rewrite, "verify", lambda *_: pytest.fail("it was verified"))
    report = memrewrite.apply(model, tiny.recipe(verify="off"), inputs)
    assert report.checks == ()
    assert report.ok


def test_on_meta_what_needs_values_is_skipped_with_a_sentence() -> None:
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model.to("meta"), tiny.recipe("parallel"), inputs)
    skipped = {c.name: c.sentence for c in report.checks if c.outcome == "skipped"}
    assert set(skipped) == {"null", "null_train", "locality", "coverage", "tokenwise", "gradient", "identity"}
    assert all("meta" in sentence for sentence in skipped.values())


def test_verification_leaves_no_trace() -> None:
    model, inputs = tiny.named("modular")
    ids = inputs["ids"].clone()
    state = torch.get_rng_state()
    memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs["ids"], ids)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert len(tiny.hooks_of(model)) == tiny.BLOCKS  # those that add a layer's output


def test_frozen_parameters_stay_frozen_and_new_ones_train() -> None:
    model, inputs = tiny.named("modular")
    model.requires_grad_(False)
    memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "memory" in name}


def test_layers_that_start_at_zero_are_zeroed_again() -> None:
    model, inputs = tiny.named("modular")
    memrewrite.apply(model, tiny.recipe("parallel"), inputs)
    assert not any(block.mlp.memory.value_proj.weight.any() for block in model.blocks)


class _TableGradients(TorchDispatchMode):
    """Counts the dense tensors of this shape that memory operators return."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.found = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "memrewrite":
            dense = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
            self.found += sum(t.shape == self.shape for t in dense)
        return out


@pytest.mark.parametrize("kind", ["memory_plus", "peer"])
def test_the_gradient_check_makes_no_gradient_of_a_whole_table(kind: str) -> None:
    model, inputs = tiny.named("modular")
    recipe = tiny.recipe("parallel")
    recipe["replace"][0] |= {"with": kind}
    with _TableGradients(torch.Size((64, tiny.WIDTH))) as gradients:
        assert memrewrite.apply(model, recipe, inputs).ok
    assert model.memory.shared.values.shape == gradients.shape
    assert gradients.found == 0
    assert {m.gradient for m in model.memory.modules() if isinstance(m, Table)} == {"dense"}  # as the recipe says


def test_a_model_that_runs_its_mlps_without_gradients_is_no_failure() -> None:
    model = tiny.modular()
    for block in model.blocks:
        block.forward = torch.no_grad()(block.forward)  # as custom autograd functions do in eval mode
    report = memrewrite.apply(model, tiny.recipe("parallel"), (tiny.tokens(),))
    (check,) = [check for check in report.checks if check.name == "gradient"]
    assert (check.outcome, "keeps no gradients" in check.sentence) == ("skipped", True)


def test_a_model_that_reads_weights_of_a_replaced_module_fails_with_that_reason() -> None:
    class ReadsWeights(tiny.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.mlp.down.weight.isfinite().all()
            return super().forward(x)

    model = tiny.modular()
    model.blocks[0].__class__ = ReadsWeights
    before = model(tiny.tokens())
    assert memrewrite.apply(model, tiny.recipe("parallel"), (tiny.tokens(),)).ok
    model = tiny.modular()
    model.blocks[0].__class__ = ReadsWeights
    with pytest.raises(VerificationError, match=r"does not run: ModelError: .* reads values of 'MLP\.down\.weight'"):
        memrewrite.apply(model, tiny.recipe("replace"), (tiny.tokens(),))
    assert torch.equal(model(tiny.tokens()), before)
