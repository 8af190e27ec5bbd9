"""Parses JSON of files that may be damaged or hostile: every fault is one ValueError."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 200  # of nested lists and objects; the deepest file that `save` writes has fewer than 20


def parse_json(text: str | bytes, *, special_floats: bool = False) -> Any:
    """The value of a JSON text.

    Raises ValueError for text that is not JSON or not UTF-8, is nested deeper than `MAX_DEPTH`, has an object with two equal
    keys, or, unless `special_floats`, NaN or an infinity, which are not JSON: configs of Hugging Face contain them.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=float if special_floats else _no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _refuse_deep(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for each in level if isinstance(each, (list, dict)) for item in _items(each)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    return value if isinstance(value, list) else list(value.values())
