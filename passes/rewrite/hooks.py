"""The small hooks and modules that hand an MLP's input to the layer in its place or beside it.

All are plain, module-level classes, so that a rewritten model can be copied, compiled and saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class InputSlot:
    """Carries an MLP's input from where it is read to where its output is due, within one forward."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        """Nothing: a forward that failed may have left a value here, and a copy of the model is not to carry it."""
        return {"x": None}

    def take(self) -> Tensor:
        """The input, once."""
        if self.x is None:
            raise RuntimeError("an MLP's output is due, but its input never came by: its modules are called in another order")
        x, self.x = self.x, None
        return x


class StoreInput:
    """Forward pre-hook of an entry: remembers the MLP's input, the argument at a position or of a name."""

    def __init__(self, hand: InputSlot, takes: int | str = 0) -> None:
        self.hand, self.takes = hand, takes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the argument."""
        self.hand.x = _argument(args, kwargs, self.takes)


class UseStoredInput:
    """Forward pre-hook of a layer at an exit: gives it the MLP's input instead of what the exit was given."""

    def __init__(self, hand: InputSlot) -> None:
        self.hand = hand

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments the layer is called with instead."""
        return (self.hand.take(),), {}


class TakeArgument:
    """Forward pre-hook of a layer in a module's place: of what the module is given, only the MLP's input."""

    def __init__(self, takes: int | str) -> None:
        self.takes = takes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments the layer is called with instead."""
        return (_argument(args, kwargs, self.takes),), {}


class GiveItem:
    """Forward hook of a layer in the place of a module that returns a tuple: the other items are gone with the module."""

    def __init__(self, item: int, items: int) -> None:
        self.item, self.items = item, items

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """The tuple, `None` in the other places."""
        return tuple(output if place == self.item else None for place in range(self.items))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], takes: int | str) -> Tensor:
    """The tensor among a call's arguments, at a position or, as another caller may write it, wherever it is."""
    there = kwargs.get(takes) if isinstance(takes, str) else args[takes] if takes < len(args) else None
    tensors = [there] if there is not None else [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise TypeError(
            f"the MLP's input was argument {takes!r} of its module; this call has {len(tensors)} tensors, none there"
        )
    return tensors[0]


class AddMemory:
    """Forward hook of an MLP: adds the layer's output to the MLP's, which may be one item of what the module returns."""

    def __init__(self, layer: nn.Module, hand: InputSlot | None, item: int | None = None) -> None:
        self.layer, self.hand, self.item = layer, hand, item

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The MLP's output and the layer's."""
        mlp: Tensor = output if self.item is None else output[self.item]
        added: Tensor = self.layer(args[0] if self.hand is None else self.hand.take())
        added = added if added.shape == mlp.shape else added.reshape(mlp.shape)  # some return their tokens in one axis
        total = mlp + added.to(mlp.dtype)
        if self.item is None:
            return total
        return type(output)(total if place == self.item else value for place, value in enumerate(output))


class FeaturesLast:
    """Forward pre-hook of a layer: its input's features, moved to the last axis."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The arguments the layer is called with instead."""
        return (args[0].movedim(self.axis, -1),)


class FeaturesBack:
    """Forward hook of a layer: its output's features, moved to where the model keeps them."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """What the layer returns instead."""
        return output.movedim(-1, self.axis)


class ZeroStub(nn.Module):
    """Stands where a replaced MLP's first matrix stood: hands on zeros of its width, without computing anything."""

    def __init__(self, width: int, axis: int = -1) -> None:
        super().__init__()
        self.width, self.axis = width, axis

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> zeros [..., width], features on `axis`: one stored number, seen at every place."""
        shape = list(x.shape)
        shape[self.axis] = self.width
        return x.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        """The width, for `print(model)`."""
        return f"width={self.width}, axis={self.axis}"
