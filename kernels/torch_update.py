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
    generator = torch.Generator(values.device).manual_seed(seed)
    for rows, gradient in row_gradients(grads, indices, weights):
        square = _load_moment(exp_avg_sq, exp_avg_sq_scale, rows)
        square = square if exp_avg_sq_scale is None else square.square_()
        mean = _load_moment(exp_avg, exp_avg_scale, rows).mul_(beta1).add_(gradient * (1 - beta1))
        square.mul_(beta2).add_(gradient.square_().mul_(1 - beta2))
        _store_moment(exp_avg, exp_avg_scale, rows, mean, generator)
        kept = square if exp_avg_sq_scale is None else root(square)
        _store_moment(exp_avg_sq, exp_avg_sq_scale, rows, kept, generator, roots=True)
        below = root(square.div_(1 - beta2**step)).add_(eps)
        change = mean.div_(1 - beta1**step).mul_(lr).div_(below)
        _store(values, scale, rows, _load(values, scale, rows).mul_(1 - lr * weight_decay).sub_(change), generator)


def _load_moment(state: Tensor, scale: Tensor | None, rows: Tensor) -> Tensor:
    """Rows of a state of one number per element, in fp32."""
    wide = wide_rows(state, rows)
    return wide if scale is None else wide.mul_(rounding.by_column(scale[rows], state.shape[1]))


def _store_moment(
    state: Tensor, scale: Tensor | None, rows: Tensor, new: Tensor, generator: torch.Generator, *, roots: bool = False
) -> None:
    """Store fp32 rows in a state, rounded stochastically. In 8 bits, positive `roots` are never stored as zeros."""
    if scale is None:
        state.index_copy_(0, rows, rounding.stored(new, state.dtype, generator))
        return
    scale[rows] = block_scale = rounding.block_scale(new)
    codes = rounding.stored(new / rounding.by_column(block_scale, state.shape[1]), state.dtype, generator).view(torch.uint8)
    if roots:
        codes = torch.maximum(codes, (new > 0).to(torch.uint8))
    state.view(torch.uint8).index_copy_(0, rows, codes)


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
