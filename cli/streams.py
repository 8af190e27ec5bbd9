"""What the process shares with the model's code while a command runs: stdout, and the signals that end the process.

stdout belongs to the result. The model's code may print with `print`, `sys.__stdout__`, `os.write(1, ...)`, C's stdio or a
subprocess: all of it goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

OUT, ERR = 1, 2  # file descriptors


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end: what is unfinished is removed on the way out, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise `Stopped` when SIGTERM or SIGHUP arrives, in place of the immediate end of the process.

    Only in the main thread, and only for a signal that has no other handler: `nohup` ignores SIGHUP. Further ones are ignored
    while the first is handled.
    """
    handled: list[int] = []
    owner = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker of the model's code: its parent ends it by this signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                handled.append(number)
                signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def result_stream() -> Iterator[TextIO]:
    """Yield a stream for the result; everything else that is written to stdout goes to stderr until the end.

    The stream is a copy of stdout's descriptor, or `sys.stdout` itself where that is another object (in tests, notebooks).
    """
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123 - not a file of ours
        out, err = sys.stdout or nowhere, sys.stderr or nowhere  # None if the process was started without them
        stack.enter_context(contextlib.redirect_stdout(err))
        try:
            original = os.dup(OUT)
        except OSError:  # the process was started without stdout
            yield out
            return
        stack.callback(os.close, original)
        _flush()
        try:
            os.dup2(ERR, OUT)
        except OSError:  # it was started without stderr
            os.dup2(nowhere.fileno(), OUT)
        stack.callback(os.dup2, original, OUT)
        stack.callback(_flush)  # what the model's code wrote and C or Python still hold goes to stderr too
        if _descriptor(out) == OUT:
            own = os.fdopen(os.dup(original), "w", encoding=out.encoding, errors=out.errors)
            stack.callback(_close, own)
            yield own
        else:
            yield out


def silence_stdout() -> None:
    """Send to stderr what the model's code still prints while the process ends. What is held until now is written before."""
    _flush()
    with contextlib.suppress(OSError):  # without stderr it goes where it went
        os.dup2(ERR, OUT)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file, closed, or only an object with `write`
        return None


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None: nothing is held
            stream.flush()  # type: ignore[union-attr]
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def _close(stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # `Session` flushes, and has reported the error
        stream.close()
