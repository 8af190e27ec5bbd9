"""The Triton kernel of Adam with a second moment per element; `triton_lazy_adam` launches it.

No number of a row depends on the whole row, except the scale of an 8-bit row: then the rows that have several slices need the
phase TOP of `triton_update_kernels` before MOVE. The scales of 8-bit states belong to BLOCK columns of a row, which are in one
block of BLOCK_D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrewrite.kernels import rounding
from memrewrite.kernels.triton_math import decode_e4m3, encode_e4m3, random_bits, round_to
from memrewrite.kernels.triton_segments import load_reads
from memrewrite.kernels.triton_update_kernels import (
    MOVE,
    TOP,
    largest,
    load_pieces,
    load_row,
    quotient,
    row_gradient,
    scale_of,
    store_pieces,
)

BLOCK: tl.constexpr = tl.constexpr(rounding.BLOCK)  # columns that share a scale of an 8-bit state


@triton.jit
def each_column(numbers, BLOCK_D: tl.constexpr):
    """The number of its block for each of BLOCK_D columns."""
    blocks: tl.constexpr = numbers.shape[0]
    return tl.reshape(tl.broadcast_to(numbers[:, None], [blocks, BLOCK_D // blocks]), [BLOCK_D])


@triton.jit
def load_scales(scales, slot, start, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """The scales of the blocks in each piece of a row's state; 1 beyond the row."""
    count: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pieces = ()
    for p in tl.static_range(PIECES):
        block = (start + p * BLOCK_D) // BLOCK + tl.arange(0, (BLOCK_D + BLOCK - 1) // BLOCK)
        pieces = pieces + (tl.load(scales + slot * count + block, block < count, 1.0),)
    return pieces


@triton.jit
def wide(stored, scales, BLOCK_D: tl.constexpr):
    """Columns of a state in fp32; `decode_e4m3` omits a factor of 256."""
    return decode_e4m3(stored) * each_column(scales * 256.0, BLOCK_D) if stored.dtype == tl.uint8 else stored.to(tl.float32)


@triton.jit
def root_of(x, EXACT: tl.constexpr):
    """The square root; with EXACT, rounded as in IEEE 754."""
    return tl.sqrt_rn(x) if EXACT else tl.sqrt(x)


@triton.jit
def moments(
    average, average_scales, square, square_scales, g, beta1, rest1, beta2, rest2, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The new first and second moment of some columns, in fp32; an 8-bit second moment is stored as its root."""
    first = beta1 * wide(average, average_scales, BLOCK_D) + rest1 * g
    before = wide(square, square_scales, BLOCK_D)
    if square.dtype == tl.uint8:
        before = before * before
    return first, beta2 * before + rest2 * (g * g)


@triton.jit
def store_state(
    state, scales, x, slot, first, seed, STREAM: tl.constexpr, ROOT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store columns of a state, and the scales of their blocks if it has 8 bits; a ROOT that is positive is not stored as 0."""
    col = first + tl.arange(0, BLOCK_D)
    bits = col
    if state.dtype.element_ty != tl.float32:
        bits = random_bits(seed, STREAM, slot, first, D, BLOCK_D)
    if scales is not None:
        blocks: tl.constexpr = (BLOCK_D + BLOCK - 1) // BLOCK
        count: tl.constexpr = (D + BLOCK - 1) // BLOCK
        size = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [blocks, BLOCK_D // blocks])
        scale = scale_of(tl.max(size, 1).to(tl.float32, bitcast=True))  # as integers, NaN is the largest
        block = first // BLOCK + tl.arange(0, blocks)
        tl.store(scales + slot * count + block, scale, block < count)
        stored = encode_e4m3(x * each_column(1.0 / scale, BLOCK_D), bits)
        if ROOT:
            stored = tl.maximum(stored, (x > 0).to(tl.uint8))
    else:
        stored = round_to(x, bits, state.dtype.element_ty)
    tl.store(state + slot * D + col, stored, col < D, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["rows", "programs", "seed"])
def lazy_adam_rows(
    values, scale, average, average_scale, square, square_scale, grads, tokens, weights, slots, starts, counts, sums,
    tops, before, rows, programs, lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed: tl.int64,
    LENGTH: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
    SLICES: tl.constexpr, PHASE: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Grid (programs, slices), as `update_rows`: the reads of a row are loaded during the update of the row before."""
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
            lazy_adam_row(
                values, scale, average, average_scale, square, square_scale, grads, tokens, weights, sums, token, weight,
                slot.to(tl.int64), first, tl.where(begin < until, first, end), begin, until, tops, before,
                part.to(tl.int64) * rows + rank, rank, part * (PIECES * BLOCK_D) if SLICES > 1 else 0,
                lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed,
                EXACT, D, BLOCK_D, PIECES, SLICES, PHASE, ROWS, CACHE,
            )  # fmt: skip
        first, end, token, weight, slot = next_first, next_end, next_token, next_weight, next_slot
        next_first, next_end = third_first, third_end


@triton.jit
def lazy_adam_row(
    values, scale, average, average_scale, square, square_scale, grads, tokens, weights, sums, token, weight, slot,
    first, end, begin, until, tops, before, entry, rank, start,
    lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    PHASE: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One phase of the step of the slice of a row from column `start`; `entry` is its place in `tops`."""
    cols = start + tl.arange(0, BLOCK_D)
    at = slot * D
    size = 256.0  # the factor that `decode_e4m3` omits
    if scale is not None:
        size *= tl.load(before + rank) if PHASE == MOVE and SLICES > 1 else tl.load(scale + slot)
    old = load_pieces(values, at, cols, D, PIECES)  # all of these are loaded while the gradient is summed
    means = load_pieces(average, at, cols, D, PIECES)
    seconds = load_pieces(square, at, cols, D, PIECES)
    mean_scales, second_scales = means, seconds
    if average_scale is not None:
        mean_scales = load_scales(average_scale, slot, start, D, BLOCK_D, PIECES)
        second_scales = load_scales(square_scale, slot, start, D, BLOCK_D, PIECES)
    g = row_gradient(
        grads, tokens, weights, sums, token, weight, first, end, begin, until, cols, D, PIECES, ROWS, CACHE
    )  # fmt: skip
    new = ()
    for p in tl.static_range(PIECES):
        mean, second = moments(
            means[p], mean_scales[p], seconds[p], second_scales[p], g[p], beta1, rest1, beta2, rest2, BLOCK_D
        )  # fmt: skip
        root = root_of(second, EXACT)
        if EXACT:
            below = root_of(quotient(second, correct2, EXACT), EXACT) + eps
        else:
            below = quotient(root, tl.sqrt(correct2), EXACT) + eps
        row = decode_e4m3(old[p]) * size if old[p].dtype == tl.uint8 else old[p].to(tl.float32)
        new = new + (row * decay - quotient(lr * quotient(mean, correct1, EXACT), below, EXACT),)
        if PHASE == MOVE:
            begins = start + p * BLOCK_D
            kept = second if square_scale is None else root
            store_state(average, average_scale, mean, slot, begins, seed, 1, False, D, BLOCK_D)
            store_state(square, square_scale, kept, slot, begins, seed, 2, True, D, BLOCK_D)
    if PHASE == TOP:
        tl.store(tops + entry, largest(new, cols, D, PIECES))
    else:
        new_scale = 1.0
        if scale is not None:
            if SLICES == 1:
                new_scale = scale_of(largest(new, cols, D, PIECES))
                tl.store(scale + slot, new_scale)
            else:
                new_scale = tl.load(scale + slot)
        store_pieces(values, None, at, slot, start, new, new, new_scale, seed, EXACT, D, BLOCK_D, PIECES)
