"""The operators `rowwise_adagrad_`, `rowwise_adam_` and `lazy_adam_`: an optimizer step of a table, on the rows that were read.

The table's gradient is passed as the factors of its lookups and never materialized. `ops` registers these functions.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from memrewrite.kernels.backends import choose, require_known
from memrewrite.kernels.checks import check_range, check_reads, one_device, require, same_shape
from memrewrite.kernels.rounding import FP8, blocks_of

LARGEST = torch.finfo(torch.float32).max
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
    adagrad_fake(values, scale, total, grads, indices, weights, lr, eps, weight_decay, seed, backend)
    reads = _with_reads("rowwise_adagrad_", values, grads, indices, weights)
    if reads is None:
        return
    chosen = _chosen("rowwise_adagrad_", "adagrad_", backend, values, scale, reads)
    chosen.adagrad_(values, scale, total, *reads, lr=lr, eps=eps, weight_decay=weight_decay, seed=seed)
    _were_changed(values, scale, total)


def adagrad_fake(
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
    """The checks of `adagrad`."""
    op = "rowwise_adagrad_"
    _check(op, values, scale, {"total": total}, (grads, indices, weights), backend)
    _check_numbers(op, lr=lr, eps=eps, weight_decay=weight_decay)


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
    numbers = (lr, beta1, beta2, eps, weight_decay)
    adam_fake(values, scale, exp_avg, exp_avg_sq, grads, indices, weights, *numbers, step, seed, backend)
    reads = _with_reads("rowwise_adam_", values, grads, indices, weights)
    if reads is None:
        return
    chosen = _chosen("rowwise_adam_", "adam_", backend, values, scale, reads)
    named = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    chosen.adam_(values, scale, exp_avg, exp_avg_sq, *reads, **named, step=step, seed=seed)
    _were_changed(values, scale, exp_avg, exp_avg_sq)


def adam_fake(
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
    """The checks of `adam`."""
    op = "rowwise_adam_"
    _check(op, values, scale, {"exp_avg_sq": exp_avg_sq}, (grads, indices, weights), backend)
    one_device(op, values, exp_avg)
    if exp_avg.shape != values.shape or exp_avg.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{op}: exp_avg must be {tuple(values.shape)} in float32 or bfloat16, not {tuple(exp_avg.shape)} in {exp_avg.dtype}"
        )
    _check_memory(op, exp_avg)
    _check_adam_numbers(op, lr, beta1, beta2, eps, weight_decay, step)


def lazy_adam(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor | None,
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
    """`memrewrite::lazy_adam_`; the public function is `ops.lazy_adam_`."""
    tensors = (values, scale, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
    numbers = (lr, beta1, beta2, eps, weight_decay)
    lazy_adam_fake(*tensors, grads, indices, weights, *numbers, step, seed, backend)
    reads = _with_reads("lazy_adam_", values, grads, indices, weights)
    if reads is None:
        return
    chosen = _chosen("lazy_adam_", "lazy_adam_", backend, values, scale, reads)
    named = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    chosen.lazy_adam_(*tensors, *reads, **named, step=step, seed=seed)
    _were_changed(*tensors)


def lazy_adam_fake(
    values: Tensor,
    scale: Tensor | None,
    exp_avg: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor | None,
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
    """The checks of `lazy_adam`."""
    op = "lazy_adam_"
    _check(op, values, scale, {}, (grads, indices, weights), backend)
    _check_moment(op, "exp_avg", values, exp_avg, exp_avg_scale)
    _check_moment(op, "exp_avg_sq", values, exp_avg_sq, exp_avg_sq_scale)
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise TypeError(f"{op}: exp_avg and exp_avg_sq must have one dtype, not {exp_avg.dtype} and {exp_avg_sq.dtype}")
    _check_adam_numbers(op, lr, beta1, beta2, eps, weight_decay, step)


def _check_moment(op: str, name: str, values: Tensor, moment: Tensor, scale: Tensor | None) -> None:
    """Raise TypeError or ValueError unless `moment` is a state of one number per element of the table, with its scales."""
    one_device(op, values, moment, scale)
    if moment.dtype not in (torch.float32, torch.bfloat16, FP8):
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float8_e4m3fn, not {moment.dtype}")
    same_shape(op, name, tuple(moment.shape), tuple(values.shape))
    if (scale is None) == (moment.dtype == FP8):
        raise TypeError(f"{op}: {name} of 8 bits needs {name}_scale, and no other does; it is {moment.dtype}")
    if scale is not None:
        if scale.dtype != torch.float32:
            raise TypeError(f"{op}: {name}_scale must be float32, not {scale.dtype}")
        same_shape(op, f"{name}_scale", tuple(scale.shape), (values.shape[0], blocks_of(values.shape[1])))
    _check_memory(op, moment, scale)


def _were_changed(*tensors: Tensor | None) -> None:
    """Count the change of each tensor: a backward that needs the old content raises torch's error. Kernels do not count."""
    changed = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
    torch.autograd.graph.increment_version(changed)


_Reads = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _with_reads(op: str, values: Tensor, grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]) -> _Reads | None:
    """The lookups with at least one read, their indices checked; None if there are none."""
    kept = [lookup for lookup in zip(grads, indices, weights, strict=True) if lookup[1].numel()]
    if not kept or values.shape[1] == 0:
        return None
    for _, index, _ in kept:
        check_range(op, index, values.shape[0])
    grads, indices, weights = (list(part) for part in zip(*kept, strict=True))
    return grads, indices, weights


def _chosen(op: str, function: str, backend: str, values: Tensor, scale: Tensor | None, reads: _Reads) -> ModuleType:
    """The backend that runs an update by its `function`."""
    _, indices, weights = reads

    def reason_of(module: ModuleType) -> str | None:
        reason: str | None = module.supports(values, indices[0], weights[0], scale)
        return reason or (None if hasattr(module, function) else f"it has no kernel for {op}")

    return choose(op, backend, reason_of)


def _check(op: str, values: Tensor, scale: Tensor | None, states: dict[str, Tensor], reads: _Reads, backend: str) -> None:
    """Raise TypeError or ValueError, before anything is changed, for inputs that the schema allows but the operators do not."""
    if values.dim() != 2 or not values.is_floating_point() or values.dtype == torch.float64:
        raise TypeError(f"{op}: values must be [N, D] in float32 or fewer bits, not {values.dtype} {tuple(values.shape)}")
    if (scale is None) == (values.itemsize == 1):
        raise TypeError(f"{op}: 8-bit values need a scale, and only they have one; these are {values.dtype}")
    for name, state in {**states, **({} if scale is None else {"scale": scale})}.items():
        if state.shape != values.shape[:1] or state.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32 [{values.shape[0]}], not {state.dtype} {tuple(state.shape)}")
    one_device(op, values, scale, *states.values(), *(tensor for part in reads for tensor in part))
    _check_memory(op, values, scale, *states.values())
    if len({len(part) for part in reads}) != 1:
        raise ValueError(f"{op}: {', '.join(str(len(part)) for part in reads)} gradients, indices and weights do not pair up")
    for grad, index, weight in zip(*reads, strict=True):
        check_reads(op, grad, index, weight)
        same_shape(op, "grad", tuple(grad.shape), (index.shape[0], values.shape[1]))
    require(
        sum(index.numel() for index in reads[1]) < MOST_READS,
        lambda: f"{op}: one update has {MOST_READS} or more reads of one table; call step() more often",
    )
    require_known(op, backend)


def _check_memory(op: str, *changed: Tensor | None) -> None:
    """Raise ValueError if elements of a tensor that is changed share memory: each would be updated several times."""
    for tensor in changed:
        if tensor is not None and any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{op}: a tensor that is changed must have its own memory for each element, not be expanded")


def _check_adam_numbers(op: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> None:
    """Raise ValueError for a number that float32 cannot represent, a β outside [0, 1), or a step below 1."""
    _check_numbers(op, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    for beta in (beta1, beta2):
        if not 0 <= beta < 1:
            raise ValueError(f"{op}: a beta is in [0, 1), not {beta}")
    if step < 1:
        raise ValueError(f"{op}: step={step}: steps count from 1")


def _check_numbers(op: str, **numbers: float) -> None:
    """Raise ValueError for a number that float32 cannot represent."""
    for name, number in numbers.items():
        if not abs(number) <= LARGEST:
            raise ValueError(f"{op}: {name}={number} is not a finite float32 number")
