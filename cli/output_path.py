"""Checks whether a result may be written to a path, before any expensive work; and writes the HTML page.

The rules of what may be replaced are `Target`'s, for the library and the command line alike. The command line adds one: its own
inputs are never replaced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memrewrite.atomic_write import prepare, replacing
from memrewrite.errors import CheckpointError
from memrewrite.output_target import Target


def refuse(target: Target, *, read: list[str]) -> None:
    """Raise `CheckpointError` for an output that may not or cannot be written, or that would replace an input in `read`."""
    target = replace(target, from_command_line=True)
    with target.errors():
        target.check_name()
        output = target.path.resolve()
        for spec in read:
            source = _existing(spec)
            if source == output or (target.directory and source.is_relative_to(output)):
                what = f"{str(target.path)!r} is an input of this command"
                if source != output:
                    what = f"{str(target.path)!r} contains an input of this command, {spec!r}, which it would delete"
                raise CheckpointError(what, where=str(target.path), hint="use another name for the output")
    prepare(target)


def _existing(spec: str) -> Path:
    """The path that MODEL or RECIPE names, without `:name` at its end."""
    path = Path(spec)
    return (path if path.exists() else Path(spec.rpartition(":")[0] or spec)).resolve()


def write_page(target: Target, text: str) -> None:
    """Write an HTML page: readers see the old or the new file, never a part."""
    with replacing(target) as draft:
        draft.write_text(text, encoding="utf-8")
