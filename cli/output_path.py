"""Whether a result may be written where the user says, asked before any expensive work is done; and a page, written whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from memrewrite.errors import CheckpointError


def refuse_output(directory: Path, *, overwrite: bool, read: list[str]) -> None:
    """Raise `CheckpointError` for a directory in use, one that cannot be made, or one that holds what is being read."""
    where = str(directory)
    if directory.is_file():
        raise CheckpointError(f"the output {where!r} is a file", where=where, hint="give a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            hint = "give a new directory, or --overwrite to replace it whole"
            raise CheckpointError(f"the output directory {where!r} is in use", where=where, hint=hint)
        held = [spec for spec in [*read, "."] if _existing(spec) and _existing(spec).is_relative_to(directory.resolve())]
        if held:
            what = f"--overwrite would delete {'the working directory' if held[0] == '.' else repr(held[0])}"
            raise CheckpointError(what, where=where, hint="give another output directory")
    parent = next(p for p in directory.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{where!r} cannot be created", where=str(parent), hint="give a directory you may write to")


def _existing(spec: str) -> Path:
    """The path that MODEL or RECIPE names, which may carry `:name`."""
    path = Path(spec)
    return (path if path.exists() else Path(spec.rpartition(":")[0] or spec)).resolve()


def refuse_file(file: Path, *, overwrite: bool, read: list[str]) -> None:
    """Raise `CheckpointError` for a file that would replace something, or cannot be written."""
    where = str(file)
    if file.is_dir():
        raise CheckpointError(f"{where!r} is a directory", where=where, hint="give a file, such as model.html or model.onnx")
    if any(_existing(spec) == file.resolve() for spec in read):
        raise CheckpointError(f"{where!r} is what is read", where=where, hint="give another file")
    if file.exists() and not overwrite:
        raise CheckpointError(f"the file {where!r} exists", where=where, hint="give a new name, or --overwrite to replace it")
    if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{where!r} cannot be written", where=where, hint="give a file in a directory you may write to")


def write_page(page: Path, text: str) -> None:
    """Write a file beside its place and rename it: whoever looks finds the old one or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{page.name}.", dir=page.absolute().parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        draft.chmod(0o644)
        draft.replace(page)
    finally:
        draft.unlink(missing_ok=True)
