"""Progress of a command on stderr: a spinner with the elapsed time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from memrewrite.phases import Phases


class Steps:
    """Call it with the name of each step when the step begins; this ends the previous step.

    Plain lines carry the seconds since the first step: `[  3.2s] capturing the model`. `phases` measures the steps.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun: float | None = None
        self.live: Progress | None = None
        self.task: TaskID | None = None
        self.phases = Phases()

    def __call__(self, name: str) -> None:
        """Begin a step."""
        self.phases(name)
        now = time.perf_counter()
        self.begun = now if self.begun is None else self.begun
        if not self.console.is_terminal:
            self.console.print(f"[{now - self.begun:5.1f}s] {name}", soft_wrap=True)
            return
        if self.live is None:
            columns = (SpinnerColumn(finished_text="·"), TextColumn("{task.description}"), TimeElapsedColumn())
            self.live = Progress(*columns, console=self.console, redirect_stdout=False)
            self.live.start()
        self._end()
        self.task = self.live.add_task(name, total=1)

    def close(self, *, failed: bool = False) -> None:
        """End the last step; a failed step is not marked as done."""
        self.phases.end()
        if self.live is not None:
            if not failed:
                self._end()
            self.live.stop()
            self.live = self.task = None

    def _end(self) -> None:
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=1)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close(failed=kind is not None)
