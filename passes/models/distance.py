"""How far the outputs of one model are from those of another, and whether rounding alone explains it.

Flow: the tensors of both outputs, in order → equal shapes, dtypes, integers and places of NaN and infinity, else infinitely
far → of every tensor the norm of the difference, relative to the norm of the other → the largest, and the bound for its dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memrewrite.errors import UserError
from memrewrite.passes.models.tensors import strided_parts

DIGITS = 0.6  # of a dtype's digits that agree at least where two orders of the same arithmetic differ by rounding


@dataclass(frozen=True)
class Distance:
    """How far outputs are from others.

    Attributes:
        relative: The largest norm of a difference, relative to the norm of the other output. Infinite where shapes, dtypes,
            integers, or places of NaN and infinity differ, and where the other output is zero.
        rounding: Whether rounding alone may cause it: at least 60 % of the digits of every output agree.
    """

    relative: float
    rounding: bool

    @property
    def exact(self) -> bool:
        """Whether every element is equal."""
        return self.relative == 0

    def __str__(self) -> str:
        if self.exact:
            return "bit-equal"
        if self.relative == math.inf:
            return "of another form, or with other integers or infinities, or not zero where the other is"
        return f"{self.relative:.1e} away, relative to their norm" + (", by rounding" if self.rounding else "")


def refuse_inexact(far: Distance | None, kind: type[UserError], where: str) -> None:
    """Raise `kind` for an exported program whose outputs are further from its model's than by rounding; None: not compared."""
    if far is not None and not far.rounding:
        raise kind(
            f"the exported program computes something else than the model: its outputs are {far}",
            where=where,
            hint="a model that asks whether it is being traced is another model as a program: edit the live model "
            "(emit='module'), or accept the program with allow_inexact=True (--allow-inexact)",
        )


def distance(found: Any, wanted: Any) -> Distance:
    """How far `found` is from `wanted`: outputs of any structure, of which the tensors are compared, in order."""
    pairs = [[leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in (found, wanted)]
    if len(pairs[0]) != len(pairs[1]):
        return Distance(math.inf, rounding=False)
    far = [_of_tensors(one, other) for one, other in zip(*pairs, strict=True)]
    return Distance(max((d.relative for d in far), default=0.0), all(d.rounding for d in far))


def _of_tensors(found: Tensor, wanted: Tensor) -> Distance:
    parts, others = strided_parts(found.detach()), strided_parts(wanted.detach())
    if [(t.shape, t.dtype) for t in parts] != [(t.shape, t.dtype) for t in others]:
        return Distance(math.inf, rounding=False)
    far = [_of_parts(one, other) for one, other in zip(parts, others, strict=True)]
    return Distance(max((d.relative for d in far), default=0.0), all(d.rounding for d in far))


def _of_parts(found: Tensor, wanted: Tensor) -> Distance:
    if torch.equal(found.isnan(), wanted.isnan()) and bool(((found == wanted) | found.isnan()).all()):
        return Distance(0.0, rounding=True)
    finite = wanted.isfinite()
    numbers = wanted.is_floating_point() or wanted.is_complex()
    if not numbers or not bool(((found == wanted) | (finite & found.isfinite()) | (found.isnan() & wanted.isnan())).all()):
        return Distance(math.inf, rounding=False)
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = found[finite].to(wide), wanted[finite].to(wide)
    norm = float(b.norm())
    relative = float((a - b).norm()) / norm if norm else math.inf
    return Distance(relative, rounding=relative <= torch.finfo(wanted.dtype).eps ** DIGITS)
