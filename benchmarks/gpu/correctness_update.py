"""Correctness of the fused updates on the device, and the two comparisons that every check uses.

The rules are implemented here again, in float64 and with a dense gradient, so that they share no mistake with the kernels.
"""

from __future__ import annotations

from collections.abc import Generator

import data as data
import torch
from calls import poison
from harness import Bench, Stop
from torch import Tensor

from memrewrite.kernels import rounding

RATES = {"lr": 0.05, "eps": 1e-8, "weight_decay": 0.1}
BETAS = {"beta1": 0.9, "beta2": 0.9}  # a state in bf16 that keeps its old values differs by more than its rounding
STEP = 3
SLOTS = 2000
ONE = 0x38  # the e4m3 code of 1
STEPS = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float8_e4m3fn: 0.08,
}  # allowed error of what is rounded stochastically
Check = Generator[
    None, None, "float | str"
]  # runs the kernels, yields, compares; returns the largest relative error, or a note


def close(name: str, got: Tensor | None, want: Tensor, tolerance: float) -> float:
    """The relative error. Raises Stop if it is too large, or NaN."""
    if got is None or got.shape != want.shape:
        raise Stop(f"{name}: the shape is {None if got is None else tuple(got.shape)}, not {tuple(want.shape)}")
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    if not error <= tolerance:  # NaN never passes
        raise Stop(f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def same(name: str, one: Tensor | None, two: Tensor | None) -> None:
    """Raise Stop unless both are equal bit for bit."""
    if one is None or two is None or not torch.equal(one, two):
        raise Stop(f"{name}: not the same bits")


def updates(
    bench: Bench, rule: str, dim: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], kind: torch.dtype | None = None
) -> Check:
    """A step with one lookup, and one with two lookups of one table: read rows follow the rule, others do not change.

    `dtypes` are those of the table, of the output's gradient, and of the weights; `kind` is that of the moments of lazy Adam.
    The same seed gives the same bits. Rows in fp8 are within half a rounding step on average, each scaled so that its largest
    entry is 448.
    """
    dtype, *others = dtypes
    slots, device = 100 if bench.rehearse else SLOTS, bench.device
    scale: Tensor | None = None
    if dtype.itemsize == 1:
        values, scale = data.fp8_table(slots, dim, device)
    else:
        values = data.table(slots, dim, dtype, device)
    ran = []
    for lookups in _lookups(bench, slots, dim, *others):
        tables = [(values.clone(), None if scale is None else scale.clone()) for _ in range(2)]
        states = [step(bench, rule, *table, *lookups, kind=kind) for table in tables]
        ran.append((lookups, tables, states[0]))
    yield
    error = 0.0
    for lookups, ((got, scales), (again, _)), state in ran:
        want, want_state, rows = expected(rule, wide_of(values, scale), *lookups)
        same("rows that were not read", got[~rows].view(torch.uint8), values[~rows].view(torch.uint8))
        same("the table, with the same seed", got.view(torch.uint8), again.view(torch.uint8))
        if scale is not None and scales is not None:
            same("scales of rows that were not read", scales[~rows], scale[~rows])
            close("scales", scales[rows], want[rows].abs().amax(-1) / 448, 1e-5)
        error = max(error, close("rows", wide_of(got, scales), want, STEPS[dtype]))
        for name, moment in want_state.items():
            error = max(error, close(name, *comparable(name, state, moment), STEPS[state[name].dtype]))
    return error


def comparable(name: str, state: dict[str, Tensor], want: Tensor) -> tuple[Tensor, Tensor]:
    """A state in float64, and what to compare it with: states of 8 bits have a scale per block, and the roots of squares."""
    got, scale = state[name].float().double(), state.get(f"{name}_scale")
    if scale is None:
        return got, want
    return got * rounding.by_column(scale, got.shape[1]), want.sqrt() if name == "exp_avg_sq" else want


def wide_of(values: Tensor, scale: Tensor | None) -> Tensor:
    """A table in float64."""
    return values.double() if scale is None else values.float().double() * scale.double().unsqueeze(-1)


def moving(bench: Bench) -> Check:
    """A step far below the spacing of bf16 must still move a table of ones by its own size on average."""
    slots, dim = (16, 64) if bench.rehearse else (1024, 1024)
    values = torch.ones(slots, dim, dtype=torch.bfloat16, device=bench.device)
    indices = torch.arange(slots, device=bench.device).unsqueeze(-1)
    one = torch.ones_like(indices, dtype=torch.bfloat16)
    total = torch.zeros(slots, device=bench.device)
    lr, spacing = 2.0**-12, 2.0**-8
    rates = {"lr": lr, "eps": 0.0, "weight_decay": 0.0}
    bench.kernels.adagrad_(values, None, total, [torch.ones_like(values)], [indices], [one], **rates, seed=7)
    yield
    moved = float((1 - values.double()).mean())
    deviation = (lr * (spacing - lr) / values.numel()) ** 0.5
    if not abs(moved - lr) <= 5 * deviation:
        raise Stop(f"the mean step is {moved:.3e}, not {lr:.3e} ± {deviation:.1e}")
    return f"mean step off by {abs(moved - lr) / deviation:.1f} standard deviations"


Lookups = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _lookups(bench: Bench, slots: int, dim: int, dtype: torch.dtype, weight: torch.dtype) -> tuple[Lookups, Lookups]:
    """One lookup, with a row that every token reads; and two of one table, with different numbers of tokens."""
    device, many = bench.device, bench.sizes.reads
    sizes = [("hot", 4, 2), ("uniform", 5, 3)] if bench.rehearse else [("hot", 333, many), ("uniform", 60, 7)]
    indices = [data.slots_read(p, t, k, slots, device, seed=s) for s, (p, t, k) in enumerate(sizes)]
    weights = [data.normal(t, k, dtype=weight, device=device, seed=s + 10) for s, (_, t, k) in enumerate(sizes)]
    grads = [data.normal(t, dim, dtype=dtype, device=device, seed=s + 20) for s, (_, t, _) in enumerate(sizes)]
    return (grads[:1], indices[:1], weights[:1]), (grads, indices, weights)


def step(
    bench: Bench,
    rule: str,
    values: Tensor,
    scale: Tensor | None,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
    fill: Tensor | slice = slice(None),
    kind: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The kernel's step, in place; returns the new state.

    First moments start at 0.25 and second ones at 0.5 in the rows `fill`; elsewhere, those of elements are NaN. `kind` is the
    dtype of the moments of lazy Adam.
    """
    if rule == "lazy_adam":
        moments = _moments(values, kind or values.dtype, fill)
        tables = (moments.get(name) for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"))
        reads = (grads, indices, weights)
        bench.kernels.lazy_adam_(values, scale, *tables, *reads, **RATES, **BETAS, step=STEP, seed=7)
        return moments
    rowwise = torch.full((values.shape[0],), 0.5, device=values.device)
    if rule == "adagrad":
        bench.kernels.adagrad_(values, scale, rowwise, grads, indices, weights, **RATES, seed=7)
        return {"total": rowwise}
    mean = torch.full(
        values.shape, torch.nan, dtype=values.dtype if values.itemsize > 1 else torch.bfloat16, device=values.device
    )
    mean[fill] = 0.25
    bench.kernels.adam_(values, scale, mean, rowwise, grads, indices, weights, **RATES, **BETAS, step=STEP, seed=7)
    return {"exp_avg": mean, "exp_avg_sq": rowwise}


def _moments(values: Tensor, kind: torch.dtype, fill: Tensor | slice) -> dict[str, Tensor]:
    """The moments of lazy Adam before a step, with scales if they have 8 bits."""
    state: dict[str, Tensor] = {}
    for name, start in (("exp_avg", 0.25), ("exp_avg_sq", 0.5)):
        state[name] = table = poison(torch.empty(values.shape, dtype=kind, device=values.device))
        if kind.itemsize == 1:
            table.view(torch.uint8)[fill] = ONE
            blocks = (values.shape[0], rounding.blocks_of(values.shape[1]))
            state[f"{name}_scale"] = scale = torch.full(blocks, torch.nan, device=values.device)
            scale[fill] = start**0.5 if name == "exp_avg_sq" else start
        else:
            table[fill] = start
    return state


def expected(
    rule: str, p: Tensor, grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The same step by the rule in float64: new table, new state, and which rows were read."""
    g, rows = torch.zeros_like(p), torch.zeros(p.shape[0], dtype=torch.bool, device=p.device)
    for grad, index, weight in zip(grads, indices, weights, strict=True):
        for j in range(index.shape[1]):
            g.index_add_(0, index[:, j].long(), weight[:, j, None].double() * grad.double())
        rows[index.flatten().long()] = True
    square, lr = g.square() if rule == "lazy_adam" else g.square().mean(-1), RATES["lr"]
    decayed = p * (1 - lr * RATES["weight_decay"])
    if rule == "adagrad":
        total = 0.5 + square
        new = decayed - lr * g / (total.sqrt() + RATES["eps"]).unsqueeze(-1)
        state = {"total": total}
    else:
        beta1, beta2 = BETAS["beta1"], BETAS["beta2"]
        mean = beta1 * 0.25 + (1 - beta1) * g
        second = beta2 * 0.5 + (1 - beta2) * square
        root = (second / (1 - beta2**STEP)).sqrt() + RATES["eps"]
        new = decayed - lr * mean / (1 - beta1**STEP) / (root if rule == "lazy_adam" else root.unsqueeze(-1))
        state = {"exp_avg": mean, "exp_avg_sq": second}
    before = {"total": 0.5, "exp_avg": 0.25, "exp_avg_sq": 0.5}
    for name, new_state in state.items():
        new_state[~rows] = before[name]
    return torch.where(rows.unsqueeze(-1), new, p), state, rows
