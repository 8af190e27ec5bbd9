"""How large a table can be trained on one device: the paper's largest in fp8, 15 M × 4096 in bf16; fused row-wise Adagrad.

Allocates the table, runs real training steps of a Memory+ layer on it, and reports peak memory and step time; a smaller device
gets a smaller table, with a note.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import data as data
import torch
from harness import Bench, Case, Result
from models import DTYPE, memory_layer, optimizer_step

STEPS = 5
REST = 14 << 30  # bytes that a step needs besides the table: activations, gradients, sorted reads


def cases(bench: Bench) -> Iterator[Case]:
    """One table per case; each fills the device."""
    for keys, dim, dtype in bench.sizes.huge:
        yield Case(f"{keys}² × {dim} {dtype}", partial(train, keys=keys, dim=dim, dtype=dtype))


def train(bench: Bench, keys: int, dim: int, dtype: str) -> list[Result]:
    """A few training steps; the output must stay finite and must change."""
    gc.collect()
    wanted = keys
    itemsize = getattr(torch, dtype).itemsize
    room = bench.free() - (0 if bench.rehearse else REST)
    keys = min(keys, int((room / (dim * itemsize + 8)) ** 0.5) // 8 * 8)
    if not bench.rehearse:
        torch.cuda.reset_peak_memory_stats()
    model = memory_layer(bench, dim, keys, gradient="fused", dtype=dtype)
    x = data.normal(bench.sizes.tokens, dim, dtype=DTYPE, device=bench.device)
    run = optimizer_step(bench, model, x, "adagrad")
    with torch.no_grad():
        before = model(x)
    for _ in range(STEPS - 1):
        run()
    bench.sync()
    taken = bench.race({"ours": run}, seconds=1.0)
    with torch.no_grad():
        after = model(x)
    moved = float((after.float() - before.float()).norm() / before.float().norm())
    finite = bool(after.isfinite().all())
    line = bench.result("memory size", f"{keys}² × {dim} {dtype}, row-wise Adagrad, T={x.shape[0]}", taken)
    line.note = f"{keys * keys * dim / 1e9:.1f} G parameters, output moved by {moved:.2f}"
    if not bench.rehearse:
        peak, total = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.get_device_properties(0).total_memory / 2**30
        line.note += f", peak {peak:.1f} of {total:.0f} GiB"
    if keys < wanted:
        line.note += f"; scaled down from {wanted}²: this device has too little memory"
    line.targets = [(f"{wanted}² × {dim} trains", None if bench.rehearse else finite and moved > 0 and keys == wanted)]
    return [line]
