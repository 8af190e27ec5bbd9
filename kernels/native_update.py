"""Fused updates by the native library: the backend "native" of `ops.rowwise_adagrad_`, `rowwise_adam_` and `lazy_adam_`."""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import NamedTuple

from torch import Tensor

from memrewrite.kernels.native_interface import FLOATS, READS, Reads, check, dense, floats, library

_UPDATE = Struct("15q9fQ")  # of `cpu/kernels.h`


class _Changed(NamedTuple):
    """What an update changes: the table, and the state of its rule."""

    values: Tensor
    scale: Tensor | None
    square: Tensor | None = None
    exp_avg: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None


def adagrad_(
    values: Tensor,
    scale: Tensor | None,
    total: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    """`ops.rowwise_adagrad_` of checked inputs with at least one read."""
    numbers = (lr, eps, 1 - lr * weight_decay, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _update(_Changed(values, scale, total), Reads(grads, indices, weights, values.shape[0]), numbers, seed)


def adam_(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """`ops.rowwise_adam_` of checked inputs with at least one read."""
    numbers = _adam_numbers(lr, beta1, beta2, eps, weight_decay, step)
    _update(_Changed(values, scale, exp_avg_sq, exp_avg), Reads(grads, indices, weights, values.shape[0]), numbers, seed)


def lazy_adam_(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor | None,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """`ops.lazy_adam_` of checked inputs with at least one read."""
    numbers = _adam_numbers(lr, beta1, beta2, eps, weight_decay, step)
    changed = _Changed(values, scale, None, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
    _update(changed, Reads(grads, indices, weights, values.shape[0]), numbers, seed)


def _adam_numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """The numbers of the struct, in its order."""
    betas = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**step, 1 - beta2**step)
    return (lr, eps, 1 - lr * weight_decay, *betas)


def _update(changed: _Changed, reads: Reads, numbers: tuple[float, ...], seed: int) -> None:
    """Update copies of the tensors that are not contiguous, then copy them back: the kernels read and write whole rows."""
    own = _Changed(*(None if tensor is None else dense(tensor) for tensor in changed))  # type: ignore[arg-type]  # values stay
    job = _UPDATE.pack(
        *READS.unpack(reads.packed),
        *FLOATS.unpack(floats(own.values)),
        _address(own.scale),
        _address(own.square),
        *FLOATS.unpack(floats(own.exp_avg)),
        _address(own.exp_avg_scale),
        *FLOATS.unpack(floats(own.exp_avg_sq)),
        _address(own.exp_avg_sq_scale),
        *numbers,
        seed % 2**64,
    )
    found = ctypes.c_int64()
    check("a fused update", library().memrewrite_update(job, ctypes.addressof(found)), found, reads.slots)
    for tensor, one in zip(changed, own, strict=True):
        if tensor is not None and one is not None and one is not tensor:
            tensor.copy_(one)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
