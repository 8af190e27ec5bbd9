"""One check for sizes that may be numbers or symbols: numbers are compared at once, symbols are left to torch."""

from __future__ import annotations

from collections.abc import Callable

import torch


def require(holds: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError with `message()` unless `holds`; a symbolic condition becomes a guard or a runtime assertion."""
    if holds is not True:  # `torch._check_value` itself would cost a one-token call several microseconds each time
        torch._check_value(holds, message)  # type: ignore[no-untyped-call]
