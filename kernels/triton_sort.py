"""Sorting in registers, for Triton kernels: the largest entries of every column of a tile, and integer keys that order scores.

A bitonic network along dim 0 of [C, R]. With a column per thread, as in the tiles of the kernels, each comparison is a minimum
and a maximum of registers, and threads do not communicate.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    """Of a power of two."""
    return n.bit_length() - 1


@triton.constexpr_function
def least(dtype):
    """The smallest integer of the dtype; no key has this value."""
    return -(2 ** (dtype.primitive_bitwidth - 1))


@triton.jit
def _exchange(x, C: tl.constexpr, R: tl.constexpr, BIT: tl.constexpr, BLOCK: tl.constexpr, DOWN: tl.constexpr):
    """One step of the network: partners differ in bit BIT of their index; blocks of 2^BLOCK ascend and descend alternately."""
    x = tl.reshape(x, [C >> (BIT + 1), 2, 1 << BIT, R])
    y = tl.sum(x, axis=1, keep_dims=True) - x  # the partner: optimized away if it is in the same thread
    right = tl.arange(0, 2)[None, :, None, None] == 1
    first = tl.where(right, y, x)  # both partners need the same comparison: it is computed once
    second = tl.where(right, x, y)
    swap = first < second if DOWN else first > second
    if (C >> BLOCK) > 1:
        block = tl.arange(0, C >> (BIT + 1))[:, None, None, None] >> (BLOCK - BIT - 1)
        swap = swap ^ ((block & 1) == 1)
    if (
        x.dtype == tl.int64
    ):  # in 32-bit halves: two selects and one comparison; on int64 LLVM would emit a minimum and a maximum
        top = tl.where(swap, (y >> 32).to(tl.int32), (x >> 32).to(tl.int32))
        low = tl.where(swap, y.to(tl.int32), x.to(tl.int32))
        x = (top.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    else:
        x = tl.where(swap, y, x)
    return tl.reshape(x, [C, R])


@triton.jit
def _best(x, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """The K largest of every column of [C, R], ascending: [K, R]; if C < K, padded at the front with `least`."""
    for stage in tl.static_range(1, log2(min(C, K)) + 1):
        for step in tl.static_range(stage):
            x = _exchange(x, C, R, stage - 1 - step, stage, False)
    if C < K:
        last = tl.arange(0, K // C)[:, None, None] == K // C - 1
        x = tl.reshape(tl.where(last, tl.reshape(x, [1, C, R]), least(x.dtype)), [K, R])
    for halving in tl.static_range(log2(max(C // K, 1))):
        x = tl.max(tl.reshape(x, [C // K >> (1 + halving), 2, K, R]), axis=1)  # of an ascending and a descending run
        x = tl.reshape(x, [C >> (1 + halving), R])
        for step in tl.static_range(log2(K)):
            x = _exchange(x, C >> (1 + halving), R, log2(K) - 1 - step, log2(K), False)
    return x


@triton.jit
def merge(best, x, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """The K largest of `best` [K, R] (descending) and x [C, R] together, descending. C and K are powers of two."""
    best = tl.maximum(best, _best(x, C, K, R))
    for step in tl.static_range(log2(K)):
        best = _exchange(best, K, R, log2(K) - 1 - step, log2(K), True)
    return best


@triton.jit
def maxima(x, C: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):
    """The largest score of every group, NaN counts as largest: [C, R, GROUP] -> [C, R]."""
    dtype: tl.constexpr = x.dtype
    for halving in tl.static_range(1, log2(GROUP) + 1):
        one, other = tl.split(tl.reshape(x, [C, R, GROUP >> halving, 2]))
        x = tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(x, [C, R]).to(dtype)


@triton.jit
def ordered(x):
    """fp32 -> int32 with the same order; NaN is largest, -0 equals +0, and the smallest integer is unused."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    sign = bits >> 31
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, (size ^ sign) - sign)


@triton.jit
def unordered(order):
    """The inverse of `ordered`: int32 -> fp32."""
    sign = order >> 31
    return (((order ^ sign) - sign) | (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(x, place, WIDE: tl.constexpr):
    """Integer keys ordered by score, then by smaller place: int64 if WIDE, else int32 for half types and places < 65536."""
    if WIDE:
        keys = (ordered(x.to(tl.float32)).to(tl.int64) << 32) | ((~place).to(tl.int64) & 0xFFFFFFFF)
    else:
        infinity: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        size = bits & 0x7FFF
        sign = bits >> 31
        order = tl.where(size > infinity, 0x7FFF, (size ^ sign) - sign)
        keys = (order << 16) | (0xFFFF - place)
    return keys


@triton.jit
def places(keys):
    """The places in the keys of `keys_of`, as int32."""
    place = ~keys.to(tl.int32)
    if keys.dtype == tl.int32:
        place = place & 0xFFFF
    return place


@triton.jit
def scores_of(keys, DTYPE: tl.constexpr):
    """The scores (of dtype DTYPE) in the keys of `keys_of`, as fp32; one NaN for all NaNs, +0 for -0."""
    if keys.dtype == tl.int64:
        scores = unordered((keys >> 32).to(tl.int32))
    else:
        order = keys >> 16
        sign = order >> 31
        bits = ((order ^ sign) - sign) | (sign & 0x8000)
        scores = bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return scores


@triton.jit
def softmax(x, live, K: tl.constexpr, R: tl.constexpr):
    """Softmax along dim 0 of [K, R] over the live entries, summed pairwise: the same bits in every layout."""
    x = tl.where(live, tl.exp(x - tl.max(tl.where(live, x, float("-inf")), axis=0)[None, :]), 0.0)
    total = x
    for halving in tl.static_range(1, log2(K) + 1):
        total = tl.sum(tl.reshape(total, [2, K >> halving, R]), axis=0)
    return x / tl.reshape(total, [1, R])
