"""Suppresses what torch logs, prints and warns of while it traces: the caller reports an attempt that fails in one line.

Only messages of the thread that traces are suppressed, and only those of torch and of ONNX's packages. What a model prints, or
logs by itself, goes where it always goes: `sys.stdout` and `sys.stderr` belong to all threads, and are never replaced.
"""

from __future__ import annotations

import builtins
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PRINT = "print"
PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir")  # whose loggers are suppressed


class _QuietThreads(logging.Filter):
    """Rejects the messages of some threads: a filter of handlers and of `warnings`, and of what two modules of torch print.

    It is in place while there is such a thread, and passes the messages of all others on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()  # held only while filters are added and removed
        self.threads = Counter[int]()
        self.handlers: list[logging.Handler] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a handler may emit the record."""
        of_torch = record.name.partition(".")[0] in PACKAGES and record.levelno <= logging.ERROR
        return not (of_torch and threading.get_ident() in self.threads)

    def match(self, _: str) -> bool:
        """Whether a warning is ignored: `warnings` calls this in place of a regular expression."""
        return threading.get_ident() in self.threads

    def write(self, *values: Any, **options: Any) -> None:
        """What the builtin function of that name does, for other threads."""
        if threading.get_ident() not in self.threads:
            vars(builtins)[PRINT](*values, **options)

    def begin(self) -> None:
        """Reject the messages of this thread."""
        with self.lock:
            if not self.threads:
                self._add()
            self.threads[threading.get_ident()] += 1

    def end(self) -> None:
        """Undo one `begin` of this thread."""
        with self.lock:
            self.threads[threading.get_ident()] -= 1
            self.threads += Counter()  # without zeros
            if not self.threads:
                self._remove()

    def _add(self) -> None:
        loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(PACKAGES)]
        handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
        last = [logging.lastResort] if logging.lastResort is not None else []
        self.handlers = list(dict.fromkeys([*handlers, *last]))
        for handler in self.handlers:
            handler.addFilter(self)
        for module in _printing():
            vars(module)[PRINT] = self.write
        # Not `warnings.catch_warnings`: it replaces the filters of all threads, and two that overlap leave one's in place.
        warnings.filters.insert(0, self._entry())  # type: ignore[attr-defined]

    def _remove(self) -> None:
        for handler in self.handlers:
            handler.removeFilter(self)
        self.handlers = []
        for module in _printing():
            del vars(module)[PRINT]
        if self._entry() in warnings.filters:  # another thread may have replaced the list
            warnings.filters.remove(self._entry())  # type: ignore[attr-defined]

    def _entry(self) -> tuple[Any, ...]:
        return ("ignore", self, Warning, None, 0)


def _printing() -> tuple[ModuleType, ...]:
    """The modules of torch that print the graph or the code in which an error was raised."""
    import torch.export._trace
    import torch.fx.graph_module

    return torch.export._trace, torch.fx.graph_module


_QUIET = _QuietThreads()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings of this thread and torch's log messages of this thread are suppressed; critical ones are not."""
    _QUIET.begin()
    try:
        yield
    finally:
        _QUIET.end()
