"""The gradients of the sparse lookup as Triton kernels, without atomics: the same inputs give the same bits.

Gradient of values: the reads are sorted into segments of one row each (`triton_segments`); the program of a segment sums its
row's gradient and, since it reads the row anyway, computes the gradients of the weights too. A second kernel adds the
segments of hot rows (rows with many reads). The gradient of the weights alone needs no sorting: it is computed per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_lookup import ELEMENT, Plan, elements, readable, whole
from memrewrite.kernels.triton_math import load_rows, unscaled
from memrewrite.kernels.triton_segments import Segments, add_reads, load_reads, segment, touched

PER_PROGRAM = 8  # segments per program, far from each other, so that the segments of a hot row are in different programs
LONG_ROWS, LONG_COLUMNS = 16, 128  # the tile in which the sums of a hot row are added
PROGRAMS = 512  # programs that process the hot rows, and the padding
DOT_ROWS = 4  # table rows that the program of a token reads at once
DOTS = 1024  # dot products that one program completes


def plan(width: int, dtype: torch.dtype, rows: int = 2) -> Plan:
    """Slices of 32 bytes per thread and one warp, so that dot products are reduced inside a warp."""
    block = max(16, min(triton.next_power_of_2(width), 1024 // dtype.itemsize))
    return Plan(rows, block, 1, triton.cdiv(width, block))


def backward(
    grad: Tensor, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, need_values: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `values` (dense [N, D]; not for 8-bit values) and of `weights` [T, K], each only if needed."""
    grad, indices, weights = grad.contiguous(), indices.contiguous(), weights.contiguous()
    how = plan(values.shape[1], values.dtype, DOT_ROWS)
    dots = torch.empty(how.slices, indices.numel(), dtype=torch.float32, device=grad.device) if need_weights else None
    grad_values, order = None, None
    if need_values:
        segments = segment([indices], [weights], values.shape[0])
        grad_values, order = torch.zeros_like(values, memory_format=torch.contiguous_format), segments.order
        add_segments(grad, values.contiguous(), segments, grad_values, dots, by_rank=False)
    elif dots is not None:
        unit = whole(indices.shape[1])
        token_dots[(indices.shape[0], how.slices)](
            grad, readable(values), scale, indices, dots, indices.shape[0], indices.shape[1] // unit,
            D=values.shape[1], UNIT=unit, ROWS=how.rows, BLOCK_D=how.block, num_warps=how.warps,
        )  # fmt: skip
    grad_weights = None
    if dots is not None:
        grad_weights, reads = torch.empty_like(weights), weights.numel()
        finish_dots[(triton.cdiv(reads, DOTS),)](dots, order, grad_weights, reads, SLICES=how.slices, BLOCK=DOTS)
    return grad_values, grad_weights


def rows(grad: Tensor, indices: Tensor, weights: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that were read, ascending, and their gradients: int64 [R], [R, D], of fixed size R = min(T·K, slots).

    If fewer rows were read, the last one is repeated with zero gradients.
    """
    grad = grad.contiguous()
    segments = segment([indices], [weights], slots)
    found = touched(segments)  # [R]
    out = torch.empty(found.numel(), grad.shape[1], dtype=grad.dtype, device=grad.device)
    add_segments(grad, None, segments, out, None, by_rank=True)
    block = min(1024, triton.next_power_of_2(grad.shape[1]))
    zero_rest[(PROGRAMS,)](out, segments.last, found.numel(), D=grad.shape[1], BLOCK_D=block)
    return found, out


def add_segments(
    grad: Tensor, values: Tensor | None, segments: Segments, out: Tensor, dots: Tensor | None, by_rank: bool
) -> None:
    """Write each row's gradient to `out`, at its slot or its rank; with `values`, also the partial dots [slices, M]."""
    width = grad.shape[1]
    how = plan(width, grad.dtype)
    sums = torch.empty(segments.long_segments.shape[0], width, dtype=torch.float32, device=grad.device)
    count = segments.table.shape[0]
    programs = triton.cdiv(count, PER_PROGRAM)
    segment_gradients[(programs, how.slices)](
        grad, None if dots is None else values, segments.slots, segments.tokens, segments.weights, segments.table,
        out, sums, dots, count, segments.tokens.numel(), programs,
        BY_RANK=by_rank, D=width, BLOCK_D=how.block, ROWS=how.rows, PER_PROGRAM=PER_PROGRAM, num_warps=how.warps,
    )  # fmt: skip
    longs = segments.long_rows.shape[0]
    if longs:
        add_long[(min(longs, PROGRAMS), triton.cdiv(width, LONG_COLUMNS))](
            sums, segments.slots, segments.long_rows, out, longs, min(longs, PROGRAMS),
            BY_RANK=by_rank, D=width, BLOCK_D=LONG_COLUMNS, ROWS=LONG_ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "reads", "programs"])
def segment_gradients(
    grad, values, slots, tokens, weights, table, out, sums, dots, count, reads, programs,
    BY_RANK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Grid (programs, slices). With `values`, dot products are computed too.

    The reads of a segment depend on its table entry, and its rows on its reads: both are loaded one iteration ahead.
    """
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mine = tl.program_id(0)
    first, end, rank, place = load_entry(table, mine, count)
    token, weight = load_reads(tokens, weights, first, end, ROWS)
    slot = tl.load(slots + first, first < end, 0)
    next_first, next_end, next_rank, next_place = load_entry(table, mine + programs, count)
    for turn in range(PER_PROGRAM):
        third_first, third_end, third_rank, third_place = load_entry(table, mine + (turn + 2) * programs, count)
        next_token, next_weight = load_reads(tokens, weights, next_first, next_end, ROWS)
        next_slot = tl.load(slots + next_first, next_first < next_end, 0)
        if first < end:
            row = tl.zeros([BLOCK_D], tl.float32)
            if values is not None:
                row = tl.load(values + slot.to(tl.int64) * D + cols, cols < D, 0).to(tl.float32)
            part = tl.program_id(1).to(tl.int64) * reads
            total = add_reads(grad, token, weight, row, dots, part, first, end, tl.zeros([BLOCK_D], tl.float32), cols, D, ROWS)
            for m in range(first + ROWS, end, ROWS):
                more, factor = load_reads(tokens, weights, m, end, ROWS)
                total = add_reads(grad, more, factor, row, dots, part, m, end, total, cols, D, ROWS)
            if place >= 0:
                tl.store(sums + place.to(tl.int64) * D + cols, total, cols < D)
            else:
                target = rank if BY_RANK else slot
                tl.store(out + target.to(tl.int64) * D + cols, total.to(out.dtype.element_ty), cols < D)
        first, end, rank, place = next_first, next_end, next_rank, next_place
        next_first, next_end, next_rank, next_place = third_first, third_end, third_rank, third_place
        slot, token, weight = next_slot, next_token, next_weight


@triton.jit
def load_entry(table, at, count):
    """The first read, end, row rank and place of a segment; empty beyond the last segment."""
    entry = table + at.to(tl.int64) * 4
    live = at < count
    return tl.load(entry, live, 0), tl.load(entry + 1, live, 0), tl.load(entry + 2, live, 0), tl.load(entry + 3, live, 0)


@triton.jit(do_not_specialize=["longs", "programs"])
def add_long(
    sums, slots, long_rows, out, longs, programs,
    BY_RANK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of rows with several segments: adds their sums, ROWS at a time. Grid (programs, slices)."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for at in range(tl.program_id(0), longs, programs):
        entry = long_rows + at * 4
        first, rank = tl.load(entry), tl.load(entry + 1)
        begin, end = tl.load(entry + 2), tl.load(entry + 3)
        if begin < end:
            total = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for place in range(begin, end, ROWS):
                piece = place + tl.arange(0, ROWS)
                live = (piece < end)[:, None] & (cols < D)[None, :]
                total += tl.load(sums + piece.to(tl.int64)[:, None] * D + cols[None, :], live, 0)
            target = rank if BY_RANK else tl.load(slots + first)
            tl.store(out + target.to(tl.int64) * D + cols, tl.sum(total, 0).to(out.dtype.element_ty), cols < D)


@triton.jit(do_not_specialize=["rows"])
def zero_rest(out, last, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write zeros to the rows of `out` after the last row that was read."""
    for row in range(tl.load(last).to(tl.int64) + 1 + tl.program_id(0), rows, tl.num_programs(0)):
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            tl.store(out + row * D + cols, tl.zeros([BLOCK_D], out.dtype.element_ty), cols < D)


@triton.jit(do_not_specialize=["tokens", "key_units"])
def token_dots(
    grad, values, scale, indices, dots, tokens, key_units,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dots[slice, t, j] = the slice's part of grad[t] . values[indices[t, j]]; grid (tokens, slices)."""
    keys = key_units * UNIT
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    own = tl.load(grad + token * D + cols, cols < D, 0).to(tl.float32)
    for begin in range(0, keys, ROWS):
        key = begin + tl.arange(0, ROWS)
        live = key >= 0
        if UNIT % ROWS != 0:
            live = key < keys
        row = tl.load(indices + token * keys + key, live, 0).to(tl.int64)
        dot = tl.sum(load_rows(values, row, first, live, D, BLOCK_D) * own[None, :], 1)
        if scale is not None:
            dot *= unscaled(values, tl.load(scale + row))
        tl.store(dots + (tl.program_id(1).to(tl.int64) * tokens + token) * keys + key, dot, live)


@triton.jit(do_not_specialize=["reads"])
def finish_dots(dots, order, out, reads, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """Add the slices' partial dots, in order, and write the gradient of each read to its position."""
    read = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = read < reads
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(SLICES):
        total += tl.load(dots + s * reads.to(tl.int64) + read, live, 0)
    if order is not None:
        tl.store(out + tl.load(order + read, live, 0), total.to(out.dtype.element_ty), live)
    else:
        tl.store(out + read, total.to(out.dtype.element_ty), live)


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the gradient kernels, for the compile gate."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for width, dtype, dots, by_rank in (
        (576, bf16, True, False), (1024, bf16, True, False), (2048, bf16, True, False), (4096, bf16, True, False),
        (1024, fp32, True, False), (1024, bf16, False, False), (1024, bf16, False, True),
    ):  # fmt: skip
        how, kind = plan(width, dtype), ELEMENT[dtype]
        tables = {"table": "*i32", "slots": "*i32", "tokens": "*i32", "weights": f"*{kind}", "grad": f"*{kind}"}
        given = {"values": f"*{kind}", "dots": "*fp32"} if dots else {"values": "constexpr", "dots": "constexpr"}
        yield CompileVariant(
            name=f"segment_gradients {kind} D={width}{' weights too' if dots else ''}{' by rank' if by_rank else ''}",
            kernel=segment_gradients,
            signature=tables | given | {"out": f"*{kind}", "sums": "*fp32", "count": "i32", "reads": "i32", "programs": "i32"},
            constants={"BY_RANK": by_rank, "D": width, "BLOCK_D": how.block, "ROWS": how.rows, "PER_PROGRAM": PER_PROGRAM}
            | ({} if dots else {"values": None, "dots": None}),
            aligned=(*tables, "out", "sums", *(given if dots else ())),
            num_warps=how.warps,
            scalar_loads=14 + 6 * how.rows,
        )  # fmt: skip
    for width, dtype, index in ((1024, bf16, "i64"), (4096, bf16, "i32"), (1024, fp32, "i64"), (1024, fp8, "i64")):
        how, eight = plan(width, dtype, DOT_ROWS), dtype == fp8
        kind = "fp32" if eight else ELEMENT[dtype]
        for element, architectures in elements(dtype).items():
            pointers = {"grad": f"*{kind}", "values": f"*{element}", "indices": f"*{index}", "dots": "*fp32"}
            pointers |= {"scale": "*fp32"} if eight else {}
            yield CompileVariant(
                name=f"token_dots {'fp8' if eight else kind} D={width} {index}",
                kernel=token_dots,
                signature={"scale": "constexpr"} | pointers | {"tokens": "i32", "key_units": "i32"},
                constants={"D": width, "UNIT": whole(128), "ROWS": how.rows, "BLOCK_D": how.block}
                | ({} if eight else {"scale": None}),
                aligned=tuple(pointers),
                num_warps=how.warps,
                scalar_loads=how.rows if eight else 0,
                architectures=architectures,
            )
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
    signature = {"dots": "*fp32", "order": "*i64", "out": "*bf16", "reads": "i32"}
    aligned, sizes = ("dots", "order", "out"), {"SLICES": 2, "BLOCK": DOTS}
    yield CompileVariant(
        "finish_dots D=1024", finish_dots, signature, sizes, aligned, num_warps=4, row_bytes=4, scalar_loads=24
    )
