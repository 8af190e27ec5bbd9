"""Which backend runs an operator: the backends in order, and the choice among them, logged once.

A call names a backend, or "auto": then the first of `BACKENDS` that supports the call runs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from memrewrite.kernels import native_backend, torch_backend, triton_backend

if TYPE_CHECKING:
    from types import ModuleType

BACKENDS: tuple[ModuleType, ...] = (triton_backend, native_backend, torch_backend)  # in order; the last supports all
NAMES = ("auto", *(backend.NAME for backend in BACKENDS))

log = logging.getLogger("memrewrite.kernels")
_logged: set[tuple[str, str, str, str]] = set()


def require_known(op: str, requested: str) -> None:
    """Raise ValueError unless `requested` is "auto" or the name of a backend."""
    if requested not in NAMES:
        raise ValueError(f"{op}: there is no backend {requested!r}; try one of {', '.join(NAMES)}")


def choose(op: str, requested: str, reason_of: Callable[[ModuleType], str | None]) -> ModuleType:
    """The backend module for one call.

    Args:
        op: Name of the operator, for messages.
        requested: Name of a backend, or "auto".
        reason_of: Returns why a backend does not support the call, or None.

    Raises:
        ValueError: `requested` is not the name of a backend, or that backend does not support the call.
    """
    against: list[str] = []
    for backend in BACKENDS:
        if requested not in ("auto", backend.NAME):
            continue
        reason = reason_of(backend)
        if reason is None:
            _log_choice(op, requested, backend.NAME, "; ".join(against))
            return backend
        against.append(f"{backend.NAME} cannot: {reason}")
    require_known(op, requested)
    raise ValueError(f'{op}: {"; ".join(against)}; try backend="auto"')


def _log_choice(op: str, requested: str, name: str, against: str) -> None:
    """Log the choice and its reason, each combination once."""
    choice = (op, requested, name, against)
    if choice in _logged:
        return
    _logged.add(choice)
    why = "requested" if requested != "auto" else against or "the first choice"
    log.info("%s runs on the backend %r (%s)", op, name, why)
