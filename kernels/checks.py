"""Checks that the operators share: sizes that may be numbers or symbols, one device, indices within the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require(holds: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError with `message()` unless `holds`; a symbolic condition becomes a guard or a runtime assertion."""
    if holds is not True:  # `torch._check_value` itself would cost a one-token call several microseconds each time
        torch._check_value(holds, message)  # type: ignore[no-untyped-call]


def one_device(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first: a kernel would read another's memory."""
    for other in others:
        if other is not None and other.device != first.device:
            raise ValueError(f"{op}: all tensors must be on one device, not on {first.device} and {other.device}")


def check_range(values: Tensor, indices: Tensor) -> None:
    """Refuse an index outside the table. Elsewhere than on the CPU the check would stall, and the device asserts."""
    if indices.device.type != "cpu":
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= values.shape[0]:
        raise IndexError(
            f"sparse_lookup: index {low if low < 0 else high} is out of range for a table of {values.shape[0]} slots"
        )
