"""The gradients of the sparse lookup as Triton kernels, without atomics: the same inputs give the same bits.

Gradient of values: the reads are sorted into segments of one row each (`triton_segments`); the program of a segment sums its
row's gradient and, since it reads the row anyway, computes the gradients of the weights too. A second kernel adds the
segments of hot rows (rows with many reads). The gradient of the weights alone needs no sorting: it is computed per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_backward_kernels import add_long, finish_dots, segment_gradients, token_dots, zero_rest
from memrewrite.kernels.triton_lookup import ELEMENT, Plan, elements, readable, slice_width, whole
from memrewrite.kernels.triton_plans import tuned
from memrewrite.kernels.triton_segments import Segments, segment, touched

PER_PROGRAM = 8  # segments per program, far from each other, so that the segments of a hot row are in different programs
LONG_ROWS, LONG_COLUMNS = 16, 128  # the tile in which the sums of a hot row are added
PROGRAMS = 512  # programs that process the hot rows, and the padding
DOTS = 1024  # dot products that one program completes


def plan(kernel: str, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Plan:
    """The measured plan of "segment_gradients" or "token_dots", else 16 or 32 bytes per thread and row.

    One warp, so that dot products are reduced inside a warp. `dtype` is that of the rows that the kernel gathers.
    """
    measured = None if device is None else tuned(kernel, device, dtype, width)
    if measured is not None:
        return Plan(slices=triton.cdiv(width, measured["block"]), **measured)
    block = slice_width(width, dtype)
    rows, cache = (2, "") if kernel == "segment_gradients" else (4, "evict_last")
    return Plan(rows, block, 1, triton.cdiv(width, block), cache=cache)


def backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, need_values: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `values` (dense [N, D]; not for 8-bit values) and of `weights` [T, K], each only if needed.

    Each has the dtype of its tensor; `grad` [T, D] may have any floating-point dtype.
    """
    grad, indices, weights = grad.contiguous(), indices.contiguous(), weights.contiguous()
    width, reads, device = values.shape[1], indices.numel(), grad.device
    how = (
        plan("segment_gradients", width, grad.dtype, device) if need_values else plan("token_dots", width, values.dtype, device)
    )
    dots = torch.empty(how.slices, reads, dtype=torch.float32, device=device) if need_weights else None
    grad_values, order = None, None
    if need_values:
        segments = segment([indices], [weights], *values.shape)
        grad_values, order = torch.zeros_like(values, memory_format=torch.contiguous_format), segments.order
        add_segments(grad, values.contiguous(), segments, grad_values, dots, how, by_rank=False)
    elif dots is not None:
        unit = whole(indices.shape[1])
        token_dots[(indices.shape[0], how.slices)](
            grad, readable(values), scale, indices, dots, indices.shape[0], indices.shape[1] // unit,
            D=width, UNIT=unit, ROWS=how.rows, BLOCK_D=how.block, CACHE=how.cache, num_warps=how.warps, **how.limits,
        )  # fmt: skip
    grad_weights = None
    if dots is not None:
        grad_weights = torch.empty_like(weights)
        finish_dots[(triton.cdiv(reads, DOTS),)](dots, order, grad_weights, reads, SLICES=how.slices, BLOCK=DOTS)
    return grad_values, grad_weights


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that were read, ascending, and their gradients: int64 [R], [R, D], of fixed size R = min(T·K, slots).

    If fewer rows were read, the last one is repeated with zero gradients.
    """
    grad = grad.contiguous()
    width = grad.shape[1]
    segments = segment([indices], [weights], slots, width)
    found = touched(segments)  # [R]
    out = torch.empty(found.numel(), width, dtype=grad.dtype, device=grad.device)
    add_segments(grad, None, segments, out, None, plan("segment_gradients", width, grad.dtype, grad.device), by_rank=True)
    block = min(1024, triton.next_power_of_2(width))
    zero_rest[(PROGRAMS,)](out, segments.last, found.numel(), D=width, BLOCK_D=block)
    return found, out


def add_segments(
    grad: Tensor, values: Tensor | None, segments: Segments, out: Tensor, dots: Tensor | None, how: Plan, by_rank: bool
) -> None:
    """Write each row's gradient to `out`, at its slot or its rank; with `values`, also the partial dots [slices, M]."""
    width = grad.shape[1]
    sums = torch.empty(segments.long_segments.shape[0], width, dtype=torch.float32, device=grad.device)
    count = segments.table.shape[0]
    programs = triton.cdiv(count, PER_PROGRAM)
    segment_gradients[(programs, how.slices)](
        grad, None if dots is None else values, segments.slots, segments.tokens, segments.weights, segments.table,
        out, sums, dots, count, segments.tokens.numel(), programs,
        BY_RANK=by_rank, D=width, BLOCK_D=how.block, ROWS=how.rows, PER_PROGRAM=PER_PROGRAM, CACHE=how.cache,
        num_warps=how.warps, **how.limits,
    )  # fmt: skip
    longs = segments.long_rows.shape[0]
    if longs:
        add_long[(min(longs, PROGRAMS), triton.cdiv(width, LONG_COLUMNS))](
            sums, segments.slots, segments.long_rows, out, longs, min(longs, PROGRAMS),
            BY_RANK=by_rank, D=width, BLOCK_D=LONG_COLUMNS, ROWS=LONG_ROWS,
        )  # fmt: skip


def segment_variant(how: Plan, width: int, dtype: torch.dtype, dots: bool, by_rank: bool, note: str = "") -> CompileVariant:
    """The kernel of segments with a plan and fp32 weights, for the compile gate."""
    kind = ELEMENT[dtype]
    tables = {"table": "*i32", "slots": "*i32", "tokens": "*i32", "weights": "*fp32", "grad": f"*{kind}"}
    given = {"values": f"*{kind}", "dots": "*fp32"} if dots else {"values": "constexpr", "dots": "constexpr"}
    notes = ("weights too" if dots else "", "by rank" if by_rank else "", note)
    return CompileVariant(
        name=" ".join(filter(None, (f"segment_gradients {kind} D={width}", *notes))),
        kernel=segment_gradients,
        signature=tables | given | {"out": f"*{kind}", "sums": "*fp32", "count": "i32", "reads": "i32", "programs": "i32"},
        constants={"BY_RANK": by_rank, "D": width, "BLOCK_D": how.block, "ROWS": how.rows, "PER_PROGRAM": PER_PROGRAM}
        | {"CACHE": how.cache}
        | ({} if dots else {"values": None, "dots": None}),
        aligned=(*tables, "out", "sums", *(given if dots else ())),
        num_warps=how.warps,
        options=how.limits,
        scalar_loads=14 + 6 * how.rows,
    )


def dots_variants(how: Plan, width: int, dtype: torch.dtype, index: str = "i64", note: str = "") -> Iterator[CompileVariant]:
    """The kernel of tokens with a plan, for the compile gate."""
    eight = dtype.itemsize == 1
    kind = "fp32" if eight else ELEMENT[dtype]
    for element, architectures in elements(dtype).items():
        pointers = {"grad": f"*{kind}", "values": f"*{element}", "indices": f"*{index}", "dots": "*fp32"}
        pointers |= {"scale": "*fp32"} if eight else {}
        yield CompileVariant(
            name=" ".join(filter(None, (f"token_dots {'fp8' if eight else kind} D={width} {index}", note))),
            kernel=token_dots,
            signature={"scale": "constexpr"} | pointers | {"tokens": "i32", "key_units": "i32"},
            constants={"D": width, "UNIT": whole(128), "ROWS": how.rows, "BLOCK_D": how.block, "CACHE": how.cache}
            | ({} if eight else {"scale": None}),
            aligned=tuple(pointers),
            num_warps=how.warps,
            options=how.limits,
            scalar_loads=how.rows * ((1 if eight else 0) + (1 if how.rows > 8 else 0)),
            architectures=architectures,
        )


def _measured_segments(plan: dict[str, Any], dtype: torch.dtype, width: int) -> Iterator[CompileVariant]:
    how = Plan(slices=triton.cdiv(width, plan["block"]), **plan)
    for dots, by_rank in ((True, False), (False, False), (False, True)):
        yield segment_variant(how, width, dtype, dots, by_rank)


def _measured_dots(plan: dict[str, Any], dtype: torch.dtype, width: int) -> Iterator[CompileVariant]:
    yield from dots_variants(Plan(slices=triton.cdiv(width, plan["block"]), **plan), width, dtype)


MEASURED = {"segment_gradients": _measured_segments, "token_dots": _measured_dots}  # as in `triton_lookup`


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the gradient kernels, for the compile gate."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for width, dtype, dots, by_rank in (
        *((width, bf16, True, False) for width in (576, 768, 1000, 1024, 1536, 2048, 4096)),
        (1024, fp32, True, False), (1024, bf16, False, False), (1024, bf16, False, True),
    ):  # fmt: skip
        yield segment_variant(plan("segment_gradients", width, dtype), width, dtype, dots, by_rank)
    for width, dtype, index in (
        (576, bf16, "i64"), (1024, bf16, "i64"), (4096, bf16, "i32"), (1024, fp32, "i64"), (1024, fp8, "i64"),
    ):  # fmt: skip
        yield from dots_variants(plan("token_dots", width, dtype), width, dtype, index)
    yield CompileVariant(
        name="add_long bf16 D=4096",
        kernel=add_long,
        signature={"sums": "*fp32", "slots": "*i32", "long_rows": "*i32", "out": "*bf16", "longs": "i32", "programs": "i32"},
        constants={"BY_RANK": False, "D": 4096, "BLOCK_D": LONG_COLUMNS, "ROWS": LONG_ROWS},
        aligned=("sums", "slots", "long_rows", "out"),
        num_warps=4,
        scalar_loads=5,
    )
    signature = {"out": "*bf16", "last": "*i32", "rows": "i32"}
    yield CompileVariant(
        "zero_rest D=1024", zero_rest, signature, {"D": 1024, "BLOCK_D": 1024}, ("out",), num_warps=4, row_bytes=4
    )
    signature = {"dots": "*fp32", "order": "*i64", "out": "*fp32", "reads": "i32"}
    aligned, sizes = ("dots", "order", "out"), {"SLICES": 2, "BLOCK": DOTS}
    yield CompileVariant(
        "finish_dots D=1024", finish_dots, signature, sizes, aligned, num_warps=4, row_bytes=4, scalar_loads=24
    )
