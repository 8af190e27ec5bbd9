"""Which code runs an operator: the backends in order, and the choice among them, told once.

A call names a backend, or "auto": then the first of `BACKENDS` that has no reason against the call takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from memrewrite.kernels import torch_backend, triton_backend

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS: tuple[ModuleType, ...] = (triton_backend, torch_backend)  # read top to bottom; the last takes every call
NAMES = ("auto", *(backend.NAME for backend in BACKENDS))

log = logging.getLogger("memrewrite.kernels")
_told: set[tuple[str, str, str, str]] = set()


def choose(op: str, wanted: str, reason_of: Callable[[ModuleType], str | None]) -> ModuleType:
    """The backend for one call; `reason_of` says why one cannot take it, or None.

    Raises ValueError for a name that is none, and for a backend asked for by name that cannot take the call.
    """
    against = ""
    for backend in BACKENDS:
        if wanted not in ("auto", backend.NAME):
            continue
        reason = reason_of(backend)
        if reason is None:
            _tell(op, wanted, backend.NAME, against)
            return backend
        against = f"{backend.NAME} cannot: {reason}"
    if wanted not in NAMES:
        raise ValueError(f"{op}: there is no backend {wanted!r}; try one of {', '.join(NAMES)}")
    raise ValueError(f'{op}: {against}; try backend="auto"')


def _tell(op: str, wanted: str, name: str, against: str) -> None:
    """Log the choice and its reason, once for each."""
    choice = (op, wanted, name, against)
    if choice in _told:
        return
    _told.add(choice)
    why = "asked for" if wanted != "auto" else against or "the first choice"
    log.info("%s runs on the backend %r (%s)", op, name, why)
