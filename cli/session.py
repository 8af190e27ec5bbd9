"""Shared by all commands: progress and logs on stderr, the result on stdout, and errors turned into exit codes.

Flow: `session` opens → steps are reported → `show` prints one result → an exception becomes one message and one exit code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.console import Console

from memrewrite.cli.progress import Steps
from memrewrite.errors import MemrewriteError, VerificationError

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed, or an error in memrewrite or the machine; 2 the input cannot be used: the message"
    " states what to try; 130 interrupted."
)
INTERRUPTED = 130


@dataclass(frozen=True)
class Settings:
    """The options before the command name."""

    verbose: bool = False
    debug: bool = False


class Session:
    """One command: its output stream, its progress steps, and whether it prints JSON."""

    def __init__(self, out: TextIO, steps: Steps, as_json: bool) -> None:
        self.out, self.step, self.as_json = out, steps, as_json
        self.log = logging.getLogger("memrewrite")

    def show(self, document: dict[str, Any], draw: Callable[[Console], None]) -> None:
        """Print the result: `document` with --json, else by calling `draw` with a console."""
        self.step.close()
        if self.as_json:
            self.write(json.dumps(document, indent=2))
        else:
            draw(_console(self.out))

    def write(self, text: str) -> None:
        """Print text unchanged."""
        self.step.close()
        print(text, file=self.out)


@contextlib.contextmanager
def session(settings: Settings | None, as_json: bool = False) -> Iterator[Session]:
    """Context manager around a command's body: every error in it becomes `typer.Exit` with an exit code.

    Output printed by the model's own code goes to stderr: stdout has only the result.
    """
    settings = settings or Settings()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    os.environ.setdefault("TQDM_DISABLE", "1")  # the steps show progress
    out, errors = sys.stdout, _console(sys.stderr)
    with contextlib.redirect_stdout(sys.stderr), Steps(errors) as steps, _logging(errors, settings):
        current = Session(out, steps, as_json)
        try:
            yield current
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            steps.close(failed=True)
            _print(errors, "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # noqa: BLE001 - the outermost handler: every error becomes an exit code
            steps.close(failed=True)
            raise typer.Exit(_report(error, current, errors, settings)) from None


def _report(error: Exception, current: Session, errors: Console, settings: Settings) -> int:
    """Print the error on stderr, with --json also on stdout; return the exit code."""
    document: dict[str, Any] = {"kind": type(error).__name__, "what": str(error), "where": None, "hint": None}
    if isinstance(error, MemrewriteError):
        code = error.exit_code
        document |= {"what": error.what, "where": error.where, "hint": error.hint}
    else:
        code = 1
        document["hint"] = "please report it, with the traceback: memrewrite --debug COMMAND ..."
        document["what"] = f"this is a bug in memrewrite: {type(error).__name__}: {error}".rstrip(": ")
    whole: dict[str, Any] = {"error": {**document, "exit_code": code}}
    report = error.report if isinstance(error, VerificationError) else None
    if report is not None:
        whole["report"] = report.model_dump(mode="json")
    if current.as_json:
        current.write(json.dumps(whole, indent=2))
    elif report is not None:
        from memrewrite.cli import text_output

        text_output.show_checks(_console(current.out), report)
    if settings.debug:
        _print(errors, "".join(traceback.format_exception(error)).rstrip())
    for label, key in (("error", "what"), ("   at", "where"), ("  try", "hint")):
        if document[key]:
            _print(errors, f"{label}: " + str(document[key]).replace("\n", "\n       "))
    return code


@contextlib.contextmanager
def _logging(errors: Console, settings: Settings) -> Iterator[None]:
    log, handler = logging.getLogger("memrewrite"), _Lines(errors)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO if settings.verbose else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Lines(logging.Handler):
    """Prints log records as plain lines on stderr, above a running spinner."""

    def __init__(self, errors: Console) -> None:
        super().__init__()
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        _print(self.errors, f"{record.levelname.lower()}: {record.getMessage()}")


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
