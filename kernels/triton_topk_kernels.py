"""The kernels of the operator `product_key_topk`; `triton_topk` launches them.

A row is in one lane, or in several warps: the layouts follow from the shapes of the loaded tiles. Scores become integer keys
that also contain their index, so everything after that sorts distinct integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrewrite.kernels.triton_sort import keys_of, least, log2, maxima, merge, ordered, places, scores_of, softmax, unordered


@triton.jit
def _scan(best, scores, base, columns, n, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
          VEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Load the scores in the columns [C/VEC, R*VEC] and merge them into `best`."""
    if MASKED:
        x = tl.load(scores + base[None, :] + columns, mask=columns < n, other=0.0)
        keys = tl.where(columns < n, keys_of(x, columns, best.dtype == tl.int64), least(best.dtype))
    else:
        keys = keys_of(tl.load(scores + base[None, :] + columns), columns, best.dtype == tl.int64)
    keys = tl.permute(tl.reshape(keys, [C // VEC, R, VEC]), (0, 2, 1))
    return merge(best, tl.reshape(keys, [C, R]), C, K, R)


@triton.jit
def _best_groups(best, scores, base, n, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
                 VEC: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys of the K groups with the largest maxima; for equal maxima the earlier group, so no score of the result is lost."""
    PARTS: tl.constexpr = GROUP // VEC
    for c in range((n + C * GROUP - 1) // (C * GROUP)):
        starts = (c * C * PARTS + tl.arange(0, C * PARTS)) * VEC
        columns = starts[:, None] + (tl.arange(0, R * VEC) % VEC)[None, :]
        if MASKED:
            x = tl.load(scores + base[None, :] + columns, mask=columns < n, other=float("-inf"))
        else:
            x = tl.load(scores + base[None, :] + columns)
        x = tl.permute(tl.reshape(x, [C, PARTS, R, VEC]), (0, 2, 1, 3))
        groups = (c * C + tl.arange(0, C))[:, None]
        keys = keys_of(maxima(tl.reshape(x, [C, R, GROUP]), C, R, GROUP), groups, best.dtype == tl.int64)
        if MASKED:
            keys = tl.where(groups * GROUP < n, keys, least(best.dtype))
        best = merge(best, keys, C, K, R)
    return best


@triton.jit(
    do_not_specialize=["rows", "inner", "pieces", "apart", "outer1", "inner1", "outer2", "inner2"],
    do_not_specialize_on_alignment=["found"],
)
def half_kernel(
    scores, found, rows, inner, pieces,
    apart: tl.int64, outer1: tl.int64, inner1: tl.int64, outer2: tl.int64, inner2: tl.int64,
    K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys of the K largest scores of each row of each half, descending -> found [halves, K, rows].

    The length of a row `pieces`, all strides, and the address difference `apart` of the two halves are in units of VEC scores:
    the compiler then knows that no load crosses the end of a row. The code depends on the length only through MASKED: whether
    the last chunk of a row may be incomplete.
    """
    n = pieces * VEC
    half = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, R * VEC)  # VEC consecutive scores of one row are one load; consecutive rows are consecutive lanes
    row = tl.minimum(tl.program_id(0) * R + lane // VEC, rows - 1)
    outer = tl.where(half == 0, outer1, outer2)
    stride = tl.where(half == 0, inner1, inner2)
    base = (half * apart + (row // inner) * outer + (row % inner) * stride) * VEC
    row = tl.program_id(0) * R + tl.arange(0, R)
    ranks = half * K + tl.arange(0, K)
    best = tl.full([K, R], least(found.dtype.element_ty), found.dtype.element_ty)
    if GROUP == 1:
        for c in range((n + C - 1) // C):
            starts = (c * (C // VEC) + tl.arange(0, C // VEC)) * VEC
            best = _scan(best, scores, base, starts[:, None] + (lane % VEC)[None, :], n, C, K, R, VEC, MASKED)
    else:
        groups = _best_groups(best, scores, base, n, C, K, R, VEC, GROUP, MASKED)
        # Through memory, since registers cannot be indexed by a loop variable: the loop below loads a few at a time.
        tl.store(found + ranks[:, None] * rows + row[None, :], groups, mask=(row < rows)[None, :])
        tl.debug_barrier()
        within = tl.arange(0, GROUP // VEC)[None, :, None, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
        for c in range(K * GROUP // C):
            some = half * K + c * (C // GROUP) + tl.arange(0, C // GROUP)
            # Masked, not clamped, here and below: Triton then knows that rows are consecutive, and keeps them in lanes.
            group = places(tl.load(found + some[:, None] * rows + row[None, :], mask=(row < rows)[None, :], other=-1))
            columns = tl.reshape(group[:, None, :, None] * GROUP + within, [C // VEC, R * VEC])
            columns = tl.max_contiguous(tl.multiple_of(columns, [1, VEC]), [1, VEC])
            best = _scan(best, scores, base, columns, n, C, K, R, VEC, MASKED)
        tl.debug_barrier()
    tl.store(found + ranks[:, None] * rows + row[None, :], best, mask=(row < rows)[None, :])


@triton.jit(do_not_specialize=["rows", "n2"])
def pair_kernel(
    found, scores, indices, rows, n2, k: tl.constexpr, DTYPE: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, SOFTMAX: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """The k largest sums of the halves' keys `found` [2, K, rows] -> scores and slots [rows, k].

    With ranks from 1, a pair (i, j) can be among the k largest only if i * j <= k. Block b has the pairs with i in
    [2^b, 2^(b+1)) and j <= K / 2^b: K pairs for each b. A last block would have only (K, 1), which is put in an unused entry of
    the block before it: K is at least 4. Equal sums are ordered by slot, or, if RANKED because slots exceed 32 bits, by (i, j).
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    valid = (row < rows)[None, :]
    BLOCKS: tl.constexpr = log2(K)
    best = tl.full([K, R], least(tl.int64), tl.int64)
    for c in range(BLOCKS * (K // C)):
        b = c // (K // C)
        place = c % (K // C) * C + tl.arange(0, C)[:, None]
        i = (1 << b) + (place & ((1 << b) - 1))
        j = 1 + (place >> b)
        last = (b == BLOCKS - 1) & (place == K - 1)
        i = tl.where(last, K, i)
        j = tl.where(last, 1, j)
        one = tl.load(found + (i - 1).to(tl.int64) * rows + row[None, :], mask=valid, other=0)
        other = tl.load(found + (K + j - 1).to(tl.int64) * rows + row[None, :], mask=valid, other=0)
        total = ordered(scores_of(one, DTYPE) + scores_of(other, DTYPE))
        low = places(one).to(tl.int64) * n2 + places(other)
        if RANKED:
            low = ((i - 1) * K + (j - 1)).to(tl.int64)
        keys = (total.to(tl.int64) << 32) | (0xFFFFFFFF - low)
        best = merge(best, tl.where(i * j <= k, keys, least(tl.int64)), C, K, R)
    place = tl.arange(0, K)[:, None]
    sums = unordered((best >> 32).to(tl.int32))
    live = (place < k) & valid
    if SOFTMAX:
        sums = softmax(sums, place < k, K, R)
    to = row[None, :].to(tl.int64) * k + place
    tl.store(scores + to, sums, mask=live)
    slots = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    if RANKED:
        one = tl.load(found + (slots // K) * rows + row[None, :], mask=live, other=0)
        other = tl.load(found + (K + slots % K) * rows + row[None, :], mask=live, other=0)
        slots = places(one).to(tl.int64) * n2 + places(other)
    tl.store(indices + to, slots, mask=live)


@triton.jit
def _halves_of(slot, N1: tl.constexpr, N2: tl.constexpr):
    """The keys of both halves in a slot. Division of 32-bit numbers is faster, so slots that fit are divided as such."""
    if N1 * N2 <= 4294967296:
        slot = slot.to(tl.uint32)
    return (slot // N2).to(tl.int32), (slot % N2).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def scatter_kernel(
    grad, indices, grad1, grad2, rows, N1: tl.constexpr, N2: tl.constexpr, k: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Write the gradients of the keys of C chosen scores to both halves: per key, the sum of all its scores, in order."""
    row = tl.program_id(0) * R + tl.arange(0, R)[None, :]
    place = tl.program_id(1) * C + tl.arange(0, C)[:, None]
    start = tl.minimum(row, rows - 1).to(tl.int64) * k
    key1, key2 = _halves_of(tl.load(indices + start + tl.minimum(place, k - 1)), N1, N2)
    total1 = tl.zeros([C, R], tl.float32)
    total2 = tl.zeros([C, R], tl.float32)
    for m in range(k):
        other1, other2 = _halves_of(tl.load(indices + start + m), N1, N2)
        more = tl.load(grad + start + m).to(tl.float32)
        total1 = tl.where(key1 == other1, total1 + more, total1)
        total2 = tl.where(key2 == other2, total2 + more, total2)
    live = (place < k) & (row < rows)
    tl.store(grad1 + row.to(tl.int64) * N1 + key1, total1, mask=live)
    tl.store(grad2 + row.to(tl.int64) * N2 + key2, total2, mask=live)
