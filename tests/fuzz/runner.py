"""Runs the processes of kinds, detects those that die or hang, and sums up what became of the cases."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import Folders, make_case
from .child import DEADLINE
from .guard import ROOT, WAIT

TESTS = ROOT / "tests"
REPORTS = ROOT / "build" / "fuzz"
START = 300.0  # seconds that seeds and imports may take
PYTHON = (sys.executable, "-X", "faulthandler", "-m", "fuzz.child")


@dataclass
class Result:
    """The cases of one kind. `failures` has one entry for each cause, with the number of cases that it failed."""

    kind: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[int, str] = field(default_factory=dict)  # of each case, by number
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    @property
    def violations(self) -> int:
        """The failed cases in which something was compiled, imported, opened, started or left changed."""
        return sum(f["count"] for f in self.failures.values() if f["what"].startswith("violation"))

    def add(self, line: dict[str, Any]) -> None:
        """Count one case."""
        self.counts[line["outcome"]] += 1
        self.outcomes[line["number"]] = f"{line['outcome']} {line['what']}".strip()
        if line["outcome"] == "failed":
            cause = (str(line["what"]).partition(":")[0], line["where"])
            self.failures.setdefault(cause, {**line, "count": 0})["count"] += 1

    def line(self) -> str:
        """One line to print."""
        return (
            f"{self.kind}: tried {self.tried}, loaded {self.counts['loaded']}, refused {self.counts['refused']},"
            f" failed {self.counts['failed']}, violations {self.violations} ({self.seconds:.0f} s, seed {self.seed})"
        )


def fuzz(kind: str, *, seconds: float, seed: int = 0, first: int = 0, cases: int = 0, deadline: float = DEADLINE) -> Result:
    """Run cases of `kind` for `seconds`, in one process that is started again after a crash or a hang.

    `kind` is a name of `kinds.KINDS`, or `module:name` for a table of kinds elsewhere. Each cause of a failure is written to
    `build/fuzz/KIND-NUMBER` with the changed file.
    """
    result, begun, end = Result(kind, seed), time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="memrewrite-fuzz-") as base:
        folders, number = Folders(Path(base).resolve()), first
        while True:
            left = seconds if not end else max(0.0, end - time.monotonic())
            rest = cases - (number - first) if cases else 0
            if end and (left <= 0 or (cases and rest <= 0)):
                break
            process = _Process([*PYTHON, kind, str(folders.base), str(seed), str(number), str(left), str(rest)], deadline)
            for line in process.lines():
                if "start" in line:
                    end = end or time.monotonic() + seconds
                    number = line["start"]
                elif "outcome" in line:
                    result.add(line)
            if process.complete:
                break
            if not end:
                raise RuntimeError(f"the process of {kind} did not start: {process.end}\n{_tail(folders)}")
            line = {"number": number, "outcome": "failed", "what": process.end, "where": "", "trace": _tail(folders)}
            result.add({**line, "steps": None})
            number += 1
        result.seconds = time.monotonic() - begun
        _write_failures(result, folders)
    return result


def _tail(folders: Folders) -> str:
    log = folders.base / "log.txt"
    return log.read_bytes()[-3_000:].decode("utf-8", "replace") if log.is_file() else ""


class _Process:
    """A child. `lines` yields what it writes, until it ends or writes nothing for too long; `end` then says why."""

    def __init__(self, command: Sequence[str], deadline: float) -> None:
        self.complete, self.end, self._deadline = False, "", deadline
        own = {
            "MEMREWRITE_FUZZ_DEADLINE": str(deadline),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=TESTS,  # not the root: its folder `memrewrite` is not the installed package
            env={**os.environ, **own, "PYTHONPATH": path},
            start_new_session=True,
        )

    def lines(self) -> Any:
        """Parsed lines."""
        stream, rest = self._process.stdout, b""
        assert stream is not None
        patience = START
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while True:
                if not selector.select(patience):
                    self._process.kill()
                    self.end = f"hang: nothing for {patience:g} s, and it cannot be interrupted"
                    break
                data = os.read(stream.fileno(), 65_536)
                if not data:
                    break
                *whole, rest = (rest + data).split(b"\n")
                for text in whole:
                    line = json.loads(text)
                    self.complete |= "done" in line
                    patience = self._deadline * (WAIT + 1) + 1 if "start" in line else self._deadline * 12 * WAIT + 2
                    yield line
        code = self._process.wait()
        stream.close()
        self.end = self.end or (f"crash: {signal.Signals(-code).name}" if code < 0 else f"crash: exit code {code}")


def _write_failures(result: Result, folders: Folders) -> None:
    """Write the changed file of each cause, and what happened."""
    from .kinds import KINDS

    kind = KINDS.get(result.kind)
    if kind is None:
        return
    for failure in result.failures.values():
        target = REPORTS / f"{result.kind}-{failure['number']}"
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make_case(kind, folders, result.seed, failure["number"], failure["steps"])
        shutil.copytree(folders.case, target)
        (target / "failure.json").write_text(json.dumps(failure, indent=1))
        failure["path"] = str(target)
