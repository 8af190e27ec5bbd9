"""Hooks and small modules that pass an MLP's input to the layer that replaces it or runs in parallel with it.

All are plain classes at module level, so that a rewritten model can be copied, compiled and saved.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from memrewrite.errors import ModelError
from memrewrite.layers.references import ModelReference, ModuleAt
from memrewrite.layers.replaced import Replacement, Transparent
from memrewrite.passes.rewrite.layer_call import add_output


class InputSlot:
    """Stores an MLP's input during one forward, from the module that receives it to the hook that calls the layer.

    A copy of the model has a slot of its own. A copy of one module alone, which may take its place, uses the same slot.
    """

    def __init__(self, model: nn.Module) -> None:
        self.x: Tensor | None = None
        self._model = ModelReference(model)

    def __getstate__(self) -> dict[str, Any]:
        """An empty slot: a forward that raised may have left a tensor here, which copies of the model must not contain."""
        return {"x": None, "_model": self._model}

    def __deepcopy__(self, memo: dict[int, Any]) -> InputSlot:
        if not self._model.copied_in(memo):
            return self
        slot = memo[id(self)] = object.__new__(InputSlot)
        slot.x, slot._model = None, copy.deepcopy(self._model, memo)
        return slot

    def take(self) -> Tensor:
        """Return the input and empty the slot. Raises `RuntimeError` if it is empty."""
        if self.x is None:
            raise RuntimeError("a memory layer ran before its MLP's input was stored: the MLP's modules ran in another order")
        x, self.x = self.x, None
        return x


class StoreInput:
    """Forward pre-hook of an entry module: stores the MLP's input, the argument at a position or with a name."""

    def __init__(self, slot: InputSlot, takes: int | str = 0) -> None:
        self.slot, self.takes = slot, takes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the argument."""
        self.slot.x = _argument(args, kwargs, self.takes)


class UseStoredInput:
    """Forward pre-hook of a layer that replaces an exit module: calls it on the stored input, not on the exit's arguments."""

    def __init__(self, slot: InputSlot) -> None:
        self.slot = slot

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments that the layer is called with."""
        return (self.slot.take(),), {}


class TakeArgument:
    """Forward pre-hook of a layer that replaces a module: keeps only the MLP's input of the module's arguments."""

    def __init__(self, takes: int | str) -> None:
        self.takes = takes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments that the layer is called with."""
        return (_argument(args, kwargs, self.takes),), {}


class GiveItem:
    """Forward hook of a layer that replaces a module with a tuple as output: returns a tuple whose other items are None."""

    def __init__(self, item: int, items: int) -> None:
        self.item, self.items = item, items

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """The tuple with the layer's output at its place."""
        return tuple(output if place == self.item else None for place in range(self.items))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], takes: int | str) -> Tensor:
    """The tensor at a position or with a name; if there is none, the only tensor among all arguments of the call."""
    there = kwargs.get(takes) if isinstance(takes, str) else args[takes] if takes < len(args) else None
    tensors = [there] if there is not None else [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise TypeError(
            f"the MLP's input was argument {takes!r} of its module; this call has {len(tensors)} tensors, none there"
        )
    return tensors[0]


class AddMemory:
    """Forward hook of an MLP's module: adds the layer's output to the MLP's output, which may be one item of a tuple.

    `layer` returns the layer that is registered now.
    """

    def __init__(self, layer: ModuleAt, slot: InputSlot | None, item: int | None = None) -> None:
        self.layer, self.slot, self.item = layer, slot, item

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The module's output with the layer's output added."""
        mlp: Tensor = output if self.item is None else output[self.item]
        total = add_output(mlp, self.layer()(args[0] if self.slot is None else self.slot.take()))
        if self.item is None:
            return total
        return type(output)(total if place == self.item else value for place, value in enumerate(output))


class FeaturesLast:
    """Forward pre-hook of a layer: moves its input's feature axis to the end."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The arguments that the layer is called with."""
        return (args[0].movedim(_axis_of(args[0], self.axis), -1),)


class FeaturesBack:
    """Forward hook of a layer: moves its output's features from the end to the model's feature axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with its features on `axis`."""
        return output.movedim(-1, self.axis)


def _axis_of(x: Tensor, axis: int) -> int:
    """The feature axis itself. Raises `ModelError` if the input has no such axis."""
    if not -x.dim() <= axis < x.dim():
        what = f"a memory layer has its features on axis {axis}, and its input has the shape {tuple(x.shape)}"
        raise ModelError(what, hint="plan again for this model, or save it again")
    return axis


class ZeroStub(Replacement):
    """Replaces the first linear of a replaced MLP: returns zeros of its output width and computes nothing.

    Code between the MLP's modules still runs, on these zeros; the layer that replaces the last linear ignores the result.
    """

    def __init__(self, width: int, axis: int = -1) -> None:
        super().__init__()
        self.width, self.axis = width, axis

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> zeros [..., width], features on `axis`: one stored number, expanded."""
        shape = list(x.shape)
        shape[_axis_of(x, self.axis)] = self.width
        return x.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        axis = "" if self.axis == -1 else f", axis={self.axis}"
        return f"width={self.width}{axis}, in place of a replaced MLP's first linear"


class TransparentStub(Transparent, ZeroStub):
    """A `ZeroStub` while original MLPs are in the layers' places: it has the attributes of the module that it replaces."""
