"""Random transformers, their MLPs planted: what is found is what was planted, and a rewrite at all of them changes no bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from families import (
    HIDDEN,
    Block,
    D,
    Gated,
    Packed,
    Parallel,
    PostNorm,
    Sandwich,
    Scaled,
    Stack,
    Up,
    halves,
    ids,
    interleaved,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mixtures import Batched, Looped
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite

KINDS: dict[str, tuple[str, Callable[[bool], nn.Module]]] = {
    "plain": ("plain", lambda bias: Up(F.silu, bias)),
    "gated": ("gated", lambda bias: Gated(F.silu, bias)),
    "packed": ("gated_packed", lambda _: Packed(halves)),
    "interleaved": ("gated_packed", lambda _: Packed(interleaved)),
    "bare": ("plain", lambda _: Inlined()),
    "experts": ("moe", lambda _: Batched()),
    "looped experts": ("moe", lambda _: Looped()),
}
NO_SHRINKING = (Phase.explicit, Phase.generate)  # each example takes a second: the first that fails will do
STYLES = (Block, Parallel, PostNorm, Sandwich, Scaled)


class Inlined(nn.Module):
    """A module that adds a multiple of its input to an MLP of bare parameters: it has to become a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(D, HIDDEN) * 0.1), nn.Parameter(torch.randn(HIDDEN, D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + F.dropout(F.silu(x @ self.up), 0.1, self.training) @ self.down


class Wrapped(nn.Module):
    """An MLP with dropout after it, and a branch beside it that leads nowhere."""

    def __init__(self, mlp: nn.Module, rate: float, dead: bool) -> None:
        super().__init__()
        self.mlp, self.dropout, self.dead = mlp, nn.Dropout(rate), nn.Linear(D, D) if dead else None

    def forward(self, x: Tensor) -> Tensor:
        if self.dead is not None:
            _ = F.gelu(self.dead(x))
        return self.dropout(self.mlp(x))


BLOCK = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(KINDS)),
        "style": st.sampled_from(STYLES),
        "bias": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.3]),
        "dead": st.booleans(),
        "rms": st.booleans(),
        "shared": st.booleans(),  # the MLP is the one of the block before
    }
)


def random_transformer(blocks: list[dict[str, Any]]) -> tuple[nn.Module, Counter[Any]]:
    """A model, and the (path, pattern, calls) of what was planted in it."""
    made: list[nn.Module] = []
    owners: list[tuple[str, str]] = []  # path and pattern of each block's MLP
    for number, block in enumerate(blocks):
        pattern, make = KINDS[block["kind"]]
        if block["shared"] and made:
            wrapped = made[-1].mlp
            owners.append(owners[-1])
        else:
            wrapped = Wrapped(make(block["bias"]), block["dropout"], block["dead"])
            owners.append((f"blocks.{number}.mlp.mlp", pattern))
        made.append(block["style"](wrapped))
        if block["rms"]:
            made[-1].norm1, made[-1].norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
    queue = iter(made)
    return Stack(lambda: next(queue), depth=len(made)).eval(), Counter(owners)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=NO_SHRINKING)
@given(st.lists(BLOCK, min_size=1, max_size=3))
def test_found_is_planted(blocks: list[dict[str, Any]]) -> None:
    model, wanted = random_transformer(blocks)
    located = memrewrite.inspect(model, ids())
    assert Counter({(s.path, s.pattern): s.calls for s in located.sites}) == wanted
    assert all((s.d_model, s.activation) == (D, "silu") for s in located.sites)
    for site in located.sites:
        inside = {id(p) for name, p in model.get_submodule(site.path).named_parameters() if "dead" not in name}
        assert {id(model.get_parameter(name)) for name in site.parameters} == inside


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=NO_SHRINKING)
@given(st.lists(BLOCK, min_size=1, max_size=2))
def test_null_is_bit_equal_in_eval_and_train_mode(blocks: list[dict[str, Any]]) -> None:
    model, wanted = random_transformer(blocks)
    plain = copy.deepcopy(model)
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "w", "placement": "parallel"}
    rule["options"] = {"heads": 2, "topk": 4}
    report = memrewrite.apply(model, {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule]}, ids())
    assert len(report.plan.substitutions) == len(wanted)
    assert {check.outcome for check in report.checks} <= {"passed", "skipped"}
    assert torch.equal(model(*ids()), plain(*ids()))
    torch.manual_seed(1)
    once = plain.train()(*ids())
    torch.manual_seed(1)
    assert torch.equal(model.train()(*ids()), once)
