"""Facts: the ICAO code of an airport, then its latitude and longitude. Nothing but memory answers them."""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor

from tasks.sequences import Sequences, of_columns, shuffled

CHARACTERS = string.digits + string.ascii_uppercase
CODE = 4  # characters


def airports(count: int) -> Sequences:
    """`count` airports; latitude and longitude in whole degrees."""
    rows = chosen(count)
    return of_columns([codes(rows), _degrees(rows, "lat"), _degrees(rows, "lon")], answers=2)


def airports_in_detail(count: int) -> Sequences:
    """`count` airports; latitude and longitude in degrees, then the hundredths of both, then the elevation in 100 feet."""
    rows = chosen(count)
    elevation = torch.tensor([max(-2, round(row["elevation"] / 100)) + 2 for row in rows])
    places = [part(rows, name) for part in (_degrees, _hundredths) for name in ("lat", "lon")]
    return of_columns([codes(rows), *places, elevation], answers=5)


def chosen(count: int) -> list[dict[str, Any]]:
    """`count` airports with a code of four characters, in an order drawn once, from the package `airportsdata`."""
    import airportsdata

    known = sorted(airportsdata.load("ICAO").items())
    rows = [row for code, row in known if len(code) == CODE and set(code) <= set(CHARACTERS)]
    if count > len(rows):
        raise ValueError(
            f"{count:,} airports are more than the {len(rows):,} that airportsdata knows with a code of {CODE} characters"
        )
    return [rows[index] for index in shuffled(len(rows))[:count]]


def codes(rows: list[dict[str, Any]]) -> Tensor:
    """[F, CODE]: the characters of every code."""
    return torch.tensor([[CHARACTERS.index(character) for character in row["icao"]] for row in rows])


def _degrees(rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([math.floor(row[name]) + (90 if name == "lat" else 180) for row in rows])


def _hundredths(rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([math.floor(row[name] * 100) % 100 for row in rows])
