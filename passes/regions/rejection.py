"""Why something is not an MLP: the rule it breaks, the reason in words, and the graph node. A value, never an exception.

The rules are listed here and nowhere else, each with what a person can do about it. Their names appear in the output of
`inspect --why` and in saved near misses; the wording of a reason is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from memrewrite.passes.graphs.nodes import CanonicalNode

RuleName = Literal[
    "token by token",
    "closed",
    "residual",
    "one block",
    "whole mixture",
    "arrangement",
    "one input",
    "matrix, nonlinearity, matrix",
]
ADVICE: Final[dict[RuleName, str]] = {
    "token by token": (
        "an MLP computes each token by itself: if this one does, write it with elementwise operations, norms over features"
        " and views; if it mixes tokens, no memory layer can replace it"
    ),
    "closed": ("a layer in its place would no longer compute that inner value: do not return or reuse it in this forward"),
    "residual": (
        "if it is meant as an MLP, add its output to the value that its input was normed from; heads, embeddings and"
        " projections between widths are not replaced"
    ),
    "one block": (
        "an MLP is one step of the residual stream; several steps are found and replaced one by one, so each must be"
        " recognizable by itself"
    ),
    "whole mixture": (
        "a mixture of experts is replaced as a whole: example inputs with more tokens show it whole in every call"
    ),
    "arrangement": ("it obeys every other rule: a new arrangement of matrices is a small class in passes/regions/patterns.py"),
    "one input": "all first matrices of an MLP must read one and the same value",
    "matrix, nonlinearity, matrix": ("the last matrix of an MLP reads a nonlinear function of another product with a weight"),
}


@dataclass(frozen=True)
class Rejection:
    """Why a region, or a last matrix before it has one, is not an MLP.

    `rule` is the rule it breaks, a key of `ADVICE`; `node` the canonical node where it does. `near_miss` is False where
    nothing looked like an MLP in the first place: such a rejection is reported only on request, by `explain`.
    """

    rule: RuleName
    reason: str
    node: CanonicalNode
    near_miss: bool = True


def advice_on(rule: str) -> str:
    """What a person can do about a rule, by its name; "" for the name of no rule, as in near misses saved without one."""
    return next((advice for name, advice in ADVICE.items() if name == rule), "")
