"""Mixtures whose experts have a capacity: however tokens are dispatched and dropped, each is one whole site, at any sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from families import Block, D, Gated, Stack
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite

HIDDEN = 48


class Router(nn.Module):
    """A router, and experts that take at most `capacity` tokens; subclasses differ in how tokens come to their experts."""

    def __init__(self, experts: int, chosen: int, capacity: int) -> None:
        super().__init__()
        self.count, self.chosen, self.capacity = experts, chosen, capacity
        self.gate = nn.Linear(D, experts, bias=False)
        self.make()

    def make(self) -> None:
        self.experts = nn.ModuleList(Gated() for _ in range(self.count))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        return self.mixed(tokens, self.gate(tokens).softmax(-1)).view_as(x)

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """[tokens, D], [tokens, experts] -> [tokens, D]."""
        raise NotImplementedError


class Stacked(Router):
    """Experts whose weights are one stack."""

    def make(self) -> None:
        self.up = nn.Parameter(torch.randn(self.count, D, HIDDEN) * 0.2)
        self.down = nn.Parameter(torch.randn(self.count, HIDDEN, D) * 0.2)

    def each(self, rows: Tensor) -> Tensor:
        """[experts, capacity, D] -> [experts, capacity, D]."""
        return torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down)


class OneHot(Stacked):
    """Dispatch and combination are products with one-hot masks; later choices have the later places."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.topk(self.chosen, -1)
        chosen = F.one_hot(experts, self.count).to(tokens.dtype).transpose(0, 1).reshape(-1, self.count)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1).long()
        places = F.one_hot(place, len(chosen))[:, : self.capacity].to(tokens.dtype)
        dispatch = torch.einsum("te,tc->tec", chosen, places).view(self.chosen, -1, self.count, self.capacity)
        rows = torch.einsum("tec,td->ecd", dispatch.sum(0), tokens)
        return torch.einsum("tec,ecd->td", (dispatch * weights.T[..., None, None]).sum(0), self.each(rows))


class PassesThrough(Stacked):
    """A token that was dropped keeps its value."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.max(-1)
        chosen = F.one_hot(experts, self.count)
        chosen = chosen * (chosen.cumsum(0) <= self.capacity)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        dispatch = (F.one_hot(place, self.capacity)[:, None] * chosen[..., None]).to(tokens.dtype)
        rows = torch.einsum("tec,td->ecd", dispatch, tokens)
        out = torch.einsum("tec,ecd->td", dispatch, self.each(rows)) * weights[:, None]
        return torch.where(chosen.sum(-1, keepdim=True) > 0, out, tokens)


class Loop(Router):
    """One expert after the other takes its first tokens."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.topk(self.chosen, -1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, place = (found[: self.capacity] for found in torch.where(experts == e))
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return out


class Overwritten(Router):
    """As `Loop`; an expert's rows are copied over the tokens, so that dropped tokens pass."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.max(-1)
        out = tokens.clone()
        for e, expert in enumerate(self.experts):
            rows = (experts == e).nonzero().squeeze(1)[: self.capacity]
            done = expert(tokens.index_select(0, rows)) * weights.index_select(0, rows)[:, None]
            out = out.index_copy(0, rows, done)
        return out


class Masked(Router):
    """Every expert computes every token; masks drop what is over its capacity."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        chosen = F.one_hot(scores.argmax(-1), self.count)
        weights = chosen * (chosen.cumsum(0) <= self.capacity) * scores
        return sum(expert(tokens) * weights[:, e, None] for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class Sorted(Router):
    """Rows are sorted by expert; each takes the first of its group."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.topk(self.chosen, -1)
        order, out, start = experts.flatten().argsort(stable=True), torch.zeros_like(tokens), 0
        for expert, size in zip(self.experts, experts.flatten().bincount(minlength=self.count).tolist(), strict=True):
            rows = order[start : start + min(size, self.capacity)]
            start += size
            if len(rows):
                done = expert(tokens[rows // self.chosen]) * weights.flatten()[rows, None]
                out = out.index_add(0, rows // self.chosen, done)
        return out


class Slots(Stacked):
    """Sorted rows are copied into a table of experts and places; the last row of the table takes those that are dropped."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.topk(self.chosen, -1)
        order = experts.flatten().argsort(stable=True)
        expert = experts.flatten()[order]
        place = torch.arange(len(expert)) - torch.searchsorted(expert, torch.arange(self.count))[expert]
        slot = torch.where(place < self.capacity, expert * self.capacity + place, self.count * self.capacity)
        table = tokens.new_zeros(self.count * self.capacity + 1, D).index_copy(0, slot, tokens[order // self.chosen])
        done = self.each(table[:-1].view(self.count, -1, D)).flatten(0, 1)
        rows = torch.cat([done, tokens.new_zeros(1, D)])[slot] * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // self.chosen, rows)


class Prioritized(Router):
    """The tokens that the router is most certain of are served first."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, experts = scores.max(-1)
        order, out = weights.argsort(descending=True), torch.zeros_like(tokens)
        chosen = F.one_hot(experts[order], self.count)
        kept = order[(chosen.cumsum(0) * chosen).sum(-1) <= self.capacity]
        for e, expert in enumerate(self.experts):
            rows = kept[experts[kept] == e]
            if len(rows):
                out[rows] = expert(tokens[rows]) * weights[rows, None]
        return out


class Threshold(Router):
    """Each expert takes tokens whose score is above the mean; none is ranked."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = (scores[:, e] > 1 / self.count).nonzero().squeeze(1)[: self.capacity]
            if len(rows):
                out = out.index_add(0, rows, expert(tokens[rows]) * scores[rows, e, None])
        return out


class ExpertsChoose(Stacked):
    """Every expert chooses its tokens among all."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = scores.T.topk(min(self.capacity, len(tokens)), -1)
        done = self.each(tokens[chosen]) * weights[..., None]
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), done.flatten(0, 1))


class ExpertsChooseByMasks(Stacked):
    """The same with one-hot masks."""

    def mixed(self, tokens: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = scores.topk(min(self.capacity, len(tokens)), 0)
        dispatch = F.one_hot(chosen.T, len(tokens)).to(tokens.dtype)
        done = self.each(torch.einsum("ect,td->ecd", dispatch, tokens))
        return torch.einsum("ect,ecd,ce->td", dispatch, done, weights)


class ChosenInEachRow(Router):
    """Every expert chooses its tokens in each sequence of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(min(self.capacity, x.shape[1]), 1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            at = chosen[..., e, None].expand(-1, -1, D)
            out = out.scatter_add(1, at, expert(x.gather(1, at)) * weights[..., e, None])
        return out


KINDS: tuple[Callable[..., nn.Module], ...] = (
    *(OneHot, PassesThrough, Loop, Overwritten, Masked, Sorted, Slots),
    *(Prioritized, Threshold, ExpertsChoose, ExpertsChooseByMasks, ChosenInEachRow),
)
SIZES = {  # shape of the tokens; experts, chosen, capacity
    "some dropped": ((2, 7), 4, 1, 3),
    "as many tokens as experts": ((2, 4), 8, 2, 2),
    "as many tokens, experts and choices": ((2, 2), 4, 4, 4),
    "one token": ((1, 1), 4, 1, 1),
    "as many tokens as features": ((1, D), 4, 1, 6),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Stack(lambda: Block(make())).eval()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_with_a_capacity_is_one_whole_site(kind: Any, sizes: str) -> None:
    shape, *numbers = SIZES[sizes]
    model = built(lambda: kind(*numbers))
    found = memrewrite.inspect(model, {"ids": families.tokens(*shape)}).sites
    assert [(site.path, site.pattern) for site in found] == [("blocks.0.mlp", "moe"), ("blocks.1.mlp", "moe")]
    for site in found:
        assert set(site.parameters) == {name for name, _ in model.named_parameters() if name.startswith(f"{site.path}.")}


@pytest.mark.parametrize("placement", ["parallel", "replace"])
@pytest.mark.parametrize("kind", [OneHot, Slots, Prioritized, ExpertsChoose])
def test_a_layer_for_a_mixture_with_a_capacity(kind: Any, placement: str) -> None:
    model, inputs = built(lambda: kind(8, 2, 2)), {"ids": families.tokens(2, 4)}
    before = model(**inputs)
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "w", "placement": placement}
    recipe = {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}
    assert memrewrite.apply(model, recipe, inputs).ok
    assert torch.equal(model(**inputs), before) == (placement == "parallel")


# ------------------------------------------------------------------------------- what a choice among tokens brings across


class Across(Masked):
    """A mixture whose output also contains a value that another token was chosen for."""

    def __init__(self, across: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 1, 8)
        self.across = across

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.across(x)


def hard_attention(x: Tensor) -> Tensor:
    best = (-(x @ x.mT)).argmax(-1)
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, D))


ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "the largest of the sequence": lambda x: x.max(1, keepdim=True)[0] + 0 * x.max(1, keepdim=True)[1],
    "the largest two of the sequence": lambda x: x.topk(2, 1)[0].mean(1, keepdim=True),
    "the largest of the batch": lambda x: x.flatten(0, 1).topk(1, 0)[0],
    "the sorted tokens": lambda x: x.sort(1)[0],
    "the median token": lambda x: x.median(1, keepdim=True)[0] + 0 * x.median(1, keepdim=True)[1],
    "the token that fits least": hard_attention,
    "tokens in another's order": lambda x: x.gather(1, x.argsort(1)),
}


@pytest.mark.parametrize("shape", [(2, 7), (2, 2), (1, 4)])
@pytest.mark.parametrize("name", ACROSS)
def test_what_brings_another_tokens_value_is_no_part_of_a_mixture(name: str, shape: tuple[int, int]) -> None:
    found = memrewrite.inspect(built(lambda: Across(ACROSS[name])), {"ids": families.tokens(*shape)}).sites
    assert not [site.path for site in found if site.path.endswith(".mlp") and site.bindings[0].kind == "module"]
