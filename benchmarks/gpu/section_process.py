"""The process of one section: runs its cases one after the other, and records every result at once.

A case that fails does not stop the others. After each case the device must still work: a CUDA error that persists ends the
process, and the record says why the other cases were not run.
"""

from __future__ import annotations

import gc
import importlib
import math
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import faults
import torch
from harness import Bench, reason
from probe import interpreted
from record import WHOLE, Record
from results import Case, Skip, Stop
from sections import Section


def measure(section: Section, record: Record, bench: Bench, share: tuple[int, int] = (0, 1)) -> None:
    """Run the cases that are not done, those that failed before last; of n processes, number i runs every n-th case."""
    known = record.read()
    for name, value in known.values.items():
        setattr(bench, name, math.nan if value is None else value)
    try:
        cases = uniquely_named(getattr(importlib.import_module(section.module), section.function)(bench))
    except Exception as error:  # noqa: BLE001 - recorded
        record.append("failed", section=section.name, of=WHOLE, why=_status(error))
        return
    cases = faults.injected(section.name, cases)
    gc.freeze()  # what is imported by now stays: collections after each case are faster without it
    record.append("cases", section=section.name, names=[case.name for case in cases])
    before = known.cases.get(section.name, {})
    states = {case.name: before[case.name].state if case.name in before else "listed" for case in cases}
    waiting = [case for case in cases[share[0] :: share[1]] if states[case.name] != "done"]
    waiting.sort(key=lambda case: states[case.name] != "listed")
    for i, case in enumerate(waiting):
        run(section, record, bench, case)
        try:
            tidy(bench)
        except Exception as error:  # noqa: BLE001 - recorded
            for later in waiting[i + 1 :]:
                why = f"not run (the device does not work after {case.name!r}: {reason(error)})"
                record.append("failed", section=section.name, of=later.name, why=why)
            return


def run(section: Section, record: Record, bench: Bench, case: Case) -> None:
    """One case. It is done when its results are recorded and the device has finished without an error."""
    start = time.monotonic()
    record.append("begin", section=section.name, of=case.name)
    try:
        for result in case.run(bench):
            record.result(section.name, case.name, result)
        bench.sync()
    except Exception as error:  # noqa: BLE001 - recorded
        record.append("failed", section=section.name, of=case.name, why=_status(error))
        return
    for name, value in bench.kept.items():
        record.append("value", name=name, value=None if math.isnan(value) else value)
    bench.kept.clear()
    record.append("done", section=section.name, of=case.name, seconds=round(time.monotonic() - start, 2))


def tidy(bench: Bench) -> None:
    """Free what the case left; raises the error of a device that does not work any more."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    bench.free()
    bench.sync()


def uniquely_named(cases: Iterable[Case]) -> list[Case]:
    """The cases; where a name occurs again, it gets a number."""
    found: dict[str, Case] = {}
    for case in cases:
        name, number = case.name, 1
        while name in found:
            number += 1
            name = f"{case.name} ({number})"
        found[name] = Case(name, case.run)
    return list(found.values())


def _status(error: Exception) -> str:
    """What the record says of an error: a wrong kernel, something that this machine does not have, or a failure."""
    if isinstance(error, Stop):
        return f"WRONG: {error}"
    if isinstance(error, Skip):
        return f"not run ({error})"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("memrewrite"):
        return f"not run ({reason(error)})"
    traceback.print_exception(error)
    return f"FAILED: {reason(error)}"


def main(section: Section, record: Record, rehearse: bool, share: tuple[int, int], library: Path | None, end: float) -> int:
    """Measure in this process, until `end`. An error before the first case is recorded as the section's."""
    torch.manual_seed(0)
    try:
        bench = Bench(rehearse=rehearse, triton=not rehearse or interpreted(), library=library, end=end)
    except Exception as error:  # noqa: BLE001 - recorded
        record.append("failed", section=section.name, of=WHOLE, why=_status(error))
        return 1
    measure(section, record, bench, share)
    signal.alarm(10)  # ends the process if its cleanup hangs
    return 0
