"""How the tables are updated: the fused rules, and torch's optimizers on the gradient of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from settings import Setting
from torch import nn
from torch.optim import Optimizer

import memrewrite
from memrewrite.fused import Rule
from memrewrite.training import VALUES

BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Update:
    """One way to update a table.

    Attributes:
        gradient: `gradient` of the pool.
        rule: The fused rule; None for torch's optimizers.
    """

    gradient: str
    rule: Callable[[], Rule] | None = None


RULES: dict[str, Update] = {
    "adamw": Update("dense"),
    "sparse-adam": Update("sparse"),
    "lazy-adam": Update("fused", memrewrite.LazyAdam),
    "lazy-adam-bf16": Update("fused", lambda: memrewrite.LazyAdam(states="bfloat16")),
    "lazy-adam-8bit": Update("fused", lambda: memrewrite.LazyAdam(states="float8_e4m3fn")),
    "rowwise-adam": Update("fused", memrewrite.RowwiseAdam),
    "rowwise-adagrad": Update("fused", memrewrite.RowwiseAdagrad),
}


def optimizers(setting: Setting, model: nn.Module) -> list[Optimizer]:
    """The optimizers of one run; their groups are those of `memrewrite.param_groups`, with its names."""
    update = RULES[setting.rule]
    rate, value_rate = setting.lr, setting.lr * setting.value_factor
    decays = {"weight_decay": setting.weight_decay, "value_decay": setting.value_decay}
    rest, tables = memrewrite.param_groups(model, rate, value_rate, **decays)
    if update.gradient == "sparse" and tables["params"]:
        sparse = torch.optim.SparseAdam([{"params": tables["params"], "lr": value_rate, "name": VALUES}], betas=BETAS)
        return [torch.optim.AdamW([rest], betas=BETAS), sparse]
    both = torch.optim.AdamW([rest, tables], betas=BETAS)
    if update.rule is not None and tables["params"]:
        memrewrite.fuse(both, model, rule=update.rule())
    return [both]


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Bytes of the states of the tables, as far as they are tensors of more than one element."""
    tables = [p for o in optimizers for group in o.param_groups if group["name"] == VALUES for p in group["params"]]
    states = [t for o in optimizers for p in tables for t in o.state.get(p, {}).values()]
    return sum(t.numel() * t.element_size() for t in states if isinstance(t, torch.Tensor) and t.numel() > 1)
