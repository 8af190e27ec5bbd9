"""Whether a regular expression is quick on every path: Python's `re` tries every way to match, which can take years.

Flow: the parsed expression → the number of ways it can match a path, and of steps → refused where one is above its limit.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

OPEN_REPEAT = 64  # ways that `*`, `+` or `{m,n}` is counted as: how often it may repeat in a path
MAX_WAYS = 2**20  # three open repeats, and four alternatives
MAX_STEPS = 10_000  # of one way; `(){1000000000}` matches nothing a billion times

_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_ONE_STEP = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "GROUPREF", "FAILURE")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def too_slow(expression: str) -> str | None:
    """Why an expression may take too long, or None. Raises `re.error` and RecursionError as `re.compile` does."""
    ways, steps = _of_sequence(_parser.parse(expression))
    if ways > MAX_WAYS:
        return "it can match in too many ways: a repeat of a repeat or of alternatives, or too many repeats"
    return "it repeats too often" if steps > MAX_STEPS else None


def _of_sequence(items: Any) -> tuple[int, int]:
    """(ways, steps) of items one after another; both are cut off above their limits, so that numbers stay small."""
    ways, steps = 1, 0
    for operation, argument in items:
        more_ways, more_steps = _of_item(str(operation), argument)
        ways, steps = min(ways * more_ways, MAX_WAYS + 1), min(steps + more_steps, MAX_STEPS + 1)
    return ways, steps


def _of_item(operation: str, argument: Any) -> tuple[int, int]:
    if operation in _ONE_STEP:
        return 1, 1
    if operation in _REPEATS:
        least, most, body = argument
        ways, steps = _of_sequence(body)
        steps = min(max(1, least) * max(1, steps), MAX_STEPS + 1)
        if least == most:
            return ways ** min(least, 21), steps  # 2**21 is above the limit
        # a body that matches in two ways: the number of ways is exponential in the length of the path
        return (MAX_WAYS + 1 if ways > 1 else min(most - least + 1, OPEN_REPEAT)), steps
    if operation == "BRANCH":
        found = [_of_sequence(branch) for branch in argument[1]]
        return sum(ways for ways, _ in found), max(steps for _, steps in found)
    if operation == "SUBPATTERN":
        return _of_sequence(argument[-1])
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _of_sequence(argument[1])
    if operation == "ATOMIC_GROUP":
        return _of_sequence(argument)
    if operation == "GROUPREF_EXISTS":
        found = [_of_sequence(branch) for branch in argument[1:] if branch]
        return 1 + sum(ways for ways, _ in found), 1 + max(steps for _, steps in found)
    raise ValueError(f"{operation} is not supported")
