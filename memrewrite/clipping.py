"""Gradient clipping that treats value tables apart from the other parameters, and loss scaling for fused tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from memrewrite.errors import UserError
from memrewrite.fused import innermost
from memrewrite.kernels.gradient_norm import gradient_norm
from memrewrite.kernels.pending import Factors, Pending
from memrewrite.layers.value_table import Table


class GradNorms(NamedTuple):
    """The 2-norms of the gradients before they were clipped, 0-dim tensors."""

    rest: Tensor  # of all parameters but the tables
    values: Tensor  # of the tables


class _Fused(NamedTuple):
    """A table with fused updates: its gradient exists as factors only."""

    queue: Pending
    slots: int
    backend: str


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    value_max_norm: float | None = None,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> GradNorms:
    """Limit the norm of the gradients, that of value tables by itself, as in "Memory Layers at Scale" (arXiv 2412.09764).

    Each of the two sets is scaled as by `torch.nn.utils.clip_grad_norm_`: by `max_norm / (norm + 1e-6)` where that is below 1.
    The gradient of a table may be dense, sparse, or fused: the norm of a fused one is that of the sum over all its lookups
    since the last step, computed without a tensor of the table's size. A factor that is NaN, because the norm is, makes the
    rows NaN that were read. Call it after the last backward of a step, and before `optimizer.step()`.

    Args:
        model: A model, rewritten or not.
        max_norm: Largest norm of the gradients of all other parameters.
        value_max_norm: Largest norm of the gradients of the tables. Default: `max_norm`; infinity leaves them as they are.
        error_if_nonfinite: Raise RuntimeError, before anything changes, if a norm is NaN or infinite. It synchronizes.
        foreach: As in torch, for dense gradients.

    Returns:
        Both norms before clipping, on the device of a gradient; 0 where nothing has a gradient.
    """
    tables = {p for module in model.modules() if isinstance(module, Table) for p in module.parameters()}
    everything = list(model.parameters())
    rest = [p for p in everything if p not in tables]
    mine = [p for p in everything if p in tables]
    fused = [table for table in _fused(model) if table.queue.waiting]
    norms = GradNorms(_norm(rest, [], error_if_nonfinite, foreach), _norm(mine, fused, error_if_nonfinite, foreach))
    _scale(rest, [], max_norm, norms.rest, foreach)
    _scale(mine, fused, max_norm if value_max_norm is None else value_max_norm, norms.values, foreach)
    return norms


def unscale_(scaler: torch.amp.GradScaler, optimizer: Optimizer, model: nn.Module) -> None:
    """`scaler.unscale_(optimizer)` that includes the fused tables of `model`; call it before clipping and `scaler.step`.

    If the gradient of a fused table is infinite or NaN, `scaler.step(optimizer)` skips the step, as for other gradients. Then
    `optimizer.zero_grad()` discards it.

    Args:
        scaler: The scaler whose `scale` multiplied the loss; one that is not enabled does nothing.
        optimizer: An optimizer after `memrewrite.fuse(optimizer, model)`.
        model: The model with the tables.

    Raises:
        UserError: A fused table was read, and no other parameter of the optimizer has a dense gradient: `GradScaler` looks
            for infinities in such gradients only.
        RuntimeError: As `scaler.unscale_`: it was called before in this step.
    """
    if not scaler.is_enabled():
        return
    owner = innermost(optimizer)
    queues = [table.queue for table in _fused(model) if table.queue.taker is owner and table.queue.waiting]
    if queues:
        _mark_nonfinite(owner, queues)
    scaler.unscale_(owner)
    for queue in queues:
        queue.scale_(1 / scaler.scale(torch.ones((), device=queue.waiting[0].weights.device)))


@torch.no_grad()
def _mark_nonfinite(optimizer: Optimizer, queues: list[Pending]) -> None:
    """Make a dense gradient NaN if a factor is not finite, without synchronizing: `GradScaler` checks gradients only."""
    dense = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    seen = next((grad for grad in dense if not grad.is_sparse), None)
    if seen is None:
        what = "no parameter of the optimizer but fused tables has a dense gradient, in which a GradScaler looks for infinities"
        raise UserError(what, hint="train queries and keys as well, or use bf16 without a GradScaler")
    for queue in queues:
        for read in queue.waiting:
            largest = torch.maximum(read.grad.abs().amax().float(), read.weights.abs().amax().float())
            seen.add_((0 * largest).to(seen.device, seen.dtype))  # 0 · inf and 0 · NaN are NaN


def _fused(model: nn.Module) -> Iterator[_Fused]:
    """Every table with a queue, also a second table of a pool."""
    for module in model.modules():
        if isinstance(module, Table) and module.pending is not None:
            yield _Fused(module.pending, module.values.shape[0], module.backend)


def _norm(parameters: list[nn.Parameter], fused: list[_Fused], error_if_nonfinite: bool, foreach: bool | None) -> Tensor:
    """The norm of all gradients together."""
    grads = [p.grad for p in parameters if p.grad is not None]
    dense = [grad for grad in grads if not grad.is_sparse]
    rows = [gradient_norm([_as_factors(grad)], grad.shape[0]) for grad in grads if grad.is_sparse]
    rows += [gradient_norm(table.queue.waiting, table.slots, table.backend) for table in fused]
    return get_total_norm([*dense, *rows], 2.0, error_if_nonfinite, foreach)


def _as_factors(grad: Tensor) -> Factors:
    """The rows of a COO gradient [N, D] as a lookup with K = 1: rows that occur twice are summed."""
    rows = grad._values()
    return Factors(rows, grad._indices()[0].unsqueeze(1), torch.ones_like(rows[:, :1]))


def _scale(parameters: list[nn.Parameter], fused: list[_Fused], max_norm: float, norm: Tensor, foreach: bool | None) -> None:
    """Multiply all gradients by `max_norm / (norm + 1e-6)`, at most by 1."""
    clip_grads_with_norm_([p for p in parameters if p.grad is not None and not p.grad.is_sparse], max_norm, norm, foreach)
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad._values().mul_(factor.to(p.grad.device))
    for table in fused:
        table.queue.scale_(factor)
