"""The backend "torch": every operator in plain torch, for the CPU and for devices that no faster backend supports.

The forward is one embedding bag per token (`F.embedding_bag`). The gradient of a lookup is a lookup in the other direction:
slot n's gradient is the weighted sum of the output gradients of the tokens that read it, one bag per slot. Neither
materializes the [T, K, D] gather, no sum depends on the order of threads, and half types accumulate in fp32. An embedding bag
needs values and weights of one dtype: values of a half type with fp32 weights are gathered as fp32, as many as fit in a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memrewrite.kernels.checks import check_range
from memrewrite.kernels.torch_reads import in_pieces, row_gradients, sorted_reads, wide_rows
from memrewrite.kernels.torch_topk import topk, topk_backward
from memrewrite.kernels.torch_update import adagrad_, adam_, lazy_adam_

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

NAME = "torch"
SMALL = 2**24  # elements of a table that may be converted whole, if it has fewer rows than there are reads
SUM = 0  # aten's integer for mode="sum"


def supports(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None) -> str | None:
    """None: this backend supports every call."""
    return None


def supports_topk(scores1: Tensor, scores2: Tensor, k: int) -> str | None:
    """None: this backend supports every call."""
    return None


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs. Raises IndexError for an index outside the table (CPU only)."""
    check_range("sparse_lookup", indices, values.shape[0])
    wide = _computed(weights.dtype if scale is not None else values.dtype)
    # one embedding bag needs one dtype for both, and rounds its sums to that dtype
    if scale is None and (values.dtype == wide or values.dtype == weights.dtype == dtype):
        return _bags(values, indices, weights.to(values.dtype)).to(dtype)
    if scale is None and values.shape[0] <= indices.numel() and values.numel() <= SMALL:
        return _bags(values.to(wide), indices, weights.to(wide)).to(dtype)
    weights = weights.to(wide) if scale is None else weights.to(wide) * scale[indices]
    out = values.new_empty(indices.shape[0], values.shape[1], dtype=dtype)
    for index, weight, sums in in_pieces(indices.shape[1] * values.shape[1], indices, weights, out):
        sums.copy_(_bags(wide_rows(values, index.reshape(-1), wide), _counted(index), weight))
    return out


def backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `values` (dense [N, D]) and of `weights` [T, K], each only if needed, in their dtypes."""
    check_range("sparse_lookup_backward", indices, values.shape[0])
    grad, indices = grad.contiguous(), indices.contiguous()  # the gradient of a sum is an expanded tensor
    grad_values = _scatter(grad, values, indices, weights) if need_values else None
    grad_weights = _weights_gradient(grad, values, indices, scale, weights.dtype) if need_weights else None
    return grad_values, grad_weights


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that are read, int64 [R], and their gradients [R, D], with R = min(T·K, slots); no device synchronization."""
    check_range("sparse_lookup_rows", indices, slots)
    wide = grad.dtype if grad.dtype == weights.dtype else _computed(grad.dtype)
    reads = sorted_reads([grad.to(wide)], [indices], [weights.to(wide)])
    count = min(indices.numel(), slots)
    place = torch.where(
        reads.first, reads.first.cumsum(0) - 1, count
    )  # [M]: output row of each first read; the end for other reads
    starts = torch.full((count + 1,), indices.numel(), device=grad.device)
    starts.scatter_(0, place, torch.arange(indices.numel(), device=grad.device))
    found = reads.slots[-1:].long().repeat(count + 1).scatter_(0, place, reads.slots.long())
    sums = F.embedding_bag(reads.tokens, reads.grad, starts[:count], per_sample_weights=reads.weights, mode="sum")
    return found[:count], sums.to(grad.dtype)


def _computed(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of products and sums: fp32, or float64 if one of `dtypes` is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _counted(indices: Tensor) -> Tensor:
    """0, 1, 2, ... in the shape and dtype of `indices`: the places of rows that were gathered by these indices."""
    return torch.arange(indices.numel(), device=indices.device, dtype=indices.dtype).view(indices.shape)


def _bags(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One bag per token. Calls the aten operator: input checks of `F.embedding_bag` take a third of a one-token call."""
    tokens, width = indices.shape
    begins = torch.arange(0, tokens * width, width, device=indices.device, dtype=indices.dtype)
    flat, psw = indices.reshape(-1), weights.reshape(-1)
    return torch.embedding_bag(values, flat, begins, False, SUM, False, psw)[0]


def _scatter(grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`out[n] = sum over (t, j) with indices[t, j] == n of weights[t, j] * grad[t]`, as one bag per slot."""
    wide = _computed(grad.dtype, values.dtype)
    if not (grad.dtype == weights.dtype == values.dtype):
        out = values.new_zeros(values.shape)
        for found, sums in row_gradients([grad], [indices], [weights], wide):
            out.index_copy_(0, found, sums.to(out.dtype))
        return out
    read, order = indices.reshape(-1).sort(stable=True)  # [T·K]; equal slots become neighbours
    first = torch.searchsorted(read, torch.arange(values.shape[0], device=read.device, dtype=read.dtype))  # [N]
    token = order // indices.shape[1]
    return F.embedding_bag(token, grad, first, per_sample_weights=weights.reshape(-1)[order], mode="sum")


def _weights_gradient(grad: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`out[t, j] = grad[t] . values[indices[t, j]]`, without gathering all rows at once."""
    wide = _computed(grad.dtype, dtype) if scale is not None else _computed(values.dtype)
    if scale is None and (values.dtype == wide or grad.dtype == values.dtype == dtype):
        return _dots(grad.to(values.dtype), values, indices).to(dtype)
    dots = grad.new_empty(indices.shape, dtype=wide)
    for part, index, out in in_pieces(indices.shape[1] * values.shape[1], grad, indices, dots):
        out.copy_(_dots(part.to(wide), wide_rows(values, index.reshape(-1), wide), _counted(index)))
    return (dots if scale is None else dots * scale[indices]).to(dtype)


def _dots(grad: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """`out[t, j] = grad[t] . values[indices[t, j]]` for tensors of one dtype, without gathering rows."""
    tokens, width = indices.shape
    bag = torch.arange(tokens, device=indices.device, dtype=indices.dtype)
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, values, indices.reshape(-1), bag * width, bag.repeat_interleave(width), SUM
    )
    return dots.view(tokens, width)
