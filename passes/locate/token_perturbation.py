"""Changes one token of an input at a time, and measures which tokens of the output change.

Flow: one run on the input → for a few tokens, a run with that token replaced → the outputs are compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from memrewrite.passes.models.process_state import seeded

TRIED = 8  # tokens changed at most: the first, the last, and evenly between; at least one in every row if so many suffice
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Which elements of a flattened tensor make up each token: [tokens, features]. `rows`: the size of the first token axis."""

    places: Tensor
    rows: int

    @classmethod
    def consecutive(cls, elements: int, count: int, rows: int = 1) -> Tokens:
        """`count` tokens, each of as many consecutive elements."""
        return cls(torch.arange(elements).view(count, -1), rows)


@dataclass(frozen=True)
class Trial:
    """How outputs moved when single tokens of the input were changed; distances are relative to the largest output."""

    leak: str  # which change of one token moved other tokens' outputs by more than is allowed, or ""
    others: float  # how far other tokens' outputs moved at most
    own: float  # how far the changed tokens' own outputs moved at most
    tried: int  # tokens that were changed
    still: int  # of these, tokens whose own output kept every bit


def run_repeatable(call: Call, x: Tensor) -> Tensor:
    """The result of `call` on a copy of `x`, without gradients; ops that consume random numbers get the same every time."""
    with repeatable():
        return call(x.clone())


@contextmanager
def repeatable() -> Iterator[None]:
    """Context manager: no gradients, and fixed states of the random number generators, which are restored on exit."""
    with torch.no_grad(), seeded():
        yield


def trial(call: Call, x: Tensor, other: Tensor, before: Tensor, into: Tokens, out: Tokens, allowed: float) -> Trial:
    """Replace single tokens of `x` by those of `other`; `before` is the output for `x`. Stops at the first leak.

    `into` and `out` list the tokens of input and output, equally many. Outputs of other tokens may move by `allowed`, relative
    to the largest output; 0 means that they keep every bit.
    """
    size, others, own, still = before.float().abs().amax().clamp_min(1e-30), 0.0, 0.0, 0
    chosen = _chosen(into)
    for token in chosen:
        changed = x.flatten().clone()
        changed[into.places[token]] = other.flatten()[into.places[token]]
        after = run_repeatable(call, changed.view_as(x))
        differs = _differ(before, after).flatten()[out.places].any(1)  # [tokens]
        moved = (before.float() - after.float()).abs().flatten()[out.places].nan_to_num(torch.inf).amax(1) / size  # [tokens]
        still += not bool(differs[token])
        own = max(own, float(moved[token]))
        is_other = torch.arange(len(out.places), device=x.device) != token
        if differs[is_other].any():
            others = max(others, float(moved[is_other].amax()))
            if others > allowed:
                leak = f"a change of token {token} of {len(out.places)} changes {int(differs[is_other].sum())} others"
                return Trial(leak, others, own, len(chosen), still)
    return Trial("", others, own, len(chosen), still)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    return ~((one == other) | ((one != one) & (other != other)))


def _chosen(tokens: Tokens) -> list[int]:
    last = len(tokens.places) - 1
    wanted = min(TRIED, max(3, tokens.rows))
    return sorted({round(i * last / (wanted - 1)) for i in range(wanted)})
