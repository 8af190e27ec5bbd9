"""Mixtures whose loops the example's tokens unroll: which experts they visit must not decide what the MLP is."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import HIDDEN, Block, D, Gated, Stack, Up
from torch import Tensor, nn

import memrewrite

EXPERTS = 8


class Routed(nn.Module):
    """A router and experts, of which a token visits one; subclasses differ in how tokens come to their experts."""

    def __init__(self, chosen: int = 1) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(D, EXPERTS, bias=False), chosen
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, experts = self.gate(tokens).softmax(-1).topk(self.chosen, -1)
        return self.mixed(tokens, weights, experts).view_as(x)

    def mixed(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, place = torch.where(experts == e)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return out


class Sorted(Routed):
    """Rows are sorted by expert, multiplied in groups, and put back."""

    def mixed(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        order = experts.flatten().argsort()
        counts = experts.flatten().bincount(minlength=EXPERTS).tolist()
        groups = tokens[order // self.chosen].split(counts)
        done = torch.cat([expert(rows) for expert, rows in zip(self.experts, groups, strict=True) if len(rows)])
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(-1, self.chosen, D) * weights[..., None]).sum(1)


class Capacity(Routed):
    """An expert takes two tokens at most; the others are dropped. The choice is the maximum's place."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, experts = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = (experts == e).nonzero()[:2, 0]
            if len(rows):
                out[rows] = expert(tokens[rows]) * weights[rows, None]
        return out.view_as(x)


class Twice(nn.Module):
    """One block, called twice: other tokens visit other experts."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Normed(nn.Module):
    """An MLP with a batch norm inside: it holds buffers, one of which no forward in eval mode reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2).relu())


KINDS = {"loop": Routed, "two each": lambda: Routed(2), "sorted": lambda: Sorted(2), "capacity": Capacity}


def stack(make: Any, *, twice: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Stack(lambda: Twice(Block(make())), 1) if twice else Stack(lambda: Block(make()))
    return model.eval()


def recipe(placement: str) -> dict[str, Any]:
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "shared", "placement": placement}
    return {"memrewrite": 1, "pools": {"shared": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_mixture_is_one_site_whichever_experts_are_visited(name: str, twice: bool) -> None:
    model, inputs = stack(KINDS[name], twice=twice), {"ids": families.tokens(2, 7)}
    found = memrewrite.inspect(model, inputs)
    prefix = "blocks.0.block" if twice else "blocks.0"
    assert [site.path for site in found.sites] == ([f"{prefix}.mlp"] if twice else ["blocks.0.mlp", "blocks.1.mlp"])
    site = found.sites[0]
    assert (site.pattern, site.calls, site.bindings[0].kind) == ("moe", 1 + twice, "module")
    held = dict(model.get_submodule(f"{prefix}.mlp").named_parameters(prefix=f"{prefix}.mlp"))
    assert set(site.parameters) == set(held)
    assert site.weights + site.biases == sum(p.numel() for p in held.values())


@pytest.mark.parametrize("placement", ["parallel", "replace"])
@pytest.mark.parametrize(("make", "twice"), [(Routed, False), (Routed, True), (Normed, False)])
def test_all_that_a_replaced_module_holds_goes_with_it(make: Any, twice: bool, placement: str) -> None:
    model, inputs = stack(make, twice=twice), {"ids": families.tokens(2, 7)}
    prefix = "blocks.0.block.mlp" if twice else "blocks.0.mlp"
    held = sum(p.numel() for p in model.get_submodule(prefix).parameters())
    report = memrewrite.apply(model, recipe(placement), inputs)
    assert report.ok
    used_buffers = 2 * HIDDEN if make is Normed else 0  # mean and variance, which the forward reads; not the number of batches
    site = report.plan.substitutions[0].site
    assert site.weights + site.biases == held + used_buffers
    names = set(dict(model.named_parameters())) | set(dict(model.named_buffers()))
    left = {name for name in names if name.startswith(f"{prefix}.") and (".experts." in name or ".norm." in name)}
    assert bool(left) == (placement == "parallel")


class Masks(Routed):
    """Every expert takes the tokens of a boolean mask, which the values of the example decide; no op chooses."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        scores, out = self.gate(tokens).softmax(-1), torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            mask = scores[:, e] > 1 / EXPERTS
            if mask.any():
                out[mask] += expert(tokens[mask]) * scores[mask, e, None]
        return out.view_as(x)


class ThenMasks(Capacity):
    """A mixture that is seen whole in its first call; in its second, only its experts are."""

    def forward(self, x: Tensor) -> Tensor:
        self.second = not getattr(self, "second", True)
        return Masks.forward(self, x) if self.second else super().forward(x)  # type: ignore[arg-type]


def test_a_region_that_only_runs_on_the_examples_values_is_no_crash() -> None:
    found = memrewrite.inspect(stack(Masks), {"ids": families.tokens(1, EXPERTS)})
    assert found.sites or found.near_misses


def test_an_expert_alone_is_no_site_beside_its_mixture() -> None:
    """One call of the block is seen as a mixture; of the other, each expert."""
    found = memrewrite.inspect(stack(ThenMasks, twice=True), {"ids": families.tokens(2, 4)})
    assert [site.path for site in found.sites] == ["blocks.0.block.mlp"]
    parts = [miss for miss in found.near_misses if miss.rule == "whole mixture"]
    assert parts
    assert all("a part of the mixture 'blocks.0.block.mlp'" in miss.reason for miss in parts)


def test_plain_mlps_hold_what_they_use() -> None:
    site = memrewrite.inspect(stack(Up), {"ids": families.tokens(2, 7)}).sites[0]
    assert len(site.parameters) == 4
