"""An extension of griffe: docstrings are prose with shapes such as [T, K], which Markdown would read as links."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`+.*?`+)", re.DOTALL)


class LiteralBrackets(griffe.Extension):
    """Escapes what Markdown and HTML would interpret, outside of code spans."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            parts[::2] = [re.sub(r"[\[\]<*]", r"\\\g<0>", part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)
