"""The two measured peak rates of the device, to which results are compared: memory copy and bf16 matrix product.

The copy is larger than any cache, and counts bytes read and written; the matrices have random data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import data as data
import torch
from harness import Bench, Case, Result, Run, Timing


def cases(bench: Bench) -> Iterator[Case]:
    """Both rates; the copy rate gives the floor (minimum time) of every other section."""
    yield Case("copy", copy)
    yield Case("matmul", matmul)


def copy(bench: Bench) -> list[Result]:
    """Device to device."""
    count = min(bench.sizes.copy_bytes, bench.free() // 4) // 2
    source = data.normal(count, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    rate, line = _rate(bench, lambda: target.copy_(source), 2 * data.size_of(source), "copy")
    bench.keep("copy", rate)
    line.gbps = None if bench.rehearse else rate / 1e9
    line.note = f"{data.size_of(source) / 2**30:.1f} GiB, read and written"
    return [line]


def matmul(bench: Bench) -> list[Result]:
    """bf16, n³."""
    n = bench.sizes.matmul
    one, two = (data.normal(n, n, dtype=torch.bfloat16, device=bench.device, seed=s) for s in (0, 1))
    out = torch.empty_like(one)
    rate, line = _rate(bench, lambda: torch.matmul(one, two, out=out), 2 * n**3, "bf16 matmul")
    bench.keep("matmul", rate)
    line.note = f"{n}³" if bench.rehearse else f"{n}³, {rate / 1e12:.0f} TFLOP/s"
    return [line]


def _rate(bench: Bench, run: Run, amount: int, case: str) -> tuple[float, Result]:
    times = bench.race({"ours": run})
    ours = times["ours"]
    assert isinstance(ours, Timing)
    return math.nan if bench.rehearse else amount / ours.ms * 1e3, bench.result("ceilings", case, times)
