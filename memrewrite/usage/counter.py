"""Counts what one layer reads, on the layer's device."""

from __future__ import annotations

import torch
from torch import Tensor

from memrewrite.kernels import read_counts as read_counts  # importing it registers the operators


class ReadCounter:
    """Exact counts of the slots that one layer reads, and of their weights.

    A layer has one as its attribute `counter` while `memrewrite.watch` counts, and calls `count` in every forward, and
    `count_gate` if it has a gate. A copy of a watched layer is not watched: a copied or pickled counter is None.

    Args:
        grid: Rows and columns of the slots; slot i · columns + j is at (i, j).
        heads: Heads of the layer.
        topk: Slots that each head reads.
        gated: True if the layer also calls `count_gate`.
        device: Device of the layer.

    Attributes:
        reads: int64 [N], how often each slot was read.
        weight: int64 [N], the sum of the weights of these reads, in units of 1 / `read_counts.UNIT`.
        sums: float64 [2], sums over all tokens: of the entropies of all heads' weights (nats), and of the gate's mean square.
    """

    def __init__(self, grid: tuple[int, int], heads: int, topk: int, *, gated: bool, device: torch.device) -> None:
        self.grid, self.heads, self.topk, self.gated = grid, heads, topk, gated
        slots = grid[0] * grid[1]
        with torch.inference_mode(False):  # the tensors can be changed inside and outside of inference mode
            self.reads = torch.zeros(slots, dtype=torch.int64, device=device)
            self.weight = torch.zeros(slots, dtype=torch.int64, device=device)
            self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`reads`, `weight` and `sums`. Each is a sum over tokens: those of several processes can be added."""
        return self.reads, self.weight, self.sums

    def count(self, slots: Tensor, weights: Tensor) -> None:
        """Count one forward's reads: slots (int64) and their weights, both [T, heads·topk]. No effect during an export."""
        if not torch.compiler.is_exporting():
            torch.ops.memrewrite.count_reads_(self.reads, self.weight, self.sums, slots, weights)

    def count_gate(self, gate: Tensor) -> None:
        """Count one forward's gate: what multiplies the values read besides their weights. No effect during an export.

        Args:
            gate: For every token, one factor [T, 1], one per feature [T, d_v], or one per read [T, heads·topk].
        """
        if not torch.compiler.is_exporting():
            torch.ops.memrewrite.count_gate_(self.sums, gate)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
