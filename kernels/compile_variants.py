"""Kernel variants that the launchers can choose, as plain data; the compile gate compiles and checks them.

Each `triton_*` file yields its variants from the same plans that its launchers use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileVariant:
    """One variant of one Triton kernel, and limits for its machine code."""

    name: str  # "lookup_forward bf16 D=1024"
    kernel: Any  # the triton JITFunction
    signature: dict[str, str]  # parameter name -> triton type ("*bf16", "i64", "fp32", "constexpr")
    constants: dict[str, Any]  # constexpr values by parameter name
    aligned: tuple[str, ...]  # pointer and int parameters that are multiples of 16
    num_warps: int
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # e.g. enable_fp_fusion=False
    row_bytes: int = 16  # widest global load that the row path must use, in bytes; 0: it reads nothing
    scalar_loads: int = 0  # how many narrower LDG instructions are allowed (indices, weights, offsets)
    architectures: tuple[int, ...] = (80, 90, 100)  # on which a launcher can choose the variant; the gate skips others
