"""Processes with a time limit that nothing in them can extend: at the limit, SIGKILL ends the whole process group."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

TICK = 0.1
AFTER_KILL = 5.0  # seconds to wait for a killed process; one that waits for a driver may take longer, and is left behind


_started: list[Child] = []


class Child:
    """A process in a session of its own, with standard output and errors in a file."""

    def __init__(self, line: Sequence[str], output: IO[bytes], env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
        _started.append(self)

    def kill(self) -> None:
        """End it and all processes that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # none is left (macOS: only zombies are left)
            return

    def reap(self) -> bool:
        """Wait until it has ended; False if it does not end although it was killed."""
        try:
            self.process.wait(AFTER_KILL)
        except subprocess.TimeoutExpired:
            return False
        return True


def run(children: Sequence[Child], seconds: float, tick: Callable[[], None] = lambda: None) -> list[str]:
    """Wait for all; returns for each how it ended, "" for exit code 0. Whatever happens here, no process is left running.

    `tick` is called regularly meanwhile.
    """
    limit = time.monotonic() + seconds
    try:
        while time.monotonic() < limit and any(child.process.poll() is None for child in children):
            tick()
            time.sleep(TICK)
        late = [child.process.poll() is None for child in children]
    finally:
        for child in children:
            child.kill()  # also processes that an ended child left behind
    ended = [child.reap() for child in children]
    tick()
    return [
        (f"stopped at the time limit of {seconds:.0f} s" + ("" if gone else ", and cannot be killed"))
        if was_late
        else how(child.process.returncode)
        for child, was_late, gone in zip(children, late, ended, strict=True)
    ]


def kill_all() -> None:
    """End every process that was started here."""
    for child in _started:
        if child.process.returncode is None:
            child.kill()


def how(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"the process was ended by {names.get(-code, f'signal {-code}')}"
    return f"the process ended with exit code {code}" if code else ""


def output(line: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """How a process ended, and what it printed. A file and no pipe: a process that outlives it could keep a pipe open."""
    with tempfile.TemporaryFile() as file:
        (why,) = run([Child(line, file, env)], seconds)
        file.seek(0)
        return why, file.read().decode(errors="replace")


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, however that happens; without effect except on Linux."""
    if sys.platform != "linux":
        return
    set_signal_at_parents_death = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_signal_at_parents_death, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this call
        os.kill(os.getpid(), signal.SIGKILL)
