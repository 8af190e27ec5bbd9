"""PKM: the plain product-key memory (Lample et al. 2019; "Memory" in the tables of arXiv 2412.09764).

Flow: x → slots and weights → y, the weighted sum of values → a projection, only where the widths or a zero start need it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


class PkmOptions(ProductKeyOptions):
    """Options of `pkm`; the defaults are those of Memory+, so that the two can be compared."""


class Pkm(ProductKeyLayer):
    """`output = y = s V_I`: eq. (1) of arXiv 2412.09764, without a gate.

    If the values are not d_out wide, or the output must start at zero (the values of a shared pool cannot), a projection
    `value_proj` [d_v -> d_out] with bias follows; d_v is the pool's `value_dim`.
    """

    kind = "pkm"
    Options = PkmOptions

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
        mine = options_as(PkmOptions, options)
        super().__init__(d_model, d_out, mine, pool, zero_output=zero_output, device=device, dtype=dtype)
        d_v = needed(None if pool is None else pool.spec).value_dim
        self.value_proj = empty_linear(d_v, d_out, device, dtype) if zero_output or d_v != d_out else None

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` for a missing pool, an odd `key_dim`, or a `topk` above the pool's keys."""
        check_product_keys(d_model, options_as(PkmOptions, options), pool)

    @classmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of query, half keys, lookup, and the projection if there is one."""
        d_v = needed(pool).value_dim
        cost = product_key_cost(d_model, options_as(PkmOptions, options), pool, itemsize)
        return cost + dense_cost(d_v * d_out, d_out, itemsize) if zero_output or d_v != d_out else cost

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The projection from N(0, d_out^-1/2), or zero; the rest as in `ProductKeys`; no effect on meta tensors."""
        if self.product_keys.keys.is_meta:
            return
        self.product_keys.reset_parameters(generator)
        if self.value_proj is None:
            return
        if self.zero_output:
            nn.init.zeros_(self.value_proj.weight)
        else:
            nn.init.normal_(self.value_proj.weight, 0.0, self.d_out**-0.5, generator=generator)
        nn.init.zeros_(self.value_proj.bias)

    @property
    def output_is_pool(self) -> bool:
        """True without a projection."""
        return self.value_proj is None

    def scale_output(self, factor: float) -> None:
        """Multiply the projection and its bias by `factor`. Raises TypeError without a projection."""
        if self.value_proj is None:
            raise TypeError("the output is a weighted sum of the pool's values: scale these")
        scale_(self.value_proj, factor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_out], each token independently."""
        y = self.read(self.tokens_of(x))  # [T, d_v]
        out = y if self.value_proj is None else self.value_proj(y)
        return out.reshape(*x.shape[:-1], self.d_out)
