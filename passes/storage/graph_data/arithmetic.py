"""Python's functions of numbers that graphs.json can name, and how large their results can become.

Integers of Python have no limit: a chain of products, or one power, could fill the memory. So every function has a bound for
the bits of its result, and a graph that exceeds `MAX_BITS` is refused before it runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from memrewrite.passes.storage.graph_data.fields import Malformed, shown
from memrewrite.passes.storage.graph_data.results import FLOAT_BITS, INT_BITS, Result

MAX_BITS = 2**16  # 64 factors that are floats; a size has 64 bits


class NumberFunction(NamedTuple):
    """A function, its number of arguments (None: one list), and a bound for the bits of its result."""

    function: Callable[..., Any]
    arguments: int | None
    bound: Callable[[Sequence[int], Sequence[Any]], int]


def _sum(bits: Sequence[int], values: Sequence[Any]) -> int:
    return max(bits, default=0) + len(bits)


def _product(bits: Sequence[int], values: Sequence[Any]) -> int:
    return sum(bits)


def _largest(bits: Sequence[int], values: Sequence[Any]) -> int:
    return max(bits)


def _float(bits: Sequence[int], values: Sequence[Any]) -> int:
    return FLOAT_BITS


def _truth(bits: Sequence[int], values: Sequence[Any]) -> int:
    return 1


def _power(bits: Sequence[int], values: Sequence[Any]) -> int:
    return max(FLOAT_BITS, bits[0] * _exponent(values[1]))


def _shift(bits: Sequence[int], values: Sequence[Any]) -> int:
    return bits[0] + _exponent(values[1])


def _exponent(value: Any) -> int:
    """An exponent, which must be a number in the file; of a float, the next integer."""
    if type(value) not in (int, float) or not abs(value) <= INT_BITS:
        raise Malformed(f"the exponent {shown(value)} must be a number from -{INT_BITS} to {INT_BITS} in the file")
    bound: int = math.ceil(abs(value))
    return bound


BOUNDS: tuple[tuple[Callable[[Sequence[int], Sequence[Any]], int], int | None, tuple[Callable[..., Any], ...]], ...] = (
    (_sum, 2, (operator.add, operator.sub)),
    (_sum, None, (torch.sym_sum,)),
    (_product, 2, (operator.mul,)),
    (_power, 2, (operator.pow,)),
    (_shift, 2, (operator.lshift,)),
    (_largest, 2, (operator.floordiv, operator.rshift, operator.and_, operator.or_, operator.xor)),
    (_sum, 2, (operator.mod, torch.sym_max, torch.sym_min)),
    (_sum, 1, (operator.neg, operator.pos, operator.abs, operator.invert, torch.sym_int)),
    (_float, 2, (operator.truediv,)),
    (_float, 1, (math.ceil, math.floor, math.trunc, math.sqrt, torch.sym_float, torch.sym_sqrt)),
    (_truth, 2, (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)),
    (_truth, 1, (operator.not_, torch.sym_not)),
)
NUMBER_FUNCTIONS = {
    f"{function.__module__}.{function.__name__}": NumberFunction(function, arguments, bound)
    for bound, arguments, functions in BOUNDS
    for function in functions
}


def result_of_numbers(function: Callable[..., Any], args: Sequence[Any], known: Mapping[fx.Node, Result]) -> Result:
    """What a function of `NUMBER_FUNCTIONS` returns.

    Raises `Malformed` for arguments that are no numbers, or too large a result.
    """
    row = next(row for row in NUMBER_FUNCTIONS.values() if row.function is function)
    if row.arguments is None and len(args) == 1 and isinstance(args[0], (list, tuple)):
        args = args[0]
    elif len(args) != row.arguments:
        raise Malformed(f"{function.__name__} has {len(args)} arguments")
    bits = row.bound([_bits(value, known) for value in args], args)
    if bits > MAX_BITS:
        raise Malformed(f"the result of {function.__name__} may have {bits} bits, more than {MAX_BITS}")
    return Result("number", bits=bits)


def _bits(value: Any, known: Mapping[fx.Node, Result]) -> int:
    if isinstance(value, fx.Node):
        if known[value].kind == "number":
            return known[value].bits
    elif type(value) in (int, bool):
        return int(value).bit_length()
    elif type(value) is float:
        return FLOAT_BITS
    raise Malformed(f"{shown(value)} is no number")
