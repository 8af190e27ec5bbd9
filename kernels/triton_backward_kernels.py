"""The kernels of the lookup's gradients; `triton_backward` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from memrewrite.kernels.triton_math import load_rows, unscaled
from memrewrite.kernels.triton_segments import add_reads, load_reads


@triton.jit(do_not_specialize=["count", "reads", "programs"])
def segment_gradients(
    grad, values, slots, tokens, weights, table, out, sums, dots, count, reads, programs,
    BY_RANK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
    CACHE: tl.constexpr,
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
            total = tl.zeros([BLOCK_D], tl.float32)
            total = add_reads(grad, token, weight, row, dots, part, first, end, total, cols, D, ROWS, CACHE)
            for m in range(first + ROWS, end, ROWS):
                more, factor = load_reads(tokens, weights, m, end, ROWS)
                total = add_reads(grad, more, factor, row, dots, part, m, end, total, cols, D, ROWS, CACHE)
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
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
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
        dot = tl.sum(load_rows(values, row, first, live, D, BLOCK_D, UNIT % ROWS == 0, CACHE) * own[None, :], 1)
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
