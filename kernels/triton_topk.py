"""The operator `product_key_topk` in Triton: exactly the k largest of all sums of two halves.

`half_kernel` finds the k largest scores of each half: maxima of small groups, the k best groups, the k largest of their
scores. `pair_kernel` adds the candidate pairs of ranks and sorts the sums. `scatter_kernel` is the backward.
Comparisons dominate the time, not memory: with many rows, each lane sorts its own row, and lanes do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_topk_kernels import half_kernel, pair_kernel, scatter_kernel

MOST_KEYS, MOST_K = 65536, 256
SCATTERED = 16  # chosen scores of a row whose gradients one program of the backward adds
FEW_ROWS = 1024  # up to here a row is sorted by several warps: with one lane per row, most of the device would be idle
ELEMENT = {torch.float32: ("fp32", tl.float32), torch.float16: ("fp16", tl.float16), torch.bfloat16: ("bf16", tl.bfloat16)}


@dataclass(frozen=True)
class Plan:
    """How a kernel divides its work. The results do not depend on it: all keys are distinct, so the order is unique."""

    rows: int  # per program
    chunk: int  # scores sorted at once, per row
    group: int  # neighboring scores of which only the largest is sorted at first; 1: all are sorted at once
    warps: int


def plan_halves(n: int, k: int, dtype: torch.dtype, vec: int, few: bool) -> Plan:
    """Few rows: a row in several warps, all keys in one chunk. Many rows: a row per lane, as many keys as fit in registers."""
    top = triton.next_power_of_2(k)
    if few:
        chunk = max(top, min(8192, triton.next_power_of_2(n)), vec)
        return Plan(1, chunk, 1, min(8, max(1, chunk // 256)))
    held = 64 if dtype.itemsize == 4 else 96  # keys that fit in the registers of a lane
    chunk = max(16, top // 2)
    sort = (top.bit_length() - 1) * (top.bit_length() + 4) / 2 + 3  # approximate number of comparisons per key
    costs = {1: n * (sort + 6)}
    for group in (8, 16, 32):
        if vec <= group <= chunk <= top * group and triton.cdiv(n, group) > top:
            costs[group] = n + triton.cdiv(n, group) * (sort + 6) + top * group * (sort + 8)
    return Plan(_rows(chunk + top, held), chunk, min(costs, key=costs.__getitem__), 1)


def plan_pairs(k: int, few: bool) -> Plan:
    """As `plan_halves`, for keys of 64 bits."""
    top = triton.next_power_of_2(k)
    chunk = top if few else min(top, max(16, top // 2))
    return Plan(1 if few else _rows(chunk + top, 64), chunk, 1, 1)


def _rows(keys: int, held: int) -> int:
    """Rows per program, at most one per lane, so that each lane has at most `held` keys in registers."""
    return max(1, min(32, 1 << (32 * held // keys).bit_length() - 1))


def supports(scores1: Tensor, k: int) -> str | None:
    """Why these kernels do not support the scores [..., n] of a half, or None."""
    if scores1.dtype not in ELEMENT:
        return f"there are no top-k kernels for {scores1.dtype}"
    if k > MOST_K or scores1.shape[-1] > MOST_KEYS:
        return f"the top-k kernels support k <= {MOST_K} and {MOST_KEYS} keys per half, not {k} and {scores1.shape[-1]}"
    return None


def forward(scores1: Tensor, scores2: Tensor, k: int, softmax: bool = False) -> tuple[Tensor, Tensor]:
    """[..., n1], [..., n2] -> the k largest sums (or their softmax) in fp32, descending, and their slots i * n2 + j, int64.

    Among equal scores in a half, the smaller key is ranked first; among equal sums of candidate pairs, the smaller slot. So of
    all equal sums the smallest slots are chosen, unless the sums are equal only by rounding, an infinity or a NaN. NaN is
    largest, -0 becomes +0. No bit depends on the number of rows: a batch may be split.
    """
    leading = scores1.shape[:-1]
    flat1, flat2, inner = _flatten(scores1, scores2)
    rows = flat1.shape[0] * flat1.shape[1]
    out = torch.empty((*leading, k), dtype=torch.float32, device=scores1.device)
    indices = torch.empty((*leading, k), dtype=torch.int64, device=scores1.device)
    if rows == 0:
        return out, indices
    few = rows <= FEW_ROWS
    pairs = plan_pairs(k, few)
    wide = torch.int64 if scores1.dtype == torch.float32 else torch.int32
    found = torch.empty((2, triton.next_power_of_2(k), rows), dtype=wide, device=scores1.device)
    with torch.cuda.device_of(scores1):
        if flat1.shape[-1] == flat2.shape[-1]:
            _launch_halves((flat1, flat2), found, k, rows, inner, few)
        else:
            _launch_halves((flat1,), found[:1], k, rows, inner, few)
            _launch_halves((flat2,), found[1:], k, rows, inner, few)
        grid = (triton.cdiv(rows, pairs.rows),)
        constants = _pair_constants(k, scores1.dtype, pairs, softmax)
        pair_kernel[grid](found, out, indices, rows, flat2.shape[-1], **constants, num_warps=pairs.warps)
    return out, indices


def backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Adds each score's gradient [..., k] to both halves: [..., n1], [..., n2]; those of one key in order of k."""
    leading, k = indices.shape[:-1], indices.shape[-1]
    grad, indices = grad.contiguous(), indices.contiguous()
    grad1, grad2 = grad.new_zeros((*leading, n1)), grad.new_zeros((*leading, n2))
    rows = indices.numel() // k
    if rows > 0:
        constants, grid = _scatter_constants(n1, n2, k), (triton.cdiv(rows, 32), triton.cdiv(k, SCATTERED))
        with torch.cuda.device_of(grad):
            scatter_kernel[grid](grad, indices, grad1, grad2, rows, **constants, num_warps=1)
    return grad1, grad2


def _flatten(scores1: Tensor, scores2: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both as [outer, inner, n] with the same rows, without a copy if their strides allow it; and `inner`."""
    both = [scores1, scores2]
    if any(scores.stride(-1) != 1 and scores.shape[-1] > 1 for scores in both):
        both = [scores.contiguous() for scores in both]
    dims: list[tuple[int, list[int]]] = []  # size and both strides
    for d, size in enumerate(scores1.shape[:-1]):
        strides = [scores.stride(d) for scores in both]
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        elif size != 1:
            dims.append((size, strides))
    if len(dims) > 2:
        return _flatten(scores1.contiguous(), scores2.contiguous())
    dims = [(1, [0, 0])] * (2 - len(dims)) + dims
    shape = [size for size, _ in dims]
    flat = [
        scores.as_strided((*shape, scores.shape[-1]), (dims[0][1][half], dims[1][1][half], 1))
        for half, scores in enumerate(both)
    ]
    return flat[0], flat[1], shape[1]


def _launch_halves(halves: tuple[Tensor, ...], found: Tensor, k: int, rows: int, inner: int, few: bool) -> None:
    """`half_kernel` for one half, or for both in one launch: `apart` is the address difference of the two halves."""
    first, last, n, size = halves[0], halves[-1], halves[0].shape[-1], halves[0].element_size()
    strides = [*first.stride()[:2], *last.stride()[:2]]
    vec = gcd(16, *(half.data_ptr() for half in halves), *(stride * size for stride in strides), n * size) // size
    plan = plan_halves(n, k, first.dtype, vec, few)
    apart = (last.data_ptr() - first.data_ptr()) // (size * vec)
    grid = (triton.cdiv(rows, plan.rows), len(halves))
    numbers = (rows, inner, apart, *(stride // vec for stride in strides))
    half_kernel[grid](first, found, *numbers, **_half_constants(n, k, plan, vec), num_warps=plan.warps)


def _half_constants(n: int, k: int, plan: Plan, vec: int) -> dict[str, Any]:
    return {"N": n, "K": triton.next_power_of_2(k), "C": plan.chunk, "R": plan.rows, "VEC": vec, "GROUP": plan.group}


def _pair_constants(k: int, dtype: torch.dtype, plan: Plan, softmax: bool) -> dict[str, Any]:
    top = triton.next_power_of_2(k)
    blocks = top.bit_length() - 1 if top >= 4 else top
    numbers = {"k": k, "K": top, "C": plan.chunk, "R": plan.rows, "BLOCKS": blocks}
    return {**numbers, "DTYPE": ELEMENT[dtype][1], "SOFTMAX": softmax}


def _scatter_constants(n1: int, n2: int, k: int) -> dict[str, Any]:
    return {"N1": n1, "N2": n2, "k": k, "C": SCATTERED, "R": 32}


def compile_variants() -> Iterator[CompileVariant]:
    """The variants for the compile gate: every kind of plan, with the sizes that the layers use."""
    half, single = torch.bfloat16, torch.float32
    for n, k, dtype, few in (
        (128, 4, half, False),
        (1024, 32, half, False),
        (1024, 32, single, False),
        (4096, 64, half, False),
        (8192, 32, half, False),
        (1024, 32, half, True),
        (4096, 32, single, True),
    ):
        yield _half_variant(n, k, dtype, few)
    for k, dtype, few in ((32, half, False), (64, single, False), (32, half, True)):
        plan, (element, _) = plan_pairs(k, few), ELEMENT[dtype]
        signature = {"found": _key(element), "scores": "*fp32", "indices": "*i64", "rows": "i32", "n2": "i32"}
        constants = _pair_constants(k, dtype, plan, True)
        signature.update(dict.fromkeys(constants, "constexpr"))
        name = f"pair_topk {element} k={k}{' few' if few else ''}"
        yield CompileVariant(name, pair_kernel, signature, constants, ("found", "scores", "indices"), plan.warps, row_bytes=4)
    constants = _scatter_constants(1024, 1024, 32)
    signature = {"grad": "*fp32", "indices": "*i64", "grad1": "*fp32", "grad2": "*fp32", "rows": "i32"}
    signature.update(dict.fromkeys(constants, "constexpr"))
    yield CompileVariant(
        "scatter_topk k=32", scatter_kernel, signature, constants, ("grad", "indices", "grad1", "grad2"), 1, row_bytes=4
    )


def _half_variant(n: int, k: int, dtype: torch.dtype, few: bool) -> CompileVariant:
    element, vec = ELEMENT[dtype][0], 16 // dtype.itemsize
    plan = plan_halves(n, k, dtype, vec, few)
    constants = _half_constants(n, k, plan, vec)
    signature = {"scores": f"*{element}", "found": _key(element), "rows": "i32", "inner": "i32"}
    signature.update(dict.fromkeys(("apart", "outer1", "inner1", "outer2", "inner2"), "i64"))
    signature.update(dict.fromkeys(constants, "constexpr"))
    name = f"half_topk {element} n={n} k={k}{' few' if few else ''}"
    groups = plan.chunk // plan.group if plan.group > 1 else 0  # group indices, loaded one by one
    return CompileVariant(name, half_kernel, signature, constants, ("scores",), plan.warps, scalar_loads=groups)


def _key(element: str) -> str:
    return "*i64" if element == "fp32" else "*i32"
