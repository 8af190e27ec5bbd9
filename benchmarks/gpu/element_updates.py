"""The fused update with a second moment per element: moments of each dtype, beside Adam of torch on gradients in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import baseline_updates
import data as data
import torch
from harness import Bench, Case, Result, Run, Target
from lookup import DTYPE, unless_missing
from torch import Tensor, nn

from memrewrite.kernels import rounding

FP8 = torch.float8_e4m3fn
RATES = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
BETAS = (0.9, 0.99)


def cases(bench: Bench) -> Iterator[Case]:
    """Moments of each dtype and torch's Adam with the narrowest table; skewed reads; the widest table; an fp8 table."""
    first, last = bench.sizes.dims[0], bench.sizes.dims[-1]
    for moments in (torch.float32, DTYPE, FP8):
        yield _case(dim=first, moments=moments, rivals=True)
    yield _case(dim=first, moments=FP8, pattern="zipf")
    yield _case(dim=last, moments=FP8)
    yield _case(dim=last, moments=FP8, dtype=FP8)


def _case(**options: Any) -> Case:
    words = [str(option).removeprefix("torch.") for name, option in options.items() if name != "rivals"]
    return Case(f"lazy_adam {' '.join(words)}", partial(update, **options))


def update(
    bench: Bench,
    dim: int,
    moments: torch.dtype,
    dtype: torch.dtype = DTYPE,
    pattern: str = "uniform",
    rivals: bool = False,
) -> Iterator[Result]:
    """Only the update, with fp32 weights; with `rivals` also torch's SparseAdam and AdamW, with the gradient they need."""
    device, sizes = bench.device, bench.sizes
    bytes_of_rivals = 16 if rivals else 0  # an element: two copies of the table, their moments and gradients
    taken = dtype.itemsize + 2 * moments.itemsize + 4 + bytes_of_rivals
    keys = bench.keys_within(sizes.train_keys, dim, taken, 0.8)
    scale: Tensor | None = None
    if dtype == FP8:
        values, scale = data.fp8_table(keys * keys, dim, device)
    else:
        values = data.table(keys * keys, dim, dtype, device)
    indices = data.slots_read(pattern, sizes.tokens, sizes.reads, keys * keys, device)
    weights = data.weights_like(indices, torch.float32)
    grad = data.normal(sizes.tokens, dim, dtype=DTYPE, device=device)
    state = (*zero_moment(values, moments), *zero_moment(values, moments))
    numbers: dict[str, Any] = {**RATES, "beta1": BETAS[0], "beta2": BETAS[1], "step": 10, "seed": 1}

    def ours(module: Any) -> Run:
        return lambda: module.lazy_adam_(values, scale, *state, [grad], [indices], [weights], **numbers)

    runs = {"ours": ours(bench.kernels), "torch": ours(baseline_updates)}
    targets = [Target("torch", 1)]
    if rivals:
        for name, run in (("AdamW, dense", dense_adam), ("SparseAdam", sparse_adam)):
            runs[name] = unless_missing(partial(run, bench, values, grad, indices, weights))
        targets.append(Target("AdamW, dense", 1))
    stored = [table for table in (scale, *state) if table is not None]
    moved = data.update_bytes(values, indices, weights, *stored)
    case = f"lazy_adam D={dim} N={keys}² {str(dtype)[6:]} {pattern}, moments {str(moments)[6:]}"
    case += f", T={sizes.tokens} K={sizes.reads}"
    yield bench.result("update", case, bench.race(runs), moved=moved, targets=targets)


def zero_moment(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A moment of one number per element before the first step, and its scales."""
    moment = torch.zeros(values.shape, dtype=dtype, device=values.device)
    if dtype != FP8:
        return moment, None
    return moment, torch.ones(values.shape[0], rounding.blocks_of(values.shape[1]), device=values.device)


def dense_adam(bench: Bench, values: Tensor, grad: Tensor, indices: Tensor, weights: Tensor) -> Run:
    """Our gradient of the whole table, and torch's AdamW over the whole table."""
    table = nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([table], lr=RATES["lr"], betas=BETAS, weight_decay=0.0, fused=True)

    def run() -> None:
        table.grad = bench.kernels.backward(grad, table.detach(), indices, weights, None, True, False)[0]
        optimizer.step()
        table.grad = None

    return run


def sparse_adam(bench: Bench, values: Tensor, grad: Tensor, indices: Tensor, weights: Tensor) -> Run:
    """Our row-sparse gradient, and torch's SparseAdam on its rows."""
    table = nn.Parameter(values.clone())
    optimizer = torch.optim.SparseAdam([table], lr=RATES["lr"], betas=BETAS)

    def run() -> None:
        rows, gradient = bench.kernels.rows(grad, indices, weights, values.shape[0])
        table.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), gradient.to(values.dtype), values.shape, check_invariants=False)
        optimizer.step()
        table.grad = None

    return run
