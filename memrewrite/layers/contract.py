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
from memrewrite.layers.references import ModuleAt
from memrewrite.layers.replaced import Replacement

if TYPE_CHECKING:
    from memrewrite.cost import Cost
    from memrewrite.layers.pool import Pool, PoolSpec
    from memrewrite.site import Site
    from memrewrite.usage.counter import ReadCounter


class LayerOptions(BaseModel):
    """Base class of a layer kind's options: immutable data; the recipe's JSON schema and help texts are derived from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


O = TypeVar("O", bound=LayerOptions)  # noqa: E741 - O for options


class MemoryLayer(Replacement, ABC):
    """A token-wise layer `[..., d_model] -> [..., d_out]` that can replace an MLP.

    A kind is one subclass. The layer refers to its pool without registering it as a child: the pool is registered once, on
    the model, so its parameter has one name. The layer reads whatever module is registered there at the time of the call, and
    only calls it. In a deepcopy of the model all layers share one copied pool; a deepcopy of a part of the model reads the
    pool of that model.

    Attributes:
        kind: Name of the kind in recipes.
        Options: Class of its options.
        uses_pool: True if the kind reads a pool.
        scalable: False for a kind without parameters: nothing sets the scale of its output.
        has_scores: True if the kind selects slots by scores of queries and keys.
        constant: True if the output is the same for every input.
        regroups: True if the kind multiplies tokens in groups that other tokens change: their outputs may move by rounding.
        replaces_only: Why the kind cannot be added to an MLP (`placement: parallel`); "" if it can.
        reads_inputs: True if it reads the pool's second table too; the plan gives the pool this table.
        counter: What counts the slots that the layer reads while `memrewrite.watch` watches it; else None.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[LayerOptions]]
    uses_pool: ClassVar[bool] = True
    scalable: ClassVar[bool] = True
    has_scores: ClassVar[bool] = False
    constant: ClassVar[bool] = False
    regroups: ClassVar[bool] = False
    replaces_only: ClassVar[str] = ""
    reads_inputs: ClassVar[bool] = False
    counter: ReadCounter | None = None

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
        self._pool: ModuleAt | None = None if pool is None else ModuleAt(pool)

    def tokens_of(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [T, d_model]. Raises `ModelError` for an input of another width: a reshape would mix tokens."""
        if x.shape[-1:] != (self.d_model,):
            what = f"the memory layer gets an input of the shape {tuple(x.shape)}, and was made for [..., {self.d_model}]"
            raise ModelError(what, where=type(self).__name__, hint="plan again for this model, or save it again")
        return x.reshape(-1, self.d_model)

    @property
    def pool(self) -> Pool | None:
        """The pool this layer reads, or None. Another library may have put a module of its own in the place of the pool."""
        found: Pool | None = None if self._pool is None else self._pool()
        return found

    def read_pool_at(self, model: nn.Module, *path: str) -> None:
        """Read the pool that is registered at a path of `model`, at every call anew."""
        self._pool = ModuleAt(model, *path)

    @classmethod
    def complete(cls, options: LayerOptions, site: Site) -> LayerOptions:
        """The options with those that are None taken from the MLP at `site`; by default unchanged. A plan has complete options.

        Raises:
            UserError: The MLP does not say what an option must be.
        """
        return options

    @classmethod
    @abstractmethod
    def check(cls, d_model: int, d_out: int, options: LayerOptions, pool: PoolSpec | None) -> None:
        """Raise `UserError` if no layer can be built with these options and this pool (odd `key_dim`, `topk` > keys, ...).

        Options that are None and that `complete` sets later are accepted.
        """

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

    def read_counter(self) -> ReadCounter | None:
        """A new counter that fits this layer; None if the kind reads no slots, as by default.

        A kind that returns one calls `self.counter.count` in its forward unless `self.counter` is None.
        """
        return None

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the parameters in place as in the paper; no effect on meta tensors."""

    @property
    def output_is_pool(self) -> bool:
        """True if the scale of the output is that of the pool's values alone: then `Pool.scale_values_` changes it."""
        return False

    @abstractmethod
    def scale_output(self, factor: float) -> None:
        """Multiply the output by `factor`, in place, through parameters of the layer's own that the output is linear in.

        Args:
            factor: Not negative.

        Raises:
            TypeError: There are no such parameters (`output_is_pool`).
        """

    def score_std(self, x: Tensor) -> Tensor:
        """The standard deviation of every token's scores: `[T, d_model] -> [T]`. Raises TypeError without `has_scores`."""
        raise TypeError(f"{type(self).__name__} has no queries and keys")

    def scale_scores(self, factor: float) -> None:
        """Multiply the scores of queries and keys by `factor`, in place. Raises TypeError without `has_scores`."""
        raise TypeError(f"{type(self).__name__} has no queries and keys")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d_model]` to `[..., d_out]`; in eval mode each token is computed independently of the others."""

    def extra_repr(self) -> str:
        """Widths and options, for `print(model)`."""
        return f"{self.d_model} -> {self.d_out}, {self.options}"


def options_as(kind: type[O], options: LayerOptions) -> O:
    """`options`, typed as the class `kind`. Raises `TypeError` if they are of another class."""
    if not isinstance(options, kind):
        raise TypeError(f"options must be {kind.__name__}, not {type(options).__name__}")
    return options
