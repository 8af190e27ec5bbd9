"""Shared by all commands: progress and logs on stderr, the result on stdout, and errors turned into exit codes.

Flow: `session` opens → steps are reported → `show` prints one result → an exception becomes one message and one exit code.
The model's code runs inside a session, so every exception that Python has may arrive here.
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
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console

from memrewrite.cli.progress import Steps
from memrewrite.cli.streams import Stopped, result_stream, stopping
from memrewrite.errors import MemrewriteError, ModelError, UserError, VerificationError, in_one_line
from memrewrite.output_target import HINTS

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed, or an error in memrewrite or the machine; 2 the input cannot be used: the message"
    " states what to try; 130 interrupted; 129 and 143 ended by SIGHUP and SIGTERM."
)
INTERRUPTED = 130


@dataclass(frozen=True)
class Settings:
    """The options before the command name."""

    verbose: bool = False
    debug: bool = False


class Session:
    """One command: its output stream, its progress steps, whether it prints JSON, and its exit code if no error occurs."""

    def __init__(self, out: TextIO, steps: Steps, as_json: bool) -> None:
        self.out, self.step, self.as_json, self.exit_code = out, steps, as_json, 0
        self.log = logging.getLogger("memrewrite")

    def show(self, document: dict[str, Any], draw: Callable[[Console], None]) -> None:
        """Print the result: `document` with --json, else by calling `draw` with a console."""
        self.step.close()
        if self.as_json:
            self.write(json.dumps(document, indent=2))
        else:
            with _printing(self.out):
                draw(_console(self.out))

    def write(self, text: str) -> None:
        """Print text unchanged."""
        self.step.close()
        with _printing(self.out):
            print(text, file=self.out)


class _ReaderEndedError(Exception):
    """The program that reads the result has ended, as `head` does; a message would not be read."""


@contextlib.contextmanager
def _printing(out: TextIO) -> Iterator[None]:
    """Write at once, so that a full disk or a closed pipe is known here and not when the process ends."""
    try:
        yield
        out.flush()
    except BrokenPipeError:
        raise _ReaderEndedError from None
    except OSError as error:
        raise UserError(
            f"the result cannot be written to stdout: {error.strerror}",
            hint=HINTS.get(error.errno or 0, "send stdout to another file"),
        ) from error


@contextlib.contextmanager
def session(settings: Settings | None, as_json: bool = False) -> Iterator[Session]:
    """Context manager around a command's body: every error in it becomes `typer.Exit` with an exit code.

    Output printed by the model's own code goes to stderr: stdout has only the result.
    """
    settings = settings or Settings()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    os.environ.setdefault("TQDM_DISABLE", "1")  # the steps show progress
    with stopping(), result_stream() as out:
        errors = _console(sys.stderr)
        with Steps(errors) as steps, _logging(errors, settings):
            current = Session(out, steps, as_json)
            try:
                _check_working_directory()
                yield current
            except BaseException as error:  # noqa: BLE001 - the outermost handler: whatever the model's code raised
                with contextlib.suppress(OSError):  # stderr is closed
                    steps.close(failed=True)
                current.exit_code = _report(error, current, errors, settings)
    if current.exit_code:
        raise typer.Exit(current.exit_code)


def _check_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted", hint="change to a directory that exists") from None


def _explain(error: BaseException) -> tuple[MemrewriteError, str]:
    """The error as one of ours, and the name of its kind."""
    name = type(error).__name__
    if isinstance(error, MemrewriteError):
        return error, name
    if isinstance(error, MemoryError):
        return MemrewriteError("there is not enough memory", hint="use a smaller model or batch, or a larger machine"), name
    if isinstance(error, OSError) and error.errno in HINTS:
        return MemrewriteError(f"the system reports an error: {error}", hint=HINTS[error.errno]), name
    if isinstance(error, Exception):
        hint = "please report it, with the traceback: memrewrite --debug COMMAND ..."
        return MemrewriteError(f"this is a bug in memrewrite: {name}: {error}".rstrip(": "), hint=hint), name
    hint = "remove it from the code that runs with the model, such as sys.exit(); memrewrite --debug COMMAND shows where"
    return ModelError(f"the model's code ended the command: {in_one_line(error)}", hint=hint), ModelError.__name__


def _report(error: BaseException, current: Session, errors: Console, settings: Settings) -> int:
    """Print the error on stderr, with --json also on stdout; return the exit code."""
    if isinstance(error, _ReaderEndedError):
        return 1
    if isinstance(error, Stopped) or type(error) is KeyboardInterrupt:
        _print(errors, str(error) if isinstance(error, Stopped) else "interrupted")
        return error.exit_code if isinstance(error, Stopped) else INTERRUPTED
    ours, kind = _explain(error)
    code, document = ours.exit_code, {"kind": kind, "what": ours.what, "where": ours.where, "hint": ours.hint}
    whole: dict[str, Any] = {"error": {**document, "exit_code": code}}
    report = error.report if isinstance(error, VerificationError) else None
    if report is not None:
        whole["report"] = report.model_dump(mode="json")
    try:
        if current.as_json:
            current.write(json.dumps(whole, indent=2))
        elif report is not None:
            from memrewrite.cli import text_output

            with _printing(current.out):
                text_output.show_checks(_console(current.out), report)
    except (_ReaderEndedError, UserError) as unwritten:
        _print(errors, in_one_line(unwritten, kind=False))
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
    with contextlib.suppress(OSError):  # stderr is closed; the exit code remains
        console.print(text, soft_wrap=True)
