"""Which slots a file chose: PyTorch can read the same slots, and checks that each choice is as good as its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memrewrite.frozen import Frozen
from memrewrite.kernels import ops  # noqa: F401 - registers the operators
from memrewrite.kernels.product_keys import half_scores

TOPK = torch.ops.memrewrite.product_key_topk.default
KEYS = torch.ops.memrewrite.product_keys.default
ULPS = 16  # of the sums: equal keys have scores that differ by rounding only


class Ties(Frozen):
    """Comparison of the slots that the file and torch chose, in rows: one row for each token and head.

    `differing` of `rows` are different sets. `gap` is the largest distance of a slot's sum below torch's k-th best sum,
    divided by the allowed distance: up to 1 the two sums count as equal. `wrong` rows are no choice of k slots as good as
    torch's.
    """

    rows: int = 0
    differing: int = 0
    gap: float = 0.0
    wrong: int = 0

    def __add__(self, other: Ties) -> Ties:
        return Ties(
            rows=self.rows + other.rows,
            differing=self.differing + other.differing,
            gap=max(self.gap, other.gap),
            wrong=self.wrong + other.wrong,
        )


class Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records the slots that each top-k chooses, in order, or makes each top-k return `forced` slots.

    A row in which both chose the same set keeps torch's scores and order, bit for bit. `tolerance` is relative to the range of
    a row's sums.
    """

    def __init__(self, forced: Sequence[Tensor] | None = None, tolerance: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forced, self.tolerance = forced, tolerance
        self.slots: list[Tensor] = []
        self.ties = Ties()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (TOPK, KEYS):
            return out
        scores, slots = out
        self.slots.append(slots.cpu())
        if self.forced is None:
            return out
        names = [argument.name for argument in func._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        passed = defaults | dict(zip(names, args, strict=False)) | dict(kwargs or {})
        if func is KEYS:
            scores1, scores2 = half_scores(passed["queries"], passed["keys"])
        else:
            scores1, scores2 = passed["scores1"], passed["scores2"]
        forced = self.forced[len(self.slots) - 1].to(slots.device)
        sums, differs, ties = _judged(scores1, scores2, slots, forced, self.tolerance)
        self.ties += ties
        forced_scores = sums.softmax(-1) if passed["softmax"] else sums
        return torch.where(differs, forced_scores, scores), torch.where(differs, forced, slots)


def same_sets(one: Tensor, other: Tensor) -> Tensor:
    """True for rows of the two `[..., k]` tensors that have the same slots in any order, `[..., 1]`."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1, keepdim=True)


def _judged(scores1: Tensor, scores2: Tensor, own: Tensor, forced: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Ties]:
    """The sums of the slots `forced`, `[..., k]`; the rows in which they differ from `own`, `[..., 1]`; and the comparison.

    A row with a NaN has no defined best slots, and never counts as different.
    """
    n2, wide = scores2.shape[-1], torch.promote_types(scores1.dtype, torch.float32)
    inside = forced.clamp(0, scores1.shape[-1] * n2 - 1)

    def sums_at(slots: Tensor) -> Tensor:
        return scores1.gather(-1, slots // n2).to(wide) + scores2.gather(-1, slots % n2).to(wide)  # [..., k]

    sums, last = sums_at(inside), sums_at(own).amin(-1, keepdim=True)
    top = (scores1.amax(-1, keepdim=True) + scores2.amax(-1, keepdim=True)).to(wide)
    bottom = (scores1.amin(-1, keepdim=True) + scores2.amin(-1, keepdim=True)).to(wide)
    rounding = ULPS * torch.finfo(scores1.dtype).eps * torch.maximum(top.abs(), bottom.abs())
    allowed = (tolerance * (top - bottom) + rounding).clamp_min(torch.finfo(wide).tiny)
    differs = ~same_sets(own, forced) & ~(top + bottom).isnan()
    gap = ((last - sums.amin(-1, keepdim=True)) / allowed).clamp_min(0)
    ordered = forced.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1, keepdim=True)
    wrong = differs & (~(gap <= 1) | repeated | (forced != inside).any(-1, keepdim=True))
    largest = float(gap[differs].max()) if differs.any() else 0.0
    return sums, differs, Ties(rows=differs.numel(), differing=int(differs.sum()), gap=largest, wrong=int(wrong.sum()))
