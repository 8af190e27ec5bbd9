"""Blocks of another width beside the stream: which of their MLPs update it, and which matrices are only projections.

A shared block reads the stream next to the embeddings; the model projects its output into the stream, at each of its calls by
a linear of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import VOCAB, Attention, D, ids
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite

WIDE = 2 * D


class Mlp(nn.Module):
    """Plain or gated, of any widths."""

    def __init__(self, d: int, out: int, hidden: int = 3 * D, *, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, out)
        self.gate = nn.Linear(d, hidden) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Heads(nn.Module):
    """Attention between widths: four heads, or one, with or without a matrix after them."""

    def __init__(self, d: int, out: int, *, heads: int = 4, last: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, out) for _ in range(3))
        self.heads, self.out = heads, nn.Linear(out, out) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Scan(nn.Module):
    """A state-space layer: a convolution over tokens, a decaying sum over them, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(D, 2 * WIDE), nn.Linear(WIDE, D)
        self.conv, self.rate = nn.Conv1d(WIDE, WIDE, 3, padding=2, groups=WIDE), nn.Linear(WIDE, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(x).chunk(2, -1)
        value = F.silu(self.conv(value.mT)[..., : x.shape[1]].mT)
        steps = self.rate(value).sigmoid().log().cumsum(1)
        return self.out(((steps - steps.mT).exp().tril() @ value) * F.silu(gate))


class Shared(nn.Module):
    """Attention and MLP; `sums`: which of the two have a residual sum of their own."""

    def __init__(self, width: int, sums: str = "", *, attention: Any = Heads, **mlp: Any) -> None:
        super().__init__()
        self.sums, self.attention = sums, attention(WIDE, width)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(WIDE), nn.LayerNorm(width), Mlp(width, width, **mlp)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        x = torch.cat([x, embeddings], -1)
        mixed = self.attention(self.norm1(x))
        x = x + mixed if "attention" in self.sums else mixed
        y = self.mlp(self.norm2(x))
        return x + y if "mlp" in self.sums else y


class Hybrid(nn.Module):
    """State-space layers; the shared block runs before every second one. `only_read`: its output is read there only."""

    def __init__(
        self, shared: nn.Module, width: int, *, only_read: bool = False, last: Callable[[int], nn.Module] | None = None
    ):
        super().__init__()
        self.embed, self.only_read = nn.Embedding(VOCAB, D), only_read
        self.shared, self.layers = shared, nn.ModuleList(Scan() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.linears = nn.ModuleList((last or (lambda d: nn.Linear(d, D, bias=False)))(width) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = embeddings = self.embed(input_ids)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            read = x + self.linears[i // 2](self.shared(x, embeddings)) if i % 2 else x
            x = (x if self.only_read else read) + layer(norm(read))
        return x


def sites(model: Callable[[], nn.Module]) -> list[tuple[str, str, int]]:
    torch.manual_seed(0)
    found = memrewrite.inspect(model().eval(), ids()).sites
    return [(site.path, site.pattern, site.calls) for site in found]


SHARED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "no sums, at the stream's width": (lambda: Shared(D), D),
    "no sums, wide": (lambda: Shared(WIDE, hidden=3 * WIDE), WIDE),
    "both sums": (lambda: Shared(WIDE, "attention, mlp"), WIDE),
    "a sum of the attention": (lambda: Shared(WIDE, "attention", hidden=3 * WIDE), WIDE),
    "a sum of the MLP": (lambda: Shared(D, "mlp"), D),
    "gated": (lambda: Shared(D, gated=True), D),
    "one head": (lambda: Shared(D, attention=lambda d, out: Heads(d, out, heads=1)), D),
    "no matrix after the heads": (lambda: Shared(D, attention=lambda d, out: Heads(d, out, last=False)), D),
}


@pytest.mark.parametrize("only_read", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_the_mlp_of_a_shared_block_is_one_site(name: str, only_read: bool) -> None:
    make, width = SHARED[name]
    pattern = "gated" if name == "gated" else "plain"
    assert sites(lambda: Hybrid(make(), width, only_read=only_read)) == [("shared.mlp", pattern, 2)]


class NoAttention(nn.Module):
    """An MLP and no attention: with the projection after it, three matrices in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDE), Mlp(WIDE, WIDE, 3 * WIDE)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        return self.mlp(self.norm(torch.cat([x, embeddings], -1)))


NONE: dict[str, Callable[[], nn.Module]] = {
    "three matrices in a row": lambda: Hybrid(NoAttention(), WIDE),
    "as wide as the attention": lambda: Hybrid(Shared(D, hidden=D), D),
    "a bottleneck": lambda: Hybrid(Shared(D, hidden=8), D),
    "a nonlinear projection": lambda: Hybrid(
        Shared(D), D, last=lambda d: nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, D))
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_projections_of_a_branch_are_no_mlp(name: str) -> None:
    assert sites(NONE[name]) == []


class TwoStreams(nn.Module):
    """The block reads one stream, and its output is projected into another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other, self.shared = nn.Embedding(VOCAB, D), nn.Embedding(VOCAB, D), Shared(D)
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x, y = self.embed(input_ids), self.other(input_ids)
        for linear in self.linears:
            y = y + linear(self.shared(x, x))
        return y


def test_a_block_that_reads_another_stream_is_none() -> None:
    assert sites(TwoStreams) == []


@pytest.mark.parametrize("placement", ["parallel", "replace"])
def test_a_layer_in_a_shared_block(placement: str) -> None:
    torch.manual_seed(0)
    model, inputs = Hybrid(Shared(D, gated=True), D, only_read=True).eval(), ids()
    before = model(*inputs)
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "w", "placement": placement}
    recipe = {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}
    report = memrewrite.apply(model, recipe, inputs)
    assert report.ok
    assert torch.equal(model(*inputs), before) == (placement == "parallel")


# ------------------------------------------------------------------------------------------------- local parts of images


class Local(nn.Module):
    """A convolution of each channel, a norm and two matrices at each pixel, added to the image."""

    def __init__(self, hidden: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.near, self.norm = nn.Conv2d(D, D, kernel, padding=kernel // 2, groups=D), nn.BatchNorm2d(D)
        self.up, self.down, self.scale = nn.Conv2d(D, hidden, 1), nn.Conv2d(hidden, D, 1), nn.Parameter(torch.ones(D, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(self.near(x)))))


class LastAxis(Local):
    """The same with linears on the last axis."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.norm: nn.Module = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, D)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(self.near(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


class Image(nn.Module):
    """Blocks of a local part, attention and an MLP, all on [B, C, H, W]."""

    def __init__(self, local: Callable[[], nn.Module], side: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 1)
        self.blocks = nn.ModuleList(nn.ModuleDict(self.parts(local)) for _ in range(2))
        self.side = side

    def parts(self, local: Callable[[], nn.Module]) -> dict[str, nn.Module]:
        mlp = nn.Sequential(nn.BatchNorm2d(D), nn.Conv2d(D, 48, 1), nn.GELU(), nn.Conv2d(48, D, 1))
        return {"local": local(), "attention": Attention(), "norm": nn.LayerNorm(D), "mlp": mlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block["local"](x)  # type: ignore[index]
            mixed = block["attention"](block["norm"](x.flatten(2).mT))  # type: ignore[index]
            x = x + mixed.mT.unflatten(-1, (self.side, -1))
            x = x + block["mlp"](x)  # type: ignore[index]
        return x


@pytest.mark.parametrize("side", [8, 32, 48])  # 32 and 48 are sizes of features too
@pytest.mark.parametrize("local", [Local, LastAxis, lambda hidden: Local(hidden, kernel=7)])
@pytest.mark.parametrize(("hidden", "is_mlp"), [(D, False), (D // 2, False), (2 * D, True)])
def test_the_matrices_of_a_local_part_are_an_mlp_only_if_they_widen(local: Any, hidden: int, is_mlp: bool, side: int) -> None:
    torch.manual_seed(0)
    located = memrewrite.inspect(Image(lambda: local(hidden), side).eval(), (torch.randn(1, 3, side, side),))
    parts = ("local", "mlp") if is_mlp else ("mlp",)
    assert [site.path for site in located.sites] == [f"blocks.{i}.{part}" for i in range(2) for part in parts]
    if hidden == D:
        assert any("a part of what mixes the tokens" in miss.reason for miss in located.near_misses)
