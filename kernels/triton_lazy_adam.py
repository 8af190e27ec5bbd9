"""Adam with a second moment per element on the rows that were read, as a Triton kernel.

As in `triton_update`, the reads are sorted by row and a program sums the gradient of a row, or of a slice of it, in registers.
Slices of a row have nothing in common but the scale of an 8-bit table, so rows of other tables are always cut into slices of
one warp: a slice reads its own columns of the output gradients and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_lazy_adam_kernels import lazy_adam_rows
from memrewrite.kernels.triton_lookup import ELEMENT
from memrewrite.kernels.triton_plans import tuned
from memrewrite.kernels.triton_segments import LENGTH, segment, sum_hot
from memrewrite.kernels.triton_update import FP8, PER_PROGRAM, RANKS, WARP, Plan
from memrewrite.kernels.triton_update_kernels import MOVE, TOP, set_scales

TYPES = {**ELEMENT, FP8: "u8"}


def plan(
    width: int, dtype: torch.dtype, state: torch.dtype, gradients: torch.dtype, device: torch.device | None = None
) -> Plan:
    """The measured plan for a device, if there is one; else a whole row per program in 8-bit tables, slices of it in others.

    The default has the fewest columns beyond the row, and two blocks if possible. Blocks of more than one have at least 128
    columns, those of a scale of an 8-bit state.
    """
    measured = None if device is None else tuned("lazy_adam", device, dtype, width, state.itemsize)
    if measured is not None:
        return Plan(slices=triton.cdiv(width, measured["block"] * measured["pieces"]), **measured)
    widest = max(dtype.itemsize, state.itemsize, gradients.itemsize)
    if dtype != FP8 or width <= WARP:
        block = min(WARP, max(16, triton.next_power_of_2(width)))
        return Plan(2, block, 1, 1, triton.cdiv(width, block), registers(widest, 1))
    shapes = [(w, p) for w in (1, 2, 4, 8, 16) for p in (1, 2, 3) if w * 32 * registers(widest, p) <= 65536]

    def cost(shape: tuple[int, int]) -> tuple[int, ...]:
        columns = WARP * shape[0] * shape[1]
        slices = triton.cdiv(width, columns)
        return slices, slices * columns, abs(shape[1] - 2)

    warps, pieces = min(shapes, key=cost)
    return Plan(2, WARP * warps, pieces, warps, triton.cdiv(width, WARP * warps * pieces), registers(widest, pieces))


def registers(widest: int, pieces: int) -> int:
    """The most per thread; `widest`: bytes of the largest element among table, state and gradients."""
    return {True: (120, 168, 240), False: (80, 128, 200)}[widest > 2][pieces - 1]


def lazy_adam_(
    values: Tensor, scale: Tensor | None, exp_avg: Tensor, exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor, exp_avg_sq_scale: Tensor | None,
    grads: Sequence[Tensor], indices: Sequence[Tensor], weights: Sequence[Tensor],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int,
) -> None:  # fmt: skip
    """Adam with one second moment per element, in place and only on touched rows; `step` counts from 1.

    m = β1·m + (1-β1)·g;  v = β2·v + (1-β2)·g²;  p = p·(1 - lr·weight_decay) - lr·(m/c1) / (sqrt(v/c2) + eps), where
    c1 = 1 - β1^step and c2 = 1 - β2^step. Both states [N, D] are fp32, bf16, or 8-bit with scales [N, ceil(D/128)];
    an 8-bit `exp_avg_sq` has the roots of v.
    """
    tables = {"values": values, "scale": scale, "exp_avg": exp_avg, "exp_avg_scale": exp_avg_scale}
    for name, table in (tables | {"exp_avg_sq": exp_avg_sq, "exp_avg_sq_scale": exp_avg_sq_scale}).items():
        if table is not None and not table.is_contiguous():
            raise ValueError(f"fused update: {name} is not contiguous, and is updated in place; try {name}.contiguous()")
    width, exact = values.shape[1], values.dtype == torch.float32
    grad = grads[0].contiguous() if len(grads) == 1 else torch.cat(list(grads))
    how = plan(width, values.dtype, exp_avg.dtype, grad.dtype, values.device)
    segments = segment(indices, weights, *values.shape)
    sums = sum_hot(grad, segments, enable_fp_fusion=not exact)
    rows = segments.starts.shape[0] - 1
    programs = triton.cdiv(rows, PER_PROGRAM)
    tops, before = _scratch(how, rows, values)
    rates = {"lr": lr, "decay": 1 - lr * weight_decay, "eps": eps, "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2}
    rates |= {"rest2": 1 - beta2, "correct1": 1 - beta1**step, "correct2": 1 - beta2**step}
    for phase in phases(how, values.dtype):
        lazy_adam_rows[(programs, how.slices)](
            _plain(values), scale, _plain(exp_avg), exp_avg_scale, _plain(exp_avg_sq), exp_avg_sq_scale,
            grad, segments.tokens, segments.weights, segments.slots, segments.starts, segments.sums, sums,
            tops, before, rows, programs, **{name: float(rate) for name, rate in rates.items()}, seed=seed % 2**63,
            LENGTH=segments.length, EXACT=exact, PER_PROGRAM=PER_PROGRAM, **_constants(width, how, phase),
            num_warps=how.warps, enable_fp_fusion=not exact, maxnreg=how.registers,
        )  # fmt: skip
        if phase == TOP:
            set_scales[(triton.cdiv(rows, RANKS),)](
                tops, scale, before, segments.slots, segments.starts, rows, SLICES=how.slices, BLOCK=RANKS
            )


def phases(how: Plan, dtype: torch.dtype) -> tuple[int, ...]:
    """The kernel's phases, in order."""
    return (TOP.value, MOVE.value) if how.slices > 1 and dtype == FP8 else (MOVE.value,)


def _plain(table: Tensor) -> Tensor:
    """8-bit floats as bytes: the kernel decodes them itself."""
    return table.view(torch.uint8) if table.dtype == FP8 else table


def _scratch(how: Plan, rows: int, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Between phases: the largest values [slices, rows], and the old scales [rows]; None if not needed."""
    if len(phases(how, values.dtype)) == 1:
        return None, None
    tops = torch.empty(how.slices, rows, dtype=torch.float32, device=values.device)
    return tops, torch.empty(rows, dtype=torch.float32, device=values.device)


def _constants(width: int, how: Plan, phase: int) -> dict[str, Any]:
    """The constants of `lazy_adam_rows` that a plan gives."""
    sizes = {"D": width, "BLOCK_D": how.block, "PIECES": how.pieces, "SLICES": how.slices}
    return sizes | {"PHASE": phase, "ROWS": how.rows, "CACHE": how.cache}


def variants(how: Plan, width: int, dtype: torch.dtype, state: torch.dtype, grads: torch.dtype) -> Iterator[CompileVariant]:
    """The phases of a plan, for the compile gate: fp32 weights, as product keys return them."""
    pointers = {"values": f"*{TYPES[dtype]}", "average": f"*{TYPES[state]}", "square": f"*{TYPES[state]}"}
    pointers |= {"grads": f"*{TYPES[grads]}", "tokens": "*i32", "weights": "*fp32", "slots": "*i32", "starts": "*i32"}
    pointers |= {"counts": "*i64", "sums": "*fp32"} | ({"scale": "*fp32"} if dtype == FP8 else {})
    pointers |= dict.fromkeys(("average_scale", "square_scale"), "*fp32") if state == FP8 else {}
    steps = phases(how, dtype)
    pointers |= dict.fromkeys(("tops", "before"), "*fp32") if len(steps) > 1 else {}
    optional = ("scale", "average_scale", "square_scale", "tops", "before")
    rates = ("lr", "decay", "eps", "beta1", "rest1", "beta2", "rest2", "correct1", "correct2")
    kinds = ["fp8" if kind == FP8 else TYPES[kind] for kind in (dtype, state, grads)]
    for phase in steps:
        part = "" if len(steps) == 1 else f" {('power', 'top', 'move')[phase]}"
        yield CompileVariant(
            name=f"lazy_adam {kinds[0]} states {kinds[1]} D={width} {kinds[2]} gradients{part}",
            kernel=lazy_adam_rows,
            signature=pointers | {"rows": "i32", "programs": "i32", "seed": "i64"} | dict.fromkeys(rates, "fp32"),
            constants={"LENGTH": LENGTH, "EXACT": dtype == torch.float32, "PER_PROGRAM": PER_PROGRAM}
            | _constants(width, how, phase)
            | {name: None for name in optional if name not in pointers},
            aligned=tuple(pointers),
            num_warps=how.warps,
            options={"enable_fp_fusion": dtype != torch.float32, "maxnreg": how.registers},
            scalar_loads=16 + 6 * how.rows + how.pieces * ((dtype == FP8) + 4 * (state == FP8)),
        )


def measured_variants(plan: dict[str, Any], dtype: torch.dtype, width: int, state_bytes: int) -> Iterator[CompileVariant]:
    """The variants of a measured plan; gradients have the dtype of the table, or bf16 with 8-bit tables."""
    how = Plan(slices=triton.cdiv(width, plan["block"] * plan["pieces"]), **plan)
    state = {1: FP8, 2: torch.bfloat16, 4: torch.float32}[state_bytes]
    yield from variants(how, width, dtype, state, torch.bfloat16 if dtype == FP8 else dtype)


MEASURED = {"lazy_adam": measured_variants}  # as in `triton_lookup`


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the kernel, for the compile gate."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for width, dtype, state, grads in (
        *((width, bf16, state, bf16) for width in (576, 8192) for state in (fp32, bf16, FP8)),
        *((width, fp32, state, fp32) for width in (576, 8192) for state in (fp32, bf16, FP8)),
        *((width, FP8, FP8, bf16) for width in (576, 1024, 4096, 8192, 16384)), (576, FP8, bf16, bf16), (8192, FP8, bf16, bf16),
        (1024, FP8, fp32, bf16), (1024, FP8, FP8, fp32), (576, FP8, FP8, fp32), (1024, fp32, FP8, bf16),
    ):  # fmt: skip
        yield from variants(plan(width, dtype, state, grads), width, dtype, state, grads)
