"""8-bit table rows as Triton kernels: rows with one scale each, rounded to the nearest e4m3 value, given or sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_math import LARGEST_E4M3, power_of_two

BLOCK = 1024  # columns at once
PROGRAMS = 2**20  # at most; a program then has several rows


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize.quantized` of non-empty fp32 rows."""
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    _launch(codes, scale, rows.contiguous(), 0.0, 0)
    return codes, scale


def sample_(values: Tensor, scale: Tensor, spread: float, seed: int) -> None:
    """`quantize.sample_` of a non-empty, contiguous table."""
    _launch(values, scale, None, spread, seed)


def _launch(values: Tensor, scale: Tensor, source: Tensor | None, spread: float, seed: int) -> None:
    rows, width = values.shape
    programs = min(rows, PROGRAMS)
    block = min(BLOCK, max(16, triton.next_power_of_2(width)))
    quantize_rows[(programs,)](
        values.view(torch.uint8), scale, source, rows, programs, spread, seed, D=width, BLOCK_D=block, enable_fp_fusion=False
    )


@triton.jit
def columns(source, row, first, spread, seed, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns `first + 0..BLOCK_D-1` of a row, zeros beyond it: loaded, or drawn from N(0, spread²)."""
    cols = first + tl.arange(0, BLOCK_D)
    if source is not None:
        x = tl.load(source + row * D + cols, cols < D, 0)
    else:
        x = tl.where(cols < D, normal(seed, row, first, D, BLOCK_D) * spread, 0.0)
    return x


@triton.jit
def normal(seed, row, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Normal random numbers for columns of a row, by Box and Muller; they depend on the seed, the row and the column only."""
    group = row * ((D + 3) // 4) + first // 4 + tl.arange(0, BLOCK_D // 4)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    p, q = normal_pair(a, b)
    r, s = normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(p, q), tl.join(r, s)), [BLOCK_D])


@triton.jit
def normal_pair(a, b):
    """Two normal numbers from two random words: a direction of `b`'s quadrant (top two bits) and angle, and a length.

    The sine and cosine of angles up to pi/4 are their series; the library's functions need local memory for large angles.
    """
    angle = ((b & 0x3FFFFFFF).to(tl.float32) * 9.313225746154785e-10 - 0.5) * 1.5707963267948966
    square = angle * angle
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 - square / 5040)))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square / 40320)))
    quadrant = b >> 30
    x = tl.where(quadrant % 2 == 1, -sine, cosine)
    y = tl.where(quadrant % 2 == 1, cosine, sine)
    uniform = (a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.9802322387695312e-08  # in (0, 1)
    length = tl.sqrt_rn(-2.0 * tl.log(uniform))
    length = tl.where(quadrant >= 2, -length, length)
    return x * length, y * length


@triton.jit
def nearest_e4m3(x):
    """e4m3 bytes of fp32 values, rounded to the nearest, ties to even; NaN for numbers that are not finite."""
    size = tl.abs(x)
    exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, -6)
    finite = size < float("inf")
    exact = tl.where(finite, size, 0.0) * power_of_two(3 - exponent)  # 8..16, less for subnormal numbers
    steps = tl.floor(exact).to(tl.int32)
    rest = exact - steps.to(tl.float32)
    steps += ((rest > 0.5) | ((rest == 0.5) & (steps % 2 == 1))).to(tl.int32)
    code = tl.where(finite, tl.minimum((exponent + 6) * 8 + steps, 0x7E), 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["rows", "programs", "seed"])
def quantize_rows(values, scale, source, rows, programs, spread, seed: tl.int64, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (programs,). A row is read (or sampled) twice: for its largest value, and for its codes."""
    for at in range(tl.program_id(0), rows, programs):
        row = at + tl.zeros([1], tl.int64)
        size = tl.zeros([BLOCK_D], tl.float32)
        nan = tl.zeros([BLOCK_D], tl.int32)
        for first in range(0, D, BLOCK_D):
            x = columns(source, row, first, spread, seed, D, BLOCK_D)
            size = tl.maximum(size, tl.abs(x))
            nan = nan | (x != x).to(tl.int32)
        top = tl.where(tl.max(nan, 0) > 0, float("nan"), tl.max(size, 0))
        divisor = tl.where(top == 0, 1.0, tl.div_rn(top, LARGEST_E4M3))
        tl.store(scale + at, divisor)
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            x = columns(source, row, first, spread, seed, D, BLOCK_D)
            tl.store(values + row * D + cols, nearest_e4m3(tl.div_rn(x, divisor)), cols < D)


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the kernel, for the compile gate; sampling reads nothing."""
    for width in (576, 4096):
        for given in (True, False):
            pointers = {"values": "*u8", "scale": "*fp32"} | ({"source": "*fp32"} if given else {})
            yield CompileVariant(
                name=f"{'quantize_rows' if given else 'sample_rows'} D={width}",
                kernel=quantize_rows,
                signature=pointers | {"rows": "i32", "programs": "i32", "spread": "fp32", "seed": "i64"},
                constants={"D": width, "BLOCK_D": min(BLOCK, triton.next_power_of_2(width))}
                | ({} if given else {"source": None}),
                aligned=tuple(pointers),
                num_warps=4,
                options={"enable_fp_fusion": False},
                row_bytes=16 if given else 0,
            )
