"""Modules that run for nothing, and MLPs that no edit of the module tree reaches: the reason is true, and the advice works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import CaptureError, SelectError
from tests import tiny

D, HIDDEN = tiny.WIDTH, 24
IDS = tiny.tokens(2, 8)

# --------------------------------------------------------------------------- a block runs on a padded copy beside the input


class Copies(tiny.Tiny):
    """Every block runs on its input and on a padded copy; subclasses differ in what they do with the copy."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        copy = F.pad(x, (0, 0, 2, 2))
        for block in self.blocks:
            x, copy = self.step(block, x, copy)
        return self.head(self.norm(x))

    def step(self, block: nn.Module, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        return block(x), block(copy)


class CopyFirst(Copies):
    def step(self, block: nn.Module, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        copy = block(copy)
        return block(x), copy


class LateByOne(Copies):
    """The copy enters one block later: that of the last block is for nothing."""

    def step(self, block: nn.Module, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        return block(x) + copy[:, 2:-2], block(copy)


class Merged(Copies):
    def step(self, block: nn.Module, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        copy = block(copy)
        return (block(x) + copy[:, 2:-2]) / 2, copy


class Thrice(Copies):
    def step(self, block: nn.Module, x: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        block(x * 2)
        return super().step(block, x, copy)


class Bare(tiny.Block):
    """The MLP is of bare parameters, so that the block becomes a graph."""

    def __init__(self) -> None:
        super().__init__(D, lambda d: nn.Identity(), 0.0)
        del self.mlp
        self.up, self.down = nn.Parameter(torch.randn(D, HIDDEN) * 0.2), nn.Parameter(torch.randn(HIDDEN, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + F.gelu(self.norm2(x) @ self.up) @ self.down


BLOCKS: dict[str, Any] = {
    "module": lambda: tiny.Block(D, lambda d: tiny.MLP(d, 2 * d), 0.0),
    "span": lambda: tiny.Loose(D, 0.0),
    "graph": Bare,
}
CALLS = {Copies: (1, 1), CopyFirst: (1, 1), LateByOne: (1, 1), Merged: (2, 0), Thrice: (1, 2)}  # of the last block


def copies(kind: type[Copies], block: str) -> Any:
    torch.manual_seed(0)
    return kind([BLOCKS[block]() for _ in range(2)]).eval()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
def test_a_module_that_also_runs_for_nothing_is_rewritten(kind: type[Copies], block: str, tmp_path: Any) -> None:
    model = copies(kind, block)
    before = model(IDS)
    site = memrewrite.inspect(model, (IDS,)).sites[-1]
    assert (site.bindings[0].kind, (site.calls, site.unused_calls)) == (block, CALLS[kind])
    report = memrewrite.apply(model, tiny.recipe("parallel"), (IDS,))
    assert torch.equal(model(IDS), before)
    replaced = copies(kind, block)
    assert memrewrite.apply(replaced, tiny.recipe("replace"), (IDS,)).ok
    assert not torch.equal(replaced(IDS), before)
    assert report.plan.before().flops == memrewrite.plan(copies(kind, block), tiny.recipe(), (IDS,)).before().flops
    memrewrite.save(replaced, tmp_path / "saved")
    loaded = memrewrite.load(tmp_path / "saved", copies(kind, block))
    assert torch.equal(loaded(IDS), replaced(IDS))


# ------------------------------------------------------------------------------- scales travel beside integer activations


class Scaled(nn.Module):
    """A matrix on integers: it takes and returns values with their scale, as integer-only encoders do."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, d) * 0.3), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        step = self.weight.abs().max() / 127
        y = F.linear(x / scale, torch.round(self.weight / step), torch.round(self.bias / (step * scale)))
        return y * step * scale, step * scale


class Quantized(tiny.Block):
    def __init__(self, integers: bool = True) -> None:
        super().__init__(D, lambda d: nn.Identity(), 0.0)
        del self.mlp
        self.up, self.down, self.integers = Scaled(D, HIDDEN), Scaled(HIDDEN, D), integers
        self.mlp = None if integers else tiny.MLP(D, HIDDEN)
        self.register_buffer("range", torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        if self.mlp is not None:
            return x + self.mlp(self.norm2(x))
        y, scale = self.norm2(x), self.range / 127
        x = x + 0 * len([token for token in x[0] if float(token.sum()) > 0])  # torch cannot export it
        y, scale = self.up(torch.round(y / scale) * scale, scale)
        y, _ = self.down(F.relu(y), scale)
        return x + y


def quantized(integers: bool) -> Any:
    torch.manual_seed(0)
    return tiny.Tiny([Quantized(integers) for _ in range(2)]).eval()


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_an_integer_only_encoder_is_refused_with_the_reason(placement: str) -> None:
    sites = memrewrite.inspect(quantized(True), (IDS,)).sites
    assert [(site.path, site.bindings[0].kind) for site in sites] == [("blocks.0", "none"), ("blocks.1", "none")]
    with pytest.raises(SelectError) as refused:
        memrewrite.apply(quantized(True), tiny.recipe(placement), (IDS,))
    reason = "the module 'blocks.0.down', which multiplies by its last matrix, returns more than one tensor"
    assert f"{reason}, and torch cannot export 'blocks.0'" in refused.value.what
    assert "--emit graph" not in str(refused.value.hint)  # it cannot be followed
    with pytest.raises((SelectError, CaptureError)):
        memrewrite.apply(quantized(True), tiny.recipe(placement), (IDS,), emit="graph")
    assert "before it is quantized" in str(refused.value.hint)
    assert memrewrite.apply(quantized(False), tiny.recipe(placement), (IDS,)).ok


# ------------------------------------------------------------------------------------------- blocks with sizes from values


class Sized(Bare):
    """The block reads how many tokens there are from the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * len([token for token in x[0] if float(token.sum()) > 0])


class OwnModule(Sized):
    """The same block, its MLP a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = tiny.MLP(D, HIDDEN)
        del self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x)) + 0 * len([token for token in x[0] if float(token.sum()) > 0])


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_a_block_of_bare_parameters_that_torch_cannot_export_is_refused(placement: str) -> None:
    def model(block: type[nn.Module]) -> Any:
        torch.manual_seed(0)
        return tiny.Tiny([block() for _ in range(2)]).eval()

    with pytest.raises(SelectError) as refused:
        memrewrite.apply(model(Sized), tiny.recipe(placement), (IDS,))
    assert "no single module multiplies by its last matrix, and torch cannot export 'blocks.0'" in refused.value.what
    assert str(refused.value.hint).startswith("make the MLP a module of its own")
    assert memrewrite.apply(model(OwnModule), tiny.recipe(placement), (IDS,)).ok
