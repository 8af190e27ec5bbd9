"""The facts that the models learn: the ICAO code of an airport, then its latitude and its longitude in whole degrees."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

import torch
from torch import Tensor

CHARACTERS = string.digits + string.ascii_uppercase
LATITUDES, LONGITUDES = 181, 361  # whole degrees: -90 to 90 and -180 to 180, one token each
CODE, ANSWERS = 4, 2  # tokens of a code, and of its answers


@dataclass(frozen=True)
class Facts:
    """Facts as token sequences.

    Attributes:
        tokens: int64 [F, CODE + ANSWERS]: the characters of a code, then its answers.
        vocabulary: Number of different tokens.
        entropy: Bits of an answer pair for a reader who knows how often each degree occurs, and no code.
    """

    tokens: Tensor
    vocabulary: int
    entropy: float

    @property
    def inputs(self) -> Tensor:
        """[F, CODE + 1]: all tokens but the last."""
        return self.tokens[:, :-1]

    @property
    def answers(self) -> Tensor:
        """[F, ANSWERS]: the latitude and the longitude."""
        return self.tokens[:, CODE:]


def airports(count: int, seed: int = 1234) -> Facts:
    """`count` airports with a code of four characters, chosen at random by `seed`, from the package `airportsdata`."""
    import airportsdata

    known = sorted(airportsdata.load("ICAO").items())
    rows = [(code, row["lat"], row["lon"]) for code, row in known if len(code) == CODE and set(code) <= set(CHARACTERS)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    tokens = torch.tensor([_tokens(*rows[index]) for index in order.tolist()])
    return Facts(tokens, len(CHARACTERS) + LATITUDES + LONGITUDES, sum(map(_entropy, tokens[:, CODE:].unbind(1))))


def _tokens(code: str, latitude: float, longitude: float) -> list[int]:
    first = len(CHARACTERS) + math.floor(latitude) + LATITUDES // 2
    second = len(CHARACTERS) + LATITUDES + math.floor(longitude) + LONGITUDES // 2
    return [*map(CHARACTERS.index, code), first, second]


def _entropy(column: Tensor) -> float:
    """Entropy of a column's values, in bits."""
    share = column.bincount().double() / column.numel()
    return float(-torch.xlogy(share, share).sum() / math.log(2))
