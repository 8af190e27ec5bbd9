"""The *null* check in train mode: code that is active only in train mode is checked, and leaves no state behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import VerificationError
from memrewrite.passes.verify import null_check, verified_rewrite, verify
from memrewrite.report import Check

D = tiny.WIDTH
INPUTS = {"ids": tiny.tokens()}


class Switched(nn.Module):
    """An MLP that reads its mode: its dropout is in no eval-mode graph."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        if self.training:
            hidden = F.dropout(hidden, 0.5)
        return self.down(hidden)


class Dropping(Switched):
    """The last matrix is skipped for some rows, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(F.gelu(self.up(x)))
        if self.training:
            out = out * x.new_empty(len(x), 1, 1).bernoulli_(0.5)
        return out


class Normed(nn.Module):
    """A batch norm between the matrices."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(d, 2 * d), nn.BatchNorm1d(2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.norm(self.up(x).mT).mT))


class Noisy(tiny.Loose):
    """Two matrices on the block, with dropout and a randomised activation in the block's own code between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(self.dropout(F.rrelu(self.up(self.norm2(x)), training=self.training))))


class Interleaved(tiny.Loose):
    """Attention, which consumes random numbers too, is computed between the MLP's matrices."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.up(self.norm2(x))))
        return x + self.dropout(self.attention(self.norm1(x))) + self.down(hidden)


def model_of(block: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return tiny.Tiny([block() for _ in range(2)]).eval()


def with_mlp(mlp: Callable[[], nn.Module], dropout: float = 0.2) -> Any:
    return model_of(lambda: tiny.Block(D, lambda d: mlp(), dropout))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(0.5), nn.Linear(2 * D, D), nn.Dropout(0.3))


def check_of(model: nn.Module, inputs: Any = None) -> Check:
    report = memrewrite.apply(model, tiny.recipe("parallel"), inputs or INPUTS)
    assert all(check.outcome != "failed" for check in report.checks)
    return next(check for check in report.checks if check.name == "null_train")


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_mlp(dropped),
        lambda: with_mlp(Switched),
        lambda: with_mlp(Dropping),
        lambda: model_of(lambda: tiny.Loose(D, 0.5)),
        lambda: model_of(lambda: Noisy(D, 0.5)),
        lambda: tiny.bert(hidden_dropout_prob=0.3),
        lambda: tiny.gpt2(resid_pdrop=0.3),
        lambda: tiny.t5(dropout_rate=0.3),
    ],
    ids=["dropout", "reads its mode", "stochastic depth", "span", "span with noise inside", "bert", "gpt2", "t5"],
)
def test_in_train_mode_outputs_keep_every_bit(build: Callable[[], Any]) -> None:
    model = build()
    inputs = next((make() for kind, make in tiny.MODELS.values() if type(kind()) is type(model)), INPUTS)
    check = check_of(model, inputs)
    assert check.outcome == "passed", check.sentence
    assert "same as in eval mode" not in check.sentence  # it consumed random numbers


def test_a_model_without_noise_is_reported() -> None:
    assert "same as in eval mode" in check_of(tiny.modular()).sentence


# ------------------------------------------------------------------------------------------------------- wrong extraction


def dropouts_gone(graph: fx.Graph) -> None:
    for node in [n for n in graph.nodes if "dropout" in str(n.target)]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def another_rate(graph: fx.Graph) -> None:
    for node in [n for n in graph.nodes if "dropout" in str(n.target)]:
        node.update_arg(1, 0.4)


def dropped_twice(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if "dropout" in str(n.target))
    with graph.inserting_after(node):
        again = graph.node_copy(node)
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    again.update_arg(0, node)


def one_random_number_too_many(graph: fx.Graph) -> None:
    """The MLP is the same, and all random numbers after it differ."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        graph.call_function(torch.ops.aten.rand.default, ([1],))


@pytest.mark.parametrize("mutation", [dropouts_gone, another_rate, dropped_twice, one_random_number_too_many])
@pytest.mark.parametrize("span", [False, True])
def test_noise_that_was_extracted_wrongly_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutation: Callable[[fx.Graph], None], span: bool
) -> None:
    model = model_of(lambda: Noisy(D, 0.5)) if span else with_mlp(dropped)
    photograph, real = tiny.Photograph(model), null_check.OriginalMLP

    class Wrong(real):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            mutation(self.calls[0].graph)
            self.calls[0].recompile()

    monkeypatch.setattr(null_check, "OriginalMLP", Wrong)
    monkeypatch.setattr(verified_rewrite, "substitute", lambda *_: pytest.fail("it was edited"))
    with pytest.raises(VerificationError) as caught:
        memrewrite.apply(model, tiny.recipe(), INPUTS)
    assert caught.value.report is not None
    assert [c.name for c in caught.value.report.checks if c.outcome == "failed"] == ["null_train"]
    assert not photograph.differences(tiny.Photograph(model))


# ------------------------------------------------------------------------------------------------------------ skipped


class Unsteady(Switched):
    """Its noise does not depend on the seed."""

    def forward(self, x: Tensor) -> Tensor:
        noise = float(np.random.default_rng().random()) if self.training else 0.0
        return super().forward(x) + noise


class Raising(Switched):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("labels are needed")
        return super().forward(x)


class Another(Switched):
    """What it computes in train mode cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training and float(x.sum()) > 0 else 1)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: with_mlp(Unsteady), "differ between two runs from one seed"),
        (lambda: with_mlp(Raising), "does not run in train mode: RuntimeError: labels are needed"),
        (lambda: with_mlp(Another), "cannot be captured"),
        (lambda: model_of(lambda: Interleaved(D, 0.5)), "other code consumes random numbers too"),
    ],
)
def test_what_cannot_be_compared_is_skipped_with_the_reason(build: Callable[[], Any], why: str) -> None:
    check = check_of(build())
    assert check.outcome == "skipped"
    assert why in check.sentence


def test_a_traced_graph_has_one_mode() -> None:
    program = torch.export.export(tiny.modular(), (), INPUTS)
    check = check_of(program)  # type: ignore[arg-type]
    assert check.outcome == "skipped"
    assert "in one mode" in check.sentence


# ------------------------------------------------------------------------------------------------------------ no trace


class Counting(nn.Module):
    """Mutates everything in train mode: buffers, numbers, lists, a weight, a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.scale = tiny.MLP(D, 2 * D), nn.Parameter(torch.ones(D))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.steps, self.seen, self.cache = 0, [], torch.zeros(3)
        self.register_buffer("wide", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.seen.append(self.steps)
            self.later = True
            with torch.no_grad():
                self.step += 1
                self.step = self.step + 1
                self.scale.mul_(1.5)
                self.cache.add_(1)
        return self.mlp(x) * self.scale


def test_train_mode_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = tiny.Tiny([tiny.Block(D, lambda d: Counting(), 0.3), tiny.Block(D, lambda d: Normed(), 0.3)]).eval()
    model.blocks[1].train()
    photograph = tiny.Photograph(model)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    monkeypatch.setattr(verify, "locality", lambda _: Check(name="locality", outcome="failed", number=0, sentence="stop"))
    with pytest.raises(VerificationError) as caught:
        memrewrite.apply(model, tiny.recipe(), INPUTS)
    assert caught.value.report is not None
    assert [c.outcome for c in caught.value.report.checks] == ["passed", "passed", "failed"]
    assert not photograph.differences(tiny.Photograph(model))
    counting = model.blocks[0].mlp
    assert (counting.steps, counting.seen, counting.cache.tolist()) == (0, [], [0.0, 0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
