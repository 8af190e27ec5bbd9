"""The operators that count what a layer reads, `memrewrite::count_reads_` and `memrewrite::count_gate_`.

Sums are kept on the device of the reads, and nothing is copied to the host. What is summed per slot is an integer, so results
do not depend on the order of additions. Importing this module registers the operators; a layer that is not watched never
imports it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap

UNIT = 2**30  # a weight of 1 as an integer: sums are exact to 1e-9 per read, up to 2^33 reads of one slot
ENTROPY, GATE = 0, 1  # positions in `sums`
_LOCK = threading.Lock()  # two threads may run the same model: additions on the CPU are not atomic


def count_reads_(reads: Tensor, weight: Tensor, sums: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Add one forward's reads, in place.

    Nothing is added inside of a backward: there a forward is the recomputation of a checkpointed one, which was counted.

    Args:
        reads: int64 [N]; `reads[n]` grows by the number of times that slot n was read.
        weight: int64 [N]; `weight[n]` grows by the weights of these reads, in units of 1 / `UNIT`.
        sums: float64 [2]; `sums[ENTROPY]` grows by the entropies (nats) of the weights of every token and head.
        slots: int64 [T, K]: K reads of every token, of all heads.
        weights: Floating point [T, K]; those of one head of one token add up to 1.
    """
    if _recomputing():
        return
    where, exact = slots.reshape(-1), weights.detach().reshape(-1).double()
    entropy = torch.special.entr(exact).sum()
    with _LOCK:
        reads.index_add_(0, where, torch.ones((), dtype=torch.int64, device=where.device).expand_as(where))
        weight.index_add_(0, where, (exact * UNIT).round().long())
        sums[ENTROPY].add_(entropy)


def count_gate_(sums: Tensor, gate: Tensor) -> None:
    """Add to `sums[GATE]` the mean square of every token's gate [T, D]; nothing inside of a backward, as `count_reads_`."""
    if not _recomputing():
        squares = gate.detach().double().square().mean(-1).sum()
        with _LOCK:
            sums[GATE].add_(squares)


def _recomputing() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _nothing(*_: Any) -> None:
    """What a tracer of shapes, or a device without values, does."""


def _reads_of_a_batch(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[None, None]:
    """Under `torch.vmap` the tokens of all calls are counted."""
    reads, weight, sums, slots, weights = inputs
    slots, weights = (_joined(t, dim, info.batch_size) for t, dim in ((slots, dims[3]), (weights, dims[4])))
    torch.ops.memrewrite.count_reads_(reads, weight, sums, slots, weights)
    return None, None


def _gate_of_a_batch(info: Any, dims: tuple[int | None, ...], sums: Tensor, gate: Tensor) -> tuple[None, None]:
    torch.ops.memrewrite.count_gate_(sums, _joined(gate, dims[1], info.batch_size))
    return None, None


def _joined(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[B·T, ...] from [B, T, ...] with the batch at `dim`, or from a tensor that all calls share."""
    batch = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batch.flatten(0, 1)


_LIBRARY = Library("memrewrite", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _run, _batched in (
    (
        "count_reads_(Tensor(a!) reads, Tensor(b!) weight, Tensor(c!) sums, Tensor slots, Tensor weights) -> ()",
        count_reads_,
        _reads_of_a_batch,
    ),
    ("count_gate_(Tensor(a!) sums, Tensor gate) -> ()", count_gate_, _gate_of_a_batch),
):
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    register_fake(f"memrewrite::{_name}", _nothing, lib=_LIBRARY)
    register_vmap(f"memrewrite::{_name}", _batched, lib=_LIBRARY)
