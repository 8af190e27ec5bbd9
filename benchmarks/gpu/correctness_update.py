"""Correctness of the fused updates on the device, and the two comparisons that every check uses.

The rules are implemented here again, in float64 and with a dense gradient, so that they share no mistake with the kernels.
"""

from __future__ import annotations

import data as data
import torch
from harness import Bench, Stop
from torch import Tensor

RATES = {"lr": 0.05, "eps": 1e-8, "weight_decay": 0.1}
BETAS = {"beta1": 0.9, "beta2": 0.99}
STEP = 3


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


def updates(bench: Bench, rule: str, dim: int, dtype: torch.dtype) -> float:
    """One step with two lookups on one table: touched rows follow the rule, others do not change; same bits in two runs."""
    slots = 100 if bench.rehearse else 2000
    values = data.table(slots, dim, dtype, bench.device)
    lookups = _lookups(bench, slots, dim, dtype)
    got, state, _ = step(bench, rule, values, None, *lookups)
    want, want_state, rows = expected(rule, values.double(), *lookups)
    if not torch.equal(got[~rows], values[~rows]):
        raise Stop("a row that was not read was changed")
    exact = dtype == torch.float32
    error = close("rows", got, want, 1e-5 if exact else 1e-2)
    for name in want_state:
        loose = state[name].dtype == torch.bfloat16
        error = max(error, close(name, state[name], want_state[name], 1e-2 if loose else 1e-5))
    again, _, _ = step(bench, rule, values, None, *lookups)
    if not torch.equal(got, again):
        raise Stop("the same seed gave different bits")
    return error


def fp8_update(bench: Bench, rule: str, dim: int) -> float:
    """A table in fp8: rows within half a rounding step on average, each scaled so that its largest entry is 448."""
    slots = 100 if bench.rehearse else 2000
    values, scale = data.fp8_table(slots, dim, bench.device)
    wide = values.float().double() * scale.double().unsqueeze(-1)
    lookups = _lookups(bench, slots, dim, torch.float32)
    got, _, scales = step(bench, rule, values, scale, *lookups)
    want, _, rows = expected(rule, wide, *lookups)
    assert scales is not None
    close("scales", scales[rows], want[rows].abs().amax(-1) / 448, 1e-5)
    if not torch.equal(got[~rows].view(torch.uint8), values[~rows].view(torch.uint8)):
        raise Stop("a row that was not read was changed")
    return close("rows", got.float() * scales.unsqueeze(-1), want, 0.08)


def moving(bench: Bench) -> str:
    """A step far below the spacing of bf16 must still move a table of ones by its own size on average."""
    slots, dim = (16, 64) if bench.rehearse else (1024, 1024)
    values = torch.ones(slots, dim, dtype=torch.bfloat16, device=bench.device)
    indices = torch.arange(slots, device=bench.device).unsqueeze(-1)
    one = torch.ones_like(indices, dtype=torch.bfloat16)
    total = torch.zeros(slots, device=bench.device)
    lr, spacing = 2.0**-12, 2.0**-8
    rates = {"lr": lr, "eps": 0.0, "weight_decay": 0.0}
    bench.kernels.adagrad_(values, None, total, [torch.ones_like(values)], [indices], [one], **rates, seed=7)
    moved = float((1 - values.double()).mean())
    deviation = (lr * (spacing - lr) / values.numel()) ** 0.5
    if not abs(moved - lr) <= 5 * deviation:
        raise Stop(f"the mean step is {moved:.3e}, not {lr:.3e} ± {deviation:.1e}")
    return f"mean step off by {abs(moved - lr) / deviation:.1f} standard deviations"


Lookups = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _lookups(bench: Bench, slots: int, dim: int, dtype: torch.dtype) -> Lookups:
    """Two lookups of one table, with different numbers of tokens; the second has a row that every token reads."""
    device = bench.device
    sizes = [("uniform", 5, 3), ("hot", 4, 2)] if bench.rehearse else [("uniform", 60, 7), ("hot", 333, 4)]
    indices = [data.slots_read(p, t, k, slots, device, seed=s) for s, (p, t, k) in enumerate(sizes)]
    weights = [data.normal(t, k, dtype=dtype, device=device, seed=s + 10) for s, (_, t, k) in enumerate(sizes)]
    grads = [data.normal(t, dim, dtype=dtype, device=device, seed=s + 20) for s, (_, t, _) in enumerate(sizes)]
    return grads, indices, weights


def step(
    bench: Bench,
    rule: str,
    values: Tensor,
    scale: Tensor | None,
    grads: list[Tensor],
    indices: list[Tensor],
    weights: list[Tensor],
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The kernel's step on copies: new table, new state, new scales."""
    slots, device = values.shape[0], values.device
    new, new_scale = values.clone(), None if scale is None else scale.clone()
    rowwise = torch.full((slots,), 0.5, device=device)
    if rule == "adagrad":
        bench.kernels.adagrad_(new, new_scale, rowwise, grads, indices, weights, **RATES, seed=7)
        return new, {"total": rowwise}, new_scale
    kept = values.dtype if values.itemsize > 1 else torch.bfloat16
    mean = torch.full(values.shape, 0.25, dtype=kept, device=device)
    bench.kernels.adam_(new, new_scale, mean, rowwise, grads, indices, weights, **RATES, **BETAS, step=STEP, seed=7)
    return new, {"exp_avg": mean, "exp_avg_sq": rowwise}, new_scale


def expected(
    rule: str, p: Tensor, grads: list[Tensor], indices: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The same step by the rule in float64: new table, new state, and which rows were read."""
    g, rows = torch.zeros_like(p), torch.zeros(p.shape[0], dtype=torch.bool, device=p.device)
    for grad, index, weight in zip(grads, indices, weights, strict=True):
        shares = weight.double().unsqueeze(-1) * grad.double().unsqueeze(1)  # [T, K, D]
        g.index_add_(0, index.flatten().long(), shares.flatten(0, 1))
        rows[index.flatten().long()] = True
    square, lr = g.square().mean(-1), RATES["lr"]
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
        new = decayed - lr * mean / (1 - beta1**STEP) / root.unsqueeze(-1)
        state = {"exp_avg": mean, "exp_avg_sq": second}
    before = {"total": 0.5, "exp_avg": 0.25, "exp_avg_sq": 0.5}
    for name, new_state in state.items():
        new_state[~rows] = before[name]
    return torch.where(rows.unsqueeze(-1), new, p), state, rows
