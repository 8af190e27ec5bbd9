"""The small hooks and modules that hand an MLP's input to the layer in its place or beside it.

All are plain, module-level classes, so that a rewritten model can be copied, compiled and saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Hand:
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


class HandOn:
    """Forward pre-hook of an entry: remembers the MLP's input."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember the first argument."""
        self.hand.x = args[0]


class TakeHanded:
    """Forward pre-hook of a layer at an exit: gives it the MLP's input instead of the hidden value."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """The arguments the layer is called with instead."""
        return (self.hand.take(),)


class AddMemory:
    """Forward hook of an MLP: adds the layer's output to the MLP's."""

    def __init__(self, layer: nn.Module, hand: Hand | None) -> None:
        self.layer, self.hand = layer, hand

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The MLP's output and the layer's."""
        x = args[0] if self.hand is None else self.hand.take()
        added: Tensor = self.layer(x)
        return output + added.to(output.dtype)


class Hollow(nn.Module):
    """Stands where a replaced MLP's first matrix stood: hands on zeros of its width, without computing anything."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> zeros [..., width]: one stored number, seen at every place."""
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)

    def extra_repr(self) -> str:
        """The width, for `print(model)`."""
        return f"width={self.width}"
