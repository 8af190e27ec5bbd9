"""The sparse lookup as a Triton kernel: `out[t] = sum_j weights[t, j] * values[indices[t, j]]`, accumulated in fp32.

One program computes one slice of one token's output: in each step it reads ROWS table rows and adds them. For few tokens, each
chunk of ROWS has its own program, and a second kernel adds the sums in the same order: same bits.
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
from memrewrite.kernels.triton_plans import tuned

FEW_TOKENS = 64  # up to here, one program per slice would leave most of the device idle
ADDED = 8  # chunk sums that are loaded at once
SPLIT_LIMIT = 16384  # maximum of tokens x chunks, the number of sums that the split path writes

ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ELEMENT.update({torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"})


@dataclass(frozen=True)
class Plan:
    """How a table is read. Depends only on its width and dtype, so no result depends on the number of tokens."""

    rows: int  # rows that a program reads in one step
    block: int  # columns of a slice
    warps: int
    slices: int
    registers: int | None = None  # maximum per thread
    cache: str = "evict_last"  # for how long the rows stay in the caches: a word of Triton, "" for no hint

    @property
    def limits(self) -> dict[str, int]:
        """The compiler option for the registers."""
        return {} if self.registers is None else {"maxnreg": self.registers}


def plan(width: int, dtype: torch.dtype, device: torch.device | None = None) -> Plan:
    """The measured plan of the device, else 8 loads of 16 bytes per thread and step.

    The register limit makes the assembler use more registers, not fewer. For bf16 on sm_90 (`compile_gate`), without it 2 of
    the 8 loads are in flight and a multiprocessor has 36 KiB of rows in flight; with it (63 registers) all 8, and 128 KiB. The
    limits are the lowest without spills on every architecture.
    """
    measured = None if device is None else tuned("forward", device, dtype, width)
    if measured is not None:
        return Plan(slices=triton.cdiv(width, measured["block"]), **measured)
    block = slice_width(width, dtype)
    return Plan(8, block, max(1, block * dtype.itemsize // 512), triton.cdiv(width, block), 96 if dtype.itemsize == 1 else 72)


def slice_width(width: int, dtype: torch.dtype) -> int:
    """Columns of a slice: 16 bytes for each lane of two warps, or of one if fewer lanes are then without a column.

    Slices of half a warp leave still fewer lanes idle (10 % instead of 25 % at 576 columns of bf16), but do not save
    instructions: 137 instead of 132 per row, since half of the lanes load other indices than the rest.
    """
    warp = 512 // dtype.itemsize
    if width <= warp:
        return max(16, int(triton.next_power_of_2(width)))
    return 2 * warp if 2 * triton.cdiv(width, 2 * warp) == triton.cdiv(width, warp) else warp


def whole(number: int, most: int = 8) -> int:
    """The largest power of two, up to `most`, that divides a number: a constexpr of the kernel with few distinct values."""
    return min(most, number & -number)


def fused(*dtypes: torch.dtype) -> dict[str, bool]:
    """Compiler option: multiplications and additions may be fused (FMA) only where that does not change the result.

    The compiler fuses different operations in the split kernel and in the whole one (seen on sm_100). Products of two half
    types are exact in fp32; those with fp32 weights or a scale are not.
    """
    return {"enable_fp_fusion": all(dtype.itemsize == 2 for dtype in dtypes)}


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
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """The weighted sum of ROWS of a token's rows, in fp32."""
    place = chunk * ROWS + tl.arange(0, ROWS)
    at = token.to(tl.int64) * keys + place
    live = place >= 0
    if not FULL:
        live = place < keys
    row = tl.load(indices + at, live, 0).to(tl.int64)
    weight = tl.load(weights + at, live, 0).to(tl.float32)
    if scale is not None:
        weight *= tl.load(scale + row, live, 0)  # the scale of an unread row may be NaN
    tile = load_rows(values, row, first, live, D, BLOCK_D, FULL, CACHE)
    return tl.sum(tile * unscaled(values, weight)[:, None], axis=0)


@triton.jit(do_not_specialize=["tokens", "key_units"])
def lookup_forward(
    values, scale, indices, weights, out, tokens, key_units,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, slices); with SPLIT (tokens, slices, chunks), and each chunk's sum goes to out [chunks, tokens, D]."""
    token = tl.program_id(0)
    keys = key_units * UNIT
    first = tl.program_id(1) * BLOCK_D
    cols = first + tl.arange(0, BLOCK_D)
    full: tl.constexpr = UNIT % ROWS == 0
    if SPLIT:
        chunk = tl.program_id(2)
        total = chunk_sum(values, scale, indices, weights, token, chunk, keys, first, D, ROWS, BLOCK_D, full, CACHE)
        place = (chunk.to(tl.int64) * tokens + token) * D
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        for chunk in range(tl.cdiv(keys, ROWS)):
            total += chunk_sum(values, scale, indices, weights, token, chunk, keys, first, D, ROWS, BLOCK_D, full, CACHE)
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


def forward(values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sparse_lookup` of checked, non-empty inputs; `scale` [N] for 8-bit values. Returns [T, D] in `dtype`."""
    tokens, keys = indices.shape
    width = values.shape[1]
    how = plan(width, values.dtype, values.device)
    out = torch.empty(tokens, width, dtype=dtype, device=values.device)
    chunks = triton.cdiv(keys, how.rows)
    split = tokens <= FEW_TOKENS and chunks > 1 and tokens * chunks <= SPLIT_LIMIT
    target = torch.empty(chunks, tokens, width, dtype=torch.float32, device=values.device) if split else out
    grid = (tokens, how.slices, chunks) if split else (tokens, how.slices)
    unit = whole(keys, max(8, how.rows))
    lookup_forward[grid](
        readable(values), scale, indices.contiguous(), weights.contiguous(), target, tokens, keys // unit,
        D=width, UNIT=unit, ROWS=how.rows, BLOCK_D=how.block, SPLIT=split, CACHE=how.cache,
        num_warps=how.warps, **fused(values.dtype, weights.dtype), **how.limits,
    )  # fmt: skip
    if split:
        add_chunks[(tokens, how.slices)](
            target, out, tokens, chunks, D=width, ROWS=ADDED, BLOCK_D=how.block, num_warps=how.warps
        )
    return out


def variant(
    how: Plan, width: int, dtype: torch.dtype, weights: torch.dtype, keys: int = 128, index: str = "i64", note: str = ""
) -> Iterator[CompileVariant]:
    """The forward kernel with a plan, for the compile gate; `weights` is the dtype of the output too, fp32 excepted."""
    eight, unit = dtype.itemsize == 1, whole(keys, max(8, how.rows))
    split = note == "split"
    name = "fp8" if eight else ELEMENT[dtype] + ("" if weights == dtype else f" {ELEMENT[weights]} weights")
    for element, architectures in elements(dtype).items():
        yield CompileVariant(
            name=" ".join(filter(None, ("lookup_forward", name, f"D={width} K={keys} {index}", note))),
            kernel=lookup_forward,
            signature={
                "values": f"*{element}", "scale": "*fp32" if eight else "constexpr", "indices": f"*{index}",
                "weights": f"*{ELEMENT[weights]}", "out": f"*{'fp32' if split or eight else ELEMENT[dtype]}",
                "tokens": "i32", "key_units": "i32",
            },
            constants={"D": width, "UNIT": unit, "ROWS": how.rows, "BLOCK_D": how.block, "SPLIT": split, "CACHE": how.cache}
            | ({} if eight else {"scale": None}),
            aligned=("values", "indices", "weights", "out", *(["scale"] if eight else [])),
            num_warps=how.warps,
            options={**fused(dtype, weights), **how.limits},
            scalar_loads=how.rows * (2 if unit < how.rows or how.rows > 8 else 0) + (how.rows if eight else 0),
            architectures=architectures,
        )  # fmt: skip


def measured_variants(plan: dict[str, Any], dtype: torch.dtype, width: int) -> Iterator[CompileVariant]:
    """The variants of a measured plan."""
    how = Plan(slices=triton.cdiv(width, plan["block"]), **plan)
    yield from variant(how, width, dtype, torch.float32)
    yield from variant(how, width, dtype, torch.float32, note="split")


MEASURED = {"forward": measured_variants}  # kernel of the table of plans -> its variants, for the compile gate


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the forward kernels, for the compile gate."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for width in (576, 768, 1000, 1024, 1536, 2048, 4096):
        yield from variant(plan(width, bf16), width, bf16, fp32)
    for width, dtype, weights, keys, index, note in (
        (1024, bf16, bf16, 128, "i64", ""), (4096, bf16, bf16, 128, "i64", ""), (1024, bf16, fp32, 128, "i32", ""),
        (1024, bf16, fp32, 127, "i64", ""), (1024, fp32, fp32, 128, "i64", ""), (1024, fp8, fp32, 128, "i64", ""),
        (4096, fp8, fp32, 128, "i64", ""), (1024, bf16, fp32, 128, "i64", "split"), (1024, fp8, fp32, 128, "i64", "split"),
    ):  # fmt: skip
        yield from variant(plan(width, dtype), width, dtype, weights, keys, index, note)
    how = plan(1024, bf16)
    yield CompileVariant(
        name="add_chunks bf16 D=1024",
        kernel=add_chunks,
        signature={"sums": "*fp32", "out": "*bf16", "tokens": "i32", "chunks": "i32"},
        constants={"D": 1024, "ROWS": ADDED, "BLOCK_D": how.block},
        aligned=("sums", "out"),
        num_warps=how.warps,
    )
