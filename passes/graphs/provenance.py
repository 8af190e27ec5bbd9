"""Which module call and which source line created a node."""

from __future__ import annotations

import linecache
from pathlib import Path

import torch
from torch import fx

TORCH = str(Path(torch.__file__).parent)


def modules_of(node: fx.Node) -> list[tuple[str, str]]:
    """The module calls that a node was recorded in, outermost first, as (call, path).

    A call is the path with a count for repeats (`encoder.layer@1`): a module that is called twice has two calls.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), str(value[0])) for key, value in stack.items()]


def path_prefixes(path: str) -> list[str]:
    """A module path and the paths of all modules around it, outermost first: "a.b" -> "", "a", "a.b"."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def path_of(node: fx.Node) -> str:
    """The path of the innermost module that a node was recorded in."""
    stack = modules_of(node)
    return clean(stack[-1][1]) if stack else ""


def clean(path: str) -> str:
    """A module path that `get_submodule` accepts: without the tracer's root prefix and repeat count."""
    path = path.partition("@")[0]
    for prefix in ("L['self'].", "L__self___", "L__self__."):
        path = path.removeprefix(prefix)
    return "" if path in ("L['self']", "L__self__") else path


def source_line(node: fx.Node) -> str:
    """The innermost `file:line`, outside of torch's files, that created a node, or ""."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and TORCH not in line]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.partition(',')[0]}"


def line_at(source: str) -> str:
    """The text of the source line `file:line`; "" if it cannot be read."""
    file, _, number = source.rpartition(":")
    return linecache.getline(file, int(number)).strip() if number.isdigit() else ""
