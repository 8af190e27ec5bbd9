"""What every layer kind offers: frozen options, a check before building, a cost, and a forward from d_model to d_out.

`check` → build (uninitialised, also on meta) → `reset_parameters` or a checkpoint → `forward`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

if TYPE_CHECKING:
    from memrewrite.cost import Cost
    from memrewrite.layers.pool import Pool, PoolSpec


class LayerOptions(BaseModel):
    """Options of a layer kind: frozen data, from which the recipe's schema and its help are derived."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


O = TypeVar("O", bound=LayerOptions)  # noqa: E741 - O for options


class MemoryLayer(nn.Module, ABC):
    """A token-wise layer `[..., d_model] -> [..., d_out]` that may take an MLP's place.

    A kind is one subclass: its name, its options, whether it reads a pool, `check`, `cost`, `forward` and
    `reset_parameters`. The pool is held by reference and never registered here: it hangs once at the model's root,
    and its parameter has one name there. A deepcopy of the model keeps its layers on one (copied) pool.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[LayerOptions]]
    uses_pool: ClassVar[bool] = True

    @abstractmethod
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
        """Build with uninitialised parameters on `device`; `zero_output`: the layer starts by adding nothing."""
        super().__init__()
        self.d_model, self.d_out, self.options, self.zero_output = d_model, d_out, options, zero_output
        self._pool: tuple[Pool, ...] = () if pool is None else (pool,)  # in a tuple, so that it is not registered as a child

    @property
    def pool(self) -> Pool | None:
        """The pool this layer reads, or None."""
        return self._pool[0] if self._pool else None

    @classmethod
    @abstractmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` when this layer cannot be built so (odd `key_dim`, `topk` > keys, ...)."""

    @classmethod
    @abstractmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of one such layer without the pool's own parameters (counted once per pool)."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise in place as the paper says; a no-op on meta tensors."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d_model]` to `[..., d_out]`, each token by itself."""

    def extra_repr(self) -> str:
        """Widths and options, for `print(model)`."""
        return f"{self.d_model} -> {self.d_out}, {self.options}"


def options_as(kind: type[O], options: LayerOptions) -> O:
    """`options` as the kind's own class. Raises TypeError when they are another kind's."""
    if not isinstance(options, kind):
        raise TypeError(f"options of a {kind.__name__} are needed, not {type(options).__name__}")
    return options


def empty_linear(
    d_in: int, d_out: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """An `nn.Linear` with bias whose entries are not initialised: no time, and no random number, is spent on them."""
    linear = nn.Linear(d_in, d_out, device="meta", dtype=dtype)
    return linear.to_empty(device=torch.get_default_device() if device is None else device)
