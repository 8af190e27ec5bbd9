"""Which module call and which source line a node was recorded in."""

from __future__ import annotations

import linecache
from pathlib import Path

import torch
from torch import fx

TORCH = str(Path(torch.__file__).parent)


def modules_of(node: fx.Node) -> list[tuple[str, str]]:
    """The module calls a node was recorded in, outermost first, as (call, path).

    A call is the path with a count for repeats (`encoder.layer@1`): one module called twice gives two calls.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), str(value[0])) for key, value in stack.items()]


def path_of(node: fx.Node) -> str:
    """The innermost module a node was recorded in."""
    stack = modules_of(node)
    return clean(stack[-1][1]) if stack else ""


def clean(path: str) -> str:
    """A module path as `get_submodule` takes it: without the tracer's root prefix and repeat count."""
    path = path.partition("@")[0]
    for prefix in ("L['self'].", "L__self___", "L__self__."):
        path = path.removeprefix(prefix)
    return "" if path in ("L['self']", "L__self__") else path


def source_line(node: fx.Node) -> str:
    """The innermost `file:line` of the model's own code that made a node (torch's own files aside), or ""."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and TORCH not in line]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.partition(',')[0]}"


def line_at(source: str) -> str:
    """The text of a source line given as `file:line`; "" where it cannot be read."""
    file, _, number = source.rpartition(":")
    return linecache.getline(file, int(number)).strip() if number.isdigit() else ""
