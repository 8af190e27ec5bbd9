"""What a node of a graph returns: a tensor, several, a number. No value is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

INT_BITS = 64  # of a size, or of an integer in the file
FLOAT_BITS = 1024  # the largest float, rounded to an integer


@dataclass(frozen=True)
class Result:
    """What a node returns. `parts`: of "several", each. `bits`: a number has at most so many, if it is an integer."""

    kind: Literal["tensor", "tensors", "number", "several", "other"]
    parts: tuple[Result, ...] = ()
    bits: int = 0


TENSOR, TENSORS = Result("tensor"), Result("tensors")
NUMBER = Result("number", bits=FLOAT_BITS)
OTHER = Result("other")
