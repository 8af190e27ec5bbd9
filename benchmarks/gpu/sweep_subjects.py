"""What the sweep of plans measures: kernels and sizes, their candidate plans, and inputs to run the launchers on.

A launcher takes the plan in use from `triton_plans.tuned`, so each is run in the same way, whatever fields its plans have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import data
import torch
from element_updates import zero_moment
from torch import Tensor
from triton import next_power_of_2

from memrewrite.kernels import triton_backward, triton_lazy_adam, triton_lookup, triton_segments, triton_topk, triton_update
from memrewrite.kernels.triton_plans import CACHES, KERNELS, PlanError
from memrewrite.kernels.triton_topk_plans import Plan, check_halves

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
READS = 128


@dataclass(frozen=True)
class Inputs:
    """`run` is timed; `outputs` are compared and must not depend on earlier runs."""

    run: Callable[[], Any]
    outputs: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """A kernel at one size."""

    kernel: str  # its name in the table of plans
    dtype: torch.dtype
    size: tuple[int, ...]
    candidates: list[dict[str, Any]]  # the most promising first
    inputs: Callable[[torch.device, str], Inputs]  # for a pattern of reads, or "tiny" or "rehearsal"
    functions: tuple[Any, ...]  # its Triton functions
    tolerance: float = 0.01  # of the relative error: other rows per step add in another order; for bf16 outputs
    patterns: int = 2

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} {'x'.join(map(str, self.size))}"

    def compiled(self) -> dict[int, Any]:
        """The kernels compiled so far in this process; none in the interpreter."""
        caches = [cache for function in self.functions for cache in getattr(function, "device_caches", {}).values()]
        return {id(kernel): kernel for cache in caches for kernel in cache[0].values()}

    def spills(self, before: dict[int, Any]) -> int:
        """The registers that the kernels compiled since then spill."""
        new = [kernel for key, kernel in self.compiled().items() if key not in before]
        return max((int(kernel.n_spills or 0) for kernel in new), default=0)


def subjects(rehearse: bool) -> Iterator[Subject]:
    """All of them, the most important first; tiny ones for a rehearsal."""
    for width in (40,) if rehearse else (1024, 4096):
        yield _forward(width, BF16)
        yield _gradients(width, BF16)
        yield _dots(width, BF16)
        yield _update(width, BF16)
        yield _lazy_adam(width, BF16, FP8)
    if rehearse:
        yield from _topk(32, 2, BF16)
    else:
        yield from _topk(1024, 32, BF16)
        yield _update(8192, BF16)
        yield _forward(4096, FP8)
        yield from _topk(4096, 64, BF16)
        yield from _topk(1024, 32, torch.float32)


def _plans(kernel: str, blocks: list[int], **values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Combinations of the values of the fields that the plans of this kernel have."""
    fields = [name for name in KERNELS[kernel].fields if name in values]
    choices = product(*(values[name] for name in fields))
    plans = [dict(zip(fields, choice, strict=True)) for choice in choices]
    return [{**plan, "block": block} for plan in plans for block in blocks] if blocks else plans


def _promising(plans: list[dict[str, Any]], itemsize: int, loads: int) -> list[dict[str, Any]]:
    """Those with 2 to 16 loads of 16 bytes per thread and step, sorted by their distance to `loads`; then by fields' order."""

    def asked(plan: dict[str, Any]) -> float:
        return float(plan["rows"] * plan["block"] * itemsize / (512 * plan["warps"]))

    kept = [plan for plan in plans if 2 <= asked(plan) <= 16 and plan["block"] * itemsize >= 256 * plan["warps"]]
    return sorted(kept, key=lambda plan: abs(asked(plan) - loads))


def _inputs(width: int, dtype: torch.dtype, device: torch.device, pattern: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values, slots, fp32 weights, and scale."""
    tokens, reads, slots = {"tiny": (80, READS, 300), "rehearsal": (3, 5, 20)}.get(pattern, (16384, READS, 1 << 20))
    where = pattern if pattern in ("uniform", "zipf") else "uniform"
    indices = data.slots_read(where, tokens, reads, slots, device)
    weights = data.weights_like(indices, torch.float32)
    if dtype == FP8:
        values, scale = data.fp8_table(slots, width, device)
        return values, indices, weights, scale
    return data.table(slots, width, dtype, device), indices, weights, None


def _same(run: Callable[[], Any]) -> Inputs:
    def outputs() -> tuple[Tensor, ...]:
        out = run()
        return out if isinstance(out, tuple) else (out,)

    return Inputs(run, outputs)


def _forward(width: int, dtype: torch.dtype) -> Subject:
    def inputs(device: torch.device, pattern: str) -> Inputs:
        values, indices, weights, scale = _inputs(width, dtype, device, pattern)
        return _same(lambda: triton_lookup.forward(values, indices, weights, scale, BF16))

    warp = 512 // dtype.itemsize
    plans = _plans(
        "forward", [warp, 2 * warp, 4 * warp], registers=(72, 64, 96), cache=CACHES, rows=(8, 4, 16), warps=(1, 2, 4)
    )
    return Subject("forward", dtype, (width,), _promising(plans, dtype.itemsize, 8), inputs, (triton_lookup.lookup_forward,))


def _gradients(width: int, dtype: torch.dtype) -> Subject:
    def inputs(device: torch.device, pattern: str) -> Inputs:
        values, indices, weights, _ = _inputs(width, dtype, device, pattern)
        grad = data.normal(indices.shape[0], width, dtype=dtype, device=device)
        segments = triton_segments.segment([indices], [weights], *values.shape)
        found = int(segments.last) + 1

        def run() -> tuple[Tensor, ...]:
            how = triton_backward.plan("segment_gradients", width, dtype, device)
            dots = torch.empty(how.slices, indices.numel(), dtype=torch.float32, device=device)
            out = torch.empty(segments.starts.numel() - 1, width, dtype=dtype, device=device)
            triton_backward.add_segments(grad, values, segments, out, dots, how, by_rank=True)
            return out[:found], dots

        def outputs() -> tuple[Tensor, ...]:
            out, dots = run()
            return out, dots.sum(0)

        return Inputs(run, outputs)

    warp = 512 // dtype.itemsize
    plans = _plans(
        "segment_gradients", [warp, 2 * warp, 4 * warp], registers=(None, 80, 128), cache=("", "evict_last"),
        rows=(2, 4, 8), warps=(1, 2),
    )  # fmt: skip
    functions = (triton_backward.segment_gradients,)
    return Subject("segment_gradients", dtype, (width,), _promising(plans, dtype.itemsize, 4), inputs, functions)


def _dots(width: int, dtype: torch.dtype) -> Subject:
    def inputs(device: torch.device, pattern: str) -> Inputs:
        values, indices, weights, scale = _inputs(width, dtype, device, pattern)
        grad = data.normal(indices.shape[0], width, dtype=dtype, device=device)

        def run() -> Tensor:
            out = triton_backward.backward(grad, values, indices, weights, scale, False, True)[1]
            assert out is not None
            return out

        return _same(run)

    warp = 512 // dtype.itemsize
    plans = _plans("token_dots", [warp, 2 * warp], registers=(None, 64, 96), cache=CACHES, rows=(4, 8, 2), warps=(1, 2))
    return Subject("token_dots", dtype, (width,), _promising(plans, dtype.itemsize, 8), inputs, (triton_backward.token_dots,))


def _update(width: int, dtype: torch.dtype) -> Subject:
    def inputs(device: torch.device, pattern: str) -> Inputs:
        values, indices, weights, _ = _inputs(width, dtype, device, pattern)
        table, state = values.clone(), torch.ones(values.shape[0], device=device)
        grad = data.normal(indices.shape[0], width, dtype=dtype, device=device)

        some = slice(None, None, values.shape[0] // 5000 or 1)  # all rows of the results would not fit in memory

        def step() -> None:
            numbers = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.0, "seed": 0}
            triton_update.adagrad_(table, None, state, [grad], [indices], [weights], **numbers)

        def outputs() -> tuple[Tensor, ...]:
            table.copy_(values)
            state.fill_(1)
            step()
            return table[some].clone(), state.clone()

        return Inputs(step, outputs)

    functions = (triton_update.update_rows,)
    patterns = 1 if width > 4096 else 2  # two tables of 16 GiB each per pattern
    return Subject("update", dtype, (width, 1), _update_plans(width), inputs, functions, patterns=patterns)


def _update_plans(width: int) -> list[dict[str, Any]]:
    """Whole rows with the fewest columns beyond the row first, then phases: slices narrower than the row."""
    whole = [(256 * warps, pieces, warps) for warps in (1, 2, 4, 8, 16) for pieces in (1, 2, 3, 4)]
    whole = sorted(
        (size for size in whole if width <= size[0] * size[1] < 2 * max(width, 256)),
        key=lambda size: (size[0] * size[1], abs(size[1] - 2)),
    )
    sliced = [(256, 2, 1), (512, 1, 2), (512, 2, 2)] if width >= 2048 else []
    shapes = [*((*size, rows) for size in whole for rows in (2, 4)), *((*size, 2) for size in sliced)]
    limits = [*product(("evict_last", ""), (80, 64)), ("evict_last", 96)]
    return [
        {"rows": rows, "block": block, "pieces": pieces, "warps": warps, "registers": registers, "cache": cache}
        for cache, registers in limits
        for block, pieces, warps, rows in shapes
    ]


def _lazy_adam(width: int, dtype: torch.dtype, moments: torch.dtype) -> Subject:
    """For a table of 16 or 32 bits: its rows are cut into slices, of which the widest is a row of up to 1024 columns."""

    def inputs(device: torch.device, pattern: str) -> Inputs:
        values, indices, weights, _ = _inputs(width, dtype, device, pattern)
        table, state = values.clone(), [t for _ in range(2) for t in zero_moment(values, moments)]
        grad = data.normal(indices.shape[0], width, dtype=dtype, device=device)
        some = slice(None, None, values.shape[0] // 5000 or 1)

        def step() -> None:
            numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1, "seed": 0}
            triton_lazy_adam.lazy_adam_(table, None, *state, [grad], [indices], [weights], **numbers)

        def outputs() -> tuple[Tensor, ...]:
            table.copy_(values)
            for moment, scale in (state[:2], state[2:]):
                moment.zero_()
                if scale is not None:
                    scale.fill_(1)
            step()
            return table[some].clone(), *(t[some].float() for t in state if t is not None)

        return Inputs(step, outputs)

    plans = _plans(
        "lazy_adam", [256, 128, 512], registers=(80, 64, 96, 128), cache=CACHES, rows=(2, 4), warps=(1, 2), pieces=(1, 2)
    )
    threads = [plan for plan in plans if 128 <= plan["block"] // plan["warps"] <= 512]
    functions = (triton_lazy_adam.lazy_adam_rows,)
    return Subject("lazy_adam", dtype, (width, moments.itemsize), threads, inputs, functions)


def _topk(n: int, k: int, dtype: torch.dtype) -> Iterator[Subject]:
    def inputs(device: torch.device, pattern: str) -> Inputs:
        rows = {"tiny": 2000, "rehearsal": 3}.get(pattern, 65536)
        halves = [data.normal(rows, n, dtype=dtype, device=device, seed=seed) for seed in (3, 4)]
        return _same(lambda: triton_topk.forward(*halves, k))

    rows, registers, top, vec = (16, 32, 8), (None, 128), next_power_of_2(k), 16 // dtype.itemsize
    groups = (16, 8, 32, 4, 1)
    halves = _plans("topk_half", [], registers=registers, rows=rows, group=groups, chunk=(16, 32, 64), warps=(1,))
    halves = [plan for plan in halves if _exact(plan, top, n, vec)]
    chunks = tuple(chunk for chunk in (16, 32, 64) if chunk <= top)
    pairs = _plans("topk_pair", [], registers=registers, rows=rows, group=(1,), chunk=chunks or (top,), warps=(1,))
    for kernel, plans, size in (("topk_half", halves, (n, k)), ("topk_pair", pairs, (k,))):
        functions = (triton_topk.half_kernel, triton_topk.pair_kernel)
        yield Subject(kernel, dtype, size, plans, inputs, functions, tolerance=0.0, patterns=1)


def _exact(plan: dict[str, Any], top: int, n: int, vec: int) -> bool:
    try:
        check_halves(Plan(**plan), top, n, vec)
    except PlanError:
        return False
    return True


def error(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The largest relative error of the outputs; 0 for equal bits, infinite where one has a NaN that the other does not."""
    worst = 0.0
    for ours, theirs in zip(got, right, strict=True):
        if torch.equal(ours, theirs):
            continue
        size = theirs.norm(dtype=torch.float32)
        difference = float((ours.float() - theirs.float()).norm() / size) if size else float("inf")
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
