"""The backend "triton": kernels for CUDA devices. Triton is imported by the first call that uses it.

Triton launches on the current device; each call sets the current device to that of its tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

NAME = "triton"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


def supports(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None) -> str | None:
    """Why this backend does not support the call, or None."""
    if values.device.type != "cuda":
        return "the tensors are not on a CUDA device"
    if values.dtype not in FLOATS and values.dtype != FP8:
        return f"there are no kernels for {values.dtype}"
    if (scale is None) != (values.dtype != FP8) or weights.dtype not in FLOATS:
        return f"there are no kernels for values of {values.dtype} {'without' if scale is None else 'with'} a scale"
    if indices.numel() >= 2**30:
        return "there are 2**30 or more reads in one call"
    return _unusable(values.device.index)


def supports_topk(scores1: Tensor, scores2: Tensor, k: int) -> str | None:
    """Why this backend does not support the call, or None."""
    if scores1.device.type != "cuda":
        return "the tensors are not on a CUDA device"
    reason = _unusable(scores1.device.index)
    if reason is not None:
        return reason
    from memrewrite.kernels import triton_topk

    return triton_topk.supports(scores1, k) or triton_topk.supports(scores2, k)


def runs_on(device: torch.device) -> bool:
    """True if the kernels run on a device."""
    return device.type == "cuda" and _unusable(device.index) is None


@lru_cache
def _unusable(device: int | None) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the device is not a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels are for compute capability 8.0 and newer, not {major}.{minor}"


def _at(tensor: Tensor) -> AbstractContextManager[None]:
    """Context manager: the device of `tensor` is the current one; no effect for CPU tensors (Triton's interpreter)."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs, in `dtype`."""
    from memrewrite.kernels import triton_lookup

    with _at(values):
        return triton_lookup.forward(values, indices, weights, scale, dtype)


def backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `values` (dense [N, D]) and of `weights` [T, K], each only if needed."""
    from memrewrite.kernels import triton_backward

    with _at(values):
        return triton_backward.backward(grad, values, indices, weights, scale, need_values, need_weights)


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that are read and their gradients; padding as in `sparse_lookup.rows`."""
    from memrewrite.kernels import triton_backward

    with _at(grad):
        return triton_backward.rows(grad, indices, weights, slots)


def adagrad_(*tensors: Any, **numbers: Any) -> None:
    """`ops.rowwise_adagrad_` of checked inputs with at least one read: `torch_backend.adagrad_` has the signature."""
    from memrewrite.kernels import triton_update

    with _at(tensors[0]):
        triton_update.adagrad_(*tensors, **numbers)


def adam_(*tensors: Any, **numbers: Any) -> None:
    """`ops.rowwise_adam_` of checked inputs with at least one read: `torch_backend.adam_` has the signature."""
    from memrewrite.kernels import triton_update

    with _at(tensors[0]):
        triton_update.adam_(*tensors, **numbers)


def lazy_adam_(*tensors: Any, **numbers: Any) -> None:
    """`ops.lazy_adam_` of checked inputs with at least one read: `torch_backend.lazy_adam_` has the signature."""
    from memrewrite.kernels import triton_lazy_adam

    with _at(tensors[0]):
        triton_lazy_adam.lazy_adam_(*tensors, **numbers)


def topk(scores1: Tensor, scores2: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """`product_key_topk` of checked inputs with at least one row."""
    from memrewrite.kernels import triton_topk

    with _at(scores1):
        return triton_topk.forward(scores1, scores2, k, softmax)


def topk_backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Adds each score's gradient to both halves, without atomics."""
    from memrewrite.kernels import triton_topk

    with _at(grad):
        return triton_topk.backward(grad, indices, n1, n2)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize.quantized` of non-empty rows."""
    from memrewrite.kernels import triton_quantize

    with _at(rows):
        return triton_quantize.quantized(rows)


def sample_(values: Tensor, scale: Tensor, spread: float, seed: int) -> None:
    """`quantize.sample_` of a non-empty table."""
    from memrewrite.kernels import triton_quantize

    with _at(values):
        triton_quantize.sample_(values, scale, spread, seed)
