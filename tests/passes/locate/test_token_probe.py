"""The *locality* and *tokenwise* checks: a token's output depends on that token alone, in MLPs and in layers, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.passes.capture.capture import capture
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.regions import region
from memrewrite.passes.verify.evidence import Evidence
from memrewrite.passes.verify.mlp_locality import locality
from memrewrite.plans import Plan
from memrewrite.report import Check

D = tiny.WIDTH


class Mlp(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixing(Mlp):
    """Every token sees all before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x).cumsum(1)))


class Shifted(Mlp):
    """Every token sees the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x).roll(1, 1)))


class Reordered(Mlp):
    """The tokens of a row come out in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))[:, [1, 0, 2, 3, 4]])


class AcrossRows(Mlp):
    """The last row sees the first."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.gelu(torch.cat([hidden[:-1], hidden[-1:] + 1e-3 * hidden[:1]])))


class ALittle(Mlp):
    """Every token sees a small fraction of the last one."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.gelu(hidden + 1e-6 * hidden[:, -1:]))


class Constant(Mlp):
    def __init__(self, d: int = D) -> None:
        super().__init__(d)
        nn.init.zeros_(self.down.weight)


class Channels(nn.Module):
    """1×1 convolutions: features are the second axis, as many as places along another."""

    def __init__(self, dims: int, d: int) -> None:
        super().__init__()
        kind = nn.Conv1d if dims == 1 else nn.Conv2d
        self.up, self.down = kind(d, 2 * d, 1), kind(2 * d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Sums(nn.Module):
    """An MLP after a layer before it, on any layout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sin())


def check_of(model: nn.Module, *inputs: Tensor) -> Check:
    """The result of the check for every MLP that is found."""
    before = capture(model, inputs)
    locations = locate(before)
    found = [_Substitution(site) for site in locations.sites]
    assert found
    plan = Plan.model_construct(captured="", pools={}, substitutions=tuple(found))
    return locality(Evidence(model, plan, before, locations, {}))


class _Substitution:
    """The fields of a substitution that the check reads."""

    def __init__(self, site: Any) -> None:
        self.site = site


def model_with(mlp: Callable[[], nn.Module]) -> Any:
    return tiny.modular(lambda d: mlp())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (tiny.modular(), (tiny.tokens(),)),
        (tiny.loose(), (tiny.tokens(),)),
        (tiny.modular(), (tiny.tokens(batch=9, length=2),)),
        (tiny.modular(), (tiny.tokens(batch=1, length=1),)),
        (tiny.gpt2(), (tiny.tokens(),)),
        (tiny.bert(), (tiny.tokens(),)),
        (Sums(Channels(1, 6)), (torch.randn(2, 6, 6),)),
        (Sums(Channels(1, 6)), (torch.randn(6, 6, 6),)),
        (Sums(Channels(2, 6)), (torch.randn(2, 6, 6, 6),)),
        (Sums(Channels(2, 6)), (torch.randn(1, 6, 4, 3),)),
    ],
    ids=[
        "module",
        "span",
        "many rows",
        "one token",
        "gpt2",
        "bert",
        "[B,C,T]",
        "[B,C,T] all 6",
        "[B,C,H,W] all 6",
        "[1,C,H,W]",
    ],
)
def test_a_token_changes_only_its_own_output(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    check = check_of(model.eval(), *inputs)
    assert check.outcome == "passed", check.sentence
    assert "keeps every bit" in check.sentence


def test_equal_mlps_are_tried_once() -> None:
    assert "3 MLPs, 1 of them distinct" in check_of(tiny.modular(), tiny.tokens()).sentence


def test_an_mlp_with_a_constant_output_is_counted() -> None:
    assert "1 give the same for every input" in check_of(model_with(Constant), tiny.tokens()).sentence


@pytest.mark.parametrize("mlp", [Mixing, Shifted, Reordered, AcrossRows, ALittle])
def test_a_region_that_mixes_tokens_fails(monkeypatch: pytest.MonkeyPatch, mlp: Callable[[], nn.Module]) -> None:
    """The check fails even if the locator does not notice the mixing."""
    monkeypatch.setattr(region, "mixes_tokens", lambda *_: None)
    monkeypatch.setattr(region, "LAYOUT", region.LAYOUT | {"roll", "index"})
    model = model_with(mlp)
    with pytest.raises(memrewrite.errors.VerificationError) as caught:
        memrewrite.apply(model, tiny.recipe(), {"ids": tiny.tokens()})
    assert caught.value.report is not None
    assert [c.name for c in caught.value.report.checks if c.outcome == "failed"] == ["locality"]
