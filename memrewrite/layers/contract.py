"""The interface of every layer kind: options, a check before building, a cost, and a forward from d_model to d_out.

Flow: `check` → build (uninitialized, also on meta) → `reset_parameters` or a checkpoint → `forward`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from memrewrite.errors import ModelError

if TYPE_CHECKING:
    from memrewrite.cost import Cost
    from memrewrite.layers.pool import Pool, PoolSpec


class LayerOptions(BaseModel):
    """Base class of a layer kind's options: immutable data; the recipe's JSON schema and help texts are derived from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


O = TypeVar("O", bound=LayerOptions)  # noqa: E741 - O for options


class MemoryLayer(nn.Module, ABC):
    """A token-wise layer `[..., d_model] -> [..., d_out]` that can replace an MLP.

    A kind is one subclass. The layer refers to its pool without registering it as a child: the pool is registered once, on
    the root module, so its parameter has one name. In a deepcopy of the model, all layers share one copied pool.

    Attributes:
        kind: Name of the kind in recipes.
        Options: Class of its options.
        uses_pool: True if the kind reads a pool.
        reads_inputs: True if it reads the pool's second table too; the plan gives the pool this table.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[LayerOptions]]
    uses_pool: ClassVar[bool] = True
    reads_inputs: ClassVar[bool] = False

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
        """Build the layer with uninitialized parameters.

        Args:
            d_model: Width of the input.
            d_out: Width of the output.
            options: Options of this kind.
            pool: The pool to read, if the kind reads one.
            zero_output: Make `reset_parameters` initialize the layer so that its output is zero.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            UserError: As `check`.
            TypeError: The options are of another kind.
        """
        super().__init__()
        self.d_model, self.d_out, self.options, self.zero_output = d_model, d_out, options, zero_output
        self._pool: tuple[Pool, ...] = () if pool is None else (pool,)  # in a tuple, so that it is not registered as a child

    def tokens_of(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [T, d_model]. Raises `ModelError` for an input of another width: a reshape would mix tokens."""
        if x.shape[-1:] != (self.d_model,):
            what = f"the memory layer gets an input of the shape {tuple(x.shape)}, and was made for [..., {self.d_model}]"
            raise ModelError(what, where=type(self).__name__, hint="plan again for this model, or save it again")
        return x.reshape(-1, self.d_model)

    @property
    def pool(self) -> Pool | None:
        """The pool this layer reads, or None."""
        return self._pool[0] if self._pool else None

    @classmethod
    @abstractmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` if no layer can be built with these options and this pool (odd `key_dim`, `topk` > keys, ...)."""

    @classmethod
    def check_trainable(cls, d_model: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` if a parameter of the layer could not get a gradient with these options; by default none."""

    @classmethod
    def check_device(cls, options: LayerOptions, pool: PoolSpec | None, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `UserError` if the layer, with parameters of `dtype`, cannot run on `device`; by default it can.

        Args:
            options: Options of this kind.
            pool: The pool to read, with its `backend`.
            device: A device of this machine, not meta.
            dtype: Dtype of the layer's parameters.
        """

    @classmethod
    @abstractmethod
    def cost(
        cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None, itemsize: int, *, zero_output: bool
    ) -> Cost:
        """Cost of one such layer for one token, without the pool's parameters (counted once per pool).

        Args:
            d_model: Width of the input.
            d_out: Width of the output.
            options: Options of this kind.
            pool: Size of the pool, if the kind reads one.
            itemsize: Bytes of one parameter of the layer.
            zero_output: As in `__init__`.
        """

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the parameters in place as in the paper; no effect on meta tensors."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d_model]` to `[..., d_out]`; each token is computed independently of the others."""

    def extra_repr(self) -> str:
        """Widths and options, for `print(model)`."""
        return f"{self.d_model} -> {self.d_out}, {self.options}"


def options_as(kind: type[O], options: LayerOptions) -> O:
    """`options`, typed as the class `kind`. Raises `TypeError` if they are of another class."""
    if not isinstance(options, kind):
        raise TypeError(f"options must be {kind.__name__}, not {type(options).__name__}")
    return options
