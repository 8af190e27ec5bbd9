"""The numbers of usage statistics: against formulas written out in Python, and at the ends of their ranges."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_layers import layer, stack

import memrewrite
from memrewrite.kernels.read_counts import UNIT
from memrewrite.usage.counter import ReadCounter
from memrewrite.usage.statistics import UsageStatistics, layer_usage, pool_usage

CPU = torch.device("cpu")


def counter(reads: list[int], weight: list[float] | None = None, *, heads: int = 1, topk: int = 1) -> ReadCounter:
    """A counter that has counted these reads."""
    made = ReadCounter((1, len(reads)), heads, topk, gated=False, device=CPU)
    made.reads += torch.tensor(reads)
    made.weight += (torch.tensor(reads if weight is None else weight).double() * UNIT).long()
    return made


COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=250).filter(any)


@settings(deadline=None)
@given(COUNTS)
def test_spread_of_one_layer(reads: list[int]) -> None:
    usage = layer_usage("a", "pkm", "", counter(reads))
    total, slots = sum(reads), len(reads)
    kl = sum(n / total * math.log(n / total * slots) for n in reads if n)
    best = sorted(reads, reverse=True)[: -(-slots // 100)]
    assert usage.kl_reads == pytest.approx(kl, abs=1e-9)
    assert usage.kl_weight == pytest.approx(kl, abs=1e-6)
    assert usage.top_reads == float(Fraction(sum(best), total))
    assert usage.top_weight == pytest.approx(usage.top_reads, rel=1e-9)
    assert usage.slots_read == sum(n > 0 for n in reads) == slots - usage.slots_never_read
    assert usage.share_read == usage.slots_read / slots
    assert usage.reads == usage.tokens == total
    assert 0 <= usage.kl_reads <= math.log(slots) + 1e-9


def test_weights_are_counted_apart_from_reads() -> None:
    usage = layer_usage("a", "pkm", "", counter([1, 1, 1, 1], [1.0, 0.0, 0.0, 0.0]))
    assert usage.kl_reads == 0
    assert usage.kl_weight == pytest.approx(math.log(4))
    assert usage.top_weight == 1


@pytest.mark.parametrize("topk", [1, 3, 5])
def test_expected_share_is_that_of_random_heads(topk: int) -> None:
    """Against a simulation: 4 tokens with 2 heads choose topk of 5 slots at random."""
    generator, trials = torch.Generator().manual_seed(0), 20_000
    order = torch.rand(trials, 8, 5, generator=generator).argsort(-1)[..., :topk].flatten(1)
    simulated = torch.zeros(trials, 5).scatter_(1, order, 1.0).mean().item()
    usage = layer_usage("a", "pkm", "", counter([8 * topk, 0, 0, 0, 0], heads=2, topk=topk))
    assert usage.tokens == 4
    assert usage.share_if_uniform == pytest.approx(simulated, abs=0.003)


@settings(deadline=None)
@given(st.data(), st.integers(1, 60))
def test_overlap_of_layers(data: st.DataObject, slots: int) -> None:
    column = st.lists(st.integers(0, 9), min_size=slots, max_size=slots).filter(any)
    layers = {name: data.draw(column) for name in "abc"}
    usage = pool_usage("shared", {name: counter(reads) for name, reads in layers.items()})
    assert usage.reads == sum(map(sum, layers.values()))
    assert usage.slots_read == sum(any(column) for column in zip(*layers.values(), strict=True))
    assert [o.layers for o in usage.overlaps] == [("a", "b"), ("a", "c"), ("b", "c")]
    for overlap in usage.overlaps:
        one, two = (layers[name] for name in overlap.layers)
        sets = [{i for i, n in enumerate(column) if n} for column in (one, two)]
        shares = [[n / sum(column) for n in column] for column in (one, two)]
        assert overlap.slots == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert overlap.reads == pytest.approx(sum(map(min, *shares)), abs=1e-9)


def test_nothing_read() -> None:
    usage = layer_usage("a", "pkm", "", counter([0, 0]))
    assert (usage.reads, usage.share_read, usage.share_if_uniform, usage.slots_never_read) == (0, 0, 0, 2)
    numbers = (usage.kl_reads, usage.kl_weight, usage.top_reads, usage.top_weight, usage.entropy, usage.effective_slots)
    assert numbers == (None,) * 6
    assert pool_usage("p", {"a": counter([0, 0]), "b": counter([1, 0])}).overlaps == ()


@pytest.mark.parametrize(("factor", "expected"), [(0.0, math.log(3)), (1e5, 0.0)])
def test_entropy_is_between_0_and_log_k(factor: float, expected: float) -> None:
    model: Any = layer(topk=3, qk_norm=False)
    model.product_keys.query.weight.data *= factor
    with memrewrite.watch(model) as usage:
        model(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    (found,) = usage.statistics().layers
    assert found.entropy == pytest.approx(expected, abs=1e-3)
    assert found.effective_slots == pytest.approx(math.exp(expected), abs=1e-2)


def test_json_and_scalars() -> None:
    with memrewrite.watch(model := stack()) as usage:
        model(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    statistics = usage.statistics()
    assert UsageStatistics.model_validate_json(statistics.model_dump_json()) == statistics
    scalars = usage.scalars()
    assert scalars["memory/1/share_read"] == statistics.layers[1].share_read
    assert scalars["memory/shared/top_reads"] == statistics.pools[0].top_reads
    overlaps = [o.reads for o in statistics.pools[0].overlaps]
    assert scalars["memory/shared/overlap"] == pytest.approx(sum(overlaps) / 3)
    assert all(isinstance(value, float) for value in scalars.values())


def test_sums_over_processes(tmp_path: Path) -> None:
    """Two processes, each with half of the tokens: both have what one process with all tokens counts."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    with memrewrite.watch(model := layer()) as usage:
        model(tokens())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(usage.scalars())


def tokens() -> torch.Tensor:
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with memrewrite.watch(model := layer()) as usage:
        model(tokens()[2 * rank : 2 * rank + 2])
    usage.all_reduce()
    torch.save(usage.scalars(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
