"""Identity and none: what a model does with its MLPs bridged or removed. Baselines without parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from memrewrite.cost import Cost
from memrewrite.errors import UserError
from memrewrite.layers.contract import LayerOptions, MemoryLayer, options_as
from memrewrite.layers.pool import Pool, PoolSpec


class NoOptions(LayerOptions):
    """`identity` and `none` have no options."""


class WithoutParameters(MemoryLayer):
    """Base class of the kinds that have no parameters and cost nothing."""

    Options = NoOptions
    uses_pool = False
    scalable = False

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
        if zero_output and not self.constant:
            raise UserError(self.replaces_only, hint="placement: replace")
        super().__init__(d_model, d_out, options, pool, zero_output=zero_output, device=device, dtype=dtype)

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Accept all widths."""
        options_as(NoOptions, options)

    @classmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Nothing."""
        return Cost()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """There are none."""

    def scale_output(self, factor: float) -> None:
        """Raise TypeError: there are no parameters."""
        raise TypeError(f"{self.kind!r} has no parameters that scale its output")


class Identity(WithoutParameters):
    """`output = x`: the MLP's input, after the norm before it, is added to the residual stream."""

    kind = "identity"
    replaces_only = "`identity` cannot be added to an MLP: its output cannot start at zero, so it would change the model"

    @classmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` if input and output have different widths."""
        super().check(d_model, d_out, options, pool)
        if d_model != d_out:
            what = f"`identity` returns its input, which has {d_model} features, and the MLP's output has {d_out}"
            raise UserError(what, hint="`with: none`, which returns zeros, or `with: dense`")

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> the same values. A copy: the model may mutate an MLP's output in place."""
        self.tokens_of(x)
        return x.clone()


class Nothing(WithoutParameters):
    """`output = 0`: the block without its MLP."""

    kind = "none"
    constant = True
    replaces_only = "`none` cannot be added to an MLP: its output is always zero, so it would have no effect"

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> zeros [..., d_out]."""
        self.tokens_of(x)
        return x.new_zeros((*x.shape[:-1], self.d_out))
