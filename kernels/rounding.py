"""Stores fp32 rows in fewer bits, with unbiased stochastic rounding.

A table in fp8 (e4m3) has one fp32 scale per row, chosen so that the largest entry of each row has the largest fp8 value.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, FP8: 3}  # mantissa bits
_LOWEST = {torch.bfloat16: -126, torch.float16: -14, FP8: -6}  # exponent of the smallest normal number


def row_scale(rows: Tensor) -> Tensor:
    """The scales of fp8 rows: the largest absolute entry divided by 448; 1 for rows of zeros. [R, D] -> fp32 [R]."""
    largest = rows.abs().amax(-1)
    return torch.where(largest == 0, 1.0, largest / FP8_MAX)


def stored(rows: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 rows rounded stochastically to `dtype`: up or down with probabilities that make the result unbiased.

    Infinities and NaN do not change. Above the largest number, fp8 is clamped and other types round as the hardware does.
    """
    if dtype not in _MANTISSA:
        return rows.to(dtype)
    chance = torch.rand(rows.shape, generator=generator, device=rows.device)
    _, exponent = torch.frexp(rows)  # rows = m * 2**exponent with 0.5 <= |m| < 1
    power = (exponent - 1).clamp(min=_LOWEST[dtype]) - _MANTISSA[dtype]
    steps = torch.ldexp(rows, -power)  # exact: only the exponent moves
    rounded = torch.ldexp((steps + chance).floor(), power)
    if dtype == FP8:
        rounded = rounded.clamp(-FP8_MAX, FP8_MAX)  # e4m3fn has no infinity: it would become NaN
    return torch.where(rows.isfinite(), rounded, rows).to(dtype)
