"""The backend "native": C++ kernels for the CPU, compiled by `memrewrite build-op`; without that library it supports nothing.

The kernels (`kernels/cpu/`) have a plain C interface: the library needs no headers of torch and fits every version. They run on
torch's threads, release the GIL, and return the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
from struct import Struct

import torch
from torch import Tensor

from memrewrite.kernels.native_interface import TYPES, Reads, check, dense, floats, library, loaded
from memrewrite.kernels.native_update import adagrad_, adam_, lazy_adam_

__all__ = [
    "adagrad_",
    "adam_",
    "backward",
    "forward",
    "lazy_adam_",
    "rows",
    "supports",
    "supports_topk",
    "topk",
    "topk_backward",
]

NAME = "native"

MOST_SLOTS, MOST_READS = 2**40, 2**31
MOST_SCORES, MOST_K = 2**31 - 1, 2**26
_LOOKUP = Struct("13q")  # of `cpu/kernels.h`, as `_TOPK_GRADIENT`
_TOPK_GRADIENT = Struct("8q")


def supports(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None) -> str | None:
    """Why this backend does not support the call, or None."""
    if values.device.type != "cpu":
        return "the tensors are not on the CPU"
    if values.dtype not in TYPES or weights.dtype not in TYPES:
        return f"there are no kernels for {values.dtype} with weights of {weights.dtype}"
    if values.shape[0] >= MOST_SLOTS or indices.numel() >= MOST_READS:
        return f"there are {MOST_SLOTS} or more slots, or {MOST_READS} or more reads in one call"
    return loaded()[1]


def supports_topk(scores1: Tensor, scores2: Tensor, k: int) -> str | None:
    """Why this backend does not support the call, or None."""
    if scores1.device.type != "cpu":
        return "the tensors are not on the CPU"
    if scores1.dtype not in TYPES or scores1.itemsize == 1:
        return f"there are no kernels for {scores1.dtype}"
    if k > MOST_K or max(scores1.shape[-1], scores2.shape[-1]) > MOST_SCORES:
        return f"k is above {MOST_K}, or a half has more than {MOST_SCORES} scores"
    return loaded()[1]


# ---------------------------------------------------------------------------------------------------------------- the lookup


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs. Raises IndexError for an index outside the table."""
    stored = dtype if dtype in TYPES else torch.float32
    out = torch.empty((indices.shape[0], values.shape[1]), dtype=stored, device="cpu")
    _lookup("sparse_lookup", "memrewrite_lookup", values, indices, weights, scale, out)
    return out if dtype == stored else out.to(dtype)


def _lookup(op: str, kernel: str, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, y: Tensor) -> None:
    """Call a kernel with the struct `Lookup` for the operator `op`. `weights` and `y` may be outputs, which are contiguous."""
    values, indices, weights = dense(values), dense(indices), dense(weights)
    scale = None if scale is None else dense(scale)
    (slots, width), (tokens, reads) = values.shape, indices.shape
    job = _LOOKUP.pack(
        values.data_ptr(),
        TYPES[values.dtype],
        indices.data_ptr(),
        indices.dtype == torch.int64,
        weights.data_ptr(),
        TYPES[weights.dtype],
        0 if scale is None else scale.data_ptr(),
        y.data_ptr(),
        TYPES[y.dtype],
        slots,
        width,
        tokens,
        reads,
    )
    found = ctypes.c_int64()
    result = getattr(library(), kernel)(job, ctypes.addressof(found))
    if result:
        check(op, result, found, slots)


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
    grad = dense(grad if grad.dtype in TYPES else grad.float())
    grad_values = grad_weights = None
    if need_weights:
        grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device="cpu")
        _lookup("sparse_lookup_backward", "memrewrite_lookup_dots", values, indices, grad_weights, scale, grad)
    if need_values:
        grad_values = torch.empty(values.shape, dtype=values.dtype, device="cpu")
        found, reads = ctypes.c_int64(), Reads([grad], [indices], [weights], values.shape[0])
        check(
            "sparse_lookup_backward",
            library().memrewrite_lookup_scatter(reads.packed, floats(grad_values), ctypes.addressof(found)),
            found,
            reads.slots,
        )
    return grad_values, grad_weights


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that are read, int64 [R], and their gradients [R, D], with R = min(T·K, slots)."""
    count = min(indices.numel(), slots)
    read = torch.empty(count, dtype=torch.int64, device="cpu")
    sums = torch.empty((count, grad.shape[1]), dtype=grad.dtype, device="cpu")
    found, reads = ctypes.c_int64(), Reads([grad], [indices], [weights], slots)
    run = library().memrewrite_lookup_rows
    check("sparse_lookup_rows", run(reads.packed, read.data_ptr(), floats(sums), count, ctypes.addressof(found)), found, slots)
    return read, sums


# ----------------------------------------------------------------------------------------------------------------- the top-k


def topk(scores1: Tensor, scores2: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """`product_key_topk` of checked, non-empty inputs; of equal scores the one with the smaller index is first."""
    scores1, scores2 = dense(scores1), dense(scores2)
    shape, n1, n2 = (*scores1.shape[:-1], k), scores1.shape[-1], scores2.shape[-1]
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    indices = torch.empty(shape, dtype=torch.int64, device="cpu")
    inputs = TYPES[scores1.dtype], scores1.data_ptr(), scores2.data_ptr()
    sizes = scores1.numel() // n1, n1, n2, k, softmax
    check("product_key_topk", library().memrewrite_topk(*inputs, scores.data_ptr(), indices.data_ptr(), *sizes), None, 0)
    return scores, indices


def topk_backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Adds each score's gradient to both halves: [..., k] -> [..., n1], [..., n2] in the dtype of `grad`."""
    wide, indices = dense(grad.float()), dense(indices)
    leading, k = indices.shape[:-1], indices.shape[-1]
    grad1, grad2 = (torch.empty((*leading, n), dtype=torch.float32, device="cpu") for n in (n1, n2))
    pointers = (tensor.data_ptr() for tensor in (wide, indices, grad1, grad2))
    job = _TOPK_GRADIENT.pack(*pointers, indices.numel() // k, n1, n2, k)
    found = ctypes.c_int64()
    result = library().memrewrite_topk_gradient(job, ctypes.addressof(found))
    check("product_key_topk_backward", result, found, n1 * n2, "{} pairs of keys")
    return grad1.to(grad.dtype), grad2.to(grad.dtype)
