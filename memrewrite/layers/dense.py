"""Dense: an MLP of any width, such as a wider or narrower one than the MLP that it replaces.

Flow: x → up (and gate) → activation → down.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memrewrite.cost import Cost, dense_cost
from memrewrite.layers.contract import LayerOptions, MemoryLayer, options_as
from memrewrite.layers.linear import empty_linear, scale_
from memrewrite.layers.mlp import MlpOptions, check_mlp, completed, shape_of
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.site import Site


class DenseOptions(MlpOptions):
    """Options of `dense`: without any, an MLP of the same shape with new weights."""


class Dense(MemoryLayer):
    """`output = down(act(gate(x)) * up(x))`, or `down(act(up(x)))`: a dense MLP, the baseline of all memory layers.

    The matrices start from N(0, fan_in^-1/2), which keeps the variance of the features, and the biases at zero. With
    `zero_output`, `down` and its bias start at zero: the layer returns exactly 0, and in the first step only they have a
    nonzero gradient.
    """

    kind = "dense"
    Options = DenseOptions
    uses_pool = False

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
        self.check(d_model, d_out, options, None)
        super().__init__(d_model, d_out, options, pool, zero_output=zero_output, device=device, dtype=dtype)
        self.shape = shape_of(options_as(DenseOptions, options))
        hidden, bias = self.shape.d_hidden, self.shape.bias
        self.gate = empty_linear(d_model, hidden, device, dtype, bias=bias) if self.shape.gated else None
        self.up = empty_linear(d_model, hidden, device, dtype, bias=bias)
        self.down = empty_linear(hidden, d_out, device, dtype, bias=bias)

    @classmethod
    def complete(cls, options: LayerOptions, site: Site) -> LayerOptions:
        """Width, gate, activation and biases as in the MLP, where the options do not say otherwise."""
        return completed(options_as(DenseOptions, options), site)

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` if the hidden width is given twice."""
        check_mlp(options_as(DenseOptions, options))

    @classmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of the matrices and their biases."""
        weights, biases = shape_of(options_as(DenseOptions, options)).size(d_model, d_out)
        return dense_cost(weights, biases, itemsize)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, fan_in^-1/2), biases zero; with `zero_output`, `down` is zero. No effect on meta tensors."""
        if self.down.weight.is_meta:
            return
        for linear in (self.gate, self.up, self.down):
            if linear is None:
                continue
            nn.init.normal_(linear.weight, 0.0, linear.in_features**-0.5, generator=generator)
            if self.shape.bias:
                nn.init.zeros_(linear.bias)
        if self.zero_output:
            nn.init.zeros_(self.down.weight)

    def scale_output(self, factor: float) -> None:
        """Multiply `down`, and so the layer's output, by `factor`."""
        scale_(self.down, factor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_out], each token independently."""
        tokens = self.tokens_of(x)  # [T, d]
        gate = None if self.gate is None else self.gate(tokens)
        out: Tensor = self.down(self.shape.hidden(self.up(tokens), gate))
        return out.reshape(*x.shape[:-1], self.d_out)
