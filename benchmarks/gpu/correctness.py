"""Correctness of every kernel on the device, before anything is timed: a wrong kernel may be fast.

Each case samples inputs, fills new memory with NaN, and compares with the formula in float64 by ‖out − ref‖ / ‖ref‖.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import correctness_topk
import data as data
import torch
from calls import Launch, forward, recorded, text
from correctness_keys import product_keys
from correctness_large import large_table
from correctness_update import Check, close, moving, same, updates
from harness import Bench, Case, Result, Stop
from lookup import odd_widths, timed_widths
from sections import COVERAGE
from torch import Tensor

from memrewrite.kernels import reference

SECTION = "correctness"
# half types: one unit in the last place, since Triton's interpreter truncates to bf16; what fp32 outputs show is exact
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FP8 = torch.float8_e4m3fn
UPDATES = (  # dtype of the table, of the output's gradient, of the weights
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (FP8, torch.bfloat16, torch.float32),
    (FP8, torch.float32, torch.float32),
)
LAZY_ADAM = (  # those, and the dtype of the moments
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32, FP8),
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (FP8, torch.bfloat16, torch.float32, FP8),
)
WIDEST = 8192  # of the updates: two slices
SLOTS = 4096
TOKENS = 300  # more than the reads of a segment; its thirds run as few tokens


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
    yield Lookup(
        63, 20, 9 if bench.rehearse else 60, 7, torch.bfloat16 if bench.rehearse else torch.float32, "hot", torch.int32
    )
    if not bench.rehearse:
        yield Lookup(60, 1000, 65, 7, torch.float16, "hot", torch.int32)
    tokens, reads = (7, 4) if bench.rehearse else (TOKENS, bench.sizes.reads)
    slots = 40 if bench.rehearse else SLOTS
    for dim in timed_widths(bench):
        yield Lookup(slots, dim, tokens, reads, torch.bfloat16, "hot")
        yield Lookup(slots, dim, tokens, reads, torch.bfloat16, "zipf", torch.int32)
        yield Lookup(slots, dim, tokens, reads, torch.float32, "zipf")
        yield Lookup(slots, dim, tokens, reads, torch.bfloat16, weights=torch.float32)


def checks(bench: Bench) -> Iterator[tuple[str, Callable[[Bench], Check]]]:
    """The checks of every kernel at every size, by name."""
    for size in lookups(bench):
        yield f"lookup {size}", partial(lookup, size=size)
    for dim in timed_widths(bench):
        for weights in (torch.float32, torch.bfloat16):
            yield f"lookup fp8 D={dim}, weights {_short(weights)}", partial(fp8_lookup, dim=dim, dtype=weights)
    for topk_size in correctness_topk.sizes(bench):
        rows, n1, n2, k, dtype = topk_size
        yield f"topk {rows}×({n1}+{n2}) k={k} {_short(dtype)}", partial(correctness_topk.topk, size=topk_size)
    for rule in ("adagrad", "adam"):
        for dim in dict.fromkeys((20, *timed_widths(bench), *(() if bench.rehearse else (WIDEST,)))):
            for dtypes in UPDATES:
                table, grad, weights = map(_short, dtypes)
                yield (
                    f"{rule} D={dim} {table}, gradients {grad}, weights {weights}",
                    partial(updates, rule=rule, dim=dim, dtypes=dtypes),
                )
    widths = (20, bench.sizes.dims[0], bench.sizes.dims[-1], odd_widths(bench)[0], *(() if bench.rehearse else (WIDEST,)))
    for dim in dict.fromkeys(widths):
        for *dtypes, kind in LAZY_ADAM:
            table, grad, weights, moments = map(_short, (*dtypes, kind))
            yield (
                f"lazy_adam D={dim} {table}, gradients {grad}, weights {weights}, moments {moments}",
                partial(updates, rule="lazy_adam", dim=dim, dtypes=tuple(dtypes), kind=kind),
            )


def cases(bench: Bench) -> Iterator[Case]:
    """One case per check, then tables of more than 2^31 elements; the last one compares with what is timed."""
    for name, check in checks(bench):
        yield _case(name, check)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(f"topk from queries {_short(dtype)}", partial(product_keys, dtype=dtype))
    yield _case("stochastic rounding bfloat16", moving)
    for dtype in (torch.bfloat16, FP8):
        yield _case(f"lookup and updates of more than 2^31 elements, {_short(dtype)}", partial(large_table, dtype=dtype))
    if bench.kernels.NAME == "triton":
        yield Case(COVERAGE, timed_is_checked)


def _case(name: str, check: Callable[[Bench], Check]) -> Case:
    def run(bench: Bench) -> Iterator[Result]:
        with poisoned():
            found = finished(check(bench))
        yield Result(SECTION, name, "ok", note=found if isinstance(found, str) else f"relative error {found:.1e}")

    return Case(name, run)


def finished(check: Check) -> float | str:
    """The result of a check. Raises Stop if a kernel is wrong."""
    found: list[float | str] = []

    def keeping() -> Iterator[None]:
        found.append((yield from check))

    for _ in keeping():
        pass
    return found[0]


def timed_is_checked(bench: Bench) -> Iterator[Result]:
    """Stop unless the checks launch each kernel with each plan that the timed sections launch."""
    checked = checked_launches(bench)
    missing = timed_launches(bench) - checked
    if missing:
        raise Stop(f"{len(missing)} timed kernels are not checked, e.g. {text(min(missing))}")
    yield Result(SECTION, COVERAGE, "ok", note=f"the checks have {len(checked)} kernels and plans")


def checked_launches(bench: Bench) -> set[Launch]:
    """The kernels and plans that the checks launch; nothing is launched."""
    with recorded(launch=False) as launches:
        for _, check in checks(bench):
            next(check(bench))
    return launches


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
    """What the timed sections launch of this package: their cases run on small tables, and launch nothing.

    Without the sections of whole layers: they launch these kernels, with fp32 weights, as some cases here do at each width.
    """
    import lookup as lookups
    import steps

    dry: Any = Dry(bench)
    makers = (lookups.forward_cases, lookups.decode_cases, lookups.backward_cases)
    with recorded(launch=False) as launches:
        for cases in (*makers, steps.topk_cases, steps.update_cases):
            for case in cases(dry):
                list(case.run(dry))
        list(steps.lookup_step(dry, dry.sizes.dims[0]))
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


def lookup(bench: Bench, size: Lookup) -> Check:
    """Forward, both gradients, row gradients; the same bits in two runs, and for the batch in three parts.

    With fp32 weights, output and output gradient are fp32 too: a weight that is rounded to the table's dtype is an error. Then
    once more as training calls it, with both in the table's dtype.
    """
    slots, kind, device = size.slots, size.weights or size.dtype, bench.device
    values = data.table(slots, size.dim, size.dtype, device)
    indices = data.slots_read(size.pattern, size.tokens, size.reads, slots, device, size.index)
    weights = data.normal(size.tokens, size.reads, dtype=kind, device=device)
    grad = data.normal(size.tokens, size.dim, dtype=kind, device=device, seed=4)
    third = size.tokens // 3
    parts = [slice(0, third), slice(third, third + 2), slice(third + 2, None)] if third else []
    runs = [lookup_results(bench, values, indices, weights, grad, parts)]
    if size.weights is not None:
        runs.append(lookup_results(bench, values, indices, weights, grad.to(size.dtype), parts))
    yield
    errors = []
    for found in runs:
        exact = values.double().requires_grad_(), weights.double().requires_grad_()
        want = reference.sparse_lookup(exact[0], indices, exact[1])
        want_gv, want_gw = torch.autograd.grad(want, exact, found.grad.double())
        rows, row_grads = found.rows
        if int(rows.min()) < 0 or int(rows.max()) >= slots:
            raise Stop(f"row gradients: a row is outside the table of {slots}")
        dense = torch.zeros_like(want_gv).index_add_(0, rows, row_grads.double())
        narrow = TOLERANCE[found.grad.dtype]
        errors += [
            close("forward", found.out[0], want, narrow),
            close("gradient of values", found.both[0][0], want_gv, TOLERANCE[size.dtype]),
            close("gradient of weights", found.both[0][1], want_gw, TOLERANCE[kind]),
            close("row gradients", dense, want_gv, narrow),
            close("gradient of values alone", found.values_alone, want_gv, TOLERANCE[size.dtype]),
            close("gradient of weights alone", found.dots[0], want_gw, TOLERANCE[kind]),
        ]
        same("forward, again", found.out[0], found.out[1])
        for name, one, two in zip(("values", "weights"), *found.both, strict=True):
            same(f"gradient of {name}, again", one, two)
        if parts:
            same("forward in parts", found.out[0], torch.cat(found.out[2:]))
            same("gradient of weights in parts", found.dots[0], torch.cat(found.dots[1:]))
    return max(errors)


@dataclass(frozen=True)
class Found:
    """What the kernels of a lookup return, for one gradient of the output."""

    grad: Tensor
    out: list[Tensor]  # of two runs, then of the parts
    both: list[tuple[Tensor, Tensor]]  # gradients of values and weights of two runs
    rows: tuple[Tensor, Tensor]
    values_alone: Tensor
    dots: list[Tensor]  # the gradient of the weights alone, then of the parts


def lookup_results(bench: Bench, values: Tensor, indices: Tensor, weights: Tensor, grad: Tensor, parts: list[slice]) -> Found:
    """Every kernel of the lookup, with the output in the dtype of `grad`."""
    kernels, everything = bench.kernels, slice(None)

    def out(part: slice) -> Tensor:
        return forward(kernels, values, indices[part], weights[part], dtype=grad.dtype)

    def dots(part: slice) -> Tensor:
        found: Tensor = kernels.backward(grad[part], values, indices[part], weights[part], None, False, True)[1]
        return found

    return Found(
        grad=grad,
        out=[out(part) for part in (everything, everything, *parts)],
        both=[kernels.backward(grad, values, indices, weights, None, True, True) for _ in range(2)],
        rows=kernels.rows(grad, indices, weights, values.shape[0]),
        values_alone=kernels.backward(grad, values, indices, weights, None, True, False)[0],
        dots=[dots(part) for part in (everything, *parts)],
    )


def fp8_lookup(bench: Bench, dim: int, dtype: torch.dtype) -> Check:
    """Forward, of few tokens too, and the gradient of the weights of an fp8 table; the output has the dtype of the weights."""
    device, kernels, slots = bench.device, bench.kernels, 40 if bench.rehearse else SLOTS
    values, scale = data.fp8_table(slots, dim, device)
    tokens, reads = (6, 4) if bench.rehearse else (TOKENS, bench.sizes.reads)
    indices = data.slots_read("uniform", tokens, reads, slots, device)
    weights = data.normal(tokens, reads, dtype=dtype, device=device)
    grad = data.normal(tokens, dim, dtype=dtype, device=device, seed=4)
    out = forward(kernels, values, indices, weights, scale)
    few = forward(kernels, values, indices[:2], weights[:2], scale)
    gw = kernels.backward(grad, values, indices, weights, scale, False, True)[1]
    yield
    wide = values.float().double() * scale.double().unsqueeze(-1)
    want = reference.sparse_lookup(wide, indices, weights.double())
    want_gw = torch.einsum("td,tkd->tk", grad.double(), wide[indices])
    same("forward of few tokens", out[:2], few)
    return max(close("forward", out, want, TOLERANCE[dtype]), close("gradient of weights", gw, want_gw, TOLERANCE[dtype]))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
