"""Checks that the operators share, before a kernel reads memory: sizes, dtypes, layouts, one device, indices within the table.

Implementations and fake implementations call them; sizes are integers or symbolic. Only the values of indices are unknown to a
fake implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError with `message()` unless `condition`; a symbolic condition becomes a guard or a runtime assertion."""
    if condition is not True:  # `torch._check_value` itself takes several microseconds, too long for a call with one token
        torch._check_value(condition, message)  # type: ignore[no-untyped-call]


def one_device(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first, TypeError unless they are dense (strided)."""
    for other in (first, *others):
        if other is None:
            continue
        if other.device != first.device:
            raise ValueError(f"{op}: all tensors must be on one device, not on {first.device} and {other.device}")
        if other.layout is not torch.strided:
            raise TypeError(f"{op}: all tensors must be dense (torch.strided), not {other.layout}")


def is_wide(tensor: Tensor) -> bool:
    """True for a floating dtype of 16 or more bits."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def check_whole(op: str, indices: Tensor) -> None:
    """Raise TypeError unless the indices are int32 or int64."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices must be int32 or int64, not {indices.dtype}")


def same_shape(op: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless the shape of the argument `name` is the wanted one."""
    if len(found) != len(wanted):
        raise ValueError(f"{op}: {name} is {found}, not {wanted}")
    for one, other in zip(found, wanted, strict=True):
        require(one == other, lambda: f"{op}: {name} is {found}, not {wanted}")


def check_reads(op: str, grad: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Raise ValueError or TypeError unless the three are the gradient and the reads of a lookup: [T, D], [T, K], [T, K]."""
    if not grad.dim() == indices.dim() == weights.dim() == 2:
        raise ValueError(
            f"{op}: a lookup has grad [T, D], indices [T, K] and weights [T, K], "
            f"not {tuple(grad.shape)}, {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    one_device(op, grad, indices, weights)
    check_whole(op, indices)
    if not is_wide(grad) or not is_wide(weights):
        raise TypeError(
            f"{op}: grad and weights must have a floating dtype of 16 or more bits, not {grad.dtype} and {weights.dtype}"
        )
    same_shape(op, "weights", tuple(weights.shape), tuple(indices.shape))
    require(
        grad.shape[0] == indices.shape[0],
        lambda: f"{op}: grad {tuple(grad.shape)} and indices {tuple(indices.shape)} have different numbers of tokens",
    )


def check_range(op: str, indices: Tensor, size: int, what: str = "a table of {} slots") -> None:
    """Raise IndexError for an index outside [0, size), on the CPU only: elsewhere the check would synchronize."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{op}: index {low if low < 0 else high} is out of range for {what.format(size)}")
