"""Correctness of every kernel on the device, before anything is timed: a wrong kernel may be fast.

Each case samples inputs, fills new memory with NaN, and compares with the formula in float64 by ‖out − ref‖ / ‖ref‖.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import data as data
import torch
from correctness_update import close, fp8_update, moving, same, updates
from harness import Bench, Case, Result, Stop

from memrewrite.kernels import reference

SECTION = "correctness"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Check = Callable[[Bench], float | str]  # the largest relative error, or a note; raises Stop

# N, D, T, K, dtype of the table, dtype of the indices, pattern. Odd sizes first, then the measured widths.
LOOKUPS = [
    (1, 1, 1, 1, torch.float32, torch.int64, "uniform"),
    (63, 20, 60, 7, torch.float32, torch.int32, "uniform"),
    (1000, 576, 63, 128, torch.bfloat16, torch.int32, "uniform"),
    (60, 1000, 65, 7, torch.float16, torch.int32, "hot"),
    (4096, 1024, 1000, 128, torch.bfloat16, torch.int64, "uniform"),
    (4096, 1024, 2000, 128, torch.float32, torch.int64, "zipf"),
    (4096, 2048, 700, 32, torch.bfloat16, torch.int64, "hot"),
    (2048, 4096, 300, 128, torch.bfloat16, torch.int64, "hot"),
]
SMALL_LOOKUPS = [(1, 1, 1, 1, torch.float32, torch.int64, "uniform"), (63, 20, 9, 7, torch.bfloat16, torch.int32, "hot")]
# rows, n1, n2, k, dtype
TOPKS = [
    (7, 63, 60, 7, torch.float32),
    (65, 200, 128, 32, torch.float16),
    (33, 1024, 1024, 32, torch.bfloat16),
    (33, 1024, 1024, 32, torch.float32),
    (17, 4096, 4096, 32, torch.bfloat16),
    (9, 4096, 4096, 32, torch.float32),
]
UPDATES = [(20, torch.float32), (1024, torch.bfloat16), (2048, torch.float32), (4096, torch.bfloat16)]
SMALL_TOPKS = [(5, 9, 6, 3, torch.float32), (3, 16, 16, 4, torch.bfloat16)]


def cases(bench: Bench) -> Iterator[Case]:
    """One case per kernel and size; the first wrong result ends the run."""
    small = bench.rehearse
    for size in SMALL_LOOKUPS if small else LOOKUPS:
        name = f"lookup N={size[0]} D={size[1]} T={size[2]} K={size[3]} {_short(size[4])} {_short(size[5])} {size[6]}"
        yield _case(name, partial(lookup, size=size))
    for dim in (32,) if small else (576, 1024, 4096):
        yield _case(f"lookup fp8 D={dim}", partial(fp8_lookup, dim=dim))
    for topk_size in SMALL_TOPKS if small else TOPKS:
        rows, n1, n2, k, dtype = topk_size
        yield _case(f"topk {rows}×({n1}+{n2}) k={k} {_short(dtype)}", partial(topk, size=topk_size))
    for rule in ("adagrad", "adam"):
        for dim, dtype in UPDATES[:1] if small else UPDATES:
            yield _case(f"{rule} D={dim} {_short(dtype)}", partial(updates, rule=rule, dim=dim, dtype=dtype))
        yield _case(f"{rule} fp8", partial(fp8_update, rule=rule, dim=32 if small else 4096))
    yield _case("stochastic rounding bfloat16", moving)


def _case(name: str, check: Check) -> Case:
    def run(bench: Bench) -> list[Result]:
        with poisoned():
            found = check(bench)
        return [Result(SECTION, name, "ok", note=found if isinstance(found, str) else f"relative error {found:.1e}")]

    return Case(name, run)


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


def lookup(bench: Bench, size: tuple[int, int, int, int, torch.dtype, torch.dtype, str]) -> float:
    """Forward, both gradients, row gradients; the same bits in two runs, and for the batch in two parts."""
    slots, dim, tokens, reads, dtype, index, pattern = size
    kernels, device = bench.kernels, bench.device
    values = data.table(slots, dim, dtype, device)
    indices = data.slots_read(pattern, tokens, reads, slots, device, index)
    weights = data.normal(tokens, reads, dtype=dtype, device=device)
    grad = data.normal(tokens, dim, dtype=dtype, device=device, seed=4)
    exact = values.double().requires_grad_(), weights.double().requires_grad_()
    want = reference.sparse_lookup(exact[0], indices, exact[1])
    want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())

    out = kernels.forward(values, indices, weights, None)
    gv, gw = kernels.backward(grad, values, indices, weights, None, True, True)
    rows, row_grads = kernels.rows(grad, indices, weights, slots)
    dense = torch.zeros_like(want_gv).index_add_(0, rows, row_grads.double())
    tolerance = TOLERANCE[dtype]
    errors = [
        close("forward", out, want, tolerance),
        close("gradient of values", gv, want_gv, tolerance),
        close("gradient of weights", gw, want_gw, tolerance),
        close("row gradients", dense, want_gv, tolerance),
    ]
    same("forward, again", out, kernels.forward(values, indices, weights, None))
    again = kernels.backward(grad, values, indices, weights, None, True, True)
    same("gradient of values, again", gv, again[0])
    same("gradient of weights, again", gw, again[1])
    close(
        "gradient of values alone", kernels.backward(grad, values, indices, weights, None, True, False)[0], want_gv, tolerance
    )
    close(
        "gradient of weights alone", kernels.backward(grad, values, indices, weights, None, False, True)[1], want_gw, tolerance
    )
    if tokens > 1:
        parts = [slice(0, tokens // 3 or 1), slice(tokens // 3 or 1, tokens)]
        split = [kernels.forward(values, indices[p], weights[p], None) for p in parts]
        same("forward in two parts", out, torch.cat(split))
        grads = [kernels.backward(grad[p], values, indices[p], weights[p], None, False, True)[1] for p in parts]
        same("gradient of weights in two parts", gw, torch.cat(grads))
    return max(errors)


def fp8_lookup(bench: Bench, dim: int) -> float:
    """Forward and the gradient of the weights of an fp8 table."""
    device = bench.device
    values, scale = data.fp8_table(500, dim, device)
    tokens, reads = (6, 4) if bench.rehearse else (200, 32)
    indices = data.slots_read("uniform", tokens, reads, 500, device)
    dtype = torch.bfloat16 if dim % 1024 == 0 else torch.float32
    weights = data.normal(tokens, reads, dtype=dtype, device=device)
    grad = data.normal(tokens, dim, dtype=dtype, device=device, seed=4)
    wide = values.float().double() * scale.double().unsqueeze(-1)
    want = reference.sparse_lookup(wide, indices, weights.double())
    want_gw = torch.einsum("td,tkd->tk", grad.double(), wide[indices])
    out = bench.kernels.forward(values, indices, weights, scale)
    gw = bench.kernels.backward(grad, values, indices, weights, scale, False, True)[1]
    return max(close("forward", out, want, TOLERANCE[dtype]), close("gradient of weights", gw, want_gw, TOLERANCE[dtype]))


def topk(bench: Bench, size: tuple[int, int, int, int, torch.dtype]) -> float:
    """The scores are bit for bit the largest sums, each slot gives its sum, no slot occurs twice; softmax; backward."""
    rows, n1, n2, k, dtype = size
    kernels, device = bench.kernels, bench.device
    one = data.normal(rows, n1, dtype=dtype, device=device)
    two = data.normal(rows, n2, dtype=dtype, device=device, seed=4)
    want = torch.cat(
        [reference.product_key_topk(a, b, k)[0] for a, b in zip(one.float().split(8), two.float().split(8), strict=True)]
    )
    scores, slots = kernels.topk(one, two, k, False)
    same("scores", scores, want)
    same("sums of the slots", scores, one.float().gather(1, slots // n2) + two.float().gather(1, slots % n2))
    if (slots.sort(-1).values.diff(dim=-1) == 0).any():
        raise Stop("a slot was chosen twice")
    weights, again = kernels.topk(one, two, k, True)
    same("slots, with softmax", slots, again)
    grad = data.normal(rows, k, dtype=torch.float32, device=device, seed=5)
    found = kernels.topk_backward(grad, slots, n1, n2)
    errors = [close("softmax", weights, scores.double().softmax(-1), 1e-5)]
    for name, got, at, n in (("first", found[0], slots // n2, n1), ("second", found[1], slots % n2, n2)):
        right = torch.zeros(rows, n, dtype=torch.float64, device=device).scatter_add_(1, at, grad.double())
        errors.append(close(f"gradient of the {name} half", got, right, 1e-5))
    again_grads = kernels.topk_backward(grad, slots, n1, n2)
    same("gradients, again", torch.cat(found, 1), torch.cat(again_grads, 1))
    return max(errors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
