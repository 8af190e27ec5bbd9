"""Trains models on the facts of airports and compares what they recall: `python benchmarks/facts STUDY`.

Setting C: 10,000 airports (about 139 kbit, three times the capacity of the dense model), a Llama of 8 blocks and width 32,
memory layers in blocks 2, 4 and 6. Each run is a process with one thread; `--jobs` run at a time. A finished run is kept in
`--out` and not repeated. Prints a table of every run and of the mean ± standard deviation over the seeds, and writes
`STUDY.json` and the learning curves `STUDY.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from settings import Json, Setting
from studies import STUDIES
from tables import environment, table

HERE = Path(__file__).parent


def main() -> None:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python benchmarks/facts")
    parser.add_argument("study", choices=STUDIES, help="the question: start, rates, rules, training, models or smoke")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of every setting (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per CPU)")
    parser.add_argument("--out", type=Path, default=Path("build/facts"), help="folder of finished runs and results")
    parser.add_argument("--plot", action="store_true", help="draw the learning curves; needs matplotlib")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = STUDIES[options.study](options.seeds)
    records = _records(settings, options.out, options.jobs)
    print(table(records))
    (options.out / f"{options.study}.json").write_text(json.dumps({"environment": environment(), "runs": records}, indent=1))
    if options.plot:
        from plots import curves

        curves(records, options.out / f"{options.study}.png")


def _records(settings: list[Setting], out: Path, jobs: int) -> list[Json]:
    """The record of every setting, in order; missing ones are run."""
    begun, missing = time.perf_counter(), [s for s in settings if not _file(out, s).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        for done, setting in enumerate(pool.map(lambda s: _run(s, out), missing), 1):
            left = (time.perf_counter() - begun) / done * (len(missing) - done)
            print(f"{done}/{len(missing)} {setting.key}: about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    return [json.loads(_file(out, setting).read_text()) for setting in settings]


def _run(setting: Setting, out: Path) -> Setting:
    """Run one setting in a process of its own, and keep its record."""
    command = [sys.executable, str(HERE / "one.py"), json.dumps(setting.to_json())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"the run {setting.key!r} failed:\n{done.stderr[-3000:]}")
    temporary = _file(out, setting).with_suffix(".part")
    temporary.write_text(done.stdout)
    temporary.replace(_file(out, setting))
    return setting


def _file(out: Path, setting: Setting) -> Path:
    return out / f"{setting.key.replace(' ', '_')}.run.json"


if __name__ == "__main__":
    main()
