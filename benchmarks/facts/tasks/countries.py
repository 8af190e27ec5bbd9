"""A relation that can be guessed: an airport's country follows, mostly, from the first letters of its ICAO code."""

from __future__ import annotations

import torch

from tasks.airports import chosen, codes
from tasks.sequences import Sequences, of_columns

TESTS = 4000


def countries(count: int) -> Sequences:
    """`count` airports and their countries; the test asks for other airports."""
    rows = chosen(count + TESTS)
    names = {name: number for number, name in enumerate(sorted({row["country"] for row in rows}))}
    return of_columns([codes(rows), torch.tensor([names[row["country"]] for row in rows])], answers=1, tests=TESTS)
