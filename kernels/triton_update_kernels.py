"""The Triton kernels of the optimizer step; `triton_update` launches them.

A row's columns are in PIECES blocks of BLOCK_D columns per program, as tuples of tensors: their number need not be a power of
two. If a program has a whole row (SLICES is 1), the phase MOVE does everything. If a row has several slices, the phase POWER
sums the squares of each slice's gradient, TOP (8-bit tables) finds each slice's largest new value, and MOVE stores the slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrewrite.kernels.triton_math import (
    LARGEST_E4M3,
    SMALLEST_NORMAL,
    decode_e4m3,
    encode_e4m3,
    random_bits,
    round_to,
)
from memrewrite.kernels.triton_segments import load_reads

POWER: tl.constexpr = tl.constexpr(0)
TOP: tl.constexpr = tl.constexpr(1)
MOVE: tl.constexpr = tl.constexpr(2)


@triton.jit
def load_row(starts, at, rows):
    """The first read and the end of a row; equal beyond the last row."""
    return tl.load(starts + at, at < rows, 0), tl.load(starts + at + 1, at < rows, 0)


@triton.jit
def load_pieces(table, at, cols, D: tl.constexpr, PIECES: tl.constexpr):
    """Columns of a row, as stored. No other program reads them: they need not stay in the cache."""
    pieces = ()
    for p in tl.static_range(PIECES):
        col = cols + p * cols.shape[0]
        pieces = pieces + (tl.load(table + at + col, col < D, 0, eviction_policy="evict_first"),)
    return pieces


@triton.jit
def add_gradients(
    grads, token, weight, total, first, end, cols,
    D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Add ROWS weighted output gradients to the pieces of a row's gradient."""
    live = first + tl.arange(0, ROWS) < end
    at = token.to(tl.int64) * D
    factor = weight.to(tl.float32)[:, None]
    tiles = ()
    for p in tl.static_range(PIECES):
        col = cols + p * cols.shape[0]
        mask = live[:, None] & (col < D)[None, :]
        tiles = tiles + (tl.load(grads + at[:, None] + col[None, :], mask, 0, eviction_policy=CACHE),)
    sums = ()
    for p in tl.static_range(PIECES):
        sums = sums + (total[p] + tl.sum(tiles[p].to(tl.float32) * factor, 0),)
    return sums


@triton.jit
def row_gradient(
    grads, tokens, weights, sums, token, weight, first, end, begin, until, cols,
    D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Columns of a row's gradient: the sum of its reads (the first ROWS are already loaded), or of its segments' sums."""
    total = ()
    for _ in tl.static_range(PIECES):
        total = total + (tl.zeros([cols.shape[0]], tl.float32),)
    total = add_gradients(grads, token, weight, total, first, end, cols, D, PIECES, ROWS, CACHE)
    for m in range(first + ROWS, end, ROWS):
        more, factor = load_reads(tokens, weights, m, end, ROWS)
        total = add_gradients(grads, more, factor, total, m, end, cols, D, PIECES, ROWS, CACHE)
    for place in range(begin, until):
        part = load_pieces(sums, place * D, cols, D, PIECES)
        added = ()
        for p in tl.static_range(PIECES):
            added = added + (total[p] + part[p],)
        total = added
    return total


@triton.jit
def quotient(x, y, EXACT: tl.constexpr):
    """x / y; with EXACT, rounded as in IEEE 754."""
    return tl.div_rn(x, y) if EXACT else x * (1.0 / y)


@triton.jit
def squares(gradient, PIECES: tl.constexpr):
    """The sum of the squares of a row's gradient."""
    total = gradient[0] * gradient[0]
    for p in tl.static_range(1, PIECES):
        total += gradient[p] * gradient[p]
    return tl.sum(total, 0)


@triton.jit
def moved(old, before, average, g, size, root, lr, decay, beta1, rest1, correct1, EXACT: tl.constexpr):
    """Columns of the new row and of the new first moment, in fp32; `root` is the denominator."""
    row = decode_e4m3(old) * size if old.dtype == tl.uint8 else old.to(tl.float32)
    moment, push = g, g
    if average is not None:
        moment = beta1 * before.to(tl.float32) + rest1 * g
        push = quotient(moment, correct1, EXACT)
    return row * decay - quotient(lr * push, root, EXACT), moment


@triton.jit
def largest(rows, cols, D: tl.constexpr, PIECES: tl.constexpr):
    """The largest absolute value in a row; inf if there is a NaN, which a maximum may ignore."""
    top = tl.zeros([cols.shape[0]], tl.float32)
    for p in tl.static_range(PIECES):
        size = tl.where(rows[p] == rows[p], tl.abs(rows[p]), float("inf"))
        top = tl.maximum(top, tl.where(cols + p * cols.shape[0] < D, size, 0.0))
    return tl.max(top, 0)


@triton.jit
def scale_of(top):
    """The scale that maps the largest value to the largest e4m3 value; NaN for a row that is not finite, 1 for zeros."""
    size = tl.maximum(top / LARGEST_E4M3, SMALLEST_NORMAL)
    return tl.where(top == 0, 1.0, tl.where(top < float("inf"), size, float("nan")))


@triton.jit(do_not_specialize=["rows", "programs", "seed"])
def update_rows(
    values, scale, average, square, grads, tokens, weights, slots, starts, counts, sums, powers, tops, before, rows, programs,
    lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed: tl.int64,
    LENGTH: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    SLICES: tl.constexpr, PHASE: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Grid (programs, slices): one slice of all rows runs before the next, so that its gradients can stay in the cache.

    Adagrad without `average`, Adam with it. The reads of a row are loaded during the update of the row before.
    """
    mine = tl.program_id(0)
    part = tl.program_id(1)
    first, end = load_row(starts, mine, rows)
    token, weight = load_reads(tokens, weights, first, end, ROWS)
    slot = tl.load(slots + first, first < end, 0)
    next_first, next_end = load_row(starts, mine + programs, rows)
    for turn in range(PER_PROGRAM):
        third_first, third_end = load_row(starts, mine + (turn + 2) * programs, rows)
        next_token, next_weight = load_reads(tokens, weights, next_first, next_end, ROWS)
        next_slot = tl.load(slots + next_first, next_first < next_end, 0)
        if first < end:
            rank = mine + turn * programs
            long = end - first > LENGTH
            begin = tl.load(counts + rank, long, 0) & 0xFFFFFFFF
            until = tl.load(counts + rank + 1, long, 0) & 0xFFFFFFFF
            move_row(
                values, scale, average, square, grads, tokens, weights, sums, token, weight, slot.to(tl.int64), first,
                tl.where(begin < until, first, end), begin, until, powers, tops, before, part.to(tl.int64) * rows + rank, rank,
                part * (PIECES * BLOCK_D) if SLICES > 1 else 0,
                lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed,
                EXACT, D, BLOCK_D, PIECES, SLICES, PHASE, ROWS, CACHE,
            )  # fmt: skip
        first, end, token, weight, slot = next_first, next_end, next_token, next_weight, next_slot
        next_first, next_end = third_first, third_end


@triton.jit
def move_row(
    values, scale, average, square, grads, tokens, weights, sums, token, weight, slot, first, end, begin, until,
    powers, tops, before, entry, rank, start, lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    PHASE: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One phase of the step of the slice of a row from column `start`; `entry` is its place in `powers` and `tops`."""
    cols = start + tl.arange(0, BLOCK_D)
    at = slot * D
    size = 256.0  # the factor that `decode_e4m3` omits
    old, moments = (), ()
    if PHASE != POWER:  # loaded while the gradient is summed
        if scale is not None:
            size *= tl.load(before + rank) if PHASE == MOVE and SLICES > 1 else tl.load(scale + slot)
        moment2 = tl.load(square + slot)
        old = load_pieces(values, at, cols, D, PIECES)
        moments = old if average is None else load_pieces(average, at, cols, D, PIECES)
    g = row_gradient(
        grads, tokens, weights, sums, token, weight, first, end, begin, until, cols, D, PIECES, ROWS, CACHE
    )  # fmt: skip
    if PHASE == POWER:
        tl.store(powers + entry, squares(g, PIECES))
    else:
        if SLICES == 1:
            moment2 = beta2 * moment2 + rest2 * quotient(squares(g, PIECES), D * 1.0, EXACT)
            tl.store(square + slot, moment2)
        root = tl.sqrt_rn(quotient(moment2, correct2, EXACT)) + eps
        rows, new = (), ()
        for p in tl.static_range(PIECES):
            row, moment = moved(old[p], moments[p], average, g[p], size, root, lr, decay, beta1, rest1, correct1, EXACT)
            rows, new = rows + (row,), new + (moment,)
        if PHASE == TOP:
            tl.store(tops + entry, largest(rows, cols, D, PIECES))
        else:
            new_scale = 1.0
            if scale is not None:
                if SLICES == 1:
                    new_scale = scale_of(largest(rows, cols, D, PIECES))
                    tl.store(scale + slot, new_scale)
                else:
                    new_scale = tl.load(scale + slot)
            store_pieces(values, average, at, slot, start, rows, new, new_scale, seed, EXACT, D, BLOCK_D, PIECES)


@triton.jit
def store_pieces(
    values, average, at, slot, start, rows, moments, scale, seed,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Store the columns of a row, divided by its scale if the table is 8-bit, and of its first moment."""
    for p in tl.static_range(PIECES):
        first = start + p * BLOCK_D
        col = first + tl.arange(0, BLOCK_D)
        bits = col
        if not EXACT:
            bits = random_bits(seed, 0, slot, first, D, BLOCK_D)
        if values.dtype.element_ty == tl.uint8:
            stored = encode_e4m3(rows[p] / scale, bits)
        else:
            stored = round_to(rows[p], bits, values.dtype.element_ty)
        tl.store(values + at + col, stored, col < D, eviction_policy="evict_first")
        if average is not None:
            if average.dtype.element_ty != tl.float32:
                bits = random_bits(seed, 1, slot, first, D, BLOCK_D)
            stored = round_to(moments[p], bits, average.dtype.element_ty)
            tl.store(average + at + col, stored, col < D, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["rows"])
def add_powers(
    powers, square, slots, starts, rows, beta2, rest2,
    EXACT: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new second moment of each row, from the sums of its slices, in order."""
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, end = load_row(starts, rank, rows)
    live = first < end
    slot = tl.load(slots + first, live, 0).to(tl.int64)
    power = tl.zeros([BLOCK], tl.float32)
    for s in range(SLICES):
        power += tl.load(powers + s * rows.to(tl.int64) + rank, live, 0)
    old = tl.load(square + slot, live, 0)
    tl.store(square + slot, beta2 * old + rest2 * quotient(power, D * 1.0, EXACT), live)


@triton.jit(do_not_specialize=["rows"])
def set_scales(tops, scale, before, slots, starts, rows, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """The new scale of each row, from the largest values of its slices; the old one moves to `before`."""
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, end = load_row(starts, rank, rows)
    live = first < end
    slot = tl.load(slots + first, live, 0).to(tl.int64)
    top = tl.zeros([BLOCK], tl.float32)
    for s in range(SLICES):
        top = tl.maximum(top, tl.load(tops + s * rows.to(tl.int64) + rank, live, 0))
    tl.store(before + rank, tl.load(scale + slot, live, 0), live)
    tl.store(scale + slot, scale_of(top), live)
