"""Routing of a mixture of experts: which tokens each expert gets, in groups of equal size for batched products.

Flow: scores [T, experts] → `by_experts`: each expert's best tokens; or `by_tokens`: each token's best experts, the tokens of an
expert placed in blocks of equal size. Shapes depend on the number of tokens only, so no number is read from the device.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """T·k assignments of tokens to experts, in blocks of equal size, each of one expert.

    Attributes:
        experts: The expert of each block [blocks]; unused blocks have any.
        places: The block and the row in it of each assignment, two [T·k]; token t has the assignments t·k to t·k + k - 1.
        size: Rows of one block.
        load: Assignments of each expert [experts], int64.
    """

    experts: Tensor
    places: tuple[Tensor, Tensor]
    size: int
    load: Tensor


def by_experts(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Expert choice: for each expert the scores and the numbers of its `capacity` best tokens: [T, E] -> two [E, capacity]."""
    best = scores.t().topk(capacity, dim=1)
    return best.values, best.indices


def capacity_of(tokens: int, experts: int, factor: float) -> int:
    """Tokens of each expert in expert choice: `factor * tokens / experts`, rounded up. `tokens` may be symbolic."""
    exact = Fraction(factor).limit_denominator(1000)
    share = exact.denominator * experts
    return (tokens * exact.numerator + share - 1) // share


def by_tokens(chosen: Tensor, experts: int) -> Blocks:
    """Token choice: blocks for the experts [T, k] that the tokens chose. No assignment is dropped.

    An expert's assignments fill as many blocks of `T·k / experts` rows as they need. All experts together need at most two
    per expert, however uneven the choice is, and at most one per assignment: one token reads only the experts it chose.
    """
    flat = chosen.flatten()  # [N]
    size = flat.shape[0] // experts + 1
    blocks = torch.sym_min(flat.shape[0], 2 * experts)  # type: ignore[no-untyped-call]
    mine = flat[:, None] == torch.arange(experts, device=flat.device)  # [N, E]
    counted = mine.long().cumsum(0)  # [N, E]: assignments so far
    load = mine.sum(0)
    used = (load + size - 1) // size  # blocks of each expert
    ends = used.cumsum(0)
    rank = counted.gather(1, flat[:, None]).squeeze(1) - 1  # of an assignment among those of its expert
    whole = rank // size  # blocks before that of an assignment; torch's ONNX exporter has no remainder by a symbolic number
    places = (ends - used)[flat] + whole, rank - whole * size
    numbers = torch.arange(blocks, device=flat.device)
    owners = (numbers[:, None] >= ends).sum(1).clamp(max=experts - 1)
    return Blocks(owners, places, size, load)
