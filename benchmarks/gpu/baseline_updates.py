"""Baselines of the fused updates: the same rules in plain torch, in fixed shapes, so that the host never waits for the device.

`F.embedding_bag` sums the table's gradient over the sorted reads, one bag per row, in fp32; then all rows are updated, a slice
of fixed size at a time; rows that were not read keep their bits. A CUDA graph could capture all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memrewrite.kernels import rounding

SLICE = 1 << 26  # table elements updated at once
SMALLEST = 2.0**-9  # positive number of e4m3


def table_gradient(grads: list[Tensor], indices: list[Tensor], weights: list[Tensor], slots: int) -> tuple[Tensor, Tensor]:
    """The table's gradient in fp32 [slots, D], and bool [slots]: which rows are read."""
    flat = torch.cat([index.reshape(-1).long() for index in indices])
    owners, first = [], 0
    for index in indices:
        tokens, reads = index.shape
        owner = torch.arange(first, first + tokens, device=flat.device)
        owners.append(owner.unsqueeze(1).expand(tokens, reads).reshape(-1))
        first += tokens
    found, order = flat.sort()
    starts = torch.searchsorted(found, torch.arange(slots + 1, device=flat.device))
    psw = torch.cat([weight.reshape(-1).float() for weight in weights])[order]
    wide = torch.cat([grad.float() for grad in grads])
    sums = F.embedding_bag(torch.cat(owners)[order], wide, starts[:-1], per_sample_weights=psw, mode="sum")
    return sums, starts[1:] > starts[:-1]


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
    """As `ops.rowwise_adagrad_`."""
    generator = torch.Generator(values.device).manual_seed(seed)
    sums, touched = table_gradient(grads, indices, weights, values.shape[0])
    total.add_(torch.linalg.vector_norm(sums, dim=-1).square_().div_(sums.shape[1]))  # + 0 in rows that are not read
    below = total.sqrt().add_(eps)
    for part in _slices(values):
        push = sums[part].div_(below[part].unsqueeze(-1))
        _move(values, scale, part, push, touched[part], lr, weight_decay, generator)


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
    """As `ops.rowwise_adam_`."""
    generator = torch.Generator(values.device).manual_seed(seed)
    sums, touched = table_gradient(grads, indices, weights, values.shape[0])
    power = torch.linalg.vector_norm(sums, dim=-1).square_().div_(sums.shape[1])
    exp_avg_sq.copy_(torch.where(touched, exp_avg_sq.lerp(power, 1 - beta2), exp_avg_sq))
    below = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    for part in _slices(values):
        mean = exp_avg[part].float().lerp(sums[part], 1 - beta1)
        _store(exp_avg, part, mean, touched[part], generator)
        push = mean.div_(1 - beta1**step).div_(below[part].unsqueeze(-1))
        _move(values, scale, part, push, touched[part], lr, weight_decay, generator)


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
    """As `ops.lazy_adam_`."""
    generator = torch.Generator(values.device).manual_seed(seed)
    sums, touched = table_gradient(grads, indices, weights, values.shape[0])
    for part in _slices(values):
        mean = _moment(exp_avg, exp_avg_scale, part).lerp_(sums[part], 1 - beta1)
        square = _moment(exp_avg_sq, exp_avg_sq_scale, part)
        square = square if exp_avg_sq_scale is None else square.square_()
        square.lerp_(sums[part].square(), 1 - beta2)
        _store_moment(exp_avg, exp_avg_scale, part, mean, touched[part], generator)
        kept = square if exp_avg_sq_scale is None else square.sqrt()
        _store_moment(exp_avg_sq, exp_avg_sq_scale, part, kept, touched[part], generator, roots=True)
        below = square.div_(1 - beta2**step).sqrt_().add_(eps)
        push = mean.div_(1 - beta1**step).div_(below)
        _move(values, scale, part, push, touched[part], lr, weight_decay, generator)


def _moment(state: Tensor, scale: Tensor | None, part: slice) -> Tensor:
    """Rows of a state of one number per element, in fp32."""
    wide = state[part].to(torch.float32, copy=True)
    return wide if scale is None else wide.mul_(rounding.by_column(scale[part], state.shape[1]))


def _store_moment(
    state: Tensor,
    scale: Tensor | None,
    part: slice,
    new: Tensor,
    touched: Tensor,
    generator: torch.Generator,
    *,
    roots: bool = False,
) -> None:
    """Write the rows that were read; in 8 bits with a scale per block, where positive roots stay positive."""
    if scale is not None:
        block_scale = rounding.block_scale(new)
        new = new / rounding.by_column(block_scale, state.shape[1])
        new = torch.where(new > 0, new.clamp(min=SMALLEST), new) if roots else new
        scale[part] = torch.where(touched.unsqueeze(-1), block_scale, scale[part])
    _store(state, part, new, touched, generator)


def _slices(values: Tensor) -> list[slice]:
    rows = max(1, SLICE // values.shape[1])
    return [slice(begin, begin + rows) for begin in range(0, values.shape[0], rows)]


def _move(
    values: Tensor,
    scale: Tensor | None,
    part: slice,
    push: Tensor,
    touched: Tensor,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """One step of some rows: decayed, minus lr times `push`."""
    old = values[part].to(torch.float32, copy=True)
    if scale is not None:
        old.mul_(scale[part].unsqueeze(-1))
    new = old.mul_(1 - lr * weight_decay).sub_(push, alpha=lr)
    if scale is not None:
        row_scale = rounding.row_scale(new)
        new.div_(row_scale.unsqueeze(-1))
        scale[part] = torch.where(touched, row_scale, scale[part])
    _store(values, part, new, touched, generator)


def _store(table: Tensor, part: slice, new: Tensor, touched: Tensor, generator: torch.Generator) -> None:
    """Write the rows that were read, rounded stochastically if the table has fewer bits; the others keep theirs."""
    narrow = rounding.stored(new, table.dtype, generator)
    if table.itemsize == 1:
        table, narrow = table.view(torch.uint8), narrow.view(torch.uint8)
    table[part] = torch.where(touched.unsqueeze(-1), narrow, table[part])
