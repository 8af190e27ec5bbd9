"""The largest tables that can be trained on this device: each takes what its free memory allows, state included.

Trains a Memory+ layer on the table for a few steps, and reports slots, parameters, peak memory and the time of a step.
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
PARTS = 4  # a step has a fourth of the other sections' tokens: small cards too have most memory left for the table
SHARE = 0.85  # of the free memory: what the table and its state must take
TABLES = (("float8_e4m3fn", "adagrad"), ("bfloat16", "adagrad"), ("bfloat16", "adam"))  # dtype, rule


def cases(bench: Bench) -> Iterator[Case]:
    """One table per case; each fills the device."""
    dim = bench.sizes.dims[-1]
    for dtype, rule in TABLES:
        yield Case(f"{dtype} D={dim} {rule}", partial(train, dim=dim, dtype=getattr(torch, dtype), rule=rule))


def slot_bytes(dim: int, dtype: torch.dtype, rule: str) -> int:
    """Bytes of a slot: its row, the scale of 8-bit rows, and the state of the rule (`memrewrite.fused`)."""
    row = dim * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)
    first_moment = dim * (4 if dtype == torch.float32 else 2)
    return row + 4 + (first_moment if rule == "adam" else 0)


def step_bytes(bench: Bench, dim: int, keys: int) -> int:
    """Upper estimate of the bytes that a step needs besides table and state.

    Activations and gradients of the layer, the scores of the keys, the sorted reads with their counts, and the keys themselves
    with their optimizer state.
    """
    tokens, reads, heads = -(-bench.sizes.tokens // PARTS), bench.sizes.reads, bench.sizes.heads
    activations = 24 * tokens * dim * DTYPE.itemsize
    scores = 3 * 2 * heads * tokens * keys * 4
    sorted_reads = 120 * tokens * reads
    weights = 16 * (3 * dim * dim + heads * 2 * keys * dim)
    return activations + scores + sorted_reads + weights + (1 << 29)


def largest_keys(bench: Bench, dim: int, dtype: torch.dtype, rule: str, free: int) -> int:
    """The most keys per half, a multiple of 8, whose table, state and step take at most the free memory."""
    keys = 8
    while step_bytes(bench, dim, keys + 8) + (keys + 8) ** 2 * slot_bytes(dim, dtype, rule) <= free:
        keys += 8
    return keys


def train(bench: Bench, dim: int, dtype: torch.dtype, rule: str) -> Iterator[Result]:
    """A few training steps; the output must stay finite and must change."""
    gc.collect()
    free = bench.free()
    keys = bench.sizes.train_keys if bench.rehearse else largest_keys(bench, dim, dtype, rule, free)
    if not bench.rehearse:
        torch.cuda.reset_peak_memory_stats()
    model = memory_layer(bench, dim, keys, gradient="fused", dtype=str(dtype).removeprefix("torch."))
    x = data.normal(-(-bench.sizes.tokens // PARTS), dim, dtype=DTYPE, device=bench.device)
    run = optimizer_step(bench, model, x, rule)
    with torch.no_grad():
        before = model(x)
    for _ in range(STEPS - 1):
        run()
    bench.sync()
    taken = bench.race({"ours": run}, seconds=1.0)
    with torch.no_grad():
        after = model(x)
    moved = float((after.float() - before.float()).norm() / before.float().norm())
    trains = bool(after.isfinite().all()) and moved > 0
    share = keys * keys * slot_bytes(dim, dtype, rule) / free
    facts = {"slots": keys * keys, "parameters": keys * keys * dim, "table_and_state_of_free": share, "free_bytes": free}
    note = f"{keys * keys:,} slots, {keys * keys * dim / 1e9:.1f} G parameters, output moved by {moved:.2f}"
    if not bench.rehearse:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
        total = torch.cuda.get_device_properties(bench.device).total_memory
        note += f"; table and state {share:.0%} of {free / 2**30:.0f} GiB free, peak {facts['peak_bytes'] / 2**30:.1f} of"
        note += f" {total / 2**30:.0f} GiB"
    name = f"{keys}² × {dim} {str(dtype)[6:]}, row-wise {rule.capitalize()}, T={x.shape[0]}"
    line = bench.result("memory size", name, taken, note=note, extra=facts)
    target = f"≥ {SHARE:.0%} of the free memory, and it trains"
    line.targets = [(target, None if bench.rehearse else trains and share >= SHARE)]
    yield line
