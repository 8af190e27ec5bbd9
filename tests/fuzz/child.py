"""The process of one kind: it runs cases one after another and writes a line of JSON about each to its standard output.

`python -m fuzz.child KIND FOLDER SEED FIRST SECONDS CASES`, which `runner` starts again after a crash. SECONDS counts
from the first case; with CASES = 0 their number is not limited.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import Case, Folders, make_case
from .guard import ROOT, WAIT, Blocked, Guard, Hang, limit_memory, words_of
from .kinds import Kind

DEADLINE = float(os.environ.get("MEMREWRITE_FUZZ_DEADLINE", "10"))  # seconds of CPU time for one case
MEMORY = 3 * 2**30  # bytes beyond what the process has when it is warm


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "loaded", "refused" or "failed"; `what` is the reason, `where` the line of memrewrite."""

    outcome: str
    what: str = ""
    where: str = ""
    trace: str = ""

    @property
    def signature(self) -> tuple[str, str, str]:
        """Two cases with the same signature have, most likely, the same cause."""
        return self.outcome, self.what.partition(":")[0], self.where


def run_case(kind: Kind, guard: Guard, folders: Folders, case: Case) -> Outcome:
    """Read the changed file under the guard."""
    from memrewrite.errors import MemrewriteError

    outcome, error = Outcome("loaded"), None
    new = words_of(case.after) - words_of(case.before)
    unread = {str(case.file)} if kind.unread and case.file.parent.joinpath("memrewrite.json").exists() is False else set()
    try:
        with guard.watching(folders.case, new, DEADLINE, unread):
            case.target(folders.case, case.file)
    except MemrewriteError as caught:
        blames_us = "please report" in str(caught)
        outcome, error = Outcome("failed", "blames memrewrite: " + caught.what) if blames_us else Outcome("refused"), caught
    except Hang as caught:
        outcome, error = Outcome("failed", f"hang: more than {DEADLINE:g} s of CPU time, or {WAIT * DEADLINE:g} s"), caught
    except Blocked as caught:
        outcome, error = Outcome("failed", f"violation: {caught}"), caught
    except BaseException as caught:  # noqa: BLE001 - whatever else a reader raises is what is looked for
        outcome, error = Outcome("failed", f"{type(caught).__name__}: {str(caught)[:300]}"), caught
    if guard.violations:  # also where a reader hid it
        outcome = Outcome("failed", f"violation: {guard.violations[0]}")
    if outcome.outcome == "failed" and error is not None:
        shown = "".join(traceback.format_exception(error, limit=-12))[-4_000:]
        outcome = Outcome(outcome.outcome, outcome.what, _where(error), shown)
    return outcome


def _where(error: BaseException) -> str:
    """The innermost line of memrewrite in the traceback; without any, the innermost line."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [f for f in lines if f.filename.startswith(f"{ROOT}/") and "/tests/" not in f.filename and ".venv" not in f.filename]
    found = (own or lines)[-1:]
    return f"{Path(found[0].filename).name}:{found[0].lineno}" if found else ""


def smallest(kind: Kind, guard: Guard, folders: Folders, key: tuple[int, int], count: int, wanted: Outcome) -> list[int]:
    """The changes of a failing case that suffice for the same failure: one of them, or all but those that can be left out."""

    def fails(steps: list[int]) -> bool:
        found = run_case(kind, guard, folders, make_case(kind, folders, *key, steps=steps))
        return found.signature == wanted.signature

    steps = list(range(count))
    for step in steps if count > 1 else ():
        if fails([step]):
            return [step]
    for step in list(steps):
        fewer = [other for other in steps if other != step]
        if fewer and fails(fewer):
            steps = fewer
    return steps


def main(arguments: list[str]) -> None:
    """Run cases until the time is over."""
    module, _, name = arguments[0].rpartition(":")
    kinds = importlib.import_module(module or "fuzz.kinds").KINDS
    kind: Kind = kinds[name]
    folders, seed, number = Folders(Path(arguments[1])), int(arguments[2]), int(arguments[3])
    seconds, most = float(arguments[4]), int(arguments[5])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    log = (folders.base / "log.txt").open("ab")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    folders.make()
    if not any(folders.seeds.iterdir()):
        kind.prepare(folders.seeds)
    tempfile.tempdir = str(folders.case)
    guard = Guard(folders.decoy)
    _warm_up(kind, folders)
    limit_memory(MEMORY)
    known: set[tuple[str, str, str]] = set()
    end, last = time.monotonic() + seconds, number + most
    while time.monotonic() < end and (not most or number < last):
        out.write(json.dumps({"start": number}) + "\n")
        case = make_case(kind, folders, seed, number)
        found = run_case(kind, guard, folders, case)
        line = {"number": number, **asdict(found), "steps": list(range(case.steps))}
        if found.outcome == "failed" and found.signature not in known:
            known.add(found.signature)
            line["steps"] = smallest(kind, guard, folders, (seed, number), case.steps, found)
        out.write(json.dumps(line) + "\n")
        number += 1
        if number % 50 == 0:
            gc.collect()
    out.write(json.dumps({"done": number}) + "\n")


def _warm_up(kind: Kind, folders: Folders) -> None:
    """Read unchanged seeds, each with one target and one with all: it imports what reading needs. Refused ones are fine."""
    import contextlib
    import shutil

    from memrewrite.errors import MemrewriteError

    loaded = 0
    first, *others = kind.files(folders.seeds)
    pairs = [*((first, target) for target in dict.fromkeys(kind.targets)), *((other, kind.targets[0]) for other in others)]
    for file, target in pairs:
        shutil.rmtree(folders.case, ignore_errors=True)
        shutil.copytree(file.parent, folders.case)
        with contextlib.suppress(MemrewriteError):
            target(folders.case, folders.case / file.name)
            loaded += 1
    if not loaded and not kind.unread:
        raise RuntimeError("no file is read without an error before it is changed: the cases would show nothing")


if __name__ == "__main__":
    main(sys.argv[1:])
