"""A rule: the sum of two numbers of three digits. Nothing but computing answers pairs that were never seen."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.sequences import Sequences

TESTS = 4000
DIGITS = 3


def addition(count: int) -> Sequences:
    """`count` pairs and their sums, all numbers with the last digit first; the test asks for other pairs."""
    pairs = torch.randperm(10 ** (2 * DIGITS), generator=torch.Generator().manual_seed(1234))[: count + TESTS]
    first, second = pairs // 10**DIGITS, pairs % 10**DIGITS
    tokens = torch.cat([_digits(first, DIGITS), _digits(second, DIGITS), _digits(first + second, DIGITS + 1)], 1)
    return Sequences(tokens[:-TESTS], tokens[-TESTS:], answers=DIGITS + 1, vocabulary=10)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """[F] -> [F, count], the last digit first."""
    return torch.stack([numbers // 10**place % 10 for place in range(count)], 1)
