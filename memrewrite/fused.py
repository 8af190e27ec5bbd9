"""Fused updates of value tables: an optimizer step updates the rows that were read, without a gradient of the table.

Flow: backward → gradient factors queued in the pool (`kernels.pending`) → `optimizer.step()` → one pass over the rows read.
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
from memrewrite.kernels.pending import Factors, Pending, as_lists, refuse_capture
from memrewrite.layers.value_table import Table
from memrewrite.lazy_adam import CatchUp, LazyAdam, hooks_of

__all__ = ["LazyAdam", "RowwiseAdagrad", "RowwiseAdam", "Rule", "fuse"]

State = dict[str, Tensor]


class Rule(Protocol):
    """An update rule for the rows of a table: its optimizer state, and one step.

    Attributes:
        value_lr_factor: The rate of the tables that suits the rule, as a multiple of the other parameters' rate.
    """

    @property
    def value_lr_factor(self) -> float:
        """A multiple of the other parameters' rate; `memrewrite.param_groups` uses it."""

    def fresh(self, values: Tensor) -> State:
        """The state before the first step, for a table `values` [N, D]."""

    def step(self, pool: Table, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read, in place.

        Args:
            pool: The table that is updated.
            state: State that `fresh` created; updated in place.
            reads: Gradient factors of every lookup since the last step.
            step: Number of this step, from 1.
            numbers: `lr`, `weight_decay`, `seed` and `backend`.
        """


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one fp32 accumulator per row. Table and state take 2·D + 4 bytes per slot in bf16, D + 8 in fp8.

    The formula is in `kernels.ops.rowwise_adagrad_`.

    Attributes:
        eps: Added to the square root of the accumulator.
        value_lr_factor: The rate that suits the rule, as a multiple of the other parameters' rate.
    """

    eps: float = 1e-8
    value_lr_factor: float = 5.0

    def fresh(self, values: Tensor) -> State:
        """`total` fp32 [N], zeros."""
        return {"total": values.new_zeros(values.shape[0], dtype=torch.float32)}

    def step(self, pool: Table, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read, in place."""
        ops.rowwise_adagrad_(pool.values, pool.scale, state["total"], *as_lists(reads), eps=self.eps, **numbers)


@dataclass(frozen=True)
class RowwiseAdam:
    """Adam with one fp32 second moment per row; the first moment is bf16, or fp32 for fp32 tables.

    Rows that were not read do not change: no update and no decay, as in `torch.optim.SparseAdam`. The formula is in
    `kernels.ops.rowwise_adam_`.

    Attributes:
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        value_lr_factor: The rate that suits the rule, as a multiple of the other parameters' rate.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    value_lr_factor: float = 5.0

    def fresh(self, values: Tensor) -> State:
        """`exp_avg` [N, D] and `exp_avg_sq` fp32 [N], zeros."""
        dtype = torch.float32 if values.dtype == torch.float32 else torch.bfloat16
        return {
            "exp_avg": values.new_zeros(values.shape, dtype=dtype),
            "exp_avg_sq": values.new_zeros(values.shape[0], dtype=torch.float32),
        }

    def step(self, pool: Table, state: State, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read, in place."""
        moments = state["exp_avg"], state["exp_avg_sq"]
        ops.rowwise_adam_(
            pool.values, pool.scale, *moments, *as_lists(reads), betas=self.betas, eps=self.eps, step=step, **numbers
        )


DEFAULT_RULE: Rule = LazyAdam(states="bfloat16")  # learns as much as AdamW, with half of its state: docs/knowledge.md


def fuse(optimizer: Optimizer, model: nn.Module, rule: Rule | None = None) -> None:
    """Make `optimizer.step()` update the tables of the pools of `model` whose gradient is "fused" and that are not frozen.

    These are the `values` of a pool, and also its `inputs.values` for `peer`; each has a state of its own. Learning rate and
    weight decay are those of the parameter group that contains the table, read at every step. Weight decay is decoupled and
    applies to the rows that were read. The state of the update is in `optimizer.state`, so `state_dict` and `load_state_dict`
    include it; call `load_state_dict` after `fuse`. Gradients accumulate exactly over micro-batches until the step.
    `optimizer.zero_grad()` discards them; `model.zero_grad()` does not. torch's gradient clipping and `GradScaler` see only the
    other parameters: use `memrewrite.clip_grad_norm_` and `memrewrite.unscale_`.

    Args:
        optimizer: The optimizer that contains the tables as parameters; a wrapper around it is accepted.
        model: The model with the pools.
        rule: `RowwiseAdagrad`, `RowwiseAdam` or `LazyAdam`. Default: `LazyAdam(states="bfloat16")`.

    Raises:
        UserError: No pool is fused, or all are frozen; a table is float64, not in the optimizer, or already updated by an
            optimizer; the rule does not support its dtype; the optimizer maximizes; or several processes train (each would
            update its own copy).
    """
    optimizer = innermost(optimizer)
    found = {name: m for name, m in model.named_modules() if isinstance(m, Table) and m.pending is not None}
    if not found:
        raise UserError('no pool of this model has the gradient "fused"', hint="set `gradient: fused` for it in the recipe")
    pools = {name: table for name, table in found.items() if table.values.requires_grad}
    if not pools:
        what = "the tables with fused updates are frozen: they require no gradient"
        raise UserError(what, where=", ".join(found), hint="table.values.requires_grad_()")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UserError("fused updates need a single process: other processes would not get them", hint="gradient: dense")
    rule = rule or DEFAULT_RULE
    for name, pool in pools.items():
        _check(optimizer, name, pool)
        if isinstance(rule, LazyAdam):
            rule.check(name, pool.values)
    _attach(optimizer, pools, rule)
    for pool in pools.values():
        _queue(pool).taker = optimizer
        for old in hooks_of(pool):  # of an optimizer that was deleted
            old.remove(pool)
        if isinstance(rule, LazyAdam) and rule.catch_up:
            CatchUp(optimizer, rule).attach(pool)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that performs the step: some libraries wrap it in one that only forwards calls and has no hooks."""
    while "_optimizer_step_post_hooks" not in vars(optimizer) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def _queue(pool: Table) -> Pending:
    if pool.pending is None:
        raise UserError("this pool is not fused", hint="gradient: fused")
    return pool.pending


def _check(optimizer: Optimizer, name: str, pool: Table) -> None:
    group = _group_of(optimizer, pool.values)
    if group is None:
        hint = "build it with memrewrite.param_groups(model, lr=...)"
        raise UserError(f"the optimizer has no parameter {name}.values", hint=hint)
    if group.get("maximize"):
        raise UserError("a fused update minimizes, and this optimizer maximizes", hint="maximize=False")
    if pool.values.dtype == torch.float64:
        raise UserError(f"{name}.values is float64, which has no fused update", hint="gradient: dense")
    taker = _queue(pool).taker
    if taker is not None:
        hint = "call memrewrite.fuse with one optimizer only"
        raise UserError(f"an optimizer ({type(taker).__name__}) already updates {name}", hint=hint)


def _group_of(optimizer: Optimizer, values: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(p is values for p in g["params"])), None)


def _attach(optimizer: Optimizer, pools: dict[str, Table], rule: Rule) -> None:
    """Hook into step, zero_grad and load_state_dict of the optimizer. No hook keeps a reference to the optimizer."""
    loaded: dict[nn.Parameter, State] = {}
    owner = ref(optimizer)

    def step(optimizer: Optimizer, *_: Any) -> None:
        _step(optimizer, pools, rule)

    def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        # torch casts loaded states to the dtype of the parameter; these states are wider and must bypass the cast
        loaded.clear()
        numbers = _saved_numbers(optimizer, state_dict)
        state = dict(state_dict["state"])
        for pool in pools.values():
            found = state.pop(numbers.get(id(pool.values)), {})
            device = pool.values.device
            loaded[pool.values] = {key: t.clone() if key == "step" else t.to(device, copy=True) for key, t in found.items()}
        return {**state_dict, "state": state}

    def after_load(optimizer: Optimizer) -> None:
        optimizer.state.update({values: state for values, state in loaded.items() if state})
        loaded.clear()

    def zero_grad(set_to_none: bool = True) -> None:
        for pool in pools.values():
            _queue(pool).take()
        it = owner()
        if it is not None:
            type(it).zero_grad(it, set_to_none=set_to_none)

    for pool in pools.values():  # some optimizers create state in their constructor, as large as the table
        state = optimizer.state.get(pool.values, {})
        if not float(state.get("step", 0)):
            optimizer.state.pop(pool.values, None)
    optimizer.register_step_post_hook(step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(after_load)
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]  # torch has no hook for it


def _saved_numbers(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[int, Any]:
    """The saved number of each parameter, by the parameter's id: torch matches them by position in the groups."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)  # torch itself refuses different groups
    return {id(p): number for group, saved in groups for p, number in zip(group["params"], saved["params"], strict=False)}


@dataclass(frozen=True)
class _Update:
    """One pool's step, after all checks."""

    pool: Table
    state: State
    reads: list[Factors]
    step: int
    numbers: dict[str, Any]


@torch.no_grad()
def _step(optimizer: Optimizer, pools: dict[str, Table], rule: Rule) -> None:
    """Update every pool that was read. All are checked before the first changes; a failed one keeps its gradient."""
    updates = [_ready(optimizer, name, pool, rule) for name, pool in pools.items() if _queue(pool).waiting]
    for update in updates:
        rule.step(update.pool, update.state, update.reads, update.step, update.numbers)
        update.state["step"] += 1
        for hook in hooks_of(update.pool):
            hook.follow(update.pool)
        _queue(update.pool).take()


def _ready(optimizer: Optimizer, name: str, pool: Table, rule: Rule) -> _Update:
    refuse_capture(pool.values)
    group = _group_of(optimizer, pool.values)
    if group is None:
        hint = "create the optimizer with the present parameters of the model, then call memrewrite.fuse again"
        raise UserError(f"{name}.values was replaced by another parameter after memrewrite.fuse", hint=hint)
    state = optimizer.state[pool.values]
    if not state:
        state.update(rule.fresh(pool.values), step=torch.zeros((), dtype=torch.float32, device="cpu"))
    _check_state(rule, pool.values, state)
    step = int(state["step"]) + 1
    decay = float(group.get("weight_decay", 0.0))
    numbers = {"lr": float(group["lr"]), "weight_decay": decay, "seed": pool.seed_at(step), "backend": pool.backend}
    return _Update(pool, state, list(_queue(pool).waiting), step, numbers)


def _check_state(rule: Rule, values: Tensor, state: State) -> None:
    """Raise `UserError` for the state of another rule, or for a state in another dtype or number of dimensions."""
    with torch.device("meta"):
        wanted = rule.fresh(torch.empty(values.shape, dtype=values.dtype))
    kinds = {key: (t.dtype, t.dim()) for key, t in wanted.items()}
    if {"step", *kinds} != set(state) or any((state[key].dtype, state[key].dim()) != kind for key, kind in kinds.items()):
        found = ", ".join(f"{key} {getattr(t, 'dtype', type(t).__name__)} {list(t.shape)}" for key, t in state.items())
        raise UserError(
            f"the optimizer state of a pool is {found}, which is not the state of {rule}",
            hint="call load_state_dict after memrewrite.fuse, with the rule used in training",
        )
