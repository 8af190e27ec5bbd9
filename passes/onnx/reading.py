"""Reads ONNX files, which may be damaged or hostile: every message is checked before anything else uses the file.

A file is data. Refused are weights outside of its directory, operators that run code or load a file, functions that call
themselves or expand to a huge graph, and text that is not UTF-8.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memrewrite.errors import ExportError, in_one_line

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 2**31 - 1  # protobuf reads no more
MOST_NODES = 2_000_000  # with functions expanded, which runtimes do when they load the file
RUN_CODE = ("EPContext", "PythonOp", "PythonOpGrad")  # onnxruntime's: a compiled graph in a file, and functions of Python
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}  # of the standard
AGAIN = "export it again"

Function = tuple[str, str, str]  # domain, name, overload


def read_graph(path: Path) -> onnx.ModelProto:
    """A file without its external weights.

    Raises `ExportError` if the file or its weights are missing, or it is damaged or refused for one of the reasons above.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ExportError(f"reading ONNX needs onnx ({error})", hint="pip install 'memrewrite[onnx]'") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(_bytes_of(path))
    except DecodeError as error:
        raise ExportError(f"the file cannot be read as ONNX: {in_one_line(error)}", where=str(path), hint=AGAIN) from error
    messages = list(_messages(model))
    _refuse_bad_text(messages, path)
    for message in messages:
        if isinstance(message, onnx.TensorProto) and (message.external_data or message.data_location):
            _refuse_location(message, path)
        if isinstance(message, onnx.NodeProto) and message.op_type in RUN_CODE:
            raise ExportError(
                f"the file has a node {message.op_type!r}, which runs code or loads a file",
                where=f"{path}: node {message.name!r}",
                hint=AGAIN,
            )
    _refuse_expansion(model, path)
    return model


def _bytes_of(path: Path) -> bytes:
    """The content of a file. Raises `ExportError` if there is none, or it is a device, a pipe, or too large."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ExportError("it is no file, and cannot be read as ONNX", where=str(path), hint="give an ONNX file")
        if status.st_size > MOST_BYTES:
            raise ExportError("the file is larger than 2 GiB: it cannot be read as ONNX", where=str(path), hint=AGAIN)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {str(path)!r}", hint="memrewrite export MODEL -o model.onnx") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ExportError(f"the file cannot be read as ONNX: {in_one_line(error)}", where=str(path), hint=AGAIN) from error


def _messages(root: Any) -> Iterator[Any]:
    """A message and all messages inside it, at any depth."""
    todo = [root]
    while todo:
        message = todo.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                todo.extend([value] if hasattr(value, "ListFields") else value)


def _refuse_bad_text(messages: Sequence[Any], path: Path) -> None:
    """Raise `ExportError` for text that is not UTF-8: protobuf returns it as bytes."""
    for message in messages:
        for field, value in message.ListFields():
            values = value if field.type == field.TYPE_STRING and not isinstance(value, (str, bytes)) else [value]
            if field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
                what = f"the field {field.name!r} of a {type(message).__name__} contains text that is not UTF-8"
                raise ExportError(what, where=str(path), hint=AGAIN)


def _refuse_location(tensor: Any, path: Path) -> None:
    """Raise `ExportError` unless an external weight is a part of a file in the directory of `path`."""
    where = f"{path}: weight {tensor.name[:100]!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, numbers = entries.get("location", ""), [entries.get(key, "0") for key in ("offset", "length")]
    if entries.keys() - EXTERNAL_KEYS or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ExportError("its place in another file is not written as the standard says", where=where, hint=AGAIN)
    try:
        file = (path.parent / name).resolve()
        size = file.stat().st_size if file.is_file() else None
        folders = {path.parent.resolve(), path.resolve().parent}  # a link to the file may be beside a link to its weights
    except (OSError, ValueError, RuntimeError):  # a name that the system refuses; a circle of links
        size = None
    if size is None:
        hint = "a large model is two files: move and copy them together"
        raise ExportError(f"the file's weights are missing: {name[:200]!r} is not next to it", where=where, hint=hint)
    if Path(name).is_absolute() or not any(file.is_relative_to(folder) for folder in folders):
        what = f"its weights are in {name[:200]!r}, outside of the directory of the file"
        raise ExportError(what, where=where, hint="do not use this file: a file that memrewrite writes has them next to it")
    offset, length = (int(number) if len(number) < 20 else size + 1 for number in numbers)
    if offset + length > size:
        what = f"the file's weights are damaged: {name!r} has {size} bytes, and at least {offset + length} are needed"
        raise ExportError(what, where=where, hint="copy the two files again")


def _refuse_expansion(model: onnx.ModelProto, path: Path) -> None:
    """Raise `ExportError` if functions call themselves, or if the graph is too large when every call is expanded."""
    bodies: dict[Function, Counter[Function]] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise ExportError(f"the file defines the function {key[1][:100]!r} twice", where=str(path), hint=AGAIN)
        bodies[key] = _calls(function)
    try:
        order = list(TopologicalSorter({key: calls.keys() & bodies.keys() for key, calls in bodies.items()}).static_order())
    except CycleError as error:
        names = " → ".join(key[1][:50] for key in error.args[1][:5])
        raise ExportError(f"functions of the file call themselves: {names}", where=str(path), hint=AGAIN) from error
    sizes: dict[Function, int] = {}
    for key in order:
        sizes[key] = _expanded(bodies[key], sizes)
    total = _expanded(_calls(model.graph), sizes)
    if total > MOST_NODES:
        what = f"with its functions expanded the file has {total:.3g} nodes; at most {MOST_NODES} are read"
        raise ExportError(what, where=str(path), hint=AGAIN)


def _calls(body: Any) -> Counter[Function]:
    """How many nodes of each operator a graph or function has, in the graphs inside it too."""
    return Counter((m.domain, m.op_type, m.overload) for m in _messages(body) if type(m).__name__ == "NodeProto")


def _expanded(calls: Counter[Function], sizes: dict[Function, int]) -> int:
    return min(sum(count * (1 + sizes.get(key, 0)) for key, count in calls.items()), 10**18)
