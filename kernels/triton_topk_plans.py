"""How the kernels of `product_key_topk` divide their work: computed from the sizes, or measured (`triton_plans`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from memrewrite.kernels.triton_plans import PlanError, tuned

NARROW_KEYS = 65536  # up to here, scores of the half types and their indices fit into integer keys of 32 bits
LEAST_K = 4  # entries that the kernels find at least
LANE_K = 256  # up to here, a row fits into the registers of a few lanes


@dataclass(frozen=True)
class Plan:
    """How a kernel divides its work. The results do not depend on it: all keys are distinct, so the order is unique."""

    rows: int  # per program
    chunk: int  # scores sorted at once, per row
    group: int  # neighboring scores of which only the largest is sorted at first; 1: all are sorted at once
    warps: int
    registers: int | None = None  # at most, per thread

    def options(self) -> dict[str, int]:
        """The options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


def rounded(k: int) -> int:
    """How many entries the kernels find for k: a power of two."""
    return max(LEAST_K, 1 << (k - 1).bit_length())


def plan_halves(n: int, k: int, dtype: torch.dtype, vec: int, few: bool) -> Plan:
    """Few rows or a large k: a row in several warps. Many rows: a row in one lane or a few, its keys in their registers.

    The plan depends on n only through the largest power of two in it and the width of keys, and on k only through `rounded`: so
    all plans can be enumerated (`triton_topk.half_variants`) and compiled.
    """
    top, size = rounded(k), 1 << n.bit_length() - 1
    if few or k > LANE_K:
        # Few rows: the fewest steps, one after the other. Many rows: few registers, so that many programs are in flight.
        chunk = max(top, 4096 if few and size > 1024 else 1024 if size > 256 else 256)
        return Plan(1, chunk, 1, min(8, chunk // 256))
    chunk = max(16, min(top // 2, 32 if vec == 1 else top))
    sort = (top.bit_length() - 1) * (top.bit_length() + 4) / 2 + 3  # approximate number of comparisons per key
    costs = {1: size * (sort + 6)}
    for group in (4, 8, 16, 32):
        # All loads of a chunk are in flight at once, each in a register or more.
        if vec <= group <= chunk <= top * group and chunk * group <= 64 * vec and size // group > top:
            costs[group] = size + size // group * (sort + 6) + top * group * (sort + 8)
    return Plan(_rows(chunk + top, 32 if wide_keys(n, dtype) else 64), chunk, min(costs, key=costs.__getitem__), 1)


def plan_pairs(k: int, few: bool) -> Plan:
    """As `plan_halves`, for keys of 64 bits."""
    top = rounded(k)
    if k > LANE_K:
        return Plan(1, top, 1, min(8, top // 128))
    chunk = top if few else min(top, max(16, top // 2))
    return Plan(1 if few else _rows(chunk + top, 48 if top <= 32 else 24), chunk, 1, 1)


def wide_keys(n: int, dtype: torch.dtype) -> bool:
    """Whether keys have 64 bits."""
    return dtype == torch.float32 or n > NARROW_KEYS


def _rows(keys: int, held: int) -> int:
    """Rows per program, at most one per lane, so that each lane has at most `held` keys in registers."""
    return max(1, min(32, 1 << (32 * held // keys).bit_length() - 1))


def measured(kernel: str, scores: Tensor, few: bool, *size: int) -> Plan | None:
    """The measured plan of "topk_half" (n, k) or "topk_pair" (k), if there is one. Only plans for many rows are measured.

    Raises:
        PlanError: The kernel is not exact with this plan.
    """
    found = None if few else tuned(kernel, scores.device, scores.dtype, *size)
    if found is None:
        return None
    plan, top = Plan(**found), rounded(size[-1])
    if kernel == "topk_pair":
        if plan.group != 1 or plan.chunk > top:
            raise PlanError(f"{plan}: topk_pair needs group 1 and a chunk of at most {top}")
    else:
        check_halves(plan, top, size[0], 16 // scores.element_size())
    return plan


def check_halves(plan: Plan, top: int, n: int, vec: int) -> None:
    """Raise PlanError if `half_kernel` cannot find the `top` best of n scores, loaded `vec` at a time, with this plan."""
    if plan.chunk % vec != 0:
        raise PlanError(f"{plan}: chunk must be a multiple of {vec}, the scores of one load")
    exact = plan.group % vec == 0 and top * plan.group % plan.chunk == 0 and triton.cdiv(n, plan.group) > top
    if plan.group > 1 and not (exact and plan.group <= plan.chunk and plan.warps == 1):
        raise PlanError(
            f"{plan} cannot find the {top} best of {n} scores: group must be 1, or else a multiple of {vec} of which there are "
            f"more than {top} and at most the chunk, with a chunk that divides {top} * group, and 1 warp"
        )
