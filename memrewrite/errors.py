"""The errors that memrewrite raises: what happened, where, and what to try.

The command line prints them; `exit_code` becomes the exit code of the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memrewrite.report import Report


def in_one_line(error: BaseException, *, kind: bool = True, limit: int = 300) -> str:
    """An error's class and its message without line breaks, cut at `limit` characters; `kind=False` omits the class.

    Of a `MemrewriteError` the message is `what` alone. An error without a message is its class.
    """
    message = error.what if isinstance(error, MemrewriteError) else str(error)
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    name = type(error).__name__
    return (f"{name}: {text}" if kind else text) if text else name


class MemrewriteError(Exception):
    """Base class: an error with a place and a hint. Exit code 1: the cause is in memrewrite or the machine.

    Args:
        what: What happened, quoting the user's input.
        where: `file:line:column`, or a module path and a graph node.
        hint: What to try.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [what]
        if where:
            lines.append(f"  at: {where}")
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__("\n".join(lines))


class UserError(MemrewriteError):
    """The input cannot be used as it is. Exit code 2: the user can correct it."""

    exit_code = 2


class ModelError(UserError):
    """The model, its builder or its example inputs cannot be used."""


class CaptureError(UserError):
    """`torch.export` could not capture the model, neither whole nor block by block."""


class RecipeError(UserError):
    """The recipe is invalid: the message contains file, line, column and a caret."""


class SelectError(UserError):
    """The recipe is valid but does not fit this model."""


class CheckpointError(UserError):
    """A saved directory is incomplete, was modified, or would be overwritten."""


class ExportError(UserError):
    """A model cannot be written as ONNX, or an ONNX file cannot be run as requested."""


class VerificationError(MemrewriteError):
    """A check of `verify` failed; the rewrite was undone. `report` contains every check."""

    report: Report | None = None

    def with_report(self, report: Report) -> VerificationError:
        """Set the report of all checks and return this error."""
        self.report = report
        return self
