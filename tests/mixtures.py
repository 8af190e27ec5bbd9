"""Mixtures of experts in many forms, shared by several test files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import Block
from torch import Tensor, nn
from torch.nn import functional as F

D, WIDTH, EXPERTS, CHOSEN = 32, 24, 4, 2


class Experts(nn.Module):
    """The weights of a mixture; forms differ in `routed`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, D, 2 * WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, D) * 0.1)

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(CHOSEN, -1)
        return self.routed(flat, weights / weights.sum(-1, keepdim=True), chosen).view(x.shape)

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """[tokens, d], [tokens, k], [tokens, k] -> [tokens, d]; the reference: one token and one expert at a time."""
        rows = range(len(x))
        return torch.stack([sum(weights[t, k] * self.expert(chosen[t, k], x[t]) for k in range(CHOSEN)) for t in rows])

    def expert(self, e: int | Tensor, x: Tensor) -> Tensor:
        gate, up = (x @ self.up[e]).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down[e]


class AllExperts(Experts):
    """Every expert computes every token; the weights of those not chosen are zero."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        spread = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights)
        gate, up = torch.einsum("td,edf->tef", x, self.up).chunk(2, -1)
        return torch.einsum("tef,efd,te->td", F.silu(gate) * up, self.down, spread)


class Batched(Experts):
    """`bmm` over the experts."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        spread = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights)
        gate, up = torch.bmm(x.expand(EXPERTS, -1, -1), self.up).chunk(2, -1)
        return (torch.bmm(F.silu(gate) * up, self.down) * spread.T.unsqueeze(-1)).sum(0)


class Drawn(Experts):
    """The matrices of the chosen experts are looked up for each token."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gate, up = torch.einsum("td,tkdf->tkf", x, self.up[chosen]).chunk(2, -1)
        return torch.einsum("tkf,tkfd,tk->td", F.silu(gate) * up, self.down[chosen], weights)


class Masked(Experts):
    """A loop over all experts, each on all tokens."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            out = out + self.expert(e, x) * (weights * (chosen == e)).sum(-1, keepdim=True)
        return out


class Looped(Experts):
    """A loop over the experts that were chosen, each on its tokens: no tracer follows it."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in F.one_hot(chosen, EXPERTS).sum((0, 1)).nonzero().flatten().tolist():
            token, place = torch.where(chosen == e)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, place].unsqueeze(-1))
        return out


class Sorted(Experts):
    """Rows sorted by expert, cut where the next begins, and put back."""

    def routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort()
        rows = x[order // CHOSEN]
        mine = F.one_hot(chosen.flatten()[order], EXPERTS).to(x.dtype)
        gate, up = torch.einsum("rd,re,edf->rf", rows, mine, self.up).chunk(2, -1)
        out = torch.einsum("rf,re,efd->rd", F.silu(gate) * up, mine, self.down) * weights.flatten()[order, None]
        return out[order.argsort()].view(-1, CHOSEN, D).sum(1)


class Modules(nn.Module):
    """Every expert is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D)) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(CHOSEN, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return out


class Shared(AllExperts):
    """A shared expert is added, scaled by its own gate."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D))
        self.shared_gate = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class Latent(Drawn):
    """The experts work in a narrower space."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS)
        self.narrow, self.widen = nn.Linear(D, 16), nn.Linear(16, D)
        self.up = nn.Parameter(torch.randn(EXPERTS, 16, 2 * WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(CHOSEN, -1)
        return self.widen(self.routed(self.narrow(flat), weights, chosen)).view(x.shape)


class Scored(Drawn):
    """Returns the router's weights too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(CHOSEN, -1)
        return self.routed(flat, weights, chosen).view(x.shape), weights


class TakesFirst(Block):
    """A block that keeps the first of what its MLP returns."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out, _ = self.mlp(self.norm2(x))
        return x + out


class ByName(Block):
    """A block that calls its MLP by keyword, with another argument."""

    class Mlp(Drawn):
        def forward(self, number: int, *, hidden: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden) * number

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(1, hidden=self.norm2(x))


class RouterOutside(Block):
    """Router and experts are modules of the block, and a dense MLP runs in parallel on the same stream."""

    class Chosen(Drawn):
        def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:  # type: ignore[override]
            return self.routed(x, weights, chosen)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)))
        self.gate, self.experts = nn.Linear(D, EXPERTS), self.Chosen()
        del self.experts.router

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        flat = self.norm2(x).reshape(-1, D)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, -1)
        return x + self.mlp(flat).view(x.shape) + self.experts(flat, weights, chosen).view(x.shape)


SAME: dict[str, type[Experts]] = {
    "all experts": AllExperts,
    "batched": Batched,
    "drawn": Drawn,
    "masked": Masked,
    "looped": Looped,
    "sorted": Sorted,
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "modules": lambda: Block(Modules()),
    "shared": lambda: Block(Shared()),
    "latent": lambda: Block(Latent()),
    "a tuple": lambda: TakesFirst(Scored()),
    "by name": lambda: ByName(ByName.Mlp()),
}
MIXTURES = {**{name: (lambda make=make: Block(make())) for name, make in SAME.items()}, **OTHERS}
