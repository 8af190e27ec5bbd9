"""Every error a user can meet: what happened, where, and what to try.

Raised anywhere below the door; `cli` prints them and turns `exit_code` into the process's exit code.
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
    """An error with a place and a way out. Exit code 1: the fault is ours or the machine's.

    `what` says what happened, quoting the user's own words; `where` is `file:line:column`, or a module path and a
    graph node; `hint` says what to try.
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
    """The input cannot be used as it is. Exit code 2: the user can mend it."""

    exit_code = 2


class ModelError(UserError):
    """The model, its builder or its example inputs cannot be used."""


class CaptureError(UserError):
    """`torch.export` could not capture the model, neither whole nor block by block."""


class RecipeError(UserError):
    """The recipe is not well formed: the message carries file, line, column and a caret."""


class SelectError(UserError):
    """The recipe is well formed but does not fit this model."""


class CheckpointError(UserError):
    """A saved directory is missing something, was changed, or would be overwritten."""


class ExportError(UserError):
    """A model cannot be written as ONNX, or an ONNX file cannot be run as asked."""


class VerificationError(MemrewriteError):
    """A check of `verify` failed; the rewrite was undone. `report` holds every check."""

    report: Report | None = None

    def with_report(self, report: Report) -> VerificationError:
        """This error, with the report of all checks."""
        self.report = report
        return self
