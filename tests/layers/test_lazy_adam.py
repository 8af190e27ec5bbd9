"""The rule `LazyAdam`: training compared with `torch.optim.AdamW` on the dense gradient, and rows that catch up."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from closeness import relative_error
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import UserError
from memrewrite.fused import LazyAdam, RowwiseAdam, fuse
from memrewrite.kernels import ops
from memrewrite.layers.value_table import ValueTable

FP8 = torch.float8_e4m3fn
STATES = ["float32", "bfloat16", "float8_e4m3fn"]
N, D, T, K = 50, 12, 6, 3


class TwoReads(nn.Module):
    """Two lookups of one table with weights that are trained too; the rows are those of `batch`."""

    def __init__(self, gradient: str = "fused", dtype: torch.dtype = torch.float32, rows: int = N) -> None:
        super().__init__()
        self.table = ValueTable(rows, D, gradient=gradient, dtype=dtype)
        self.mix = nn.Linear(D, 2 * K, dtype=dtype if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            self.table.values.copy_(torch.randn(rows, D, generator=torch.Generator().manual_seed(0)))
            for p in self.mix.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        first, second = self.mix(x.to(self.mix.weight.dtype)).chunk(2, -1)
        y = self.table(slots[0], first).to(first.dtype)
        return y + self.table(slots[1], second + y[:, :K]).to(first.dtype)


def batch(step: int, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, slots and targets: a few rows are read often, most of them rarely, the last ten never."""
    g = torch.Generator().manual_seed(step)
    slots = torch.where(torch.rand(2, T, K, generator=g) < 0.7, 5, rows - 10)
    slots = (torch.rand(2, T, K, generator=g) * slots).long()
    return torch.randn(T, D, generator=g), slots, torch.randn(T, D, generator=g)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, slots, target = batch(step)
    y = model(x, slots)
    return (y - target.to(y.dtype)).square().mean()


def optimizer_of(model: TwoReads, rule: LazyAdam | None) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.table.values], "lr": 3e-2, "weight_decay": 0.2},
        {"params": list(model.mix.parameters()), "lr": 1e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    if rule is not None:
        fuse(optimizer, model, rule)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, run: nn.Module | None = None) -> list[float]:
    """The rate of every step is another: warm-up, then decay."""
    losses = []
    for step in steps:
        for group, peak in zip(optimizer.param_groups, (3e-2, 1e-2), strict=True):
            group["lr"] = peak * min((step + 1) / 5, 1 - step / 60)
        optimizer.zero_grad()
        loss = loss_of(run or model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CATCH_UP = LazyAdam(betas=(0.9, 0.99), catch_up=True)


def test_caught_up_training_is_adamw_on_the_dense_gradient():
    """40 steps, rows read rarely or never, a schedule, decay: as close to AdamW in float64 as AdamW in fp32 is."""
    lazy, dense, exact = TwoReads(), TwoReads("dense"), TwoReads("dense", torch.float64)
    runs = [(lazy, optimizer_of(lazy, CATCH_UP)), (dense, optimizer_of(dense, None)), (exact, optimizer_of(exact, None))]
    losses = [train(model, optimizer, range(40)) for model, optimizer in runs]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    stale = runs[0][1].state[lazy.table.values]["row_step"]
    assert (stale < 30).sum() >= 10
    never = lazy.table.values[-10:].clone()
    tables = [model.state_dict()["table.values"] for model, _ in runs]  # brings all rows up to date
    assert (stale == 40).all()
    assert not torch.equal(never, lazy.table.values[-10:])  # decayed
    assert relative_error(tables[0], tables[2]) <= max(2 * relative_error(tables[1], tables[2]), 1e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[model.table.values][name] for model, optimizer in runs]
        assert relative_error(moments[0], moments[2]) <= 2e-6


def test_without_catching_up_it_is_another_rule():
    lazy, exact = TwoReads(), TwoReads("dense", torch.float64)
    train(lazy, optimizer_of(lazy, LazyAdam(betas=(0.9, 0.99))), range(40))
    train(exact, optimizer_of(exact, None), range(40))
    assert relative_error(lazy.table.values, exact.table.values) > 1e-3
