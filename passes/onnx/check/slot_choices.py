"""Which slots a file chose: PyTorch reads the same, and judges each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memrewrite.frozen import Frozen
from memrewrite.kernels import ops  # noqa: F401 - registers the operators

TOPK = torch.ops.memrewrite.product_key_topk.default
ARGUMENTS = tuple(argument.name for argument in TOPK._schema.arguments)
ULPS = 16  # of the sums: keys that are all the same are told apart by rounding alone


class Ties(Frozen):
    """Rows of slots (one a token and head) which file and torch chose.

    `differing` of `rows` are not the same sets. `gap` is the most that a slot's sum lies below torch's k-th best, in parts
    of what counts as equal: up to 1 it does. `wrong` rows are no choice of k slots as good as torch's.
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
    """While entered, notes the slots that torch's top-ks choose, in order; given the slots of `other`, has them read.

    Rows in which both chose one set of slots stay torch's to the last bit. `tolerance` is relative to the spread of a
    row's sums.
    """

    def __init__(self, other: Sequence[Tensor] | None = None, tolerance: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.other, self.tolerance = other, tolerance
        self.slots: list[Tensor] = []
        self.ties = Ties()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not TOPK:
            return out
        scores, slots = out
        self.slots.append(slots.cpu())
        if self.other is None:
            return out
        given = dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs or {})
        theirs = self.other[len(self.slots) - 1].to(slots.device)
        sums, differs, ties = _judged(given["scores1"], given["scores2"], slots, theirs, self.tolerance)
        self.ties += ties
        forced = sums.softmax(-1) if given.get("softmax", False) else sums
        return torch.where(differs, forced, scores), torch.where(differs, theirs, slots)


def same_sets(one: Tensor, other: Tensor) -> Tensor:
    """Rows of slots, `[..., k]` twice: in which the same were chosen, in whatever order, `[..., 1]`."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1, keepdim=True)


def _judged(scores1: Tensor, scores2: Tensor, own: Tensor, theirs: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Ties]:
    """The sums at the slots `theirs` `[..., k]`, the rows `[..., 1]` that chose others than `own`, and how good these are.

    A row whose scores are not all numbers has no best ones: it differs in nothing.
    """
    n2, wide = scores2.shape[-1], torch.promote_types(scores1.dtype, torch.float32)
    inside = theirs.clamp(0, scores1.shape[-1] * n2 - 1)

    def sums_at(slots: Tensor) -> Tensor:
        return scores1.gather(-1, slots // n2).to(wide) + scores2.gather(-1, slots % n2).to(wide)  # [..., k]

    sums, last = sums_at(inside), sums_at(own).amin(-1, keepdim=True)
    top = (scores1.amax(-1, keepdim=True) + scores2.amax(-1, keepdim=True)).to(wide)
    bottom = (scores1.amin(-1, keepdim=True) + scores2.amin(-1, keepdim=True)).to(wide)
    rounding = ULPS * torch.finfo(scores1.dtype).eps * torch.maximum(top.abs(), bottom.abs())
    allowed = (tolerance * (top - bottom) + rounding).clamp_min(torch.finfo(wide).tiny)
    differs = ~same_sets(own, theirs) & ~(top + bottom).isnan()
    gap = ((last - sums.amin(-1, keepdim=True)) / allowed).clamp_min(0)
    ordered = theirs.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1, keepdim=True)
    wrong = differs & (~(gap <= 1) | twice | (theirs != inside).any(-1, keepdim=True))
    largest = float(gap[differs].max()) if differs.any() else 0.0
    return sums, differs, Ties(rows=differs.numel(), differing=int(differs.sum()), gap=largest, wrong=int(wrong.sum()))
