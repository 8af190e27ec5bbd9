"""Every rejection names a rule of the table, and nothing depends on the words of its reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch
from families import FAMILIES, Attention, Block, D, Stack, Up, ids
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.passes.capture.capture import capture
from memrewrite.passes.explain.explain import explained
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.regions.rejection import ADVICE, Rejection, RuleName, advice_on
from memrewrite.site import NearMiss

NEAR = [name for name, family in FAMILIES.items() if family.misses]


class Odd(nn.Module):
    """One of each: an inner value read outside, tokens mixed, widths that fit no pattern, two matrices and nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Up() for _ in range(4))
        self.gate, self.attention = nn.Linear(D, 1), Attention()

    def forward(self, x: Tensor) -> Tensor:
        leak, mix, odd, straight = self.parts
        hidden = F.gelu(leak.up(x))
        x = x + leak.down(hidden) + hidden[..., :D]
        x = x + mix.down(F.gelu(mix.up(x).cumsum(1)))
        x = x + odd.down(F.silu(self.gate(x)) * odd.up(x))
        x = x + straight.down(straight.up(x))
        return x + self.attention(x)


class Headed(Stack):
    """A head that looks like an MLP and returns to no stream."""

    def __init__(self) -> None:
        super().__init__(lambda: Block(Up()), depth=1)
        self.head = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, 8))  # type: ignore[assignment]


def models() -> dict[str, tuple[Callable[[], nn.Module], Any]]:
    named: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        name: (FAMILIES[name].build, FAMILIES[name].inputs()) for name in NEAR
    }
    return named | {"odd": (lambda: Stack(Odd, depth=1).eval(), ids()), "a head": (lambda: Headed().eval(), ids())}


@cache
def seen(name: str) -> Any:
    make, inputs = models()[name]
    torch.manual_seed(0)
    model = make()
    before = capture(model, inputs)
    return model, before


def rules(name: str) -> dict[str, list[tuple[str, str]]]:
    """The rule and advice of every finding about a model, by the finding's linear."""
    model, before = seen(name)
    answer = explained(model, before, locate(before), "")
    return {f.linear: [(f.rule, f.advice)] for f in answer.findings if f.outcome != "site"}


def test_the_table_lists_every_name() -> None:
    assert set(ADVICE) == set(get_args(RuleName))
    assert all(ADVICE.values())
    assert advice_on("closed") == ADVICE["closed"]
    assert advice_on("") == advice_on("no such rule") == ""


@pytest.mark.parametrize("name", [*NEAR, "odd", "a head"])
def test_every_near_miss_and_finding_has_a_rule(name: str) -> None:
    _, before = seen(name)
    misses = locate(before).located.near_misses
    assert misses
    assert all(miss.rule in ADVICE for miss in misses)
    found = rules(name)
    assert found
    assert all(rule in ADVICE and advice == ADVICE[rule] for each in found.values() for rule, advice in each)


@pytest.mark.parametrize("name", ["odd", "a head"])
def test_the_words_of_a_reason_play_no_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rules(name)
    words = property(lambda self: "is also read outside, along the token axis", lambda self, value: None)
    monkeypatch.setattr(Rejection, "reason", words, raising=False)
    assert rules(name) == before
    assert len({rule for each in before.values() for rule, _ in each}) > 1


def test_near_misses_saved_without_a_rule_load() -> None:
    old = '{"path": "head", "reason": "nothing is added", "node": "linear_3", "source": "model.py:3"}'
    assert NearMiss.model_validate_json(old).rule == ""
    new = NearMiss(path="head", reason="nothing is added", node="linear_3", rule="residual")
    assert NearMiss.model_validate_json(new.model_dump_json()) == new
