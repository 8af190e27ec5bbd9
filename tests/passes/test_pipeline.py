"""The functions from capture to verify: what they refuse before any edit, and models that return other objects than tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memrewrite
from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.plan import memory_budget

RULE = {"with": "memory_plus", "options": {"heads": 2, "topk": 4}}


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


INPUTS = {"input_ids": torch.arange(14).reshape(2, 7)}  # no `use_cache=False`: the model returns a cache


def recipe(*layers: int, keys: int = 8) -> dict[str, Any]:
    rules = [{"where": {"layers": [i]}, "pool": f"p{i}", **RULE} for i in layers]
    return {"memrewrite": 1, "pools": {f"p{i}": {"keys": keys} for i in layers}, "replace": rules}


def test_outputs_that_cannot_be_traced_are_ignored_and_reported() -> None:
    rewritten = model()
    forward = rewritten.forward
    report = memrewrite.apply(rewritten, recipe(1), INPUTS)
    assert "DynamicCache" in report.plan.captured
    assert {c.name: c.outcome for c in report.checks} | {"identity": "skipped"} == dict.fromkeys(
        ("null", "null_train", "locality", "coverage", "untouched", "frame", "sharing", "tokenwise", "gradient"),
        "passed",
    ) | {"identity": "skipped"}
    assert rewritten.forward == forward
    assert "forward" not in vars(rewritten)


def test_pools_that_do_not_fit_together_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 64 * 64 * 32 * 4  # bytes of a pool of 64 keys
    monkeypatch.setattr(memory_budget, "free_memory", lambda _: 2 * one - 1)
    untouched = model()
    names = dict(untouched.named_modules()).keys()
    with pytest.raises(SelectError, match="4,096 × 32") as caught:
        memrewrite.apply(untouched, recipe(0, 1, keys=64), INPUTS)
    assert caught.value.exit_code == 2
    assert "--allow-large" in str(caught.value)
    assert dict(untouched.named_modules()).keys() == names
    assert memrewrite.apply(model(), recipe(0, keys=64), INPUTS).ok
    assert memrewrite.apply(model(), recipe(0, 1, keys=64), INPUTS, allow_large=True).ok


def test_inputs_are_needed() -> None:
    with pytest.raises(ModelError, match="no example inputs"):
        memrewrite.inspect(model())


def test_a_saved_graph_runs_on_other_sizes(tmp_path: Path) -> None:
    report = memrewrite.apply(model(), recipe(0, 2), {**INPUTS, "use_cache": False}, emit="graph")
    loaded = memrewrite.load(memrewrite.save(report.model, tmp_path / "graph"), trust_code=True)
    other = {"input_ids": torch.arange(33).reshape(3, 11), "use_cache": False}
    assert torch.equal(loaded(**other)["logits"], report.model(**other)["logits"])


class InPlace(nn.Module):
    """A block that adds the residual to the MLP's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down(torch.relu(self.up(self.norm(x))))
        out.add_(x)
        return out


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_a_residual_added_in_place(placement: str) -> None:
    torch.manual_seed(0)
    blocks, x = nn.Sequential(InPlace(), InPlace()), torch.randn(2, 5, 8)
    rule = {"where": {"all": True}, "pool": "p", "placement": placement, **RULE}
    report = memrewrite.apply(blocks, {"memrewrite": 1, "pools": {"p": {"keys": 8}}, "replace": [rule]}, (x,))
    assert len(report.plan.substitutions) == 2
    assert report.ok
