"""The numbers that follow from counted reads, as plain data: per layer, per pool, and for pairs of layers that share a pool.

Information is in nats. Of a distribution p over N slots, the divergence from the uniform one is `log N + sum p log p` (KL in
section 4.5 of "Large Memory Layers with Product Keys", Lample et al. 2019, arXiv 1907.05242): 0 if all slots are used alike,
log N if one slot is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations

import torch
from pydantic import Field
from torch import Tensor

from memrewrite.frozen import Frozen
from memrewrite.kernels.read_counts import ENTROPY, GATE, UNIT
from memrewrite.usage.counter import ReadCounter


class SlotUsage(Frozen):
    """How the reads of one layer, or of all layers of one pool, are spread over the slots.

    Numbers of a distribution are None if nothing was read.

    Attributes:
        slots: Slots of the table (N).
        tokens: Tokens that were read for; a token counts once in each layer.
        reads: Reads of a slot: for every token, heads × topk of each layer.
        slots_read: Slots that were read at least once.
        slots_never_read: The others.
        share_read: `slots_read / slots`.
        share_if_uniform: The expected `share_read` if every head chose its topk slots at random.
        kl_reads: Divergence of the reads from the uniform distribution, in nats.
        kl_weight: The same of the sum of weights per slot, as Lample et al. measure it, in nats.
        top_reads: Share of the reads that go to the most read 1 % of slots (rounded up to a whole slot).
        top_weight: Share of the weight that goes to the 1 % of slots with the most weight.
    """

    slots: int
    tokens: int
    reads: int
    slots_read: int
    slots_never_read: int
    share_read: float
    share_if_uniform: float
    kl_reads: float | None
    kl_weight: float | None
    top_reads: float | None
    top_weight: float | None


class LayerUsage(SlotUsage):
    """The reads of one layer.

    Attributes:
        layer: Path of the layer in the model.
        kind: Its kind.
        pool: Name of the pool that it reads; empty for a layer without one.
        topk: Slots that each head reads.
        entropy: Entropy of the weights of one head for one token, the mean over both, in nats; at most log(topk).
        effective_slots: exp(entropy): how many equally weighted slots have this entropy.
        gate_rms: Root mean square, over tokens and features (`memory_plus`) or reads (`peer`), of what multiplies the values
            read besides their weights; None for a kind without a gate.
    """

    layer: str
    kind: str
    pool: str
    topk: int
    entropy: float | None
    effective_slots: float | None
    gate_rms: float | None


class Overlap(Frozen):
    """What two layers that share a pool have in common.

    Attributes:
        layers: Their paths.
        slots: Slots that both read, as a share of the slots that at least one of them read (Jaccard index).
        reads: `sum_n min(p_n, q_n)` of the layers' distributions of reads: 1 if they are equal, 0 if no slot is shared.
    """

    layers: tuple[str, str]
    slots: float
    reads: float


class PoolUsage(SlotUsage):
    """The reads of all layers of one pool, and what each two of them have in common.

    Attributes:
        pool: Name of the pool.
        layers: Paths of the layers that read it.
        overlaps: Every pair of layers that both read something.
    """

    pool: str
    layers: tuple[str, ...]
    overlaps: tuple[Overlap, ...]


class UsageStatistics(Frozen):
    """Everything that was counted, as numbers. `model_dump_json()` writes JSON, `model_validate_json` reads it.

    Attributes:
        layers: One entry for each watched layer, in the order of the model's modules.
        pools: One entry for each pool that they read.
    """

    layers: tuple[LayerUsage, ...] = Field(default=())
    pools: tuple[PoolUsage, ...] = Field(default=())


def layer_usage(layer: str, kind: str, pool: str, counter: ReadCounter) -> LayerUsage:
    """The numbers of one layer."""
    common = _slot_usage([counter])
    entropy, gate = (float(counter.sums[at]) for at in (ENTROPY, GATE))
    tokens = common.tokens
    mean = entropy / (tokens * counter.heads) if tokens else None
    return LayerUsage(
        **common.model_dump(),
        layer=layer,
        kind=kind,
        pool=pool,
        topk=counter.topk,
        entropy=mean,
        effective_slots=None if mean is None else math.exp(mean),
        gate_rms=math.sqrt(gate / tokens) if counter.gated and tokens else None,
    )


def pool_usage(pool: str, counters: Mapping[str, ReadCounter]) -> PoolUsage:
    """The numbers of one pool from the counters of its layers, by their paths. They have the same slots."""
    shares = {name: _share(counter.reads) for name, counter in counters.items() if bool(counter.reads.any())}
    overlaps = [Overlap(layers=(a, b), **_overlap(shares[a], shares[b])) for a, b in combinations(shares, 2)]
    common = _slot_usage(list(counters.values()))
    return PoolUsage(**common.model_dump(), pool=pool, layers=tuple(counters), overlaps=tuple(overlaps))


def _slot_usage(counters: Sequence[ReadCounter]) -> SlotUsage:
    """The numbers of the sum of these counters."""
    device = counters[0].reads.device
    reads = reduce(torch.add, (c.reads.to(device) for c in counters))
    weight = reduce(torch.add, (c.weight.to(device) for c in counters))
    slots, found = len(reads), int(reads.count_nonzero())
    tokens = [int(c.reads.sum()) // (c.heads * c.topk) for c in counters]
    # log of the probability that a slot is not read, if each head of each token chooses topk different slots at random
    missed = sum(
        t * c.heads * (math.log1p(-c.topk / slots) if c.topk < slots else -math.inf)
        for t, c in zip(tokens, counters, strict=True)
        if t
    )
    return SlotUsage(
        slots=slots,
        tokens=sum(tokens),
        reads=int(reads.sum()),
        slots_read=found,
        slots_never_read=slots - found,
        share_read=found / slots,
        share_if_uniform=max(0.0, -math.expm1(missed)),
        kl_reads=_kl_to_uniform(reads),
        kl_weight=_kl_to_uniform(weight),
        top_reads=_top_share(reads),
        top_weight=_top_share(weight),
    )


def _share(counts: Tensor) -> Tensor:
    """Counts as a distribution, in float64."""
    return counts.double() / counts.sum()


def _kl_to_uniform(counts: Tensor) -> float | None:
    if not bool(counts.any()):
        return None
    return max(0.0, math.log(len(counts)) - float(torch.special.entr(_share(counts)).sum()))


def _top_share(counts: Tensor) -> float | None:
    if not bool(counts.any()):
        return None
    return int(counts.topk(math.ceil(len(counts) / 100)).values.sum()) / int(counts.sum())


def _overlap(p: Tensor, q: Tensor) -> dict[str, float]:
    q = q.to(p.device)
    both, either = (p > 0) & (q > 0), (p > 0) | (q > 0)
    return {"slots": int(both.sum()) / int(either.sum()), "reads": min(1.0, float(torch.minimum(p, q).sum()))}


def weight_of(counter: ReadCounter) -> Tensor:
    """The sum of the weights with which each slot was read, float64 [N]."""
    return counter.weight.double() / UNIT
