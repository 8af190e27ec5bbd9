"""An extension of griffe, for docstrings and options as memrewrite writes them.

Docstrings are prose with shapes such as [T, K], which Markdown would read as links. Options describe themselves by the
`description` of a pydantic field.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

CODE = re.compile(r"(`+.*?`+)", re.DOTALL)


class Prose(griffe.Extension):
    """Fits docstrings to the pages of the API reference."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape what Markdown and HTML would interpret, outside of code spans."""
        if isinstance(obj, griffe.Attribute) and obj.docstring is None and (text := description(obj)):
            obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            parts[::2] = [re.sub(r"[\[\]<*]", r"\\\g<0>", part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)


def description(field: griffe.Attribute) -> str:
    """What `Field(..., description="...")` states, or ""."""
    value = field.value
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
        return ""
    texts = [a.value for a in value.arguments if isinstance(a, griffe.ExprKeyword) and a.name == "description"]
    return str(ast.literal_eval(str(texts[0]))) if texts else ""
