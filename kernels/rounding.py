"""Stores fp32 rows in fewer bits, with unbiased stochastic rounding.

A table in fp8 (e4m3) has one fp32 scale per row, chosen so that the largest entry of each row has the largest fp8 value; an
optimizer state in fp8 has one per block of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128  # columns of an optimizer state in fp8 that share a scale
# Per type: an integer of its size, mantissa bits, exponent of the smallest normal number, largest code, code of NaN.
_TYPES = {torch.float16: (torch.int16, 10, -14, 0x7C00, 0x7E00), FP8: (torch.uint8, 3, -6, 0x7E, 0x7F)}
# Bits of a subnormal number, in steps of its type: the mantissa's, and those below, to which random bits are added.
_DRAWN = 30


def row_scale(rows: Tensor) -> Tensor:
    """The scales of fp8 rows: the largest absolute entry divided by 448; 1 for rows of zeros. [R, D] -> fp32 [R]."""
    largest = rows.abs().amax(-1)
    return torch.where(largest == 0, 1.0, largest / FP8_MAX)


def blocks_of(width: int) -> int:
    """Number of blocks of a row: the last one may be shorter."""
    return (width + BLOCK - 1) // BLOCK


def block_scale(rows: Tensor) -> Tensor:
    """The scales of the blocks of fp8 rows, as `row_scale` of each block. [R, D] -> fp32 [R, blocks]."""
    count, width = rows.shape
    blocks = blocks_of(width)
    return row_scale(F.pad(rows, (0, blocks * BLOCK - width)).view(count, blocks, BLOCK))


def by_column(scale: Tensor, width: int) -> Tensor:
    """The scale of every column: [R, blocks] -> [R, width]."""
    return scale.repeat_interleave(BLOCK, -1)[:, :width]


def stored(rows: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 rows rounded stochastically to `dtype`: up or down with probabilities that make the result unbiased.

    Random bits are added below the last bit that is kept, and the sum is cut off. Infinities and NaN do not change, except that
    an infinity is NaN in fp8. Above the largest number, fp8 is clamped and other types round as the hardware does.
    """
    if dtype == torch.bfloat16:
        return _bf16(rows, generator)
    if dtype in _TYPES:
        return _narrow(rows, dtype, generator)
    return rows.to(dtype)


def _bf16(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The upper half of the bits, after 16 random bits were added; four of these are cut from one random word."""
    words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64, device=rows.device)
    random = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: rows.numel()].view(rows.shape)
    sums = torch.add(rows.contiguous().view(torch.int32), random).add_(0x8000)  # `random` is from -0x8000 to 0x7FFF
    narrow = sums.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return narrow.masked_fill_(rows.isnan(), torch.nan)


def _narrow(rows: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`stored` for the types in which small numbers of fp32 are subnormal: multiples of one step."""
    integer, fraction, lowest, most, nan = _TYPES[dtype]
    random = torch.empty(rows.shape, dtype=torch.int32, device=rows.device).random_(generator=generator)  # 31 bits
    size, cut, below = rows.abs(), 23 - fraction, _DRAWN - fraction
    codes = size.view(torch.int32) + (random & (2**cut - 1)) - ((lowest + 126) << 23)  # of the exponent `lowest` is 1
    codes = codes.bitwise_right_shift_(cut).clamp_(max=most)
    steps = (size.clamp(max=2.0**lowest) * 2.0 ** (fraction - lowest + below)).int()
    small = steps.add_(random & (2**below - 1)).bitwise_right_shift_(below)
    codes = torch.where(size < 2.0**lowest, small, codes)
    codes.masked_fill_(rows.isnan() if dtype == torch.float16 else rows.isfinite().logical_not_(), nan)
    negative = rows.contiguous().view(torch.int32) >> 31  # ones or zeros
    return codes.bitwise_or_(negative << (8 * dtype.itemsize - 1)).to(integer).view(dtype)
