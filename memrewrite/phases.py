"""How long the phases of a call take: by the clock, and on the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from memrewrite.frozen import Frozen


class Phase(Frozen):
    """One phase of a call.

    Attributes:
        name: Name of the phase, as it is reported when the phase begins.
        seconds: Seconds by the clock.
        cpu_seconds: Seconds of the processor, of all threads of the process together.
    """

    name: str
    seconds: float
    cpu_seconds: float


class Phases:
    """Measures phases that follow each other: call it with the name of each as it begins, which ends the one before.

    As a context manager it ends the last phase on exit.

    Args:
        step: Also receives the name of each phase as it begins.

    Attributes:
        ended: The phases that have ended, in order.
    """

    def __init__(self, step: Callable[[str], None] | None = None) -> None:
        self.ended: list[Phase] = []
        self._step = step
        self._begun: tuple[str, float, float] | None = None

    def __call__(self, name: str) -> None:
        """Begin a phase."""
        self.end()
        self._begun = (name, time.perf_counter(), time.process_time())
        if self._step is not None:
            self._step(name)

    def end(self) -> None:
        """End the current phase, if there is one."""
        if self._begun is not None:
            name, clock, processor = self._begun
            taken = time.perf_counter() - clock, time.process_time() - processor
            self.ended.append(Phase(name=name, seconds=taken[0], cpu_seconds=taken[1]))
            self._begun = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
