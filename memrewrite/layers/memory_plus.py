"""Memory+: a product-key memory whose output is gated by the input, from "Memory Layers at Scale" (arXiv 2412.09764).

Flow: x → slots and weights → y, the weighted sum of values → y ⊙ silu(x W1) → W2.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.cost import Cost, dense_cost
from memrewrite.layers.contract import LayerOptions, options_as
from memrewrite.layers.linear import empty_linear, scale_
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.layers.product_key_layer import (
    ProductKeyLayer,
    ProductKeyOptions,
    check_product_keys,
    needed,
    product_key_cost,
)


class MemoryPlusOptions(ProductKeyOptions):
    """Options of `memory_plus`; the defaults are the paper's (arXiv 2412.09764)."""

    gate: Literal["swilu", "sigmoid"] = Field(
        "swilu", description="How x gates y: 'swilu': y ⊙ silu(x W1), as in Memory+ (eq. 2); 'sigmoid': one factor per token."
    )


class MemoryPlus(ProductKeyLayer):
    """`output = (y ⊙ silu(xᵀ W1))ᵀ W2` with `y = s V_I`: eqs. (1) and (2) of arXiv 2412.09764.

    `gate` is W1 [d_model -> d_v] ([d_model -> 1] in the paper's "gated" variant), `value_proj` is W2 [d_v -> d_out],
    both with a bias; d_v is the pool's `value_dim`. With `zero_output`, W2 and its bias start at zero: the layer returns
    exactly 0, and in the first step only W2 and its bias have a nonzero gradient.
    """

    kind = "memory_plus"
    Options = MemoryPlusOptions
    gated = True

    def __init__(
        self,
        d_model: int,
        d_out: int,
        options: LayerOptions,
        pool: Pool | None = None,
        *,
        zero_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mine = options_as(MemoryPlusOptions, options)
        super().__init__(d_model, d_out, mine, pool, zero_output=zero_output, device=device, dtype=dtype)
        d_v = needed(None if pool is None else pool.spec).value_dim
        self.swilu = mine.gate == "swilu"
        self.gate = empty_linear(d_model, d_v if self.swilu else 1, device, dtype)
        self.value_proj = empty_linear(d_v, d_out, device, dtype)

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` for a missing pool, an odd `key_dim`, or a `topk` above the pool's keys."""
        check_product_keys(d_model, options_as(MemoryPlusOptions, options), pool)

    @classmethod
    def cost(
        cls,
        d_model: int,
        d_out: int,
        options: LayerOptions,
        pool: PoolSpec | None,
        itemsize: int,
        *,
        zero_output: bool,
    ) -> Cost:
        """Cost of query, half keys, lookup, and the projections W1 and W2."""
        mine, d_v = options_as(MemoryPlusOptions, options), needed(pool).value_dim
        gate = d_v if mine.gate == "swilu" else 1
        projections = dense_cost(d_model * gate + d_v * d_out, gate + d_out, itemsize)
        return product_key_cost(d_model, mine, pool, itemsize) + projections

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """W1 and W2 from N(0, d_out^-1/2), biases zero, the rest as in `ProductKeys`; no effect on meta tensors."""
        if self.value_proj.weight.is_meta:
            return
        self.product_keys.reset_parameters(generator)
        nn.init.normal_(self.gate.weight, 0.0, self.d_out**-0.5, generator=generator)
        nn.init.zeros_(self.gate.bias)
        if self.zero_output:
            nn.init.zeros_(self.value_proj.weight)
        else:
            nn.init.normal_(self.value_proj.weight, 0.0, self.d_out**-0.5, generator=generator)
        nn.init.zeros_(self.value_proj.bias)

    def scale_output(self, factor: float) -> None:
        """Multiply W2 and its bias by `factor`."""
        scale_(self.value_proj, factor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_out], each token independently."""
        tokens = self.tokens_of(x)  # [T, d]
        y = self.read(tokens)  # [T, d_v]
        gate = self.gate(tokens)  # [T, d_v] or [T, 1]
        gate = F.silu(gate) if self.swilu else gate.sigmoid()
        if self.counter is not None:
            self.counter.count_gate(gate)
        out: Tensor = self.value_proj(y * gate)
        return out.reshape(*x.shape[:-1], self.d_out)
