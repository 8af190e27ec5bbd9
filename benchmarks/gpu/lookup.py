"""The lookup on tables far larger than the L2: forward, decode (few tokens), and backward under three patterns of reads.

"ours" is the kernel launcher; the overhead of operators and training steps is in the sections of steps and layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import data as data
import torch
from calls import forward as call
from harness import Bench, Case, Result, Run, Target, Timing
from torch import Tensor

from memrewrite.kernels import ops

DTYPE = torch.bfloat16


def timed_widths(bench: Bench) -> tuple[int, ...]:
    """Every width whose kernels are timed: those of all cases, and widths that are no power of two."""
    return tuple(dict.fromkeys((*bench.sizes.dims, *odd_widths(bench))))


def odd_widths(bench: Bench) -> tuple[int, ...]:
    """Widths of common models that are no power of two."""
    return (20,) if bench.rehearse else (576, 768, 1536)


def baselines() -> Any:
    """The module of baseline kernels, imported (with Triton) on first use."""
    import baselines

    return baselines


def unless_missing(make: Callable[[], Run]) -> Run:
    """A run that calls `make` at its first call: what cannot be made fails when it runs, and `Bench.race` reports why."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return run


def hot_keys(bench: Bench, dim: int, itemsize: int) -> int:
    """Keys per half of a table that takes a third of the L2 cache: the rest is for indices, weights and outputs."""
    l2 = 1 << 16 if bench.rehearse else torch.cuda.get_device_properties(bench.device).L2_cache_size
    return max(2, int((l2 / 3 / dim / itemsize) ** 0.5))


# ------------------------------------------------------------------------------------------------------------- forward


def forward_cases(bench: Bench) -> Iterator[Case]:
    """bf16 at every width, fp32 weights, skewed reads, a table in the L2, fp32: with all baselines; fp8: ours only."""
    dim = bench.sizes.dims[0]
    for width in timed_widths(bench):
        yield Case(f"D={width} bfloat16 uniform", partial(forward, dim=width, pattern="uniform"))
    for pattern in ("zipf", "hot"):
        yield Case(f"D={dim} bfloat16 {pattern}", partial(forward, dim=dim, pattern=pattern))
    for pattern in ("uniform", "zipf"):
        yield Case(f"D={dim} bfloat16 {pattern}, table in L2", partial(forward, dim=dim, pattern=pattern, cold=False))
    yield Case(f"D={dim} bfloat16, weights float32", partial(forward, dim=dim, pattern="uniform", kind=torch.float32))
    yield Case(f"D={dim} float32 uniform", partial(forward, dim=dim, pattern="uniform", dtype=torch.float32))
    for width in dict.fromkeys((dim, bench.sizes.dims[-1])):
        yield Case(f"D={width} fp8 uniform", partial(forward_fp8, dim=width))


def forward(
    bench: Bench,
    dim: int,
    pattern: str,
    dtype: torch.dtype = DTYPE,
    kind: torch.dtype | None = None,
    cold: bool = True,
) -> Iterator[Result]:
    """All implementations on one table. Not `cold`: the table fits in the L2 cache and caches are not flushed.

    `kind` is the dtype of our weights; the baselines support only weights in the table's dtype.
    """
    sizes = bench.sizes
    keys = bench.keys_within(sizes.keys, dim, dtype.itemsize, 0.25) if cold else hot_keys(bench, dim, dtype.itemsize)
    values = data.table(keys * keys, dim, dtype, bench.device)
    indices = data.slots_read(pattern, sizes.tokens, sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, kind or dtype)
    inputs = (values, indices, weights)
    rounded = (values, indices, weights.to(dtype))
    times = bench.race({"ours": lambda: call(bench.kernels, *inputs), **forward_baselines(bench, *rounded)}, flush=cold)
    targets = [Target("embedding_bag", 2), Target("triton", 1)]
    if pattern == "uniform" and cold:
        moved = data.forward_bytes(*inputs)
        targets.insert(0, Target("floor", 0.85))
    elif cold:  # rows that are read repeatedly stay in the L2 cache: only the first read must reach memory
        written = sizes.tokens * dim * dtype.itemsize
        moved = data.touched(indices) * dim * dtype.itemsize + data.size_of(indices, weights) + written
    else:  # nothing must reach memory
        moved = 0
    case = f"T={sizes.tokens} K={sizes.reads} D={dim} N={keys}² {str(dtype)[6:]} {pattern}"
    case += (f", weights {str(kind)[6:]}" if kind else "") + ("" if cold else ", table in L2")
    yield bench.result("forward", case, times, moved=moved, targets=targets if dtype == DTYPE else ())


def forward_baselines(bench: Bench, values: Tensor, indices: Tensor, weights: Tensor) -> dict[str, Run]:
    """All baselines for the forward."""
    inputs = (values, indices, weights)
    return {
        "embedding_bag": lambda: baselines().bag_forward(*inputs),
        "torch": lambda: baselines().torch_forward(*inputs),
        "torch, compiled": unless_missing(lambda: partial(bench.compile(baselines().gathered), *inputs)),
        "triton": lambda: baselines().triton_forward(*inputs),
        "fbgemm": unless_missing(lambda: partial(baselines().Fbgemm(values).forward, indices, weights)),
    }


def forward_fp8(bench: Bench, dim: int) -> Iterator[Result]:
    """An fp8 table with bf16 weights: half the bytes; no baseline supports such a table."""
    sizes = bench.sizes
    keys = bench.keys_within(sizes.keys, dim, 1, 0.25)
    values, scale = data.fp8_table(keys * keys, dim, bench.device)
    indices = data.slots_read("uniform", sizes.tokens, sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, DTYPE)
    times = bench.race({"ours": lambda: call(bench.kernels, values, indices, weights, scale)})
    moved = data.forward_bytes(values, indices, weights) + indices.numel() * scale.itemsize
    case = f"T={sizes.tokens} K={sizes.reads} D={dim} N={keys}² fp8 uniform"
    yield bench.result("forward", case, times, moved=moved)


# -------------------------------------------------------------------------------------------------------------- decode


def decode_cases(bench: Bench) -> Iterator[Case]:
    """Few tokens, with the narrowest and the widest table; skewed reads, and a table in the L2."""
    dims = tuple(dict.fromkeys((bench.sizes.dims[0], bench.sizes.dims[-1])))
    for dim in dims:
        for tokens in bench.sizes.decode:
            yield Case(f"T={tokens} D={dim}", partial(decode, tokens=tokens, dim=dim))
    few, dim = bench.sizes.decode[-1], dims[0]
    for pattern in ("zipf", "hot"):
        yield Case(f"T={few} D={dim} {pattern}", partial(decode, tokens=few, dim=dim, pattern=pattern))
    yield Case(f"T={few} D={dim} table in L2", partial(decode, tokens=few, dim=dim, cold=False))


def decode(bench: Bench, tokens: int, dim: int, pattern: str = "uniform", cold: bool = True) -> Iterator[Result]:
    """Device time of CUDA graphs with several calls; the note has the time of an eager call.

    The calls read different slots, so that rows are in no cache, except where the pattern repeats them; not `cold`: the table
    fits in the L2 cache and caches are not flushed.
    """
    reads = bench.sizes.reads
    keys = bench.keys_within(bench.sizes.keys, dim, DTYPE.itemsize, 0.25) if cold else hot_keys(bench, dim, DTYPE.itemsize)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    sets = [data.slots_read(pattern, tokens, reads, keys * keys, bench.device, seed=s) for s in range(bench.sizes.sets)]
    weights = data.weights_like(sets[0], DTYPE)

    def all_sets(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Run:
        return unless_missing(lambda: bench.graphed(lambda: [function(values, indices, weights) for indices in sets]))

    times = bench.race(
        {
            "ours": all_sets(partial(call, bench.kernels)),
            "embedding_bag": all_sets(lambda v, i, w: baselines().bag_forward(v, i, w)),
            "torch": all_sets(lambda v, i, w: baselines().torch_forward(v, i, w)),
            "torch, compiled": all_sets(bench.compile(lambda v, i, w: baselines().gathered(v, i, w))),
            "triton": all_sets(lambda v, i, w: baselines().triton_forward(v, i, w)),
        },
        per=bench.sizes.sets,
        flush=cold,
    )
    uniform = cold and pattern == "uniform"
    moved = data.forward_bytes(values, sets[0], weights) if uniform else 0
    eager = ""
    if uniform:
        calls = {"op": ops.sparse_lookup, "embedding_bag": baselines().bag_forward}
        eager = eager_us(bench, calls, (values, sets[0], weights))
    case = f"T={tokens} K={reads} D={dim} N={keys}² bfloat16 {pattern}" + ("" if cold else ", table in L2")
    targets = [Target("embedding_bag", 2), Target("triton", 5)] if uniform else []
    yield bench.result("decode", case, times, moved=moved, targets=targets, note=eager)


def eager_us(bench: Bench, calls: dict[str, Callable[..., Any]], inputs: tuple[Tensor, ...]) -> str:
    """Microseconds of wall time per eager call, launch included, as text."""
    if bench.rehearse:
        return ""
    texts = []
    for name, function in calls.items():
        for _ in range(20):
            function(*inputs)
        bench.sync()
        start = time.perf_counter()
        for _ in range(200):
            function(*inputs)
        bench.sync()
        texts.append(f"{name} {(time.perf_counter() - start) * 5e3:.0f} µs")
    return "eager call: " + ", ".join(texts)


# ------------------------------------------------------------------------------------------------------------ backward


def backward_cases(bench: Bench) -> Iterator[Case]:
    """Every width and pattern, a table in the L2, then the row-sparse gradient."""
    for dim in bench.sizes.dims:
        yield Case(f"D={dim}", partial(backward, dim=dim, patterns=("uniform", "zipf", "hot")))
    for dim in odd_widths(bench):
        yield Case(f"D={dim}", partial(backward, dim=dim, patterns=("uniform",)))
    dim = bench.sizes.dims[0]
    yield Case(f"D={dim} table in L2", partial(backward, dim=dim, patterns=("uniform",), cold=False))
    part = partial(backward, dim=dim, patterns=("uniform",), kind=torch.float32)
    yield Case(f"D={dim}, weights float32", part)
    yield Case(f"D={dim} rows", partial(sparse_rows, dim=dim))


def backward(
    bench: Bench, dim: int, patterns: tuple[str, ...], kind: torch.dtype = DTYPE, cold: bool = True
) -> Iterator[Result]:
    """Dense gradients of values and weights: first uniform reads, to which the skewed ones are compared.

    Not `cold`: the table fits in the L2 cache and caches are not flushed. `kind` is the dtype of our weights.
    """
    size = DTYPE.itemsize
    keys = bench.keys_within(bench.sizes.train_keys, dim, 4 * size, 0.5) if cold else hot_keys(bench, dim, size)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    uniform: float | None = None
    for pattern in patterns:
        times, moved = backward_race(bench, values, pattern, kind, cold)
        case = f"T={bench.sizes.tokens} K={bench.sizes.reads} D={dim} N={keys}² {pattern}"
        case += ("" if kind == DTYPE else f", weights {str(kind)[6:]}") + ("" if cold else ", table in L2")
        targets = [Target("triton", 1), Target("triton, fp32 sums", 1)]
        line = bench.result("backward", case, times, moved=moved if cold else 0, targets=targets)
        if pattern == "uniform":
            uniform = line.ms
        else:
            met = None if line.ms is None or uniform is None else line.ms <= 1.5 * uniform
            line.targets.append(("≤ 1.5× its uniform time", met))
        yield line


def backward_race(
    bench: Bench, values: Tensor, pattern: str, kind: torch.dtype, cold: bool
) -> tuple[dict[str, Timing | str], int]:
    """All implementations on one pattern, and the bytes that must move."""
    indices = data.slots_read(pattern, bench.sizes.tokens, bench.sizes.reads, values.shape[0], bench.device)
    weights = data.weights_like(indices, kind)
    grad = data.normal(bench.sizes.tokens, values.shape[1], dtype=DTYPE, device=bench.device)
    inputs = (values, indices, weights.to(DTYPE))

    def rival(forward: Callable[[], Any]) -> Run:
        return unless_missing(lambda: baselines().gradients(forward(), grad, *inputs))

    runs: dict[str, Run] = {
        "ours": lambda: bench.kernels.backward(grad, values, indices, weights, None, True, True),
        "embedding_bag": rival(lambda: baselines().bag_forward),
        "torch": rival(lambda: baselines().torch_forward),
        "torch, compiled": rival(lambda: bench.compile(baselines().gathered)),
        "triton": lambda: baselines().triton_backward(grad, *inputs),
        "triton, fp32 sums": lambda: baselines().triton_backward(grad, *inputs, torch.float32),
        # FBGEMM has no dense gradient: its backward updates the rows with a rate of 0
        "fbgemm, forward too": unless_missing(lambda: partial(baselines().Fbgemm(values).step, grad, *inputs[1:])),
    }
    return bench.race(runs, flush=cold), data.backward_bytes(values, indices, weights, dense=True)


def sparse_rows(bench: Bench, dim: int) -> Iterator[Result]:
    """Row-sparse gradient and weights' gradient; the baseline `embedding_bag(sparse=True)` does not coalesce its rows."""
    keys = bench.keys_within(bench.sizes.train_keys, dim, 4 * DTYPE.itemsize, 0.5)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    indices = data.slots_read("uniform", bench.sizes.tokens, bench.sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, DTYPE)
    grad = data.normal(bench.sizes.tokens, dim, dtype=DTYPE, device=bench.device)

    def ours() -> None:
        bench.kernels.rows(grad, indices, weights, keys * keys)
        bench.kernels.backward(grad, values, indices, weights, None, False, True)

    bag = unless_missing(
        lambda: baselines().gradients(partial(baselines().bag_forward, sparse=True), grad, values, indices, weights)
    )
    moved = data.backward_bytes(values, indices, weights, dense=False)
    case = f"T={bench.sizes.tokens} K={bench.sizes.reads} D={dim} N={keys}² uniform, rows"
    yield bench.result("backward", case, bench.race({"ours": ours, "embedding_bag": bag}), moved=moved)
