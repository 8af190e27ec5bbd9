"""The rule `LazyAdam`: fused Adam with one second moment per element, on the rows that were read.

With `catch_up`, rows are brought up to date before they are read: with the steps that Adam would have made while their gradient
was zero. Flow: forward of the table (a hook that `fuse` adds) → `bring_up_to_date` → backward → `step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from memrewrite.errors import UserError
from memrewrite.kernels import ops, rounding
from memrewrite.kernels.pending import Factors, as_lists
from memrewrite.layers.value_table import Table

CHUNK = 2**18  # elements that are brought up to date at once: in float64 they fit in the cache
NEGLIGIBLE = 2.0**-32  # of a step: a row's own momentum is no longer applied
HISTORY = 256  # steps whose learning rate a new state has room for
NOT_COMPILED = "LazyAdam(catch_up=True) changes rows before a table is read, which cannot be in a compiled or exported graph"


@dataclass(frozen=True)
class LazyAdam:
    """Adam with one second moment per element. Rows that were not read do not change, unless they are caught up.

    The formula is in `kernels.ops.lazy_adam_`. Its state takes 8·D bytes per slot in float32, 4·D in bfloat16, and
    2·D + 8·ceil(D / 128) in float8_e4m3fn (block-wise scales).

    With `catch_up`, training is that of `torch.optim.AdamW` with a dense gradient, to rounding, for any schedule of rate and
    decay: before rows are read, in training or evaluation, they get the steps that they missed. Momentum and decay continue
    during these steps, as in AdamW. The forward of a table, `state_dict` of the model and of the optimizer, and
    `memrewrite.save` see rows that are up to date; before anything else reads `values`, call `memrewrite.catch_up(model)`.
    `torch.compile` and `torch.export` of a module that reads such a table are refused: a graph cannot change it in the forward.

    Attributes:
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        states: Dtype of both moments: "float32", "bfloat16" or "float8_e4m3fn"; the last two are rounded stochastically.
        catch_up: Bring rows up to date before they are read. For states of float32, tables of float32 or bfloat16, and
            β1² < β2 (else momentum would outlive the second moment).
        value_lr_factor: The rate that suits the rule, as a multiple of the other parameters' rate.

    Raises:
        UserError: `states` is another dtype, or `catch_up` does not support the other attributes.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    states: str = "float32"
    catch_up: bool = False
    value_lr_factor: float = 5.0

    def __post_init__(self) -> None:
        if self.states not in ("float32", "bfloat16", "float8_e4m3fn"):
            raise UserError(f"LazyAdam has no states={self.states!r}", hint="float32, bfloat16 or float8_e4m3fn")
        if self.catch_up and self.states != "float32":
            raise UserError(f"catch_up=True needs states in float32, not {self.states}", hint='states="float32"')
        if self.catch_up and not self.betas[0] ** 2 < self.betas[1]:
            raise UserError(f"catch_up=True needs β1² < β2, and betas={self.betas}", hint="betas=(0.9, 0.999)")

    def check(self, name: str, values: Tensor) -> None:
        """Raise `UserError` for a table that the rule does not support."""
        if self.catch_up and values.dtype not in (torch.float32, torch.bfloat16):
            hint = "dtype: float32 or bfloat16, or catch_up=False"
            raise UserError(f"catch_up=True supports no table of {values.dtype}, as {name}.values", hint=hint)

    def fresh(self, values: Tensor) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq` [N, D], zeros, with scales [N, ceil(D / 128)] in 8 bits; with `catch_up`, a history.

        The history is `row_step` [N], the step to which a row is up to date, and for every step the learning rate `rates` and
        `log_keep`, the logarithm of the product of all `1 - lr · decay` so far.
        """
        dtype = getattr(torch, self.states)
        moments = ("exp_avg", "exp_avg_sq")
        state = {name: values.new_zeros(values.shape, dtype=dtype) for name in moments}
        if dtype == rounding.FP8:
            blocks = (values.shape[0], rounding.blocks_of(values.shape[1]))
            state |= {f"{name}_scale": values.new_ones(blocks, dtype=torch.float32) for name in moments}
        if self.catch_up:
            state["row_step"] = values.new_zeros(values.shape[0], dtype=torch.int32)
            state |= {name: values.new_zeros(HISTORY, dtype=torch.float64) for name in ("rates", "log_keep")}
        return state

    def step(self, pool: Table, state: dict[str, Tensor], reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        """Update the rows that were read, in place. Raises `UserError` if a forward did not bring them up to date."""
        lists = as_lists(reads)
        rows = torch.cat([index.flatten() for index in lists[1]]).unique() if self.catch_up else None  # type: ignore[no-untyped-call]
        if rows is not None:
            if not bool((state["row_step"][rows] == step - 1).all()):
                raise UserError(
                    "a fused table was read without the hook that brings its rows up to date",
                    hint="call the pool's forward, and torch.compile only after memrewrite.fuse",
                )
            _record(state, step, numbers["lr"], numbers["weight_decay"])
        moments = (state["exp_avg"], state.get("exp_avg_scale"), state["exp_avg_sq"], state.get("exp_avg_sq_scale"))
        ops.lazy_adam_(pool.values, pool.scale, *moments, *lists, betas=self.betas, eps=self.eps, step=step, **numbers)
        if rows is not None:
            state["row_step"][rows] = step

    @torch.no_grad()
    def bring_up_to_date(self, pool: Table, state: dict[str, Tensor], rows: Tensor | None = None) -> None:
        """Apply to rows the steps that they missed, in place; `rows` are slots of any shape, by default all."""
        now = int(state["step"])
        known = state["row_step"]
        if rows is None:
            stale = (known < now).nonzero().flatten()
        else:
            rows = rows.flatten()
            stale = rows[known[rows] < now].unique()  # type: ignore[no-untyped-call]
        table = pool.values.data  # a change of rows that no lookup has read: backward passes need not see it
        random = torch.Generator(table.device).manual_seed(pool.seed_at(now))
        for part in stale.split(max(1, CHUNK // max(1, table.shape[1]))):  # type: ignore[no-untyped-call]
            moments = state["exp_avg"][part], state["exp_avg_sq"][part]
            row, mean, square = self._missed(table[part], *moments, known[part].long(), now, state)
            table[part] = rounding.stored(row.float(), table.dtype, random)
            state["exp_avg"][part], state["exp_avg_sq"][part], known[part] = mean.float(), square.float(), now

    def _missed(
        self, row: Tensor, mean: Tensor, square: Tensor, since: Tensor, now: int, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, D] and their moments after the steps `since` [R] + 1 to `now` with zero gradients, in float64.

        The step that is n after `since` moves a row by `lr_n (β1^n m / c1_n) / (sqrt(β2^n v / c2_n) + eps)`, and the decays of
        the later steps shrink it. After some n, nothing is left of it: β1^n falls faster than sqrt(β2^n).
        """
        (beta1, beta2), rates, log_keep = self.betas, state["rates"], state["log_keep"]
        row, mean, square = row.double(), mean.double(), square.double()
        row *= (log_keep[now] - log_keep[since]).exp().unsqueeze(-1)
        moving = (mean != 0).any(-1).nonzero().flatten()
        moving = moving[since[moving].argsort()]  # those that missed more steps first
        step, momentum, root = since[moving], mean[moving], square[moving].sqrt()
        counts = (now - step).bincount().flip(0).cumsum(0).flip(0).tolist()  # [n]: rows that missed n steps or more
        change = torch.zeros_like(momentum)
        for n, count in enumerate(counts[1 : 1 + _lifetime(beta1, beta2)], 1):
            number = step[:count] + n
            bias1, bias2 = (1 - beta ** number.double() for beta in self.betas)
            left = rates[number] * beta1**n / bias1 * (log_keep[now] - log_keep[number]).exp()
            below = root[:count] * (beta2**n / bias2).sqrt().unsqueeze(-1) + self.eps
            change[:count] += momentum[:count] * left.unsqueeze(-1) / below
        gap = (now - since).double().unsqueeze(-1)
        return row.index_add_(0, moving, change, alpha=-1), mean * beta1**gap, square * beta2**gap


def _lifetime(beta1: float, beta2: float) -> int:
    """The number of steps after which the momentum of a row is negligible."""
    return 0 if beta1 == 0 else math.ceil(math.log(NEGLIGIBLE) / math.log(beta1 / beta2**0.5))


def _record(state: dict[str, Tensor], step: int, lr: float, weight_decay: float) -> None:
    """Add a step to the history. Raises `UserError` if the decay would not leave anything of a row."""
    if not lr * weight_decay < 1:
        raise UserError(
            f"a learning rate of {lr} with a weight decay of {weight_decay} leaves nothing of a row", hint="lr · decay < 1"
        )
    for name, number in (("rates", lr), ("log_keep", float(state["log_keep"][step - 1]) + math.log1p(-lr * weight_decay))):
        if step >= state[name].numel():
            state[name] = torch.cat([state[name], torch.zeros_like(state[name])])
        state[name][step] = number


class CatchUp:
    """Hook of one table: rows are brought up to date before a forward reads them, and all rows before they are saved.

    It does not keep the optimizer, but the state of its table, so that rows are right after the optimizer was deleted. Copies
    of the hook, which belong to copies of the table, do nothing.
    """

    def __init__(self, optimizer: Optimizer | None = None, rule: LazyAdam | None = None) -> None:
        self._optimizer = None if optimizer is None else ref(optimizer)
        self._rule = rule
        self._state: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type[CatchUp], tuple[()]]:
        return CatchUp, ()

    def attach(self, pool: Table) -> None:
        """Add the hook to a table and, for the table, to its optimizer."""
        self._handles = [
            pool.register_forward_pre_hook(self, with_kwargs=True),
            pool.register_state_dict_pre_hook(self.flush),  # type: ignore[no-untyped-call]
        ]
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            optimizer.register_state_dict_pre_hook(lambda _: self.flush(pool))

    def __call__(self, pool: Table, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bring the rows up to date that the forward is called with."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=NOT_COMPILED)  # else the error would be caught, and the frame run without compiling
            raise UserError(NOT_COMPILED, hint="catch_up=False; to export a model, save it and load it again")
        self._bring(pool, args[0] if args else kwargs["indices"])

    def flush(self, pool: Table, *_: Any) -> None:
        """Bring all rows up to date."""
        self._bring(pool, None)

    def follow(self, pool: Table) -> None:
        """Keep the present state of the table, after a step or a load has replaced it."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._state = optimizer.state.get(pool.values, {})

    def _bring(self, pool: Table, rows: Tensor | None) -> None:
        self.follow(pool)
        if self._rule is not None and "row_step" in self._state:
            self._rule.bring_up_to_date(pool, self._state, rows)

    def remove(self, pool: Table) -> None:
        """Bring all rows up to date, and remove the hook from its table."""
        self.flush(pool)
        for handle in self._handles:
            handle.remove()


def hooks_of(module: nn.Module) -> list[CatchUp]:
    """The hooks of a table that bring its rows up to date."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, CatchUp)]


def catch_up(model: nn.Module) -> None:
    """Bring all rows of the tables up to date that `LazyAdam(catch_up=True)` updates; no effect on other tables.

    Call it before something else than the forward of a model reads its tables: a copy of the model, an average of weights, or
    `values` itself. `state_dict` and `memrewrite.save` do it themselves.

    Args:
        model: A model whose optimizer `memrewrite.fuse` extended.
    """
    for module in model.modules():
        for hook in hooks_of(module):
            hook.flush(module)  # type: ignore[arg-type]  # only tables have such hooks
