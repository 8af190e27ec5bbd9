"""Small functions that the Triton kernels share: 8-bit floats as bits, random bits, stochastic rounding.

They use integer and fp32 arithmetic, available on every architecture and in the interpreter; only tables of
`tl.float8e4nv` are converted by the instruction of sm_89 and newer.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_E4M3: tl.constexpr = tl.constexpr(448.0)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # fp32's
EVICT_LAST: tl.constexpr = tl.constexpr("evict_last")
ROUNDS: tl.constexpr = tl.constexpr(7)  # of philox: the fewest that pass BigCrush


@triton.jit
def load_rows(
    values, row, first, live, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr = False,
    CACHE: tl.constexpr = EVICT_LAST,
):  # fmt: skip
    """Columns `first + 0..BLOCK_D-1` of table rows, as fp32 [ROWS, BLOCK_D]; values decoded here are 256 times too small.

    With FULL, all of `live` is true. 8-bit tables are passed unchanged if the device can convert them (half the instructions,
    right magnitude); else as int32 words of four values, or as bytes if the row width is not a multiple of four.
    """
    if values.dtype.element_ty == tl.int32:
        word = first // 4 + tl.arange(0, BLOCK_D // 4)
        at = row[:, None] * (D // 4) + word[None, :]
        if FULL and D % BLOCK_D == 0:
            words = tl.load(values + at, eviction_policy=CACHE)
        else:
            words = tl.load(values + at, live[:, None] & (word < D // 4)[None, :], 0, eviction_policy=CACHE)
        out = decode_words(words)
    else:
        cols = first + tl.arange(0, BLOCK_D)
        at = row[:, None] * D + cols[None, :]
        if FULL and D % BLOCK_D == 0:  # a mask costs an instruction that writes zeros before each load
            tile = tl.load(values + at, eviction_policy=CACHE)
        else:
            tile = tl.load(values + at, live[:, None] & (cols < D)[None, :], 0.0, eviction_policy=CACHE)
        out = decode_e4m3(tile) if tile.dtype == tl.uint8 else tile.to(tl.float32)
    return out


@triton.jit
def unscaled(values, factor):
    """A factor for the result of `load_rows`, times 256 if the values were decoded here."""
    small: tl.constexpr = (values.dtype.element_ty == tl.int32) or (values.dtype.element_ty == tl.uint8)
    return factor * 256.0 if small else factor


@triton.jit
def decode_e4m3(code):
    """e4m3 bytes as fp32, divided by 256: an fp16 with the same exponent bits is 256 times smaller, subnormals included."""
    bits = code.to(tl.int8, bitcast=True).to(tl.int16)  # sign-extended: one shift places the sign and the rest
    half = ((bits << 7) & -16512) | ((((bits & 0x7F) + 1) & 0x80) << 7)  # 0xBF80; e4m3's only NaN becomes an fp16 NaN
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_words(words):
    """`decode_e4m3` of four bytes a word, two at a time: int32 [ROWS, n] -> fp32 [ROWS, 4n]."""
    bits = words.to(tl.uint32, bitcast=True)
    nan = (bits & 0x7F7F7F7F) + 0x01010101  # sets a byte's top bit for 0x7F only
    even = ((bits << 7) & 0x3F803F80) | ((bits << 8) & 0x80008000) | ((nan << 7) & 0x40004000)  # bytes 0 and 2
    odd = ((bits >> 1) & 0x3F803F80) | (bits & 0x80008000) | ((nan >> 1) & 0x40004000)  # bytes 1 and 3
    low, high = tl.join(even & 0xFFFF, odd & 0xFFFF), tl.join(even >> 16, odd >> 16)  # bytes 0 1, bytes 2 3
    halves = tl.join(low, high).permute(0, 1, 3, 2)  # [ROWS, n, pair, byte of the pair]
    small = halves.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.reshape(small, [words.shape[0], words.shape[1] * 4])


@triton.jit
def encode_e4m3(x, bits):
    """e4m3 bytes of fp32 values, stochastically rounded by 16 random bits (unbiased).

    Times 2^-120, the smallest normal numbers of e4m3 are those of fp32, so the code is the number's top bits, for subnormal
    numbers too; what is added below them may carry into the exponent.
    """
    size = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    code = tl.minimum((size + bits * 16 + 8) >> 20, 0x7E)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32, for exponents of normal numbers: -126..127."""
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def random_bits(seed, stream, row, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """16 random bits for each of the columns `first + 0..BLOCK_D-1` of a row, as int32.

    One philox call gives the bits of 8 columns. The counter depends only on the row, the column and the stream.
    """
    group = row.to(tl.int64) * ((D + 7) // 8) + first // 8 + tl.arange(0, BLOCK_D // 8)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    extra = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, extra + stream, extra, ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d))  # [BLOCK_D/8, 2, 2]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [BLOCK_D/8, 2, 2, 2]
    return tl.reshape(halves, [BLOCK_D]).to(tl.int32)


@triton.jit
def round_to(x, bits, dtype: tl.constexpr):
    """fp32 values as fp32, bf16 or fp16; for the last two stochastically rounded (unbiased)."""
    if dtype == tl.bfloat16:
        out = round_bf16(x, bits)
    elif dtype == tl.float16:
        out = round_fp16(x, bits)
    else:
        out = x
    return out


@triton.jit
def round_bf16(x, bits):
    """Add random bits below bf16's last bit, then truncate; inf and NaN do not change."""
    raw = x.to(tl.int32, bitcast=True)
    cut = ((raw + bits) & -65536).to(tl.float32, bitcast=True)
    finite = (raw & 0x7F800000) != 0x7F800000
    return tl.where(finite, cut, x).to(tl.bfloat16)


@triton.jit
def round_fp16(x, bits):
    """Stochastic rounding in steps of fp16's spacing at x: 2^(exponent - 10), and 2^-24 for subnormal numbers."""
    exponent = tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, -14)
    steps = tl.floor(tl.abs(x) * power_of_two(10 - exponent) + uniform(bits))
    size = steps * power_of_two(exponent - 10)
    return tl.where(x < 0, -size, size).to(tl.float16)


@triton.jit
def uniform(bits):
    """16 random bits as a number in (0, 1): the middle of an interval of width 1/65536."""
    return (bits.to(tl.float32) + 0.5) * 1.52587890625e-05
