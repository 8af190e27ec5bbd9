"""The operator `product_key_topk` in Triton: exactly the k largest of all sums of two halves.

`half_kernel` finds the k largest scores of each half: maxima of small groups, the k best groups, the k largest of their
scores. `pair_kernel` adds the candidate pairs of ranks and sorts the sums. `scatter_kernel` is the backward.
Comparisons dominate the time, not memory: with many rows, each lane sorts its own row, and lanes do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_topk_kernels import half_kernel, pair_kernel, scatter_kernel
from memrewrite.kernels.triton_topk_plans import (
    LANE_K,
    NARROW_KEYS,
    Plan,
    measured,
    plan_halves,
    plan_pairs,
    rounded,
    wide_keys,
)

MOST_KEYS, MOST_K = 2**30, 2048
TOPS = tuple(2**bits for bits in range(2, 12))  # what `rounded` returns, up to MOST_K
SCATTERED = 16  # chosen scores of a row whose gradients one program of the backward adds
FEW_ROWS = 1024  # up to here a row is sorted by several warps: with one lane per row, most of the device would be idle
ELEMENT = {torch.float32: ("fp32", tl.float32), torch.float16: ("fp16", tl.float16), torch.bfloat16: ("bf16", tl.bfloat16)}


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
    all equal sums the smallest slots are chosen, unless the sums are equal only by rounding, an infinity or a NaN. With more
    than 2^32 slots, equal sums are ordered by their ranks in both halves instead. NaN is largest, -0 becomes +0. No bit depends
    on the number of rows: a batch may be split. Neither copies from the host nor synchronizes: CUDA graphs can capture it.
    """
    leading = scores1.shape[:-1]
    flat1, flat2, inner = _flatten(scores1, scores2)
    rows = flat1.shape[0] * flat1.shape[1]
    out = torch.empty((*leading, k), dtype=torch.float32, device=scores1.device)
    indices = torch.empty((*leading, k), dtype=torch.int64, device=scores1.device)
    if rows == 0:
        return out, indices
    few = rows <= FEW_ROWS
    pairs = measured("topk_pair", scores1, few, k) or plan_pairs(k, few)
    n1, n2 = flat1.shape[-1], flat2.shape[-1]
    key = torch.int64 if wide_keys(max(n1, n2), scores1.dtype) else torch.int32
    found = torch.empty((2, rounded(k), rows), dtype=key, device=scores1.device)
    with torch.cuda.device_of(scores1):
        if n1 == n2:
            _launch_halves((flat1, flat2), found, k, rows, inner, few)
        else:
            _launch_halves((flat1,), found[:1], k, rows, inner, few)
            _launch_halves((flat2,), found[1:], k, rows, inner, few)
        grid = (triton.cdiv(rows, pairs.rows),)
        constants = _pair_constants(n1 * n2, k, scores1.dtype, pairs, softmax)
        pair_kernel[grid](found, out, indices, rows, n2, **constants, **pairs.options())
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
    starts = (*(half.data_ptr() for half in halves), *(stride * size for stride in strides), n * size)
    vec = 16 // size if all(start % 16 == 0 for start in starts) else 1
    plan = plan_halves(n, k, first.dtype, vec, few)
    if vec > 1:
        plan = measured("topk_half", first, few, n, k) or plan
    apart = (last.data_ptr() - first.data_ptr()) // (size * vec)
    grid = (triton.cdiv(rows, plan.rows), len(halves))
    numbers = (rows, inner, n // vec, apart, *(stride // vec for stride in strides))
    half_kernel[grid](first, found, *numbers, **_half_constants(n, k, plan, vec), **plan.options())


def _half_constants(n: int, k: int, plan: Plan, vec: int) -> dict[str, Any]:
    # Masks where they cost little, or where a multiple of the chunk is rare: fewer kernels to compile and to check.
    masked = vec == 1 or plan.rows == 1 or n % (plan.chunk * plan.group) != 0
    return {"K": rounded(k), "C": plan.chunk, "R": plan.rows, "VEC": vec, "GROUP": plan.group, "MASKED": masked}


def _pair_constants(slots: int, k: int, dtype: torch.dtype, plan: Plan, softmax: bool) -> dict[str, Any]:
    numbers = {"k": k, "K": rounded(k), "C": plan.chunk, "R": plan.rows}
    return {**numbers, "DTYPE": ELEMENT[dtype][1], "SOFTMAX": softmax, "RANKED": slots > 2**32}


def _scatter_constants(n1: int, n2: int, k: int) -> dict[str, Any]:
    return {"N1": n1, "N2": n2, "k": k, "C": SCATTERED, "R": 32}


def _measured_halves(plan: dict[str, Any], dtype: torch.dtype, n: int, k: int) -> Iterator[CompileVariant]:
    yield half_variant(n, k, dtype, False, 16 // dtype.itemsize, Plan(**plan))


def _measured_pairs(plan: dict[str, Any], dtype: torch.dtype, k: int) -> Iterator[CompileVariant]:
    yield _pair_variant(2**20, k, dtype, False, Plan(**plan))


MEASURED = {"topk_half": _measured_halves, "topk_pair": _measured_pairs}  # as in `triton_lookup`


def compile_variants() -> Iterator[CompileVariant]:
    """The variants for the compile gate: every kind of plan, with the sizes that the layers use, and the largest ones."""
    half, single = torch.bfloat16, torch.float32
    for n, k, dtype, few, vec in (
        (128, 4, half, False, 8),
        (1024, 32, half, False, 8),
        (1024, 32, single, False, 4),
        (4096, 64, half, False, 8),
        (4096, 64, single, False, 4),
        (8192, 32, half, False, 8),
        (4096, 256, half, False, 8),
        (1024, 32, half, True, 8),
        (4096, 32, single, True, 4),
        (1001, 4, single, False, 1),
        (1001, 64, half, False, 1),
        (8193, 32, half, True, 1),
        (2**20, 32, half, False, 8),
        (4096, 1024, half, False, 8),
    ):
        yield half_variant(n, k, dtype, few, vec)
    for slots, k, dtype, few in (
        (2**20, 32, half, False),
        (2**20, 64, single, False),
        (2**20, 256, half, False),
        (2**20, 32, half, True),
        (2**24, 1024, single, False),
        (2**40, 32, half, False),
    ):
        yield _pair_variant(slots, k, dtype, few)
    for slots, k in ((2**20, 32), (2**40, 32)):
        constants = _scatter_constants(1024, slots // 1024, k)
        signature = {"grad": "*fp32", "indices": "*i64", "grad1": "*fp32", "grad2": "*fp32", "rows": "i32"}
        signature.update(dict.fromkeys(constants, "constexpr"))
        name, aligned = f"scatter_topk{_beyond(slots)} k={k}", ("grad", "indices", "grad1", "grad2")
        yield CompileVariant(name, scatter_kernel, signature, constants, aligned, 1, row_bytes=4)


def half_variants() -> Iterator[CompileVariant]:
    """A variant for each kernel that the launcher can choose by `plan_halves`, but none for fp16.

    Its code is that of bf16 with another constant and another type of maximum.
    """
    seen = set()
    for few, k, dtype in product((False, True), TOPS, (torch.float32, torch.bfloat16)):
        for bits, more, vec in product(range(MOST_KEYS.bit_length()), (0, 8), (1, 16 // dtype.itemsize)):
            n = 2**bits + more
            if k // 2 < n <= MOST_KEYS and n % vec == 0:
                variant = half_variant(n, min(n, k), dtype, few, vec)
                if identity(variant) not in seen:
                    seen.add(identity(variant))
                    yield variant


def identity(variant: CompileVariant) -> tuple[object, ...]:
    """What distinguishes its kernel from others."""
    return (*variant.signature.values(), *variant.constants.values(), variant.aligned, variant.num_warps)


def pair_variants() -> Iterator[CompileVariant]:
    """A variant for each kernel that the launcher can choose by `plan_pairs`, with a softmax and with k a power of two."""
    # More than 2^32 slots need keys of 64 bits: then the code is the same for all dtypes.
    kinds = ((torch.float32, 2**24), (torch.float32, 2**40), (torch.bfloat16, 2**24))
    for few, k, (dtype, slots) in product((False, True), TOPS, kinds):
        if not few or k <= LANE_K:
            yield _pair_variant(slots, k, dtype, few)


def half_variant(n: int, k: int, dtype: torch.dtype, few: bool, vec: int, plan: Plan | None = None) -> CompileVariant:
    """`vec`: the scores that an aligned load reads, as many as n allows. Without a plan, the computed one."""
    plan = plan or plan_halves(n, k, dtype, vec, few)
    element = ELEMENT[dtype][0]
    constants = _half_constants(n, k, plan, vec)
    signature = {"scores": f"*{element}", "found": _key(n, dtype), "rows": "i32", "inner": "i32", "pieces": "i32"}
    signature.update(dict.fromkeys(("apart", "outer1", "inner1", "outer2", "inner2"), "i64"))
    signature.update(dict.fromkeys(constants, "constexpr"))
    groups = plan.chunk // plan.group if plan.group > 1 else 0  # group indices, loaded one by one
    wide, name = vec * dtype.itemsize, f"half_topk {element} n={n} k={k}{' few' if few else ''}"
    aligned = ("scores",) if wide == 16 else ()
    return CompileVariant(
        name, half_kernel, signature, constants, aligned, plan.warps, row_bytes=wide, scalar_loads=groups if wide == 16 else 0
    )


def _pair_variant(slots: int, k: int, dtype: torch.dtype, few: bool, plan: Plan | None = None) -> CompileVariant:
    plan = plan or plan_pairs(k, few)
    element = ELEMENT[dtype][0]
    key = _key(slots // NARROW_KEYS, dtype)
    signature = {"found": key, "scores": "*fp32", "indices": "*i64", "rows": "i32", "n2": "i32"}
    constants = _pair_constants(slots, k, dtype, plan, True)
    signature.update(dict.fromkeys(constants, "constexpr"))
    name, aligned = f"pair_topk {element}{_beyond(slots)} k={k}{' few' if few else ''}", ("found", "scores", "indices")
    return CompileVariant(name, pair_kernel, signature, constants, aligned, plan.warps, row_bytes=4)


def _key(n: int, dtype: torch.dtype) -> str:
    return "*i64" if wide_keys(n, dtype) else "*i32"


def _beyond(slots: int) -> str:
    return " >2^32 slots" if slots > 2**32 else ""
