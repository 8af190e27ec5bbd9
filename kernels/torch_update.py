"""Fused updates in plain torch, a few of the rows that were read at a time; no gradient of the whole table exists."""

from __future__ import annotations

import torch
from torch import Tensor

from memrewrite.kernels import rounding
from memrewrite.kernels.reference import root
from memrewrite.kernels.torch_reads import row_gradients, wide_rows


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
    generator = torch.Generator(values.device).manual_seed(seed)
    for rows, gradient in row_gradients(grads, indices, weights):
        sums = total[rows] + gradient.square().mean(-1)
        total[rows] = sums
        change = gradient.mul_(lr).div_((root(sums) + eps).unsqueeze(-1))
        _store(values, scale, rows, _load(values, scale, rows).mul_(1 - lr * weight_decay).sub_(change), generator)


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
    generator = torch.Generator(values.device).manual_seed(seed)
    for rows, gradient in row_gradients(grads, indices, weights):
        mean = beta1 * exp_avg[rows].float() + (1 - beta1) * gradient
        square = beta2 * exp_avg_sq[rows] + (1 - beta2) * gradient.square().mean(-1)
        exp_avg[rows], exp_avg_sq[rows] = rounding.stored(mean, exp_avg.dtype, generator), square
        below = root(square / (1 - beta2**step)) + eps
        change = mean.div_(1 - beta1**step).mul_(lr).div_(below.unsqueeze(-1))
        _store(values, scale, rows, _load(values, scale, rows).mul_(1 - lr * weight_decay).sub_(change), generator)


def _load(values: Tensor, scale: Tensor | None, rows: Tensor) -> Tensor:
    """Rows of the table in fp32."""
    wide = wide_rows(values, rows)
    return wide if scale is None else wide.mul_(scale[rows].unsqueeze(-1))


def _store(values: Tensor, scale: Tensor | None, rows: Tensor, new: Tensor, generator: torch.Generator) -> None:
    """Store fp32 rows in the table, rounded stochastically if it has fewer bits."""
    if scale is not None:
        scale[rows] = row_scale = rounding.row_scale(new)
        new = new / row_scale.unsqueeze(-1)
    narrow = rounding.stored(new, values.dtype, generator)
    if values.itemsize == 1:  # torch cannot index fp8; uint8 it can
        values, narrow = values.view(torch.uint8), narrow.view(torch.uint8)
    values.index_copy_(0, rows, narrow)
