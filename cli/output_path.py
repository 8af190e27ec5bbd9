"""Checks whether a result may be written to a path, before any expensive work; and writes the HTML page atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from memrewrite.errors import CheckpointError


def refuse_output(directory: Path, *, overwrite: bool, read: list[str]) -> None:
    """Raise `CheckpointError` for a directory that is not empty, cannot be created, or contains the inputs `read`."""
    where = str(directory)
    if directory.is_file():
        raise CheckpointError(f"the output {where!r} is a file", where=where, hint="use a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            hint = "use a new directory, or --overwrite to replace the whole directory"
            raise CheckpointError(f"the output directory {where!r} is not empty", where=where, hint=hint)
        inside = [spec for spec in [*read, "."] if _existing(spec) and _existing(spec).is_relative_to(directory.resolve())]
        if inside:
            what = f"--overwrite would delete {'the working directory' if inside[0] == '.' else repr(inside[0])}"
            raise CheckpointError(what, where=where, hint="use another output directory")
    parent = next(p for p in directory.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{where!r} cannot be created", where=str(parent), hint="use a directory with write permission")


def _existing(spec: str) -> Path:
    """The path that MODEL or RECIPE names, without `:name` at its end."""
    path = Path(spec)
    return (path if path.exists() else Path(spec.rpartition(":")[0] or spec)).resolve()


def refuse_file(file: Path, *, overwrite: bool, read: list[str]) -> None:
    """Raise `CheckpointError` for a file that exists, is an input in `read`, or cannot be written."""
    where = str(file)
    if file.is_dir():
        raise CheckpointError(
            f"{where!r} is a directory", where=where, hint="use a file name, such as model.html or model.onnx"
        )
    if any(_existing(spec) == file.resolve() for spec in read):
        raise CheckpointError(f"{where!r} is an input of this command", where=where, hint="use another file name")
    if file.exists() and not overwrite:
        raise CheckpointError(f"the file {where!r} exists", where=where, hint="use a new name, or --overwrite to replace it")
    if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{where!r} cannot be written", where=where, hint="use a directory with write permission")


def write_page(page: Path, text: str) -> None:
    """Write to a temporary file in the same directory and rename it: readers see the old or the new file, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{page.name}.", dir=page.absolute().parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        draft.chmod(0o644)
        draft.replace(page)
    finally:
        draft.unlink(missing_ok=True)
