"""Faults for the tests of this benchmark: `GPU_BENCHMARK_FAULTS="forward:0=exit,topk:1=hang"` breaks these cases by number.

A faulty case first yields one real result, then fails in one of the ways of `fault`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import NoReturn

from harness import Bench
from results import Case, Result, Stop

VARIABLE = "GPU_BENCHMARK_FAULTS"


def injected(section: str, cases: list[Case]) -> list[Case]:
    """The cases, with the faults of the environment variable."""
    cases = list(cases)
    for text in filter(None, os.environ.get(VARIABLE, "").split(",")):
        at, kind = text.split("=")
        name, number = at.split(":")
        if name == section:
            case = cases[int(number)]
            cases[int(number)] = Case(case.name, partial(_faulty, case=case, kind=kind))
    return cases


def _faulty(bench: Bench, case: Case, kind: str) -> Iterator[Result]:
    for result in case.run(bench):
        yield result
        break
    fault(bench, kind)


def fault(bench: Bench, kind: str) -> NoReturn:
    """Fail as a case may fail: `wrong`, `error`, `sticky`, `hang`, `exit`, or `crash`."""
    if kind == "wrong":
        raise Stop("an injected fault")
    if kind == "sticky":  # as after an illegal memory access: every later use of the device fails
        bench.free = bench.sync = bench.race = _broken  # type: ignore[method-assign,assignment]
        _broken()
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if kind == "exit":
        os._exit(0)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    raise RuntimeError("an injected fault")


def _broken(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("CUDA error: an injected fault that persists")
