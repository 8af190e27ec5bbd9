"""Fused updates of value tables: an optimizer's step updates the rows that were read, and no gradient table ever exists.

backward → factors wait in the pool (`kernels.pending`) → `optimizer.step()` → one pass over the rows that were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.errors import UserError
from memrewrite.kernels import ops
from memrewrite.kernels.pending import Factors, Pending, refuse_capture
from memrewrite.layers.pool import Pool

State = dict[str, Tensor]


class Rule(Protocol):
    """How rows are updated: what is remembered of a table, and one step."""

    def fresh(self, values: Tensor) -> State:
        """What is remembered, before the first step."""

    def step(self, pool: Pool, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read, in step number `step`; `numbers`: lr, weight_decay, seed, backend."""


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one fp32 accumulator a row: 2·D + 4 bytes a slot in bf16, D + 8 in fp8. See `ops.rowwise_adagrad_`."""

    eps: float = 1e-8

    def fresh(self, values: Tensor) -> State:
        """`total` fp32 [N]."""
        return {"total": values.new_zeros(values.shape[0], dtype=torch.float32)}

    def step(self, pool: Pool, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read."""
        ops.rowwise_adagrad_(pool.values, pool.scale, state["total"], *_lists(reads), eps=self.eps, **numbers)


@dataclass(frozen=True)
class RowwiseAdam:
    """Adam with one fp32 second moment a row; the first moment is kept in bf16, or in fp32 for tables of fp32.

    Rows that were not read neither move nor decay, as in `torch.optim.SparseAdam`. See `ops.rowwise_adam_`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def fresh(self, values: Tensor) -> State:
        """`exp_avg` [N, D] and `exp_avg_sq` fp32 [N]."""
        dtype = torch.float32 if values.dtype == torch.float32 else torch.bfloat16
        return {
            "exp_avg": values.new_zeros(values.shape, dtype=dtype),
            "exp_avg_sq": values.new_zeros(values.shape[0], dtype=torch.float32),
        }

    def step(self, pool: Pool, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read."""
        moments = state["exp_avg"], state["exp_avg_sq"]
        ops.rowwise_adam_(
            pool.values, pool.scale, *moments, *_lists(reads), betas=self.betas, eps=self.eps, step=step, **numbers
        )


def fuse(optimizer: Optimizer, model: nn.Module, rule: Rule | None = None) -> None:
    """Have `optimizer.step()` update the pools of `model` whose gradient is "fused", by `rule` (`RowwiseAdagrad()`).

    Rate and weight decay are those of the optimizer's group that holds a pool's `values`, read at every step (decay is
    decoupled, and reaches the rows that were read). What is remembered lies in `optimizer.state`, so `state_dict` and
    `load_state_dict` carry it; load after this call. Gradients add up over micro-batches until the step, exactly;
    `optimizer.zero_grad()` drops them, `model.zero_grad()` does not reach them. Clipping sees the other parameters alone.
    A loss scaled by a `GradScaler` is not unscaled here: use bf16.

    Raises `UserError` when no pool is fused, one is not in the optimizer or has an optimizer already, the optimizer
    maximises, or several processes train (each would update its own copy).
    """
    optimizer = _innermost(optimizer)
    pools = {name: m for name, m in model.named_modules() if isinstance(m, Pool) and m.pending is not None}
    if not pools:
        raise UserError('no pool of this model has the gradient "fused"', hint="say `gradient: fused` for it in the recipe")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UserError("a fused update is of one process: others would not see it", hint="gradient: dense")
    for name, pool in pools.items():
        _check(optimizer, name, pool)
    _attach(optimizer, pools, rule or RowwiseAdagrad())
    for pool in pools.values():
        _queue(pool).taker = optimizer


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps: libraries wrap it in one that only passes calls on, and has no hooks of its own."""
    while "_optimizer_step_post_hooks" not in vars(optimizer) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def _queue(pool: Pool) -> Pending:
    if pool.pending is None:
        raise UserError("this pool is not fused", hint="gradient: fused")
    return pool.pending


def _check(optimizer: Optimizer, name: str, pool: Pool) -> None:
    group = _group_of(optimizer, pool.values)
    if group is None:
        raise UserError(f"the optimizer has no parameter {name}.values", hint="give it memrewrite.param_groups(model, lr=...)")
    if group.get("maximize"):
        raise UserError("a fused update minimises, and this optimizer maximises", hint="maximize=False")
    if pool.values.dtype == torch.float64:
        raise UserError(f"{name}.values is float64, which has no fused update", hint="gradient: dense")
    taker = _queue(pool).taker
    if taker is not None:
        raise UserError(f"an optimizer ({type(taker).__name__}) updates {name} already", hint="fuse one optimizer alone")


def _group_of(optimizer: Optimizer, values: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(p is values for p in g["params"])), None)


def _attach(optimizer: Optimizer, pools: dict[str, Pool], rule: Rule) -> None:
    """Hooks on the optimizer: its step, its zero_grad, its load_state_dict. None holds the optimizer itself."""
    kept: dict[nn.Parameter, State] = {}
    owner = ref(optimizer)

    def step(optimizer: Optimizer, *_: Any) -> None:
        _step(optimizer, pools, rule)

    def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        # torch rounds what it loads to the dtype of the parameter; these states are wider, and go round it
        kept.clear()
        numbers = _saved_numbers(optimizer, state_dict)
        state = dict(state_dict["state"])
        for pool in pools.values():
            found = state.pop(numbers.get(id(pool.values)), {})
            device = pool.values.device
            kept[pool.values] = {key: t.clone() if key == "step" else t.to(device, copy=True) for key, t in found.items()}
        return {**state_dict, "state": state}

    def after_load(optimizer: Optimizer) -> None:
        optimizer.state.update({values: state for values, state in kept.items() if state})
        kept.clear()

    def zero_grad(set_to_none: bool = True) -> None:
        for pool in pools.values():
            _queue(pool).take()
        it = owner()
        if it is not None:
            type(it).zero_grad(it, set_to_none=set_to_none)

    for pool in pools.values():  # some optimizers make a state in their constructor, as wide as the table
        state = optimizer.state.get(pool.values, {})
        if not float(state.get("step", 0)):
            optimizer.state.pop(pool.values, None)
    optimizer.register_step_post_hook(step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]  # torch has no hook for it


def _saved_numbers(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[int, Any]:
    """The saved number of each parameter, by the parameter's id: torch goes by their places in the groups."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)  # torch refuses others itself
    return {id(p): number for group, saved in groups for p, number in zip(group["params"], saved["params"], strict=False)}


@dataclass(frozen=True)
class _Update:
    """One pool's step, checked."""

    pool: Pool
    state: State
    reads: list[Factors]
    step: int
    numbers: dict[str, Any]


@torch.no_grad()
def _step(optimizer: Optimizer, pools: dict[str, Pool], rule: Rule) -> None:
    """Update every pool that was read. All are checked before the first is changed; one that fails keeps its gradient."""
    updates = [_ready(optimizer, name, pool, rule) for name, pool in pools.items() if _queue(pool).waiting]
    for update in updates:
        rule.step(update.pool, update.state, update.reads, update.step, update.numbers)
        update.state["step"] += 1
        _queue(update.pool).take()


def _ready(optimizer: Optimizer, name: str, pool: Pool, rule: Rule) -> _Update:
    refuse_capture(pool.values)
    group = _group_of(optimizer, pool.values)
    if group is None:
        hint = "fuse an optimizer that was made with the parameters that the model has now"
        raise UserError(f"{name}.values is another parameter than when the optimizer was fused", hint=hint)
    state = optimizer.state[pool.values]
    if not state:
        state.update(rule.fresh(pool.values), step=torch.zeros((), dtype=torch.float32, device="cpu"))
    _check_state(rule, pool.values, state)
    step = int(state["step"]) + 1
    seed = (pool.spec.seed * 0x9E3779B1 + step) % 2**62  # another one at every step, the same after a resume
    decay = float(group.get("weight_decay", 0.0))
    numbers = {"lr": float(group["lr"]), "weight_decay": decay, "seed": seed, "backend": pool.spec.backend}
    return _Update(pool, state, list(_queue(pool).waiting), step, numbers)


def _check_state(rule: Rule, values: Tensor, state: State) -> None:
    """Refuse what another rule remembered, or what was rounded on its way here."""
    with torch.device("meta"):
        wanted = rule.fresh(torch.empty(values.shape, dtype=values.dtype))
    if {"step", *wanted} != set(state) or any(state[key].dtype != t.dtype for key, t in wanted.items()):
        found = ", ".join(f"{key} {getattr(t, 'dtype', type(t).__name__)}" for key, t in state.items())
        raise UserError(
            f"the optimizer's state of a pool is {found}, which is not what {rule} keeps",
            hint="call load_state_dict after memrewrite.fuse, with the rule that was trained with",
        )


def _lists(reads: list[Factors]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [r.grad for r in reads], [r.indices for r in reads], [r.weights for r in reads]
