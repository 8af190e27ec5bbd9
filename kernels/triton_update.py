"""The optimizer step on the rows that were read, as Triton kernels, without a gradient of the table in memory.

The reads of all lookups of a table are sorted by row (`triton_segments`). The program of a row sums its gradient in registers,
updates the row and its optimizer state, and stores both; only the gradients of hot rows are summed by segments before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_lookup import ELEMENT
from memrewrite.kernels.triton_plans import tuned
from memrewrite.kernels.triton_segments import LENGTH, segment, sum_hot
from memrewrite.kernels.triton_update_kernels import MOVE, POWER, TOP, add_powers, set_scales, update_rows

FP8 = torch.float8_e4m3fn
PER_PROGRAM = 8  # rows per program
WARP = 256  # columns of a block per warp: 8 per thread, 16 bytes of a half type
RANKS = 256  # rows per program of the kernels between the phases


@dataclass(frozen=True)
class Plan:
    """How rows are divided among programs."""

    rows: int  # output gradients that are read at once
    block: int  # columns of a block, a power of two
    pieces: int  # blocks per program
    warps: int
    slices: int  # programs per row; more than one: the gradient is summed once per phase
    registers: int | None  # the most per thread
    cache: str = "evict_last"  # how long the output gradients stay in the cache: other rows need them again


def plan(width: int, dtype: torch.dtype, moments: bool, gradients: torch.dtype, device: torch.device | None = None) -> Plan:
    """The measured plan for a device, if there is one; else a whole row per program, or equal slices of rows that are too wide.

    The default has the fewest columns beyond the row, and two blocks if possible.

    A whole row reads its output gradients once, from the cache or from memory. Slices read them twice, but can read them from
    the cache. For G bytes of output gradients, a fraction m of them not in the cache, and a cache that is c times faster than
    the memory, the times are m·G + (1 - m)·G/c and 2·G/c: slices are faster only if m·(c - 1) > 1. With c = 1.5 (H200) they
    never are.
    """
    measured = None if device is None else tuned("update", device, dtype, width, 1 + moments)
    if measured is not None:
        return Plan(slices=triton.cdiv(width, measured["block"] * measured["pieces"]), **measured)
    wide = torch.float32 in (dtype, gradients)
    warps, pieces, block = 1, 1, max(16, triton.next_power_of_2(width))
    if width > WARP:
        sizes = [(w, p) for w in (1, 2, 4, 8, 16) for p in (1, 2, 3) if w * 32 * registers(wide, moments, p) <= 65536]
        share = triton.cdiv(width, triton.cdiv(width, max(WARP * w * p for w, p in sizes)))
        enough = [size for size in sizes if WARP * size[0] * size[1] >= share]
        warps, pieces = min(enough, key=lambda size: (size[0] * size[1], abs(size[1] - 2)))
        block = WARP * warps
    return Plan(2, block, pieces, warps, triton.cdiv(width, block * pieces), registers(wide, moments, pieces))


def registers(wide: bool, moments: bool, pieces: int) -> int:
    """The most per thread: as few as hold the blocks; without a limit the assembler uses a quarter more.

    `wide`: the table or the gradients are fp32.
    """
    narrow, broad = ((88, 128), (128, 168)) if moments else ((64, 80), (96, 128))
    return (broad if wide else narrow)[pieces > 2]


def adagrad_(
    values: Tensor, scale: Tensor | None, total: Tensor,
    grads: Sequence[Tensor], indices: Sequence[Tensor], weights: Sequence[Tensor],
    *, lr: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    """Row-wise Adagrad, in place and only on touched rows; `grads` are the gradients of the lookups' outputs.

    total += mean(g²);  p = p·(1 - lr·weight_decay) - lr·g / (sqrt(total) + eps). `total` is fp32 [N].
    """
    rates = {"lr": lr, "decay": 1 - lr * weight_decay, "eps": eps, "beta1": 0.0, "rest1": 1.0, "beta2": 1.0, "rest2": 1.0}
    _update(values, scale, None, total, grads, indices, weights, rates | {"correct1": 1.0, "correct2": 1.0}, seed)


def adam_(
    values: Tensor, scale: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor,
    grads: Sequence[Tensor], indices: Sequence[Tensor], weights: Sequence[Tensor],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int,
) -> None:  # fmt: skip
    """Adam with one second moment per row, in place and only on touched rows; `step` counts from 1.

    m = β1·m + (1-β1)·g;  v = β2·v + (1-β2)·mean(g²);  p = p·(1 - lr·weight_decay) - lr·(m/c1) / (sqrt(v/c2) + eps), where
    c1 = 1 - β1^step and c2 = 1 - β2^step. `exp_avg` is fp32 or bf16 [N, D], `exp_avg_sq` fp32 [N].
    """
    rates = {"lr": lr, "decay": 1 - lr * weight_decay, "eps": eps, "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2}
    rates |= {"rest2": 1 - beta2, "correct1": 1 - beta1**step, "correct2": 1 - beta2**step}
    _update(values, scale, exp_avg, exp_avg_sq, grads, indices, weights, rates, seed)


def _update(
    values: Tensor, scale: Tensor | None, average: Tensor | None, square: Tensor,
    grads: Sequence[Tensor], indices: Sequence[Tensor], weights: Sequence[Tensor], rates: dict[str, float], seed: int,
) -> None:  # fmt: skip
    for name, state in (("values", values), ("scale", scale), ("exp_avg", average), ("the second moment", square)):
        if state is not None and not state.is_contiguous():
            raise ValueError(f"fused update: {name} is not contiguous, and is updated in place; try {name}.contiguous()")
    width = values.shape[1]
    grad = grads[0].contiguous() if len(grads) == 1 else torch.cat(list(grads))
    how = plan(width, values.dtype, average is not None, grad.dtype, values.device)
    segments = segment(indices, weights, *values.shape)
    sums = sum_hot(grad, segments, enable_fp_fusion=values.dtype != torch.float32)
    rows = segments.starts.shape[0] - 1
    programs = triton.cdiv(rows, PER_PROGRAM)
    exact = values.dtype == torch.float32
    powers, tops, before = _scratch(how, rows, values)
    for phase in phases(how, values.dtype):
        update_rows[(programs, how.slices)](
            values.view(torch.uint8) if values.dtype == FP8 else values, scale, average, square,
            grad, segments.tokens, segments.weights, segments.slots, segments.starts, segments.sums, sums,
            powers, tops, before, rows, programs,
            **{name: float(rate) for name, rate in rates.items()}, seed=seed % 2**63,
            LENGTH=segments.length, EXACT=exact, PER_PROGRAM=PER_PROGRAM, **_constants(width, how, phase),
            num_warps=how.warps, enable_fp_fusion=not exact, maxnreg=how.registers,
        )  # fmt: skip
        order, grid = (segments.slots, segments.starts, rows), (triton.cdiv(rows, RANKS),)
        if phase == POWER:
            numbers = {"beta2": float(rates["beta2"]), "rest2": float(rates["rest2"])}
            sizes = {"EXACT": exact, "D": width, "SLICES": how.slices, "BLOCK": RANKS}
            add_powers[grid](powers, square, *order, **numbers, **sizes, enable_fp_fusion=not exact)
        elif phase == TOP:
            set_scales[grid](tops, scale, before, *order, SLICES=how.slices, BLOCK=RANKS)


def phases(how: Plan, dtype: torch.dtype) -> tuple[int, ...]:
    """The kernel's phases, in order."""
    if how.slices == 1:
        return (MOVE.value,)
    return (POWER.value, *((TOP.value,) if dtype == FP8 else ()), MOVE.value)


def _scratch(how: Plan, rows: int, values: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Between phases: sums of squares and largest values [slices, rows], and the old scales [rows]; None if not needed."""
    sizes = (how.slices, rows), (how.slices, rows), (rows,)
    needed = how.slices > 1, how.slices > 1 and values.dtype == FP8, how.slices > 1 and values.dtype == FP8
    powers, tops, before = (
        torch.empty(size, dtype=torch.float32, device=values.device) if need else None
        for size, need in zip(sizes, needed, strict=True)
    )
    return powers, tops, before


def _constants(width: int, how: Plan, phase: int) -> dict[str, Any]:
    """The constants of `update_rows` that a plan gives."""
    sizes = {"D": width, "BLOCK_D": how.block, "PIECES": how.pieces, "SLICES": how.slices}
    return sizes | {"PHASE": phase, "ROWS": how.rows, "CACHE": how.cache}


def variants(
    how: Plan, width: int, dtype: torch.dtype, grads: torch.dtype, average: torch.dtype | None
) -> Iterator[CompileVariant]:
    """The phases of a plan, for the compile gate: fp32 weights, as product keys return them; `average` is None for Adagrad."""
    bf16, fp32 = torch.bfloat16, torch.float32
    kind = {**ELEMENT, FP8: "u8"}
    pointers = {"values": f"*{kind[dtype]}", "square": "*fp32", "grads": f"*{kind[grads]}", "tokens": "*i32"}
    pointers |= {"weights": "*fp32", "slots": "*i32", "starts": "*i32", "counts": "*i64", "sums": "*fp32"}
    pointers |= ({"scale": "*fp32"} if dtype == FP8 else {}) | ({"average": f"*{ELEMENT[average]}"} if average else {})
    if how.slices > 1:
        pointers |= {"powers": "*fp32"} | ({"tops": "*fp32", "before": "*fp32"} if dtype == FP8 else {})
    rates = ("lr", "decay", "eps", "beta1", "rest1", "beta2", "rest2", "correct1", "correct2")
    note = "" if grads == dtype or (dtype, grads) == (FP8, bf16) else f" {kind[grads]} gradients"
    for phase in phases(how, dtype):
        part = "" if how.slices == 1 else f" {('power', 'top', 'move')[phase]}"
        yield CompileVariant(
            name=f"{'adam' if average else 'adagrad'} {'fp8' if dtype == FP8 else kind[dtype]} D={width}{note}{part}",
            kernel=update_rows,
            signature=pointers | {"rows": "i32", "programs": "i32", "seed": "i64"} | dict.fromkeys(rates, "fp32"),
            constants={"LENGTH": LENGTH, "EXACT": dtype == fp32, "PER_PROGRAM": PER_PROGRAM}
            | _constants(width, how, phase)
            | {name: None for name in ("scale", "average", "powers", "tops", "before") if name not in pointers},
            aligned=tuple(pointers),
            num_warps=how.warps,
            options={"enable_fp_fusion": dtype != fp32, "maxnreg": how.registers},
            scalar_loads=16 + 6 * how.rows + (how.pieces if dtype == FP8 else 0),
        )


def measured_variants(plan: dict[str, Any], dtype: torch.dtype, width: int, moments: int) -> Iterator[CompileVariant]:
    """The variants of a measured plan; gradients and first moments have the dtype of the table, or bf16 with 8-bit tables."""
    how = Plan(slices=triton.cdiv(width, plan["block"] * plan["pieces"]), **plan)
    grads = torch.bfloat16 if dtype == FP8 else dtype
    yield from variants(how, width, dtype, grads, grads if moments == 2 else None)


MEASURED = {"update": measured_variants}  # as in `triton_lookup`


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the update kernels, for the compile gate."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for width, dtype, grads, average in (
        *((width, bf16, bf16, state) for width in (576, 768, 1024, 1536, 2048, 4096, 8192) for state in (None, bf16)),
        *((width, fp32, fp32, state) for width in (576, 768, 1024, 1536, 2048, 4096, 8192) for state in (None, fp32)),
        *((width, FP8, bf16, state) for width in (576, 768, 1024, 1536, 2048, 4096, 8192) for state in (None, bf16)),
        (1024, FP8, fp32, None), (1024, fp32, bf16, None), (16384, bf16, bf16, None), (16384, FP8, bf16, bf16),
    ):  # fmt: skip
        yield from variants(plan(width, dtype, average is not None, grads), width, dtype, grads, average)
    yield from _between_variants()


def _between_variants() -> Iterator[CompileVariant]:
    """The kernels between the phases: they move one number per row."""
    pointers = {"slots": "*i32", "starts": "*i32"} | dict.fromkeys(("powers", "square", "tops", "scale", "before"), "*fp32")
    sizes = {"EXACT": False, "D": 16384, "SLICES": 2, "BLOCK": RANKS}
    for kernel in (add_powers, set_scales):
        names = [name for name in kernel.arg_names if name in pointers]
        floats = dict.fromkeys(("beta2", "rest2"), "fp32") if kernel is add_powers else {}
        yield CompileVariant(
            name=f"{kernel.__name__} slices=2",
            kernel=kernel,
            signature={name: pointers[name] for name in names} | {"rows": "i32"} | floats,
            constants={name: size for name, size in sizes.items() if name in kernel.arg_names},
            aligned=tuple(names),
            num_warps=4,
            row_bytes=4,
            scalar_loads=40,
        )
