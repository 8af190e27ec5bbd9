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
from harness import Bench, Case, Result, Run, Target, Timing
from torch import Tensor

from memrewrite.kernels import ops

DTYPE = torch.bfloat16


def baselines() -> Any:
    """The module of baseline kernels, imported (with Triton) on first use."""
    import baselines

    return baselines


def unless_missing(make: Callable[[], Run]) -> Run:
    """The run that `make` creates; if it fails, a run that raises its error when called."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - every error is reported by the run
        caught = error

        def fail() -> None:
            raise caught

        return fail


# ------------------------------------------------------------------------------------------------------------- forward


def forward_cases(bench: Bench) -> Iterator[Case]:
    """bf16 at every width, uniform and skewed reads, fp32: with all baselines; fp8: ours only."""
    for dim in bench.sizes.dims:
        yield Case(f"D={dim} bfloat16 uniform", partial(forward, dim=dim, pattern="uniform"))
    dim = bench.sizes.dims[0]
    for pattern in ("zipf", "hot"):
        yield Case(f"D={dim} bfloat16 {pattern}", partial(forward, dim=dim, pattern=pattern))
    yield Case(f"D={dim} float32 uniform", partial(forward, dim=dim, pattern="uniform", dtype=torch.float32))
    for dim in {bench.sizes.dims[0], bench.sizes.dims[-1]}:
        yield Case(f"D={dim} fp8 uniform", partial(forward_fp8, dim=dim))


def forward(bench: Bench, dim: int, pattern: str, dtype: torch.dtype = DTYPE) -> list[Result]:
    """All implementations on one table."""
    sizes = bench.sizes
    keys = bench.keys_within(sizes.keys, dim, dtype.itemsize, 0.25)
    values = data.table(keys * keys, dim, dtype, bench.device)
    indices = data.slots_read(pattern, sizes.tokens, sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, dtype)
    inputs = (values, indices, weights)
    times = bench.race({"ours": lambda: bench.kernels.forward(*inputs, None), **forward_baselines(values, indices, weights)})
    targets = [Target("embedding_bag", 2), Target("triton", 1)]
    if pattern == "uniform":
        moved = data.forward_bytes(*inputs)
        targets.insert(0, Target("floor", 0.85))
    else:  # rows that are read repeatedly stay in the L2 cache: only the first read must reach memory
        moved = (
            data.touched(indices) * dim * dtype.itemsize + data.size_of(indices, weights) + sizes.tokens * dim * dtype.itemsize
        )
    case = f"T={sizes.tokens} K={sizes.reads} D={dim} N={keys}² {str(dtype)[6:]} {pattern}"
    return [bench.result("forward", case, times, moved=moved, targets=targets if dtype == DTYPE else ())]


def forward_baselines(values: Tensor, indices: Tensor, weights: Tensor) -> dict[str, Run]:
    """All baselines for the forward."""
    inputs = (values, indices, weights)
    fbgemm = unless_missing(lambda: partial(baselines().Fbgemm(values).forward, indices, weights))
    return {
        "embedding_bag": lambda: baselines().bag_forward(*inputs),
        "torch": lambda: baselines().torch_forward(*inputs),
        "triton": lambda: baselines().triton_forward(*inputs),
        "fbgemm": fbgemm,
    }


def forward_fp8(bench: Bench, dim: int) -> list[Result]:
    """An fp8 table with bf16 weights: half the bytes; no baseline supports such a table."""
    sizes = bench.sizes
    keys = bench.keys_within(sizes.keys, dim, 1, 0.25)
    values, scale = data.fp8_table(keys * keys, dim, bench.device)
    indices = data.slots_read("uniform", sizes.tokens, sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, DTYPE)
    times = bench.race({"ours": lambda: bench.kernels.forward(values, indices, weights, scale)})
    moved = data.forward_bytes(values, indices, weights) + indices.numel() * scale.itemsize
    case = f"T={sizes.tokens} K={sizes.reads} D={dim} N={keys}² fp8 uniform"
    return [bench.result("forward", case, times, moved=moved)]


# -------------------------------------------------------------------------------------------------------------- decode


def decode_cases(bench: Bench) -> Iterator[Case]:
    """Few tokens, with the narrowest and the widest table."""
    for dim in dict.fromkeys((bench.sizes.dims[0], bench.sizes.dims[-1])):
        for tokens in bench.sizes.decode:
            yield Case(f"T={tokens} D={dim}", partial(decode, tokens=tokens, dim=dim))


def decode(bench: Bench, tokens: int, dim: int) -> list[Result]:
    """Device time of CUDA graphs with several calls on rows that are in no cache; the note has the time of an eager call."""
    reads = bench.sizes.reads
    keys = bench.keys_within(bench.sizes.keys, dim, DTYPE.itemsize, 0.25)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    sets = [data.slots_read("uniform", tokens, reads, keys * keys, bench.device, seed=s) for s in range(bench.sizes.sets)]
    weights = data.weights_like(sets[0], DTYPE)

    def all_sets(call: Callable[[Tensor, Tensor, Tensor], Any]) -> Run:
        return unless_missing(lambda: bench.graphed(lambda: [call(values, indices, weights) for indices in sets]))

    times = bench.race(
        {
            "ours": all_sets(lambda v, i, w: bench.kernels.forward(v, i, w, None)),
            "embedding_bag": all_sets(lambda v, i, w: baselines().bag_forward(v, i, w)),
            "torch": all_sets(lambda v, i, w: baselines().torch_forward(v, i, w)),
            "triton": all_sets(lambda v, i, w: baselines().triton_forward(v, i, w)),
        },
        per=bench.sizes.sets,
    )
    moved = data.forward_bytes(values, sets[0], weights)
    eager = eager_us(bench, {"op": ops.sparse_lookup, "embedding_bag": baselines().bag_forward}, (values, sets[0], weights))
    case = f"T={tokens} K={reads} D={dim} N={keys}² bfloat16"
    return [
        bench.result("decode", case, times, moved=moved, targets=[Target("embedding_bag", 2), Target("triton", 5)], note=eager)
    ]


def eager_us(bench: Bench, calls: dict[str, Callable[..., Any]], inputs: tuple[Tensor, ...]) -> str:
    """Microseconds of wall time per eager call, launch included, as text."""
    if bench.rehearse:
        return ""
    texts = []
    for name, call in calls.items():
        for _ in range(20):
            call(*inputs)
        bench.sync()
        start = time.perf_counter()
        for _ in range(200):
            call(*inputs)
        bench.sync()
        texts.append(f"{name} {(time.perf_counter() - start) * 5e3:.0f} µs")
    return "eager call: " + ", ".join(texts)


# ------------------------------------------------------------------------------------------------------------ backward


def backward_cases(bench: Bench) -> Iterator[Case]:
    """Every width and pattern, then the row-sparse gradient."""
    for dim in bench.sizes.dims:
        yield Case(f"D={dim}", partial(backward, dim=dim))
    yield Case(f"D={bench.sizes.dims[0]} rows", partial(sparse_rows, dim=bench.sizes.dims[0]))


def backward(bench: Bench, dim: int) -> list[Result]:
    """Dense gradients of values and weights: first uniform reads, to which the skewed ones are compared."""
    keys = bench.keys_within(bench.sizes.train_keys, dim, 4 * DTYPE.itemsize, 0.5)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    lines: list[Result] = []
    uniform: float | None = None
    for pattern in ("uniform", "zipf", "hot"):
        times, moved = backward_race(bench, values, pattern)
        case = f"T={bench.sizes.tokens} K={bench.sizes.reads} D={dim} N={keys}² {pattern}"
        line = bench.result("backward", case, times, moved=moved, targets=[Target("triton", 1), Target("triton, fp32 sums", 1)])
        if pattern == "uniform":
            uniform = line.ms
        else:
            met = None if line.ms is None or uniform is None else line.ms <= 1.5 * uniform
            line.targets.append(("≤ 1.5× its uniform time", met))
        lines.append(line)
    return lines


def backward_race(bench: Bench, values: Tensor, pattern: str) -> tuple[dict[str, Timing | str], int]:
    """All implementations on one pattern, and the bytes that must move."""
    indices = data.slots_read(pattern, bench.sizes.tokens, bench.sizes.reads, values.shape[0], bench.device)
    weights = data.weights_like(indices, DTYPE)
    grad = data.normal(bench.sizes.tokens, values.shape[1], dtype=DTYPE, device=bench.device)
    inputs = (values, indices, weights)
    runs: dict[str, Run] = {
        "ours": lambda: bench.kernels.backward(grad, *inputs, None, True, True),
        "embedding_bag": unless_missing(lambda: baselines().gradients(baselines().bag_forward, grad, *inputs)),
        "torch": unless_missing(lambda: baselines().gradients(baselines().torch_forward, grad, *inputs)),
        "triton": lambda: baselines().triton_backward(grad, *inputs),
        "triton, fp32 sums": lambda: baselines().triton_backward(grad, *inputs, torch.float32),
    }
    return bench.race(runs), data.backward_bytes(*inputs, dense=True)


def sparse_rows(bench: Bench, dim: int) -> list[Result]:
    """Row-sparse gradient and weights' gradient; the baseline `embedding_bag(sparse=True)` does not coalesce its rows."""
    keys = bench.keys_within(bench.sizes.train_keys, dim, 4 * DTYPE.itemsize, 0.5)
    values = data.table(keys * keys, dim, DTYPE, bench.device)
    indices = data.slots_read("uniform", bench.sizes.tokens, bench.sizes.reads, keys * keys, bench.device)
    weights = data.weights_like(indices, DTYPE)
    grad = data.normal(bench.sizes.tokens, dim, dtype=DTYPE, device=bench.device)

    def ours() -> None:
        bench.kernels.rows(grad, indices, weights, keys * keys)
        bench.kernels.backward(grad, values, indices, weights, None, False, True)

    bag = partial(baselines().bag_forward, sparse=True)
    runs = {"ours": ours, "embedding_bag": unless_missing(lambda: baselines().gradients(bag, grad, values, indices, weights))}
    moved = data.backward_bytes(values, indices, weights, dense=False)
    case = f"T={bench.sizes.tokens} K={bench.sizes.reads} D={dim} N={keys}² uniform, rows"
    return [bench.result("backward", case, bench.race(runs), moved=moved)]
