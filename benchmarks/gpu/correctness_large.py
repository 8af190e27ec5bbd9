"""Correctness on a table of more than 2^31 elements (2^32 where it fits), of which only some of the last rows are read.

A 32-bit product of slot and width reads another row: all rows that are not read are NaN, and must keep their bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import data as data
import torch
from calls import forward, poison
from correctness_update import STEPS, Check, close, comparable, expected, step, wide_of
from harness import Bench, Skip, Stop
from torch import Tensor

from memrewrite.kernels import reference, rounding

LAST = 4096  # the last rows, of which every second one is read
COPIES = 4  # table, dense gradient or second moment, first moment, and what a step needs besides
PART = 1 << 20  # rows compared at once


@dataclass(frozen=True)
class Large:
    """A table whose rows are NaN except for every second one of the last."""

    values: Tensor  # [N, D]
    scale: Tensor | None  # [N] of 8-bit values
    first: int  # the first of the last rows
    rows: Tensor  # int64 [R]: the rows that are not NaN
    kept: Tensor  # [R, D]: their values

    def wide(self) -> Tensor:
        """The last rows in float64, NaN where they are not read."""
        return wide_of(self.values[self.first :], None if self.scale is None else self.scale[self.first :])

    def restore(self) -> None:
        """Write the rows again that an update has changed."""
        put(self.values, self.rows, self.kept)

    def check_rest(self, name: str, table: Tensor) -> None:
        """Stop unless all rows of `table` that are not read are NaN with the bits they were given."""
        bits = bits_of(table)
        want = bits_of(poison(torch.empty_like(table[:1])))
        read = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device)
        read[self.rows] = True
        for part, skip in zip(bits.split(PART), read.split(PART), strict=True):
            if ((part != want).any(-1) & ~skip).any():
                raise Stop(f"{name}: a row that was not read was changed")


def bits_of(table: Tensor) -> Tensor:
    """The table as integers."""
    return table.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[table.itemsize])


def put(table: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write rows of any dtype."""
    bits_of(table)[rows] = bits_of(new)


def slots_of(bench: Bench, dim: int, dtype: torch.dtype) -> int:
    """More than 2^32 elements if four copies fit into the free memory, else more than 2^31; a rehearsal has 100 rows."""
    if bench.rehearse:
        return 100
    free = bench.free()
    for elements in (1 << 32, 1 << 31):
        if 2 * COPIES * elements * dtype.itemsize <= free:  # half: other processes check at the same time
            return elements // dim + LAST
    raise Skip(f"{free / 2**30:.0f} GiB are free; a table of 2^31 elements of {dtype} and its copies need more")


def make(bench: Bench, dtype: torch.dtype) -> Large:
    """The table on the device."""
    dim = 32 if bench.rehearse else 1024
    slots = slots_of(bench, dim, dtype)
    first = slots - min(LAST, slots // 2)
    values = poison(torch.empty(slots, dim, dtype=dtype, device=bench.device))
    rows = torch.arange(first + 1, slots, 2, device=bench.device)
    kept, scale = data.table(rows.numel(), dim, torch.float32, bench.device), None
    if dtype.itemsize == 1:
        scale = torch.full((slots,), torch.nan, device=bench.device)
        scale[rows] = rounding.row_scale(kept)
        kept = kept / scale[rows, None]
    large = Large(values, scale, first, rows, kept.to(dtype))
    large.restore()
    return large


def large_table(bench: Bench, dtype: torch.dtype) -> Check:
    """Forward, both gradients, row gradients and all updates; compared after each, since the table is changed in place."""
    large = make(bench, dtype)
    dim = large.values.shape[1]
    tokens, reads = (6, 4) if bench.rehearse else (300, 32)
    chosen = data.slots_read("zipf", tokens, reads, large.rows.numel(), bench.device)
    indices = large.rows[chosen]
    kind = torch.float32 if large.scale is not None else dtype
    weights = data.normal(tokens, reads, dtype=kind, device=bench.device)
    grad = data.normal(tokens, dim, dtype=kind, device=bench.device, seed=4)
    errors = [_lookup(bench, large, indices, weights, grad)]
    for rule in ("adagrad", "adam", "lazy_adam"):
        errors.append(_update(bench, rule, large, ([grad], [indices], [weights])))
        large.restore()
    yield
    return max(errors)


def _lookup(bench: Bench, large: Large, indices: Tensor, weights: Tensor, grad: Tensor) -> float:
    kernels, slots = bench.kernels, large.values.shape[0]
    tolerance = 4e-3 if weights.dtype == torch.bfloat16 else 1e-5
    local = indices - large.first
    exact = large.wide().requires_grad_(), weights.double().requires_grad_()
    want = reference.sparse_lookup(exact[0], local, exact[1])
    want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())
    errors = [close("forward", forward(kernels, large.values, indices, weights, large.scale), want, tolerance)]
    for narrow in (indices, indices.int()):
        gw = kernels.backward(grad, large.values, narrow, weights, large.scale, False, True)[1]
        errors.append(close("gradient of weights", gw, want_gw, tolerance))
    found, sums = kernels.rows(grad, indices, weights, slots)
    if int(found.min()) < large.first or int(found.max()) >= slots:
        raise Stop("row gradients: a row that was not read")
    dense = torch.zeros_like(want_gv).index_add_(0, found - large.first, sums.double())
    errors.append(close("row gradients", dense, want_gv, tolerance))
    if large.scale is None:  # 8-bit tables have no dense gradient
        gv, gw = kernels.backward(grad, large.values, indices, weights, None, True, True)
        errors.append(close("gradient of values", gv[large.first :], want_gv, tolerance))
        errors.append(close("gradient of weights, with that of the values", gw, want_gw, tolerance))
        if any(part.any() for part in gv[: large.first].split(PART)):
            raise Stop("gradient of values: a row that was not read has a gradient")
    return max(errors)


def _update(bench: Bench, rule: str, large: Large, reads: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> float:
    """One step in place; only the last rows are compared with the rule, since the others are not read."""
    grads, indices, weights = reads
    before = large.wide().nan_to_num()
    local = [index - large.first for index in indices]
    want, want_state, touched = expected(rule, before, grads, local, weights)
    scales = None if large.scale is None else large.scale.clone()
    state = step(bench, rule, large.values, scales, grads, indices, weights, fill=large.rows)
    got = wide_of(large.values[large.first :], None if scales is None else scales[large.first :])
    errors = [close("rows", got[touched], want[touched], STEPS[large.values.dtype])]
    large.check_rest(rule, large.values)
    if scales is not None and not scales[: large.first].isnan().all():
        raise Stop("a scale that was not read was changed")
    last = {name: bits_of(new)[large.first :][touched].view(new.dtype) for name, new in state.items()}
    for name, new in state.items():
        if name in want_state:
            errors.append(close(name, *comparable(name, last, want_state[name][touched]), STEPS[new.dtype]))
        if new.dim() == 2:
            large.check_rest(name, new)
        elif (new[: large.first] != 0.5).any():
            raise Stop(f"{name}: a row that was not read was changed")
    return max(errors)
