"""Checks that the operators share: sizes (integers or symbolic), a single device, indices within the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError with `message()` unless `condition`; a symbolic condition becomes a guard or a runtime assertion."""
    if condition is not True:  # `torch._check_value` itself takes several microseconds, too long for a call with one token
        torch._check_value(condition, message)  # type: ignore[no-untyped-call]


def one_device(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first: a kernel would read invalid addresses."""
    for other in others:
        if other is not None and other.device != first.device:
            raise ValueError(f"{op}: all tensors must be on one device, not on {first.device} and {other.device}")


def check_range(values: Tensor, indices: Tensor) -> None:
    """Raise IndexError for an index outside the table, on the CPU only: elsewhere the check would synchronize."""
    if indices.device.type != "cpu":
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= values.shape[0]:
        raise IndexError(
            f"sparse_lookup: index {low if low < 0 else high} is out of range for a table of {values.shape[0]} slots"
        )
