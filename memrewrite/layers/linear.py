"""Linear layers whose parameters are initialized later, and scaled."""

from __future__ import annotations

import torch
from torch import nn


def empty_linear(
    d_in: int,
    d_out: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
) -> nn.Linear:
    """An `nn.Linear` whose entries are not initialized: this takes no time and consumes no random numbers."""
    linear = nn.Linear(d_in, d_out, bias, device="meta", dtype=dtype)
    return linear.to_empty(device=torch.get_default_device() if device is None else device)


@torch.no_grad()
def scale_(linear: nn.Module, factor: float) -> None:
    """Multiply all parameters of a linear layer, and so its output, by `factor`, in place."""
    for parameter in linear.parameters():
        parameter.mul_(factor)
