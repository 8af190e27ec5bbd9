"""The operators `rowwise_adagrad_` and `rowwise_adam_`: an optimizer step of a table, on the rows that were read.

The table's gradient is passed as the factors of its lookups and never materialized. `ops` registers these functions.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from memrewrite.kernels.backends import choose
from memrewrite.kernels.checks import check_range, one_device

MOST_READS = 2**30  # per update: kernels count reads in 32 bits


def adagrad(
    values: Tensor,
    scale: Tensor | None,
    total: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    lr: float,
    eps: float,
    weight_decay: float,
    seed: int,
    backend: str = "auto",
) -> None:
    """`memrewrite::rowwise_adagrad_`; the public function is `ops.rowwise_adagrad_`."""
    _check("rowwise_adagrad_", values, scale, {"total": total}, (grads, indices, weights))
    reads = _with_reads(values, grads, indices, weights)
    if reads is None:
        return
    chosen = _chosen("rowwise_adagrad_", backend, values, scale, reads)
    chosen.adagrad_(values, scale, total, *reads, lr=lr, eps=eps, weight_decay=weight_decay, seed=seed)


def adam(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    backend: str = "auto",
) -> None:
    """`memrewrite::rowwise_adam_`; the public function is `ops.rowwise_adam_`."""
    _check("rowwise_adam_", values, scale, {"exp_avg_sq": exp_avg_sq}, (grads, indices, weights))
    one_device("rowwise_adam_", values, exp_avg)
    if exp_avg.shape != values.shape or exp_avg.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"rowwise_adam_: exp_avg must be {tuple(values.shape)} in float32 or bfloat16, "
            f"not {tuple(exp_avg.shape)} in {exp_avg.dtype}"
        )
    if step < 1:
        raise ValueError(f"rowwise_adam_: step={step}: steps count from 1")
    reads = _with_reads(values, grads, indices, weights)
    if reads is None:
        return
    chosen = _chosen("rowwise_adam_", backend, values, scale, reads)
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    chosen.adam_(values, scale, exp_avg, exp_avg_sq, *reads, **numbers, step=step, seed=seed)


_Reads = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _with_reads(values: Tensor, grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]) -> _Reads | None:
    """The lookups with at least one read, their indices checked; None if there are none."""
    kept = [lookup for lookup in zip(grads, indices, weights, strict=True) if lookup[1].numel()]
    if not kept or values.shape[1] == 0:
        return None
    for _, index, _ in kept:
        check_range(values, index)
    grads, indices, weights = (list(part) for part in zip(*kept, strict=True))
    return grads, indices, weights


def _chosen(op: str, backend: str, values: Tensor, scale: Tensor | None, reads: _Reads) -> ModuleType:
    _, indices, weights = reads
    return choose(op, backend, lambda b: b.supports(values, indices[0], weights[0], scale))


def _check(op: str, values: Tensor, scale: Tensor | None, states: dict[str, Tensor], reads: _Reads) -> None:
    """Raise TypeError or ValueError, before anything is changed, for inputs that the schema allows but the operators do not."""
    if values.dim() != 2 or not values.is_floating_point() or values.dtype == torch.float64:
        raise TypeError(f"{op}: values must be [N, D] in float32 or fewer bits, not {values.dtype} {tuple(values.shape)}")
    if (scale is None) == (values.itemsize == 1):
        raise TypeError(f"{op}: 8-bit values need a scale, and only they have one; these are {values.dtype}")
    for name, state in {**states, **({} if scale is None else {"scale": scale})}.items():
        if state.shape != values.shape[:1] or state.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32 [{values.shape[0]}], not {state.dtype} {tuple(state.shape)}")
    one_device(op, values, scale, *states.values(), *(tensor for part in reads for tensor in part))
    if sum(index.numel() for index in reads[1]) >= MOST_READS:
        raise ValueError(f"{op}: one update has {MOST_READS} or more reads of one table; call step() more often")
    if len({len(part) for part in reads}) != 1:
        raise ValueError(f"{op}: {', '.join(str(len(part)) for part in reads)} gradients, indices and weights do not pair up")
    for grad, index, weight in zip(*reads, strict=True):
        fits = grad.dim() == index.dim() == 2 and index.shape == weight.shape
        if not fits or grad.shape != (index.shape[0], values.shape[1]):
            raise ValueError(
                f"{op}: a lookup has grad [T, D], indices [T, K] and weights [T, K], "
                f"not {tuple(grad.shape)}, {tuple(index.shape)} and {tuple(weight.shape)}"
            )
