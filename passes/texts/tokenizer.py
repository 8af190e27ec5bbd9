"""The tokenizer of a model's directory, `tokenizer.json`: data, read without any code of the directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memrewrite.errors import ModelError, UserError, in_one_line
from memrewrite.passes.storage.manifest import is_saved, read_manifest

TOKENIZER = "tokenizer.json"
COPY = "copy or download the file again"


def tokenizer_of(directory: Path) -> Any:
    """A `tokenizers.Tokenizer`. Raises `ModelError` if the directory has none, or it cannot be read."""
    text = file_text(directory, TOKENIZER, ModelError)
    if text is None:
        what = f"{str(directory)!r} has no {TOKENIZER}, so a text cannot be read"
        hint = f"copy the {TOKENIZER} of the base next to its config before `apply`; or count without a text, on example inputs"
        raise ModelError(what, where=str(directory / TOKENIZER), hint=hint)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("a text needs the package tokenizers", hint="pip install 'memrewrite[hf]'") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # of `tokenizers`, which raises plain `Exception`
        what = f"the tokenizer cannot be read: {in_one_line(error)}"
        raise ModelError(what, where=str(directory / TOKENIZER), hint=COPY) from error


def file_text(folder: Path, name: str, error: type[UserError]) -> str | None:
    """The text of a file of a model's directory, or None; of a saved directory, only of a file that its manifest names.

    Raises `error` if it cannot be read.
    """
    if is_saved(folder):
        files = read_manifest(folder)
        return files.text(name) if name in files else None
    try:
        return (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None
    except (OSError, ValueError) as failure:
        raise unreadable(folder / name, failure, error) from failure


def unreadable(file: Path, failure: Exception, error: type[UserError]) -> UserError:
    """The error for a file of a tokenizer that cannot be read."""
    what = f"the tokenizer's {file.name} cannot be read: {in_one_line(failure, kind=False)}"
    return error(what, where=str(file), hint=COPY)
