"""The sparse lookup as a Triton kernel: `out[t] = sum_j weights[t, j] * values[indices[t, j]]`, accumulated in fp32.

One program computes one slice of one token's output: it reads ROWS table rows at once, adds them, and continues with the next
ROWS. For few tokens, each chunk of ROWS has its own program and a second kernel adds the sums in the same order: same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_math import load_rows, unscaled

FEW_TOKENS = 64  # up to here, one program per slice would leave most of the device idle
SPLIT_LIMIT = 16384  # maximum of tokens x chunks, the number of sums that the split path writes

ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ELEMENT.update({torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"})


@dataclass(frozen=True)
class Plan:
    """How a table is read. Depends only on its width and dtype, so no result depends on the number of tokens."""

    rows: int  # rows that one thread reads at once: its loads in flight
    block: int  # columns of a slice: 16 bytes per thread
    warps: int
    slices: int


def plan(width: int, dtype: torch.dtype, rows: int = 8, most_warps: int = 2) -> Plan:
    """Slices of 16 bytes per thread: the largest that leave no more threads without a column than the smallest."""
    warp = 512 // dtype.itemsize  # columns that one warp reads at once
    if width <= warp:
        return Plan(rows, max(16, triton.next_power_of_2(width)), 1, 1)
    covered = {warps: triton.cdiv(width, warp * warps) * warps for warps in (1, 2, 4, 8) if warps <= most_warps}
    warps = max(warps for warps in covered if covered[warps] == covered[1])
    return Plan(rows, warp * warps, warps, triton.cdiv(width, warp * warps))


def whole(number: int, most: int = 8) -> int:
    """The largest power of two, up to `most`, that divides a number: a constexpr of the kernel with few distinct values."""
    return min(most, number & -number)


def options(dtype: torch.dtype) -> dict[str, Any]:
    """Compiler options: multiplications and additions may be fused (FMA) only where that does not change the result.

    The compiler fuses different operations in the split kernel and in the whole one (seen on sm_100). Products of two half
    types are exact in fp32. For 8-bit tables, without a limit the assembler uses so few registers that it spills.
    """
    return {"enable_fp_fusion": dtype.itemsize == 2} | ({"maxnreg": 72} if dtype.itemsize == 1 else {})


@lru_cache
def converts_e4m3(device: torch.device) -> bool:
    """True if the device can convert e4m3 (sm_89 and newer). Not the interpreter, which converts e4m3's NaN to 480."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def readable(values: Tensor) -> Tensor:
    """The table in a form that the kernels can read.

    If the device cannot convert e4m3, as int32 words of four values, or as bytes if the row width is not a multiple of four.
    """
    values = values.contiguous()
    if values.dtype != torch.float8_e4m3fn or converts_e4m3(values.device):
        return values
    return values.view(torch.uint8 if values.shape[1] % 4 else torch.int32)


def elements(dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Element types that `readable` returns for tables with the widths of the compile variants, and their architectures."""
    return {"i32": (80,), "fp8e4nv": (90, 100)} if dtype == torch.float8_e4m3fn else {ELEMENT[dtype]: (80, 90, 100)}


@triton.jit
def chunk_sum(
    values, scale, indices, weights, token, chunk, keys, first,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The weighted sum of ROWS of a token's rows, in fp32: loaded together, added by one thread in order."""
    place = chunk * ROWS + tl.arange(0, ROWS)
    at = token.to(tl.int64) * keys + place
    live = place >= 0
    if not FULL:
        live = place < keys
    row = tl.load(indices + at, live, 0).to(tl.int64)
    weight = tl.load(weights + at, live, 0).to(tl.float32)
    if scale is not None:
        weight *= tl.load(scale + row, live, 0)  # the scale of an unread row may be NaN
    tile = load_rows(values, row, first, live, D, BLOCK_D)
    return tl.sum(tile * unscaled(values, weight)[:, None], axis=0)


@triton.jit(do_not_specialize=["tokens", "key_units"])
def lookup_forward(
    values, scale, indices, weights, out, tokens, key_units,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, slices); with SPLIT (tokens, slices, chunks), and each chunk's sum goes to out [chunks, tokens, D]."""
    token = tl.program_id(0)
    keys = key_units * UNIT
    first = tl.program_id(1) * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    full: tl.constexpr = UNIT % ROWS == 0
    if SPLIT:
        chunk = tl.program_id(2)
        total = chunk_sum(values, scale, indices, weights, token, chunk, keys, first, D, ROWS, BLOCK_D, full)
        place = (chunk.to(tl.int64) * tokens + token) * D
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        for chunk in range(tl.cdiv(keys, ROWS)):
            total += chunk_sum(values, scale, indices, weights, token, chunk, keys, first, D, ROWS, BLOCK_D, full)
        place = token.to(tl.int64) * D
    tl.store(out + place + cols, total.to(out.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def add_chunks(sums, out, tokens, chunks, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t] = the sums [chunks, tokens, D] of token t, added in order; grid (tokens, slices)."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    stride = tokens.to(tl.int64)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, chunks, ROWS):
        for j in tl.static_range(ROWS):  # unrolled, so that loads do not wait for additions
            place = ((first + j) * stride + token) * D
            total += tl.load(sums + place + cols, mask=(cols < D) & (first + j < chunks), other=0)
    tl.store(out + token * D + cols, total.to(out.dtype.element_ty), mask=cols < D)


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs; `scale` [N] for 8-bit values. Returns [T, D] in the dtype of weights."""
    tokens, keys = indices.shape
    width = values.shape[1]
    how = plan(width, values.dtype)
    out = weights.new_empty(tokens, width)
    chunks = triton.cdiv(keys, how.rows)
    split = tokens <= FEW_TOKENS and chunks > 1 and tokens * chunks <= SPLIT_LIMIT
    target = torch.empty(chunks, tokens, width, dtype=torch.float32, device=values.device) if split else out
    grid = (tokens, how.slices, chunks) if split else (tokens, how.slices)
    unit = whole(keys)
    lookup_forward[grid](
        readable(values), scale, indices.contiguous(), weights.contiguous(), target, tokens, keys // unit,
        D=width, UNIT=unit, ROWS=how.rows, BLOCK_D=how.block, SPLIT=split, num_warps=how.warps, **options(values.dtype),
    )  # fmt: skip
    if split:
        add_chunks[(tokens, how.slices)](
            target, out, tokens, chunks, D=width, ROWS=how.rows, BLOCK_D=how.block, num_warps=how.warps
        )
    return out


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the forward kernels, for the compile gate."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for width, dtype, index, keys, split in (
        (576, bf16, "i64", 128, False), (1024, bf16, "i64", 128, False), (2048, bf16, "i64", 128, False),
        (4096, bf16, "i64", 128, False), (1024, bf16, "i32", 128, False), (1024, bf16, "i64", 127, False),
        (1024, fp32, "i64", 128, False), (1024, fp8, "i64", 128, False), (4096, fp8, "i64", 128, False),
        (1024, bf16, "i64", 128, True), (1024, fp8, "i64", 128, True),
    ):  # fmt: skip
        how, eight, unit = plan(width, dtype), dtype == fp8, whole(keys)
        weight = "fp32" if eight else ELEMENT[dtype]  # product keys return fp32 weights
        for element, architectures in elements(dtype).items():
            yield CompileVariant(
                name=f"lookup_forward {'fp8' if eight else weight} D={width} K={keys} {index}{' split' if split else ''}",
                kernel=lookup_forward,
                signature={
                    "values": f"*{element}", "scale": "*fp32" if eight else "constexpr", "indices": f"*{index}",
                    "weights": f"*{weight}", "out": "*fp32" if split else f"*{weight}", "tokens": "i32", "key_units": "i32",
                },
                constants={"D": width, "UNIT": unit, "ROWS": how.rows, "BLOCK_D": how.block, "SPLIT": split}
                | ({} if eight else {"scale": None}),
                aligned=("values", "indices", "weights", "out", *(["scale"] if eight else [])),
                num_warps=how.warps,
                options=options(dtype),
                scalar_loads=how.rows * (2 if unit < how.rows else 0) + (how.rows if eight else 0),
                architectures=architectures,
            )  # fmt: skip
    how = plan(1024, bf16)
    yield CompileVariant(
        name="add_chunks bf16 D=1024",
        kernel=add_chunks,
        signature={"sums": "*fp32", "out": "*bf16", "tokens": "i32", "chunks": "i32"},
        constants={"D": 1024, "ROWS": how.rows, "BLOCK_D": how.block},
        aligned=("sums", "out"),
        num_warps=how.warps,
    )
