"""Queues for fused updates: the factors of a table's gradient, stored from the backward until the optimizer step.

The gradient of a table is `sum over lookups of w[t, j] * grad[t]` at row `indices[t, j]`. Its factors grad [T, D], indices
and weights [T, K] are stored; the gradient is never materialized. Several lookups may read one table (layers that share it,
micro-batches, activations recomputed in the backward): the table does not change before the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

_handles = itertools.count(1)
_queues: WeakValueDictionary[int, Pending] = WeakValueDictionary()


class Factors(NamedTuple):
    """The factors of one lookup's contribution to a table's gradient."""

    grad: Tensor  # [T, D]
    indices: Tensor  # [T, K]
    weights: Tensor  # [T, K]


def as_lists(reads: Sequence[Factors]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The factors of several lookups as the operators of updates take them: gradients, indices and weights."""
    return [r.grad for r in reads], [r.indices for r in reads], [r.weights for r in reads]


class Pending:
    """The queue of one table. An operator finds it by `handle`, an integer that a compiled graph can contain.

    `count`, a CPU tensor, counts all lookups ever added. The operator mutates it, so a compiler neither removes nor moves
    the operator. A copy of the table gets its own queue.
    """

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.count = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.waiting: list[Factors] = []
        self._taker: ReferenceType[Any] | None = None
        _queues[self.handle] = self

    @property
    def taker(self) -> Any | None:
        """The optimizer that empties the queue, or None (also after it was deleted)."""
        return None if self._taker is None else self._taker()

    @taker.setter
    def taker(self, taker: Any | None) -> None:
        self._taker = None if taker is None else ref(taker)

    def keep(self, grad: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Add one lookup's factors. Raises RuntimeError if no optimizer uses them: the table would not be trained."""
        if self.taker is None:
            raise RuntimeError(
                'a table with gradient "fused" got a gradient, but no optimizer uses it; '
                "call memrewrite.fuse(optimizer, model) before training"
            )
        refuse_capture(grad)
        if grad.numel() and indices.numel():  # copies: a compiled graph reuses its tensors' memory when the call returns
            self.waiting.append(Factors(grad.clone(memory_format=torch.contiguous_format), indices.clone(), weights.clone()))

    def take(self) -> list[Factors]:
        """Remove and return all factors."""
        taken, self.waiting = self.waiting, []
        return taken

    def scale_(self, factor: Tensor) -> None:
        """Multiply the gradient by `factor`, a 0-dim tensor: the weights of all factors, which become fp32."""
        self.waiting = [r._replace(weights=r.weights.float() * factor.to(r.weights.device)) for r in self.waiting]

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Context manager: inside, gradients are accepted without an optimizer; they are discarded at the exit."""
        before, waiting = self.taker, self.waiting
        self.taker, self.waiting = self, []
        try:
            yield
        finally:
            self.taker, self.waiting = before, waiting

    def __deepcopy__(self, memo: dict[int, Any]) -> Pending:
        memo[id(self)] = fresh = Pending()
        return fresh

    def __reduce__(self) -> tuple[type[Pending], tuple[()]]:
        return Pending, ()


def refuse_capture(tensor: Tensor) -> None:
    """Raise RuntimeError during CUDA graph capture: a replay would neither update the queue nor count steps."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError('a fused update cannot be in a CUDA graph; capture the forward alone, or use gradient "dense"')


def queue_of(handle: int) -> Pending:
    """The queue with this handle. Raises RuntimeError if its table was deleted."""
    queue = _queues.get(handle)
    if queue is None:
        raise RuntimeError(f"the table of queue {handle} does not exist: its model was deleted between forward and backward")
    return queue
