"""Layers without a pool in whole models: applied, saved and loaded, emitted, compiled, exported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

import memrewrite
from memrewrite.layers.moe import Moe
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import layers_of
from memrewrite.passes.verify.checks import tokenwise
from memrewrite.passes.verify.evidence import RewrittenModel
from memrewrite.passes.verify_saved import verify_saved

OPTIONS: dict[str, dict[str, Any]] = {"moe": {"experts": 3}, "dense": {"width": 1.5}, "identity": {}, "none": {}}
every_kind = pytest.mark.parametrize("kind", OPTIONS)


def wanted(kind: str, placement: str = "replace") -> dict[str, Any]:
    rule = {"where": {"all": True}, "with": kind, "placement": placement, "options": OPTIONS[kind]}
    return {"memrewrite": 1, "replace": [rule]}


@every_kind
@pytest.mark.parametrize("name", ["loose", "gpt2", "vit"])
def test_they_replace_mlps_of_real_models(kind, name):
    model, inputs = tiny.named(name)
    report = memrewrite.apply(model, wanted(kind), inputs)
    assert report.ok
    assert {c.name for c in report.checks if c.outcome == "skipped"} == {"identity"}
    assert report.after.parameters - report.before.parameters == report.parameters_after - report.parameters_before
    assert tiny.values_of(model, inputs).isfinite().all()


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_in_parallel_they_change_nothing_and_can_be_trained(kind):
    model, inputs = tiny.named("llama")
    before = tiny.values_of(model, inputs)
    report = memrewrite.apply(model, wanted(kind, "parallel"), inputs)
    assert all(check.outcome == "passed" for check in report.checks)
    assert torch.equal(tiny.values_of(model, inputs), before)
    model.train()(**inputs).logits.square().sum().backward()
    assert all(layer.down.weight.grad.any() for layer in layers_of(model, report.plan).values())


def test_none_is_the_model_without_its_mlps_and_identity_adds_their_inputs():
    model, inputs = tiny.named("modular")
    for kind, mlp in (("none", lambda x: torch.zeros_like(x)), ("identity", lambda x: x)):
        right, got = copy.deepcopy(model), copy.deepcopy(model)
        for block in right.blocks:
            block.mlp.forward = mlp
        memrewrite.apply(got, wanted(kind), inputs)
        torch.testing.assert_close(tiny.values_of(got, inputs), tiny.values_of(right, inputs))


@every_kind
def test_saved_and_loaded_they_are_the_same(kind, tmp_path):
    model, inputs = tiny.named("llama")
    memrewrite.apply(model, wanted(kind), inputs)
    model.train()(**inputs)  # statistics of training are not saved
    model.eval()
    memrewrite.save(model, tmp_path / "saved")
    loaded = memrewrite.load(tmp_path / "saved")
    assert torch.equal(tiny.values_of(loaded, inputs), tiny.values_of(model, inputs))
    assert verify_saved(tmp_path / "saved").ok
    assert not pools_of(loaded).state_dict()


@every_kind
def test_in_an_exported_graph(kind):
    model, inputs = tiny.named("modular")
    report = memrewrite.apply(model, wanted(kind), inputs, emit="graph")
    assert report.ok
    longer = {"ids": tiny.tokens(3, 9)}
    live = copy.deepcopy(model)
    memrewrite.apply(live, wanted(kind), inputs)
    torch.testing.assert_close(tiny.values_of(report.model, longer), tiny.values_of(live, longer))


@every_kind
def test_in_torch_compile_in_train_mode(kind):
    torch._dynamo.reset()
    model, inputs = tiny.named("modular")
    ours = memrewrite.backend(wanted(kind), model=model, then="eager")
    ours.memory.train()
    model.train()
    out = torch.compile(model, backend=ours)(**inputs)
    assert out.isfinite().all()
    assert len(ours.memory.layers._modules) == tiny.BLOCKS
    assert not [check for checks in ours.checks for check in checks if check.outcome == "failed"]
    assert ours.memory.layers.training


def test_tokenwise_looks_at_eval_mode_and_restores_the_mode():
    model, inputs = tiny.named("modular")
    plan = memrewrite.apply(model, wanted("moe"), inputs).plan
    model.train()
    layers = layers_of(model, plan)
    assert tokenwise(RewrittenModel(model, plan, ((), inputs), layers)).outcome == "passed"
    assert all(layer.training for layer in layers.values())


def test_tokenwise_finds_a_mixture_that_mixes_tokens(monkeypatch):
    model, inputs = tiny.named("modular")
    plan = memrewrite.apply(model, wanted("moe"), inputs).plan
    monkeypatch.setattr(Moe, "_by_tokens", lambda self, tokens, scores, logits: self._by_experts(tokens, scores))
    check = tokenwise(RewrittenModel(model, plan, ((), inputs), layers_of(model, plan)))
    assert check.outcome == "failed"


@pytest.mark.parametrize("kind", OPTIONS)
def test_exported_to_onnx_in_standard_operators(kind, tmp_path):
    onnx = pytest.importorskip("onnx")
    model, inputs = tiny.named("modular")
    memrewrite.apply(model, wanted(kind), inputs)
    memrewrite.export_onnx(model, tmp_path / "model.onnx", (inputs["ids"],))
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    session = memrewrite.onnx_session(tmp_path / "model.onnx")
    for shape in ((2, 5), (1, 1), (3, 11)):
        ids = tiny.tokens(*shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), tiny.values_of(model, {"ids": ids}), rtol=1e-4, atol=1e-4)
