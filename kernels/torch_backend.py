"""The backend "torch": every operator in plain torch, for the CPU and for devices that no faster backend supports.

The forward is one embedding bag per token (`F.embedding_bag`). The gradient of a lookup is a lookup in the other direction:
slot n's gradient is the weighted sum of the output gradients of the tokens that read it, one bag per slot. Neither
materializes the [T, K, D] gather, no sum depends on the order of threads, and half types accumulate in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memrewrite.kernels.checks import check_range
from memrewrite.kernels.torch_reads import in_pieces, sorted_reads, wide_rows
from memrewrite.kernels.torch_topk import topk, topk_backward
from memrewrite.kernels.torch_update import adagrad_, adam_

__all__ = ["adagrad_", "adam_", "backward", "forward", "rows", "supports", "supports_topk", "topk", "topk_backward"]

NAME = "torch"
SUM = 0  # aten's integer for mode="sum"


def supports(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None) -> str | None:
    """None: this backend supports every call."""
    return None


def supports_topk(scores1: Tensor, scores2: Tensor, k: int) -> str | None:
    """None: this backend supports every call."""
    return None


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs. Raises IndexError for an index outside the table (CPU only)."""
    check_range(values, indices)
    if scale is None:
        return _bags(values, indices, weights)
    pieces = in_pieces(indices.shape[1] * values.shape[1], indices, weights.float() * scale[indices])
    sums = [torch.einsum("tk,tkd->td", w, wide_rows(values, index)) for index, w in pieces]
    return torch.cat(sums).to(weights.dtype)


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
    check_range(values, indices)
    grad = grad.contiguous()  # [T, D]; the gradient of a sum is an expanded tensor
    grad_values = _scatter(grad, indices, weights, values.shape[0]) if need_values else None
    grad_weights = _dots(grad, values, indices, scale) if need_weights else None
    return grad_values, grad_weights


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that are read, int64 [R], and their gradients [R, D], with R = min(T·K, slots); no device synchronization."""
    reads = sorted_reads([grad], [indices], [weights])
    count = min(indices.numel(), slots)
    place = torch.where(
        reads.first, reads.first.cumsum(0) - 1, count
    )  # [M]: output row of each first read; the end for other reads
    starts = torch.full((count + 1,), indices.numel(), device=grad.device)
    starts.scatter_(0, place, torch.arange(indices.numel(), device=grad.device))
    found = reads.slots[-1:].long().repeat(count + 1).scatter_(0, place, reads.slots.long())
    sums = F.embedding_bag(reads.tokens, reads.grad, starts[:count], per_sample_weights=reads.weights, mode="sum")
    return found[:count], sums


def _bags(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One bag per token. Calls the aten operator: input checks of `F.embedding_bag` take a third of a one-token call."""
    tokens, width = indices.shape
    begins = torch.arange(0, tokens * width, width, device=indices.device, dtype=indices.dtype)
    flat, psw = indices.reshape(-1), weights.reshape(-1)
    return torch.embedding_bag(values, flat, begins, False, SUM, False, psw)[0]


def _scatter(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> Tensor:
    """`out[n] = sum over (t, j) with indices[t, j] == n of weights[t, j] * grad[t]`, as one bag per slot."""
    read, order = indices.reshape(-1).sort(stable=True)  # [T·K]; equal slots become neighbours
    first = torch.searchsorted(read, torch.arange(slots, device=read.device, dtype=read.dtype))  # [N]
    token = order // indices.shape[1]
    return F.embedding_bag(token, grad, first, per_sample_weights=weights.reshape(-1)[order], mode="sum")


def _dots(grad: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None) -> Tensor:
    """`out[t, j] = grad[t] . values[indices[t, j]]`, without gathering all rows (fp8 tables: a few at a time)."""
    tokens, width = indices.shape
    if scale is not None:
        pieces = in_pieces(width * values.shape[1], grad, indices)
        parts = [torch.einsum("td,tkd->tk", g.float(), wide_rows(values, index)) for g, index in pieces]
        return (torch.cat(parts) * scale[indices]).to(grad.dtype)
    bag = torch.arange(tokens, device=indices.device, dtype=indices.dtype)
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, values, indices.reshape(-1), bag * width, bag.repeat_interleave(width), SUM
    )
    return dots.view(tokens, width)
