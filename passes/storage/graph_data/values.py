"""The values in graphs.json: plain numbers and text as in JSON, every other value as an object with one key, its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from memrewrite.errors import ModelError
from memrewrite.passes.rewrite.graph_host import ANY
from memrewrite.passes.storage.graph_data.fields import Malformed, shown

KINDS: dict[str, type[Any]] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
NAMED = {  # by kind and name, without quantized dtypes; `getattr(torch, name)` would import modules for some names
    kind: {
        str(value).removeprefix("torch."): value
        for value in vars(torch).values()
        if isinstance(value, class_) and not str(value).startswith("torch.q")
    }
    for kind, class_ in KINDS.items()
}
NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
SMALLEST, LARGEST = -(2**63), 2**64 - 1  # of integers: those of int64 and uint64


def value_to_data(value: Any) -> Any:
    """A value as JSON. Raises `ModelError` for a value of another kind."""
    if value is ANY:
        return {"any": True}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [value_to_data(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [value_to_data(item) for item in value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, class_ in KINDS.items():
        if isinstance(value, class_):
            return {kind: str(value).removeprefix("torch.")}
    raise ModelError(f"a graph that contains {value!r} cannot be saved")


def value_from_data(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """A value of `value_to_data`, other than `ANY`; `nodes` are those it may refer to. Raises `Malformed`."""
    if isinstance(data, list):
        return [value_from_data(item, nodes) for item in data]
    if not isinstance(data, dict):
        return _plain(data)
    if len(data) != 1:
        raise Malformed(f"the value {shown(data)} must have one key, its kind")
    ((kind, what),) = data.items()
    if kind == "tuple" and isinstance(what, list):
        return tuple(value_from_data(item, nodes) for item in what)
    if kind == "device":
        return _device(what)
    known: Mapping[str, Any] = {"node": nodes, "float": NOT_FINITE, **NAMED}.get(kind, {})
    if not isinstance(what, str) or what not in known:
        raise Malformed(f"{shown(data)} is no value that is known here")
    return known[what]


def given_from_data(data: Any) -> Any:
    """An entry of `Trace.given`. Raises `Malformed`."""
    if isinstance(data, dict) and data.get("any") is True and len(data) == 1:
        return ANY
    value = value_from_data(data, {})
    if isinstance(value, tuple) and not all(n is None or (type(n) is int and n >= 0) for n in value):
        raise Malformed(f"{shown(data)} is no shape of a tensor")
    return value


def _plain(data: Any) -> Any:
    if isinstance(data, str):
        try:
            data.encode()
        except UnicodeEncodeError:
            raise Malformed(f"the text {shown(data)} is not Unicode") from None
    elif isinstance(data, float):
        if not math.isfinite(data):
            raise Malformed("a number is too large")
    elif isinstance(data, int) and not SMALLEST <= data <= LARGEST:
        raise Malformed(f"an integer has {data.bit_length()} bits, more than 64")
    return data


def _device(what: Any) -> torch.device:
    if not isinstance(what, str) or not re.fullmatch(r"[a-z]{1,20}(:[0-9]{1,3})?", what):
        raise Malformed(f"{shown(what)} is no device")
    try:
        return torch.device(what)
    except RuntimeError:  # of an unknown kind, or an index that is too large
        raise Malformed(f"{shown(what)} is no device") from None
