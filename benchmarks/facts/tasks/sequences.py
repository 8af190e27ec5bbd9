"""Sequences of tokens that end with answers: what every task is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sequences:
    """A task: questions and answers as token sequences of one length. Only the answers are learned.

    Attributes:
        train: int64 [F, L]: a question, then its answers.
        test: int64 [G, L]: the sequences that are asked for. For facts those of `train`, for rules others.
        answers: Tokens of the answers.
        vocabulary: Number of different tokens.
    """

    train: Tensor
    test: Tensor
    answers: int
    vocabulary: int

    @property
    def entropy(self) -> float:
        """Bits of the answers to one question for a reader who knows how often each answer occurs, and no question."""
        return sum(_entropy(column) for column in self.test[:, -self.answers :].unbind(1))

    def to(self, device: str) -> Sequences:
        """The same on a device."""
        return Sequences(self.train.to(device), self.test.to(device), self.answers, self.vocabulary)


def of_columns(columns: Sequence[Tensor], answers: int, tests: int | None = None) -> Sequences:
    """Sequences of columns of different tokens; the last `answers` columns are the answers.

    Args:
        columns: int64 [F] or [F, n] each; the values of a column, from 0, get tokens of their own, all n alike.
        answers: Number of answers.
        tests: Keep that many sequences, the last ones, out of the training. None: the test asks for what is trained.
    """
    wide = [column if column.ndim == 2 else column[:, None] for column in columns]
    first = 0
    tokens = []
    for column in wide:
        tokens.append(column + first)
        first += int(column.max()) + 1
    whole = torch.cat(tokens, 1)
    train, test = (whole, whole) if tests is None else (whole[:-tests], whole[-tests:])
    return Sequences(train, test, answers, first)


def loss_of(model: nn.Module, tokens: Tensor, answers: int) -> Tensor:
    """Mean negative log-likelihood of the answers, in nats."""
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=answers).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, -answers:].flatten())


def shuffled(count: int, seed: int = 1234) -> list[int]:
    """The numbers below `count` in an order that depends on `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def _entropy(column: Tensor) -> float:
    """Entropy of a column's values, in bits."""
    share = column.bincount().double() / column.numel()
    return float(-torch.xlogy(share, share).sum() / math.log(2))
