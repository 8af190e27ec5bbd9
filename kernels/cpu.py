"""The sparse lookup on `F.embedding_bag`: the CPU's kernel, and any device's where no faster one will do.

The forward is one bag a token. The gradient of a lookup is a lookup the other way round: slot n's gradient is the
weighted sum of the output gradients of the tokens that read it, so the table's gradient is one bag a slot. Neither
makes the [T, K, D] gather, no sum depends on the order of threads, and half types add up in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SUM = 0  # aten's number of mode="sum"


def supports(values: Tensor, indices: Tensor, weights: Tensor) -> str | None:
    """Why this backend cannot take the call, or None: it takes every one."""
    return None


def forward(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs. Raises IndexError for an index outside the table (CPU only)."""
    _check_range(values, indices)
    return F.embedding_bag(indices.contiguous(), values, per_sample_weights=weights.contiguous(), mode="sum")


def backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, need_values: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `values` (dense [N, D]) and of `weights` [T, K], each only where it is needed."""
    _check_range(values, indices)
    grad = grad.contiguous()  # [T, D]; a sum's gradient arrives expanded
    grad_values = _scatter(grad, indices, weights, values.shape[0]) if need_values else None
    grad_weights = _dots(grad, values, indices) if need_weights else None
    return grad_values, grad_weights


def _scatter(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> Tensor:
    """`out[n] = sum over (t, j) with indices[t, j] == n of weights[t, j] * grad[t]`, as one bag per slot."""
    read, order = indices.reshape(-1).sort(stable=True)  # [T·K]; equal slots become neighbours
    first = torch.searchsorted(read, torch.arange(slots, device=read.device, dtype=read.dtype))  # [N]
    token = order // indices.shape[1]
    return F.embedding_bag(token, grad, first, per_sample_weights=weights.reshape(-1)[order], mode="sum")


def _dots(grad: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """`out[t, j] = grad[t] . values[indices[t, j]]`, without gathering the rows."""
    tokens, width = indices.shape
    bag = torch.arange(tokens, device=indices.device, dtype=indices.dtype)
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, values, indices.reshape(-1), bag * width, bag.repeat_interleave(width), SUM
    )
    return dots.view(tokens, width)


def _check_range(values: Tensor, indices: Tensor) -> None:
    """Refuse an index outside the table. Elsewhere than on the CPU the check would stall, and the device asserts."""
    if indices.device.type != "cpu":
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= values.shape[0]:
        raise IndexError(
            f"sparse_lookup: index {low if low < 0 else high} is out of range for a table of {values.shape[0]} slots"
        )
