"""Correctness of every kernel on the device, before anything is timed: a wrong kernel may be fast.

Each case samples inputs, fills new memory with NaN, and compares with the formula in float64 by ‖out − ref‖ / ‖ref‖.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import correctness_topk
import data as data
import torch
from calls import FP32_WEIGHTS, Launch, forward, recorded, text
from correctness_large import large_table
from correctness_update import close, moving, same, updates
from harness import Bench, Case, Result, Stop
from lookup import timed_widths

from memrewrite.kernels import reference

SECTION = "correctness"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}  # half types: at most half a unit in the last place
FP8 = torch.float8_e4m3fn
WIDEST = 8192  # of the updates: two slices
TOKENS = 300  # more than the reads of a segment; its thirds run as few tokens
Check = Callable[[Bench], float | str]  # the largest relative error, or a note; raises Stop


@dataclass(frozen=True)
class Lookup:
    """A lookup to check; weights have the dtype of the table unless another is given, and that of the output gradient too."""

    slots: int
    dim: int
    tokens: int
    reads: int
    dtype: torch.dtype
    pattern: str = "uniform"
    index: torch.dtype = torch.int64
    weights: torch.dtype | None = None

    def __str__(self) -> str:
        kinds = f"{_short(self.dtype)} {_short(self.index)}"
        more = "" if self.weights is None else f", weights {_short(self.weights)}"
        return f"N={self.slots} D={self.dim} T={self.tokens} K={self.reads} {kinds} {self.pattern}{more}"


def lookups(bench: Bench) -> Iterator[Lookup]:
    """Odd sizes first, then every timed width, with few tokens too, in every timed dtype, and with fp32 weights."""
    yield Lookup(1, 1, 1, 1, torch.float32)
    yield Lookup(63, 20, 9 if bench.rehearse else 60, 7, torch.bfloat16 if bench.rehearse else torch.float32, "hot", torch.int32)
    if not bench.rehearse:
        yield Lookup(60, 1000, 65, 7, torch.float16, "hot", torch.int32)
    tokens, reads = (7, 4) if bench.rehearse else (TOKENS, bench.sizes.reads)
    slots = 40 if bench.rehearse else 4096
    for dim in timed_widths(bench):
        yield Lookup(slots, dim, tokens, reads, torch.bfloat16, "hot")
        yield Lookup(slots, dim, tokens, reads, torch.float32, "zipf", torch.int32)
        if FP32_WEIGHTS:
            yield Lookup(slots, dim, tokens, reads, torch.bfloat16, weights=torch.float32)


def cases(bench: Bench) -> Iterator[Case]:
    """One case per kernel and size; the first wrong result ends the run. The last one compares with what is timed."""
    small, seen = bench.rehearse, set[Launch]()
    case = partial(_case, seen=seen)
    for size in lookups(bench):
        yield case(f"lookup {size}", partial(lookup, size=size))
    for dim in timed_widths(bench):
        yield case(f"lookup fp8 D={dim}", partial(fp8_lookup, dim=dim))
    for topk_size in correctness_topk.sizes(bench):
        rows, n1, n2, k, dtype = topk_size
        name = f"topk {rows}×({n1}+{n2}) k={k} {_short(dtype)}"
        yield case(name, partial(correctness_topk.topk, size=topk_size))
    for rule in ("adagrad", "adam"):
        for dim in dict.fromkeys((20, *timed_widths(bench), *(() if small else (WIDEST,)))):
            yield case(f"{rule} D={dim}", partial(all_updates, rule=rule, dim=dim))
    yield case("stochastic rounding bfloat16", moving)
    for dtype in (torch.bfloat16, FP8):
        yield case(f"a table of more than 2^31 elements, {_short(dtype)}", partial(large_table, dtype=dtype))
    if _launches(bench):
        yield Case("every timed kernel is checked", partial(timed_is_checked, seen=seen))


def _case(name: str, check: Check, seen: set[Launch]) -> Case:
    def run(bench: Bench) -> Iterator[Result]:
        with poisoned(), recorded() if _launches(bench) else nullcontext(set[Launch]()) as launches:
            found = check(bench)
        seen.update(launches)
        yield Result(SECTION, name, "ok", note=found if isinstance(found, str) else f"relative error {found:.1e}")

    return Case(name, run)


def _launches(bench: Bench) -> bool:
    return bool(bench.kernels.NAME == "triton")


def timed_is_checked(bench: Bench, seen: set[Launch]) -> Iterator[Result]:
    """Stop unless the cases of this section launched each kernel with each plan that the timed sections launch."""
    missing = timed_launches(bench) - seen
    if missing:
        raise Stop(f"{len(missing)} timed kernels are not checked, e.g. {text(min(missing))}")
    yield Result(SECTION, "every timed kernel is checked", "ok", note=f"{len(seen)} plans")


class Dry:
    """A `Bench` that calls ours once in each race and measures nothing, on small tables."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.sizes = dataclasses.replace(bench.sizes, keys=16, train_keys=16)
        self.rehearse = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bench, name)

    def graphed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Not captured."""
        return run

    def race(self, runs: dict[str, Callable[[], Any]], **_: Any) -> dict[str, Any]:
        """Only ours."""
        runs["ours"]()
        return {}

    def result(self, section: str, case: str, *_: Any, **__: Any) -> Result:
        """A line without numbers."""
        return Result(section, case)


def timed_launches(bench: Bench) -> set[Launch]:
    """The kernels and plans that the timed sections launch for this package: their cases run on small tables, and launch nothing."""
    import lookup as lookups
    import steps

    dry: Any = Dry(bench)
    makers = (lookups.forward_cases, lookups.decode_cases, lookups.backward_cases)
    with recorded(launch=False) as launches:
        for cases in (*makers, steps.topk_cases, steps.update_cases, steps.step_cases):
            for case in cases(dry):
                list(case.run(dry))
    return launches


@contextmanager
def poisoned() -> Iterator[None]:
    """Context manager: inside, `torch.empty` returns NaN, so that elements which a kernel does not write are detected."""
    deterministic: Any = torch.utils.deterministic  # a module with a property, unknown to type checkers
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            deterministic.fill_uninitialized_memory = before[1]


def lookup(bench: Bench, size: Lookup) -> float:
    """Forward, both gradients, row gradients; the same bits in two runs, and for the batch in two parts.

    With fp32 weights, output and output gradient are fp32 too: a weight that is rounded to the table's dtype is an error.
    """
    kernels, device, slots = bench.kernels, bench.device, size.slots
    kind = size.weights or size.dtype
    values = data.table(slots, size.dim, size.dtype, device)
    indices = data.slots_read(size.pattern, size.tokens, size.reads, slots, device, size.index)
    weights = data.normal(size.tokens, size.reads, dtype=kind, device=device)
    grad = data.normal(size.tokens, size.dim, dtype=kind, device=device, seed=4)
    exact = values.double().requires_grad_(), weights.double().requires_grad_()
    want = reference.sparse_lookup(exact[0], indices, exact[1])
    want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())

    def out_of(part: slice = slice(None)) -> torch.Tensor:
        return forward(kernels, values, indices[part], weights[part], dtype=kind)

    out = out_of()
    gv, gw = kernels.backward(grad, values, indices, weights, None, True, True)
    rows, row_grads = kernels.rows(grad, indices, weights, slots)
    alone = kernels.backward(grad, values, indices, weights, None, True, False)[0]
    dense = torch.zeros_like(want_gv).index_add_(0, rows, row_grads.double())
    errors = [
        close("forward", out, want, TOLERANCE[kind]),
        close("gradient of values", gv, want_gv, TOLERANCE[size.dtype]),
        close("gradient of weights", gw, want_gw, TOLERANCE[kind]),
        close("row gradients", dense, want_gv, TOLERANCE[kind]),
        close("gradient of values alone", alone, want_gv, TOLERANCE[size.dtype]),
    ]
    same("forward, again", out, out_of())
    again = kernels.backward(grad, values, indices, weights, None, True, True)
    same("gradient of values, again", gv, again[0])
    same("gradient of weights, again", gw, again[1])

    def dots_of(part: slice = slice(None)) -> torch.Tensor:
        found: torch.Tensor = kernels.backward(grad[part], values, indices[part], weights[part], None, False, True)[1]
        return found

    dots = dots_of()
    errors.append(close("gradient of weights alone", dots, want_gw, TOLERANCE[kind]))
    if size.weights is not None:  # as training calls it: the output in the table's dtype
        narrow = forward(kernels, values, indices, weights)
        errors.append(close("forward in the table's dtype", narrow, want, TOLERANCE[size.dtype]))
        few = forward(kernels, values, indices[:2], weights[:2])
        same("forward in the table's dtype, few tokens", few, narrow[:2])
        mixed = grad.to(size.dtype)
        found = kernels.backward(mixed, values, indices, weights, None, True, True)
        wanted = torch.autograd.grad(reference.sparse_lookup(exact[0], indices, exact[1]), exact, mixed.double())
        errors.append(close("gradient of values, narrow output", found[0], wanted[0], TOLERANCE[size.dtype]))
        errors.append(close("gradient of weights, narrow output", found[1], wanted[1], TOLERANCE[kind]))
        found = kernels.backward(mixed, values, indices, weights, None, False, True)
        errors.append(close("gradient of weights alone, narrow output", found[1], wanted[1], TOLERANCE[kind]))
        rows, row_grads = kernels.rows(mixed, indices, weights, slots)
        dense = torch.zeros_like(want_gv).index_add_(0, rows, row_grads.double())
        errors.append(close("row gradients, narrow output", dense, wanted[0], TOLERANCE[size.dtype]))
    third = size.tokens // 3
    if third:
        parts = [slice(0, third), slice(third, third + 2), slice(third + 2, None)]
        same("forward in parts", out, torch.cat([out_of(part) for part in parts]))
        same("gradient of weights in parts", dots, torch.cat([dots_of(part) for part in parts]))
    return max(errors)


def all_updates(bench: Bench, rule: str, dim: int) -> float:
    """The update of a table of every dtype; in bf16 with weights of both kinds."""
    kinds = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (FP8, torch.float32)]
    kinds += [(torch.bfloat16, torch.float32)] if FP32_WEIGHTS else []
    return max(updates(bench, rule, dim, dtype, weights) for dtype, weights in kinds)


def fp8_lookup(bench: Bench, dim: int) -> float:
    """As training calls it, with fp32 weights, and with bf16 weights."""
    return max(_fp8_lookup(bench, dim, dtype) for dtype in (torch.float32, torch.bfloat16))


def _fp8_lookup(bench: Bench, dim: int, dtype: torch.dtype) -> float:
    """Forward and the gradient of the weights of an fp8 table; the output has the dtype of the weights."""
    device = bench.device
    values, scale = data.fp8_table(500, dim, device)
    tokens, reads = (6, 4) if bench.rehearse else (TOKENS, bench.sizes.reads)
    indices = data.slots_read("uniform", tokens, reads, 500, device)
    weights = data.normal(tokens, reads, dtype=dtype, device=device)
    grad = data.normal(tokens, dim, dtype=dtype, device=device, seed=4)
    wide = values.float().double() * scale.double().unsqueeze(-1)
    want = reference.sparse_lookup(wide, indices, weights.double())
    want_gw = torch.einsum("td,tkd->tk", grad.double(), wide[indices])
    out = forward(bench.kernels, values, indices, weights, scale)
    same("forward of few tokens", out[:2], forward(bench.kernels, values, indices[:2], weights[:2], scale))
    gw = bench.kernels.backward(grad, values, indices, weights, scale, False, True)[1]
    return max(close("forward", out, want, TOLERANCE[dtype]), close("gradient of weights", gw, want_gw, TOLERANCE[dtype]))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
