"""The sizes of the base model, a Llama, and of the tables that its memory layers get."""

from __future__ import annotations

from typing import NamedTuple


class Scale(NamedTuple):
    """One size.

    Attributes:
        width: Width of the model.
        blocks: Number of blocks.
        heads: Attention heads.
        keys: Keys per half of a small, a medium and a large table.
        stride: Blocks from one memory layer to the next; the three are centred.
    """

    width: int
    blocks: int
    heads: int
    keys: tuple[int, int, int]
    stride: int

    @property
    def hidden(self) -> int:
        """Hidden width of an MLP, as in Llama."""
        return 8 * self.width // 3

    @property
    def middle(self) -> int:
        """The block of a single memory layer."""
        return self.blocks // 2

    @property
    def three(self) -> tuple[int, ...]:
        """The blocks of three memory layers."""
        return (self.middle - self.stride, self.middle, self.middle + self.stride)


SCALES = {
    "d32": Scale(32, 8, 4, (64, 128, 256), 2),
    "d64": Scale(64, 12, 4, (96, 192, 384), 4),
    "d128": Scale(128, 12, 4, (256, 512, 1024), 4),
}
