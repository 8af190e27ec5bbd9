"""Checks that the operators share: sizes that may be numbers or symbols, and tensors that must be in one place."""

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
