"""The tables of a memory as modules: storage, initialization, and the reads. V of eq. (1) of arXiv 2412.09764, and u of PEER.

They depend on torch and the kernels only, so that they can be used and measured without the recipe schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrewrite.kernels import ops, quantize, rounding
from memrewrite.kernels.pending import Pending

if TYPE_CHECKING:
    from typing_extensions import Self


class Table(nn.Module):
    """Rows that are read by slot; a subclass says what calling the module computes.

    Layers call the table and never access `values`, so that hooks on this module (FSDP2's unshard, offloading,
    quantization) always run. The table is not initialized: call `reset_parameters` or load a checkpoint.

    Args:
        slots: Number of rows (N).
        width: Width of one row (D).
        dtype: Dtype of the stored values; float8_e4m3fn has one scale per row.
        gradient: How the table is trained: "dense", "sparse" or "fused".
        backend: Kernels that read it: "auto" or the name of a backend.
        seed: Seed of the initial values.
        device: Device of the table.

    Attributes:
        values: Parameter [N, D].
        scale: Buffer [N], one fp32 scale per row of an 8-bit table; None for other tables.
        pending: With gradient "fused", the queue of gradient factors for the next optimizer step; else None.
    """

    scale: Tensor | None

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        dtype: torch.dtype | None = None,
        gradient: str = "dense",
        backend: str = "auto",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gradient, self.backend, self.seed = gradient, backend, seed
        self.values = nn.Parameter(torch.empty(slots, width, device=device, dtype=dtype))  # [N, D]
        eight = self.values.dtype == rounding.FP8
        self.register_buffer("scale", torch.empty(slots, device=device, dtype=torch.float32) if eight else None)
        self.pending = Pending() if gradient == "fused" else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sample the rows from N(0, D^-1/2) in place; no effect on meta tensors.

        Without a `generator`, they depend only on `seed` (for one device type, dtype and shape).
        """
        if self.values.is_meta:
            return
        if generator is None:
            generator = torch.Generator(self.values.device).manual_seed(self.seed)
        width = self.values.shape[1]
        spread = width**-0.5
        with torch.no_grad():
            if self.scale is None:
                self.values.normal_(0.0, spread, generator=generator)
                return
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
            quantize.sample_(self.values, self.scale, spread, seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `bfloat16`, ...: they move an 8-bit table and its scales, and never cast them."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        result: Self = super()._apply(fn if self.scale is None else moved, recurse)  # type: ignore[no-untyped-call]
        return result

    def seed_at(self, step: int) -> int:
        """The seed of the stochastic rounding at a step: different at every step, the same after a resume."""
        return (self.seed * 0x9E3779B1 + step) % 2**62

    def _how(self) -> dict[str, Any]:
        """Arguments of an operator that reads this table."""
        learns = torch.is_grad_enabled()  # without autograd the kind of gradient is irrelevant; keep it out of exported graphs
        return {
            "gradient": self.gradient if learns else "dense",
            "backend": self.backend,
            "pending": self.pending if learns else None,
        }


class ValueTable(Table):
    """A table of values [N, d_v]; calling the module performs the lookup. The paper initializes it from N(0, d_v^-1/2)."""

    def forward(self, indices: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`y_t = sum_j weights[t, j] * values[indices[t, j]]`: [T, K], [T, K] -> [T, d_v].

        Args:
            indices: Slots [T, K], int32 or int64.
            weights: Weights [T, K] in any floating-point dtype; fp32 weights are not rounded to the dtype of the values.
            dtype: Dtype of the result for an 8-bit table. Default: that of the weights.

        Returns:
            [T, d_v] in the dtype of the values; for an 8-bit table, in `dtype`.
        """
        if self.scale is None and weights.dtype != self.values.dtype:
            weights = weights.float()
        stored = None if self.scale is None else dtype
        return ops.sparse_lookup(self.values, indices, weights, self.scale, dtype=stored, **self._how())


class InputTable(Table):
    """A table u [N, d_in] of input weights, one row a slot; calling the module multiplies rows with tokens.

    With a `ValueTable` v on the same slots, slot i is the expert `v_i · activation(u_i · x)` with one hidden neuron of PEER
    ("Mixture of A Million Experts", arXiv 2407.04153), whose text states no initialization. Rows from N(0, d_in^-1/2) give
    `u_i · x` the variance 1 for an x of variance 1, as the rows of a linear layer do.
    """

    def forward(self, indices: Tensor, x: Tensor) -> Tensor:
        """`out[t, j] = values[indices[t, j]] · x[t]`: [T, K], [T, d_in] -> [T, K].

        Args:
            indices: Slots [T, K], int32 or int64.
            x: Tokens [T, d_in] in any floating-point dtype.

        Returns:
            [T, K], fp32 (float64 for float64 rows).
        """
        return ops.sparse_dots(self.values, indices, x, self.scale, **self._how())
