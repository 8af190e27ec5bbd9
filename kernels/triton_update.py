"""The optimizer step on the rows that were read, as one Triton kernel, without a gradient of the table in memory.

The reads of all lookups of a table are sorted by row (`triton_segments`). The program of a row sums its gradient in registers,
updates the row and its optimizer state, and stores both; only the gradients of hot rows are summed by segments before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrewrite.kernels.compile_variants import CompileVariant
from memrewrite.kernels.triton_lookup import ELEMENT, Plan
from memrewrite.kernels.triton_math import (
    LARGEST_E4M3,
    SMALLEST_NORMAL,
    decode_e4m3,
    encode_e4m3,
    random_bits,
    round_to,
    uniform,
)
from memrewrite.kernels.triton_segments import LENGTH, add_reads, load_reads, segment, sum_hot

PER_PROGRAM = 8  # rows per program
REGISTERS, REGISTERS_IN_SLICES = {1: 96, 2: 80, 4: 128}, 200  # maximum per thread, by the bytes of a value
WIDEST = 4096  # columns that fit in registers; wider rows are processed in slices, in several passes


def plan(width: int) -> Plan:
    """A whole row per program, 16 columns per thread."""
    block = max(16, min(triton.next_power_of_2(width), WIDEST))
    return Plan(2, block, max(1, block // 512), triton.cdiv(width, block))


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
    how = plan(width)
    grad = grads[0].contiguous() if len(grads) == 1 else torch.cat(list(grads))
    segments = segment(indices, weights, *values.shape)
    sums = sum_hot(grad, segments, enable_fp_fusion=values.dtype != torch.float32)
    rows = segments.starts.shape[0] - 1
    programs = triton.cdiv(rows, PER_PROGRAM)
    update_rows[(programs,)](
        values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values, scale, average, square,
        grad, segments.tokens, segments.weights, segments.slots, segments.starts, segments.sums, sums, rows, programs,
        **{name: float(rate) for name, rate in rates.items()}, seed=seed % 2**63,
        LENGTH=segments.length, EXACT=values.dtype == torch.float32, D=width, BLOCK_D=how.block, SLICES=how.slices,
        ROWS=how.rows, PER_PROGRAM=PER_PROGRAM, num_warps=how.warps, **_options(values.dtype, how),
    )  # fmt: skip


def _options(dtype: torch.dtype, how: Plan) -> dict[str, Any]:
    """Compiler options: for fp32 rows no fusion of multiplications and additions (FMA), so that they match the formula exactly.

    The register limits are for the assembler: without a limit it uses so few registers that it spills.
    """
    most = REGISTERS_IN_SLICES if how.slices > 1 else REGISTERS[dtype.itemsize]
    return {"enable_fp_fusion": dtype != torch.float32, "maxnreg": most}


@triton.jit
def load_row(starts, at, rows):
    """The first read and the end of a row; equal beyond the last row."""
    return tl.load(starts + at, at < rows, 0), tl.load(starts + at + 1, at < rows, 0)


@triton.jit
def row_gradient(
    grads, tokens, weights, sums, token, weight, first, end, begin, until, cols, D: tl.constexpr, ROWS: tl.constexpr
):
    """Columns of a row's gradient: the sum of its reads (the first ROWS are already loaded), or of its segments' sums."""
    total = tl.zeros([cols.shape[0]], tl.float32)
    total = add_reads(grads, token, weight, total, None, 0, first, end, total, cols, D, ROWS)
    for m in range(first + ROWS, end, ROWS):
        more, factor = load_reads(tokens, weights, m, end, ROWS)
        total = add_reads(grads, more, factor, total, None, 0, m, end, total, cols, D, ROWS)
    for place in range(begin, until):
        total += tl.load(sums + place * D + cols, cols < D, 0)
    return total


@triton.jit
def quotient(x, y, EXACT: tl.constexpr):
    """x / y; with EXACT, rounded as in IEEE 754."""
    return tl.div_rn(x, y) if EXACT else x * (1.0 / y)


@triton.jit
def load_state(values, average, at, cols, D: tl.constexpr):
    """Columns of a row and of its first moment, as stored."""
    old = tl.load(values + at + cols, cols < D, 0)
    return old, old if average is None else tl.load(average + at + cols, cols < D, 0)


@triton.jit
def moved(old, before, average, g, size, root, lr, decay, beta1, rest1, correct1, EXACT: tl.constexpr):
    """Columns of the new row and of the new first moment, in fp32; `root` is the denominator."""
    row = decode_e4m3(old) * size if old.dtype == tl.uint8 else old.to(tl.float32)
    moment, push = g, g
    if average is not None:
        moment = beta1 * before.to(tl.float32) + rest1 * g
        push = quotient(moment, correct1, EXACT)
    return row * decay - quotient(lr * push, root, EXACT), moment


@triton.jit
def largest(row, cols, D: tl.constexpr):
    """The largest absolute value in a row; inf if there is a NaN, which a maximum may ignore."""
    return tl.max(tl.where(cols < D, tl.where(row == row, tl.abs(row), float("inf")), 0.0), 0)


@triton.jit
def scale_of(top):
    """The scale that maps the largest value to the largest e4m3 value; NaN for a row that is not finite, 1 for zeros."""
    size = tl.maximum(top / LARGEST_E4M3, SMALLEST_NORMAL)
    return tl.where(top == 0, 1.0, tl.where(top < float("inf"), size, float("nan")))


@triton.jit(do_not_specialize=["rows", "programs", "seed"])
def update_rows(
    values, scale, average, square, grads, tokens, weights, slots, starts, counts, sums, rows, programs,
    lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed: tl.int64,
    LENGTH: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). Adagrad without `average`, Adam with it. The reads of a row are loaded during the previous update."""
    mine = tl.program_id(0)
    first, end = load_row(starts, mine, rows)
    token, weight = load_reads(tokens, weights, first, end, ROWS)
    slot = tl.load(slots + first, first < end, 0)
    next_first, next_end = load_row(starts, mine + programs, rows)
    for turn in range(PER_PROGRAM):
        third_first, third_end = load_row(starts, mine + (turn + 2) * programs, rows)
        next_token, next_weight = load_reads(tokens, weights, next_first, next_end, ROWS)
        next_slot = tl.load(slots + next_first, next_first < next_end, 0)
        if first < end:
            long = end - first > LENGTH
            begin = tl.load(counts + mine + turn * programs, long, 0) & 0xFFFFFFFF
            until = tl.load(counts + mine + turn * programs + 1, long, 0) & 0xFFFFFFFF
            move_row(
                values, scale, average, square, grads, tokens, weights, sums, token, weight, slot.to(tl.int64), first,
                tl.where(begin < until, first, end), begin, until, lr, decay, eps, beta1, rest1, beta2, rest2,
                correct1, correct2, seed, EXACT, D, BLOCK_D, SLICES, ROWS,
            )  # fmt: skip
        first, end, token, weight, slot = next_first, next_end, next_token, next_weight, next_slot
        next_first, next_end = third_first, third_end


@triton.jit
def move_row(
    values, scale, average, square, grads, tokens, weights, sums, token, weight, slot, first, end, begin, until,
    lr, decay, eps, beta1, rest1, beta2, rest2, correct1, correct2, seed,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The step of one row. For rows of several slices, the gradient is summed again in every pass that needs all of it."""
    cols = tl.arange(0, BLOCK_D)
    at = slot * D
    size = 256.0  # the factor that `decode_e4m3` omits
    if scale is not None:
        size *= tl.load(scale + slot)
    old, before = load_state(values, average, at, cols, D)  # loaded while the gradient is summed
    moment2 = beta2 * tl.load(square + slot)
    g = row_gradient(grads, tokens, weights, sums, token, weight, first, end, begin, until, cols, D, ROWS)
    power = tl.sum(g * g, 0)
    for s in range(1, SLICES):
        part = row_gradient(grads, tokens, weights, sums, token, weight, first, end, begin, until, cols + s * BLOCK_D, D, ROWS)
        power += tl.sum(part * part, 0)
    moment2 += rest2 * quotient(power, D * 1.0, EXACT)
    root = tl.sqrt_rn(quotient(moment2, correct2, EXACT)) + eps
    row, moment = moved(old, before, average, g, size, root, lr, decay, beta1, rest1, correct1, EXACT)
    new_scale = 1.0
    if scale is not None:
        top = largest(row, cols, D)
        for s in range(1, SLICES):
            more = cols + s * BLOCK_D
            part = row_gradient(grads, tokens, weights, sums, token, weight, first, end, begin, until, more, D, ROWS)
            old, before = load_state(values, average, at, more, D)
            piece, _ = moved(old, before, average, part, size, root, lr, decay, beta1, rest1, correct1, EXACT)
            top = tl.maximum(top, largest(piece, more, D))
        new_scale = scale_of(top)
        tl.store(scale + slot, new_scale)
    tl.store(square + slot, moment2)
    for s in range(SLICES):
        more = cols + s * BLOCK_D
        if SLICES > 1:
            g = row_gradient(grads, tokens, weights, sums, token, weight, first, end, begin, until, more, D, ROWS)
            old, before = load_state(values, average, at, more, D)
            row, moment = moved(old, before, average, g, size, root, lr, decay, beta1, rest1, correct1, EXACT)
        bits = more
        if not EXACT:
            bits = random_bits(seed, 0, slot, s * BLOCK_D, D, BLOCK_D)
        if scale is not None:
            tl.store(values + at + more, encode_e4m3(row / new_scale, uniform(bits)), more < D)
        else:
            tl.store(values + at + more, round_to(row, bits, values.dtype.element_ty), more < D)
        if average is not None:
            if average.dtype.element_ty != tl.float32:
                bits = random_bits(seed, 1, slot, s * BLOCK_D, D, BLOCK_D)
            tl.store(average + at + more, round_to(moment, bits, average.dtype.element_ty), more < D)


def compile_variants() -> Iterator[CompileVariant]:
    """The variants of the update kernel, for the compile gate."""
    bf16, fp32, fp8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for width, dtype, average in (
        (576, bf16, None), (1024, bf16, None), (2048, bf16, None), (4096, bf16, None), (8192, bf16, None),
        (1024, fp32, None), (4096, fp32, None), (1024, fp8, None), (4096, fp8, None), (8192, fp8, bf16),
        (1024, bf16, bf16), (4096, bf16, bf16), (1024, fp32, fp32), (1024, fp8, bf16),
    ):  # fmt: skip
        how, eight = plan(width), dtype == fp8
        kind = "fp32" if eight else ELEMENT[dtype]  # dtype of the gradients of an 8-bit lookup
        pointers = {"values": "*u8" if eight else f"*{kind}", "square": "*fp32", "grads": f"*{kind}", "tokens": "*i32"}
        pointers |= {"weights": f"*{kind}", "slots": "*i32", "starts": "*i32", "counts": "*i64", "sums": "*fp32"}
        pointers |= ({"scale": "*fp32"} if eight else {}) | ({"average": f"*{ELEMENT[average]}"} if average else {})
        rates = ("lr", "decay", "eps", "beta1", "rest1", "beta2", "rest2", "correct1", "correct2")
        yield CompileVariant(
            name=f"{'adam' if average else 'adagrad'} {'fp8' if eight else kind} D={width}",
            kernel=update_rows,
            signature=pointers | {"rows": "i32", "programs": "i32", "seed": "i64"} | dict.fromkeys(rates, "fp32"),
            constants={"LENGTH": LENGTH, "EXACT": dtype == fp32, "D": width, "BLOCK_D": how.block, "SLICES": how.slices}
            | {"ROWS": how.rows, "PER_PROGRAM": PER_PROGRAM}
            | {name: None for name in ("scale", "average") if name not in pointers},
            aligned=tuple(pointers),
            num_warps=how.warps,
            options=_options(dtype, how),
            scalar_loads=(16 + 6 * how.rows) * (2 if how.slices > 1 else 1),
        )
