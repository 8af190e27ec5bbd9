"""The fields of graphs.json and their types; what they mean is checked where they are read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, StrictInt, StrictStr, ValidationError

from memrewrite.frozen import Frozen

FORMATS = (1, 2)  # that are read; the last is written. In format 1, structures of arguments are torch's own JSON
Op = Literal["placeholder", "get_attr", "call_function", "output"]


class Malformed(Exception):  # noqa: N818 - a reason, which `graph_json` turns into an error with a place
    """A part of graphs.json is not what it must be."""


class TraceFields(Frozen):
    """One `Trace`. A node is its name, its op, its target, its arguments and its keyword arguments."""

    in_spec: Any = Field(alias="in")
    out_spec: Any = Field(alias="out")
    given: list[Any]
    ends: dict[StrictStr, list[tuple[StrictStr, StrictStr]]]
    nodes: list[tuple[StrictStr, Op, StrictStr, list[Any], dict[StrictStr, Any]]]


class Modes(Frozen):
    """The two traces of a host."""

    eval: TraceFields
    train: TraceFields


class HostFields(Frozen):
    """One `GraphHost`. A constant has a dtype and a shape; its values are in the file of buffers."""

    path: StrictStr
    constants: dict[StrictStr, tuple[Any, list[StrictInt]]]
    skewed: list[StrictStr]
    traces: Modes


class FileFields(Frozen):
    """The whole file."""

    graphs: StrictInt
    hosts: list[HostFields]


def fields_of(data: Any) -> FileFields:
    """The fields of parsed JSON. Raises `Malformed` for a missing or unknown field, a wrong type, or another format."""
    number = data.get("graphs") if isinstance(data, dict) else None
    if type(number) is int and number not in FORMATS:
        raise Malformed(f"it has format {shown(number)}, and this version reads {' and '.join(map(str, FORMATS))}")
    try:
        return FileFields.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(shown(part).strip("'") for part in first["loc"])
        raise Malformed(f"{where or 'the file'}: {first['msg']}") from None


def shown(value: object) -> str:
    """A value for a message, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
