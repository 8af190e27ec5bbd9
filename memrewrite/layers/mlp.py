"""What the layers of dense matrices share: the options of an MLP, completed from the MLP that is replaced, and its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from pydantic import Field
from torch import Tensor

from memrewrite.errors import UserError
from memrewrite.layers.activations import ACTIVATIONS, Activation
from memrewrite.layers.contract import LayerOptions
from memrewrite.site import Site

MAX_WIDTH = 2**31 - 1
GATED = {"plain": False, "gated": True, "gated_packed": True}  # by the pattern of a site; a mixture's experts may be either


class MlpOptions(LayerOptions):
    """The shape of an MLP. What is None is taken from the MLP that is replaced, when a recipe is planned.

    Attributes:
        d_hidden: Hidden width. None: `width` times that of the replaced MLP.
        width: Hidden width as a multiple of that of the replaced MLP. None: 1.
        gated: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        activation: Name of the activation function.
        bias: Whether the matrices have biases.
    """

    d_hidden: int | None = Field(None, gt=0, le=MAX_WIDTH, description="Hidden width. Default: that of the replaced MLP.")
    width: float | None = Field(
        None, gt=0, le=2**16, description="Hidden width as a multiple of that of the replaced MLP, instead of `d_hidden`."
    )
    gated: bool | None = Field(
        None, description="true: down(act(gate(x)) * up(x)); false: down(act(up(x))). Default: as the replaced MLP."
    )
    activation: Activation | None = Field(None, description="The activation function. Default: that of the replaced MLP.")
    bias: bool | None = Field(None, description="Whether the matrices have biases. Default: as the replaced MLP.")


M = TypeVar("M", bound=MlpOptions)


class MlpShape(NamedTuple):
    """The complete options of an MLP."""

    d_hidden: int
    gated: bool
    activation: Callable[[Tensor], Tensor]
    bias: bool

    def size(self, d_in: int, d_out: int) -> tuple[int, int]:
        """Entries of all matrices, and of all biases."""
        first = 2 if self.gated else 1
        weights = first * d_in * self.d_hidden + self.d_hidden * d_out
        return weights, (first * self.d_hidden + d_out if self.bias else 0)

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """What the last matrix reads: `act(gate) * up`, or `act(up)` without a gate."""
        return self.activation(up) if gate is None else self.activation(gate) * up


def shape_of(options: MlpOptions) -> MlpShape:
    """The shape that complete options describe. Raises `UserError` if one is None."""
    d_hidden, gated, activation, bias = options.d_hidden, options.gated, options.activation, options.bias
    if d_hidden is None or gated is None or activation is None or bias is None:
        missing = next(name for name in ("d_hidden", "gated", "activation", "bias") if getattr(options, name) is None)
        raise UserError(f"`{missing}` is not set: it is taken from the replaced MLP by `plan`", hint=f"set `{missing}`")
    return MlpShape(d_hidden, gated, ACTIVATIONS[activation], bias)


def check_mlp(options: MlpOptions) -> None:
    """Raise `UserError` if the hidden width is given twice."""
    if options.d_hidden is not None and options.width is not None:
        what = f"`width: {options.width:g}` and `d_hidden: {options.d_hidden}` both give the hidden width"
        raise UserError(what, hint="remove one of them")


def completed(options: M, site: Site) -> M:
    """The options with those that are None taken from the MLP at `site`.

    Raises:
        UserError: It is not known whether the MLP is gated, or which activation it has, and the options do not say it.
    """
    check_mlp(options)
    gated = GATED.get(site.pattern) if options.gated is None else options.gated
    if gated is None:
        what = f"the MLP at {site.path!r} has the pattern {site.pattern!r}, which may be gated or not"
        raise UserError(what, hint="say it in `options`: `gated: true` or `gated: false`")
    activation = options.activation or site.activation
    if activation not in ACTIVATIONS:
        what = f"the activation of the MLP at {site.path!r} is not known"
        raise UserError(what, hint="say it in `options`: `activation: silu`, for example")
    d_hidden = options.d_hidden or max(1, round((options.width or 1) * site.d_hidden))
    bias = site.biases > 0 if options.bias is None else options.bias
    known = {"d_hidden": d_hidden, "width": None, "gated": gated, "activation": activation, "bias": bias}
    return type(options).model_validate(options.model_dump() | known)
