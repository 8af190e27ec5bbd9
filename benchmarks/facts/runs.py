"""Finished runs, a file for each in a folder; what is missing is trained, each run in its own process, several at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from settings import Json, Setting

ONE = Path(__file__).with_name("one.py")


class Runs:
    """Trains what is missing, says how long it will take, and returns records.

    Args:
        out: Folder of the finished runs. A run that was interrupted is repeated from its start, with the same result.
        jobs: Runs at a time on CPUs, with one thread each; on a CUDA device they run one after the other, in this process.
        minutes: Begin no run after that time. None: no limit.
    """

    def __init__(self, out: Path, jobs: int, minutes: float | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.jobs = out, jobs
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.records: dict[Setting, Json] = {}  # all that were asked for
        self._seconds: dict[str, list[float]] = defaultdict(list)  # per step, by model

    def __call__(self, settings: list[Setting], *, then: list[Setting] | None = None) -> list[Json]:
        """The records of some settings, in their order; without those that there was no time for.

        Args:
            settings: What to train.
            then: What the caller will ask for next, as far as it is known: it counts in the estimate of the time left.
        """
        missing = [s for s in dict.fromkeys(settings) if not self._file(s).exists()]
        later = [s for s in dict.fromkeys(then or []) if not self._file(s).exists()]
        jobs = 1 if any(s.device == "cuda" for s in missing) else self.jobs
        pool = ThreadPoolExecutor(jobs)
        try:
            for number, (setting, trained) in enumerate(zip(missing, pool.map(self._run, missing), strict=True), 1):
                left = self._left(missing[number:] + later) / jobs
                state = f"about {left / 60:.0f} min left" if trained else "no time left"
                print(f"{number}/{len(missing)} {setting}: {state}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after an interruption or a failed run, no other begins
        finished = [setting for setting in dict.fromkeys(settings) if self._file(setting).exists()]
        self.records |= {setting: json.loads(self._file(setting).read_text()) for setting in finished}
        return [self.records[setting] for setting in finished]

    def _run(self, setting: Setting) -> bool:
        """Train one setting and keep its record, if there is time. Returns whether there was."""
        begun = time.monotonic()
        if begun > self._end:
            return False
        record = _in_this_process(setting) if setting.device == "cuda" else _in_its_own(setting)
        temporary = self._file(setting).with_suffix(".part")
        temporary.write_text(record)
        temporary.replace(self._file(setting))
        self._seconds[setting.model].append((time.monotonic() - begun) / setting.steps)
        return True

    def _left(self, settings: list[Setting]) -> float:
        """Seconds for some settings, one after the other, from the runs so far: of the same model, else of all."""
        every = [seconds for measured in self._seconds.values() for seconds in measured] or [0.0]
        return sum(mean(self._seconds.get(s.model) or every) * s.steps for s in settings)

    def _file(self, setting: Setting) -> Path:
        return self.out / f"{setting.key}.run.json"


def _in_its_own(setting: Setting) -> str:
    """The record of a setting, trained in a process of its own."""
    command = [sys.executable, str(ONE), json.dumps(setting.to_json())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"the run {setting} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _in_this_process(setting: Setting) -> str:
    """The record of a setting, trained here: it shares the start of the device and the compiled kernels with other runs."""
    from train import run

    return json.dumps(run(setting))
