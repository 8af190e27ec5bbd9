"""What a refusal means for a person who could do something about it: rules by the words of their reasons, and source lines."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """A rule that every MLP obeys: its name, words by which its reasons are known, and what one could do."""

    name: str
    words: tuple[str, ...]
    advice: str


RULES = (
    Rule(
        "token by token",
        (
            "is not known to work token by token",
            "along the token axis",
            "combines a token axis",
            "cannot be followed",
            "merges tokens",
            "the order of the tokens",
            "works across tokens",
            "depends on other tokens",
            "tried token by token",
        ),
        "an MLP treats each token by itself: if this does, spell it with elementwise operations, norms over features and views;"
        " if it mixes tokens, no memory layer can take its place",
    ),
    Rule(
        "closed",
        ("is also read outside",),
        "a layer in its place would no longer make that inner value: do not return or reuse it in this forward",
    ),
    Rule(
        "residual",
        ("does not return to the residual stream",),
        "if it is meant as an MLP, add its output to the value that its input was normed from; heads, embeddings and"
        " projections between widths are left alone",
    ),
    Rule(
        "arrangement",
        ("not plain:", "not gated:"),
        "it obeys every other rule: a new arrangement of matrices is a small class in passes/patterns.py",
    ),
    Rule(
        "one input",
        ("goes back to", "does not come from one value"),
        "all first matrices of an MLP must read one and the same value",
    ),
    Rule(
        "matrix, nonlinearity, matrix",
        ("nothing nonlinear between", "no nonlinear function", "it reads no other linear"),
        "the last matrix of an MLP reads a nonlinear function of another product with a weight",
    ),
)


def rule_of(reason: str) -> Rule | None:
    """The rule that gave a reason; None for one that is not listed."""
    return next((rule for rule in RULES if any(words in reason for words in rule.words)), None)
