"""Which tokens read which row: the reads of one or more lookups, sorted by row and split into segments.

A stable sort puts the reads of a row next to each other in the order (lookup, token, key). The reads of a row are one segment,
those of a hot row several segments. Counts stay on the device: tensor sizes are upper bounds, and entries beyond the counts
are empty. Each segment of a hot row has a sum [D]; if many rows are hot, the segments are longer, so that the sums fit in
SCRATCH.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant

LENGTH = 128  # reads per segment at least: the segments of a hot row are summed in parallel
SCRATCH = 64 << 20  # bytes of the sums of hot rows' segments at most
BLOCK = 512
HOT_BLOCK, HOT_ROWS = 512, 4  # columns, and reads at once, of a program that sums a segment of a hot row
NO_HINT: tl.constexpr = tl.constexpr("")  # for the caches; Triton 3.6.0 takes no plain string as a default
LONG = 1 << 32  # one counter for two counts: long rows in the high word, their segments in the low word


@dataclass(frozen=True)
class Segments:
    """M reads of at most R = min(M, N) rows, sorted by row."""

    slots: Tensor  # [M] int32 (int64 for tables of 2^31 slots and more): the row of each read, ascending
    order: Tensor  # [M] int64: which read of the concatenated lookups it is
    tokens: Tensor  # [M] int32: its row of the concatenated output gradients
    weights: Tensor  # [M]
    starts: Tensor  # [R + 1] int32: the first read of each row that is read; M beyond the last row
    sums: Tensor  # [R + 1] int64: rows of several segments before each row (high word), and their segments (low word)
    table: Tensor  # [S, 4] int32: first read, end, row's rank, place among the segments of long rows or -1
    long_segments: Tensor  # [P, 2] int32: first read and end, by place
    long_rows: Tensor  # [C, 4] int32: first read, rank, first place, end of the places
    last: Tensor  # [1] int32: the last row's rank
    length: int  # rows of at most this many reads are one segment


def segment(indices: Sequence[Tensor], weights: Sequence[Tensor], slots: int, width: int) -> Segments:
    """Sort the reads of lookups [T_l, K_l] of one table [slots, width]. Does not synchronize with the device.

    A row of more than L reads has a segment for every L. L is LENGTH, or 2·H/P if that is more: H is the number of reads of
    rows of more than LENGTH, and P sums fit in SCRATCH. These rows have fewer than 2·H/L segments, so each sum has a place.
    """
    kind = torch.int32 if slots < 2**31 else torch.int64
    found, order = torch.sort(_joined([i.reshape(-1).to(kind) for i in indices]), stable=True)
    reads = found.numel()
    most = max(2, SCRATCH // (4 * width))
    rows, longs = min(reads, slots), min(reads // (LENGTH + 1), most // 2)
    rank = torch.zeros(reads, dtype=torch.int32, device=found.device)
    torch.cumsum(found[1:] != found[:-1], 0, dtype=torch.int32, out=rank[1:])
    starts = torch.full((rows + 1,), reads, dtype=torch.int32, device=found.device)
    sums = torch.empty(rows + 1, dtype=torch.int64, device=found.device)
    table = torch.zeros(min(reads, rows + reads // LENGTH), 4, dtype=torch.int32, device=found.device)
    long_segments = torch.zeros(min(reads // LENGTH + longs, most), 2, dtype=torch.int32, device=found.device)
    long_rows = torch.zeros(longs, 4, dtype=torch.int32, device=found.device)
    flat = _joined([w.reshape(-1) for w in weights])
    tokens, sorted_weights = torch.empty_like(rank), torch.empty_like(flat)
    owners = None if len(indices) == 1 else _owners(indices)
    grid = (triton.cdiv(reads, BLOCK),)
    mark_starts[grid](rank, order, owners, flat, starts, tokens, sorted_weights, reads, indices[0].shape[1], BLOCK=BLOCK)
    hot = torch.zeros(1, dtype=torch.int64, device=found.device)
    limits: dict[str, Any] = {"LENGTH": LENGTH, "BLOCK": BLOCK}
    count_hot[(triton.cdiv(rows, BLOCK),)](starts, hot, rows, **limits)
    count_long[(triton.cdiv(rows + 1, BLOCK),)](starts, hot, sums, rows, most, LONG=LONG, **limits)
    torch.cumsum(sums, 0, out=sums)
    cut[grid](rank, starts, hot, sums, table, long_segments, long_rows, reads, most, **limits)
    return Segments(found, order, tokens, sorted_weights, starts, sums, table, long_segments, long_rows, rank[-1:], LENGTH)


def touched(segments: Segments) -> Tensor:
    """The rows that were read, ascending, int64 [R]; padded by repeating the last one."""
    last = segments.slots.numel() - 1
    return segments.slots[segments.starts[:-1].clamp(max=last).long()].long()


def sum_hot(grad: Tensor, segments: Segments, **options: Any) -> Tensor:
    """The gradient sums of the hot rows' segments, by place: fp32 [P, D]."""
    places, width = segments.long_segments.shape[0], grad.shape[1]
    sums = torch.empty(places, width, dtype=torch.float32, device=grad.device)
    if places:
        sum_long[(places, triton.cdiv(width, HOT_BLOCK))](
            grad, segments.tokens, segments.weights, segments.long_segments, sums,
            D=width, BLOCK_D=HOT_BLOCK, ROWS=HOT_ROWS, num_warps=1, **options,
        )  # fmt: skip
    return sums


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _owners(indices: Sequence[Tensor]) -> Tensor:
    """The token of each read of several lookups, numbered through all lookups; int32 [M]."""
    first, owners = 0, []
    for part in indices:
        tokens, keys = part.shape
        owner = torch.arange(first, first + tokens, dtype=torch.int32, device=part.device)
        owners.append(owner[:, None].expand(tokens, keys).reshape(-1))
        first += tokens
    return torch.cat(owners)


@triton.jit(do_not_specialize=["reads", "keys"])
def mark_starts(rank, order, owners, weights, starts, tokens, sorted_weights, reads, keys, BLOCK: tl.constexpr):
    """Store where each row's reads begin; copy tokens and weights into sorted order."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = m < reads
    mine = tl.load(rank + m, live, 0)
    before = tl.load(rank + m - 1, live & (m > 0), -1)
    tl.store(starts + mine, m, live & (mine != before))
    read = tl.load(order + m, live, 0)
    token = read.to(tl.int32) // keys if owners is None else tl.load(owners + read, live, 0)
    tl.store(tokens + m, token, live)
    tl.store(sorted_weights + m, tl.load(weights + read, live, 0), live)


@triton.jit(do_not_specialize=["rows"])
def count_hot(starts, hot, rows, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Add the reads of rows of more than LENGTH to a counter: integers, so the order of the atomic additions is irrelevant."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(starts + r + 1, r < rows, 0) - tl.load(starts + r, r < rows, 0)
    total = tl.sum(tl.where(count > LENGTH, count, 0).to(tl.int64), 0)
    if total > 0:
        tl.atomic_add(hot, total)


@triton.jit
def segment_length(hot, most, LENGTH: tl.constexpr):
    """Reads per segment: the sums of the rows of more reads have at most `most` places."""
    return tl.maximum((2 * tl.load(hot) + most - 1) // most, LENGTH).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "most"])
def count_long(starts, hot, sums, rows, most, LENGTH: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr):
    """sums[r + 1] = LONG + number of segments of row r if it has several segments, else 0; sums[0] = 0."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) - 1
    live = (r >= 0) & (r < rows)
    count = tl.load(starts + r + 1, live, 0) - tl.load(starts + r, live, 0)
    length = segment_length(hot, most, LENGTH)
    pieces = (count + length - 1) // length
    tl.store(sums + r + 1, tl.where(pieces > 1, pieces.to(tl.int64) + LONG, 0), r < rows)


@triton.jit(do_not_specialize=["reads", "most"])
def cut(rank, starts, hot, sums, table, long_segments, long_rows, reads, most, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the entry of each segment; the first of a long row also writes the row's entry."""
    length = segment_length(hot, most, LENGTH)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = m < reads
    row = tl.load(rank + m, live, 0)
    begin, end = tl.load(starts + row, live, 0), tl.load(starts + row + 1, live, 0)
    live = live & ((m - begin) % length == 0)
    before, after = tl.load(sums + row, live, 0), tl.load(sums + row + 1, live, 0)
    longs, places = (before >> 32).to(tl.int32), before.to(tl.int32)
    piece = (m - begin) // length
    long = after != before
    entry = table + (row + places - longs + piece).to(tl.int64) * 4
    tl.store(entry, m, live)
    tl.store(entry + 1, tl.minimum(m + length, end), live)
    tl.store(entry + 2, row, live)
    tl.store(entry + 3, tl.where(long, places + piece, -1), live)
    live = live & long
    entry = long_segments + (places + piece) * 2
    tl.store(entry, m, live)
    tl.store(entry + 1, tl.minimum(m + length, end), live)
    live = live & (piece == 0)
    entry = long_rows + longs * 4
    tl.store(entry, m, live)
    tl.store(entry + 1, row, live)
    tl.store(entry + 2, places, live)
    tl.store(entry + 3, after.to(tl.int32), live)


@triton.jit
def load_reads(tokens, weights, first, end, ROWS: tl.constexpr):
    """The tokens and weights of a row's next ROWS reads."""
    read = first + tl.arange(0, ROWS)
    return tl.load(tokens + read, read < end, 0), tl.load(weights + read, read < end, 0)


@triton.jit
def add_reads(
    grad, token, weight, row, dots, part, first, end, total, cols,
    D: tl.constexpr, ROWS: tl.constexpr, CACHE: tl.constexpr = NO_HINT,
):  # fmt: skip
    """Add ROWS weighted output gradients to a row's gradient, and store their dot products with the row."""
    read = first + tl.arange(0, ROWS)
    live = read < end
    at = token.to(tl.int64)[:, None] * D + cols[None, :]
    tile = tl.load(grad + at, live[:, None] & (cols < D)[None, :], 0, eviction_policy=CACHE).to(tl.float32)
    if dots is not None:
        tl.store(dots + part + read, tl.sum(tile * row[None, :], 1), live)
    return total + tl.sum(tile * weight.to(tl.float32)[:, None], 0)


@triton.jit
def sum_long(grads, tokens, weights, long_segments, sums, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """The sum of each segment of the hot rows; grid (places, slices)."""
    place = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = tl.load(long_segments + place * 2), tl.load(long_segments + place * 2 + 1)
    if first < end:
        total = tl.zeros([BLOCK_D], tl.float32)
        for m in range(first, end, ROWS):
            token, weight = load_reads(tokens, weights, m, end, ROWS)
            total = add_reads(grads, token, weight, total, None, 0, m, end, total, cols, D, ROWS)
        tl.store(sums + place.to(tl.int64) * D + cols, total, cols < D)


def compile_variants() -> Iterator[CompileVariant]:
    """The kernels that build segments, for the compile gate. They move numbers, not rows."""
    words = dict.fromkeys(("rank", "starts", "tokens", "owners", "table", "long_segments", "long_rows"), "*i32")
    words |= {"order": "*i64", "sums": "*i64", "hot": "*i64", "weights": "*fp32", "sorted_weights": "*fp32"}
    words |= {"reads": "i32", "keys": "i32", "rows": "i32", "most": "i32"}
    sizes = {"LENGTH": LENGTH, "LONG": LONG, "BLOCK": BLOCK}
    ones: dict[str, Any] = {"owners": None}
    variants: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (mark_starts, " one lookup", ones),
        (mark_starts, " several lookups", {}),
        (count_hot, "", {}),
        (count_long, "", {}),
        (cut, "", {}),
    )
    for kernel, note, constants in variants:
        names = [name for name in kernel.arg_names if name in words and name not in constants]
        yield CompileVariant(
            name=f"{kernel.__name__}{note}",
            kernel=kernel,
            signature={name: words[name] for name in names} | dict.fromkeys(constants, "constexpr"),
            constants={name: size for name, size in sizes.items() if name in kernel.arg_names} | constants,
            aligned=tuple(name for name in names if words[name].startswith("*")),
            num_warps=4,
            row_bytes=4,
            scalar_loads=40,
        )
    for kind in ("bf16", "fp32"):
        pointers = {"tokens": "*i32", "weights": "*fp32", "long_segments": "*i32", "grads": f"*{kind}", "sums": "*fp32"}
        yield CompileVariant(
            name=f"sum_long {kind} D=4096",
            kernel=sum_long,
            signature=pointers,
            constants={"D": 4096, "BLOCK_D": HOT_BLOCK, "ROWS": HOT_ROWS},
            aligned=tuple(pointers),
            num_warps=1,
            scalar_loads=2 + 2 * HOT_ROWS,
        )
