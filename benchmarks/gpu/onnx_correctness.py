"""Correctness of the memory operators' kernels in ONNX Runtime on the device, before anything is timed.

Each case samples inputs, fills the outputs with NaN before the call, and compares with the formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import data as data
import torch
from correctness_update import close, same
from harness import Bench, Case, Result, Stop
from onnx_operators import Operators
from torch import Tensor

from memrewrite.kernels import reference

Size = tuple[int, int, int, int]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LOOKUPS = [  # N, D, T, K; each also with rows whose addresses are not multiples of 16 bytes
    (1, 1, 1, 1), (63, 20, 60, 7), (1000, 63, 1, 128), (97, 1000, 63, 300), (4096, 1024, 1000, 128), (4096, 2048, 5, 33)
]  # fmt: skip
TOPKS = [  # rows, n1, n2, k
    (1, 1, 1, 1), (7, 63, 60, 7), (65, 200, 128, 32), (33, 1024, 1024, 32), (9, 4096, 4096, 32), (3, 1500, 1200, 1024)
]  # fmt: skip


def checks(bench: Bench, operators: Operators) -> Iterator[Case]:
    """Both operators with all dtypes and sizes."""
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for size in LOOKUPS[:3] if bench.rehearse else LOOKUPS:
            for index in (torch.int64, torch.int32):
                for apart in (0, 1):
                    name = (
                        f"lookup N={size[0]} D={size[1]} T={size[2]} K={size[3]} {kind} {str(index)[6:]}"
                        + ", unaligned" * apart
                    )
                    yield _check(name, partial(lookup, operators, size=size, dtype=dtype, index=index, apart=apart))
        for size in TOPKS[:3] if bench.rehearse else TOPKS:
            for soft in (0, 1):
                name = f"topk {size[0]}×({size[1]}+{size[2]}) k={size[3]} {kind}" + ", softmax" * soft
                yield _check(name, partial(topk, operators, size=size, dtype=dtype, soft=soft))
    if not bench.rehearse:  # on the CPU it is an error
        yield _check("an index of no row", partial(no_row, operators))


def _check(name: str, check: Callable[[Bench], float]) -> Case:
    return Case(name, lambda bench: [Result("onnx", name, note=f"relative error {check(bench):.1e}")])


def lookup_inputs(
    bench: Bench, size: Size, dtype: torch.dtype, index: torch.dtype = torch.int64, apart: int = 0
) -> dict[str, Tensor]:
    """Inputs of SparseLookup; the table starts `apart` elements after a multiple of 16 bytes."""
    slots, dim, tokens, reads = size
    values = data.table(1, slots * dim + apart, dtype, bench.device)[0, apart:].view(slots, dim)
    indices = data.slots_read("uniform", tokens, reads, slots, bench.device, index)
    return {"values": values, "indices": indices, "weights": data.weights_like(indices, dtype)}


def lookup(operators: Operators, bench: Bench, size: Size, dtype: torch.dtype, index: torch.dtype, apart: int) -> float:
    """Compared with the formula in float64; the same bits in two runs."""
    inputs = lookup_inputs(bench, size, dtype, index, apart)
    wide = inputs["values"].double(), inputs["indices"], inputs["weights"].double()
    (found,) = operators.call("native", "SparseLookup", inputs)()
    error = close("lookup", found, reference.sparse_lookup(*wide), TOLERANCE[dtype])
    same("lookup, again", found, operators.call("native", "SparseLookup", inputs)()[0])
    return error


def no_row(operators: Operators, bench: Bench) -> float:
    """A token that reads outside the table gets NaN; the results of other tokens are right."""
    inputs = lookup_inputs(bench, (63, 20, 9, 7), torch.float32)
    want = reference.sparse_lookup(*(x.double() if x.is_floating_point() else x for x in inputs.values()))
    inputs["indices"][2, 3], inputs["indices"][5, 0] = 63, -1
    (found,) = operators.call("native", "SparseLookup", inputs)()
    wrong = [2, 5]
    if not found[wrong].isnan().all():
        raise Stop("an index outside the table read something")
    want[wrong] = 0
    return close("the other tokens", found.index_fill(0, torch.tensor(wrong, device=bench.device), 0), want, 1e-5)


def topk(operators: Operators, bench: Bench, size: Size, dtype: torch.dtype, soft: int) -> float:
    """Scores are bit for bit the largest sums, each slot gives its sum, no slot occurs twice; same bits in two runs."""
    rows, n1, n2, k = size
    one, two = (data.normal(rows, n, dtype=dtype, device=bench.device, seed=n + at) for at, n in enumerate((n1, n2)))
    inputs = {"scores1": one, "scores2": two}
    scores, slots = operators.call("native", "ProductKeyTopk", inputs, k=k, softmax=soft)()
    again = operators.call("native", "ProductKeyTopk", inputs, k=k, softmax=soft)()
    same("scores, again", scores, again[0])
    same("slots, again", slots, again[1])
    halves = zip(one.float().split(4), two.float().split(4), strict=True)
    want = torch.cat([reference.product_key_topk(a, b, k)[0] for a, b in halves])
    same("sums of the slots", want, one.float().gather(1, slots // n2) + two.float().gather(1, slots % n2))
    if (slots.sort(-1).values.diff(dim=-1) == 0).any():
        raise Stop("a slot was chosen twice")
    if soft:
        return close("softmax", scores, want.double().softmax(-1), 1e-5)
    same("scores", scores, want)
    return 0.0
