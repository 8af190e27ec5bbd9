"""Baseline kernels for the benchmarks only: straightforward Triton, plain torch, embedding bags, and FBGEMM's tables.

Each computes the same as ours; tests check this, since a comparison with a wrong baseline has no value.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

Run = Any


@triton.jit
def _forward(values, indices, weights, out, READS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One warp adds one token's rows, one after the other."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(READS):
        slot = tl.load(indices + token * READS + j).to(tl.int64)
        weight = tl.load(weights + token * READS + j).to(tl.float32)
        row = tl.load(values + slot * DIM + column, mask=column < DIM, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + token * DIM + column, total, mask=column < DIM)


@triton.jit
def _backward(
    grad, values, indices, weights, grad_values, grad_weights, READS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Dot products of a token's gradient with its rows, and atomic additions to the gradients of the rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    g = tl.load(grad + token * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
    for j in range(READS):
        slot = tl.load(indices + token * READS + j).to(tl.int64)
        weight = tl.load(weights + token * READS + j).to(tl.float32)
        row = tl.load(values + slot * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
        tl.store(grad_weights + token * READS + j, tl.sum(g * row, 0))
        change = (weight * g).to(grad_values.dtype.element_ty)
        tl.atomic_add(grad_values + slot * DIM + column, change, mask=column < DIM, sem="relaxed")


def triton_forward(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """[T, D], one warp per token."""
    (tokens, reads), dim = indices.shape, values.shape[1]
    out = values.new_empty(tokens, dim)
    _forward[(tokens,)](values, indices, weights, out, reads, dim, triton.next_power_of_2(dim), num_warps=1)
    return out


def triton_backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Dense gradient of values, summed atomically in `dtype` (default: that of the values), and gradient of weights."""
    (tokens, reads), dim = indices.shape, values.shape[1]
    grad_values = torch.zeros_like(values, dtype=dtype or values.dtype)
    grad_weights = torch.empty_like(weights)
    inputs = (grad, values, indices, weights, grad_values, grad_weights)
    _backward[(tokens,)](*inputs, reads, dim, triton.next_power_of_2(dim), num_warps=4)
    return grad_values.to(values.dtype), grad_weights


def torch_forward(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The [T, K, D] gather and a matrix product a token."""
    return torch.bmm(weights.unsqueeze(1), values[indices]).squeeze(1)


def gathered(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Gather, multiply, sum: what `torch.compile` fuses into one kernel."""
    return (values[indices] * weights.unsqueeze(-1)).sum(1)


def bag_forward(values: Tensor, indices: Tensor, weights: Tensor, sparse: bool = False) -> Tensor:
    """`F.embedding_bag` with weights."""
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum", sparse=sparse)


def gradients(forward: Any, grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> Run:
    """A run of only the backward of `forward`: the autograd graph is created once and kept."""
    leaves = values.detach().requires_grad_(), weights.detach().requires_grad_()
    out = forward(leaves[0], indices, leaves[1])
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def torch_topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The direct way: top-k of both halves, all k² sums, top-k of those, and two gathers."""
    (best1, slots1), (best2, slots2) = scores1.topk(k, dim=-1), scores2.topk(k, dim=-1)
    sums = (best1.float().unsqueeze(-1) + best2.float().unsqueeze(-2)).flatten(-2)  # [..., k²]
    scores, chosen = sums.topk(k, dim=-1)
    first, second = slots1.gather(-1, chosen // k), slots2.gather(-1, chosen % k)
    return scores, first * scores2.shape[-1] + second


class Fbgemm:
    """FBGEMM's table-batched embedding with a copy of `values`, and row-wise Adagrad fused into its backward.

    Raises ModuleNotFoundError if FBGEMM is not installed.
    """

    def __init__(self, values: Tensor, lr: float = 0.0, eps: float = 1e-8) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        cuda = values.is_cuda
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.table = SplitTableBatchedEmbeddingBagsCodegen(
            [(values.shape[0], values.shape[1], *place)],
            weights_precision=SparseType.from_dtype(values.dtype),
            output_dtype=SparseType.from_dtype(values.dtype),
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=lr,
            eps=eps,
        )
        self.table.split_embedding_weights()[0].copy_(values)

    def forward(self, indices: Tensor, weights: Tensor) -> Tensor:
        """[T, D]; its weights are fp32."""
        tokens, reads = indices.shape
        offsets = torch.arange(0, tokens * reads + 1, reads, device=indices.device, dtype=indices.dtype)
        out: Tensor = self.table(indices.reshape(-1), offsets, per_sample_weights=weights.float().reshape(-1))
        return out

    def step(self, grad: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Forward, gradient of the weights, and the update of the touched rows."""
        leaf = weights.detach().float().requires_grad_()
        out = self.forward(indices, leaf)
        torch.autograd.backward(out, grad.to(out.dtype))
