"""The command line: runs a study, prints and writes what it found."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from groups import grouped
from runs import Runs
from settings import Json
from studies import STUDIES, TUNING_SEED, Study
from summary import draw, summary
from tables import environment, tuning


def main(description: str) -> None:
    """Run the study that the command line names."""
    parser = argparse.ArgumentParser(description=description, prog="python benchmarks/facts", epilog=_studies())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", choices=STUDIES, nargs="?", default="models", metavar="STUDY", help="default: models")
    parser.add_argument("--seeds", type=int, help="runs of every setting (default: 3; for quick, smoke and gpu 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per CPU)")
    parser.add_argument("--minutes", type=float, help="begin no run after that time; the next call goes on")
    parser.add_argument("--out", type=Path, default=Path("build/facts"), help="folder of finished runs and results")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing; plots need matplotlib")
    options = parser.parse_args()
    study = STUDIES[options.study]
    runs = Runs(options.out, options.jobs, options.minutes)
    try:
        settings = study.settings(runs, options.seeds or study.seeds)
        records = runs(settings)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with the finished runs")
    tried = [record for setting, record in runs.records.items() if setting.seed == TUNING_SEED]
    _write(options, study, records, tried)
    if len(records) < len(set(settings)):
        sys.exit(f"{len(records)} of {len(set(settings))} runs are finished; the same command goes on")
    if problem := study.problem(records):
        sys.exit(f"failed: {problem}")


def _write(options: argparse.Namespace, study: Study, records: list[Json], tried: list[Json]) -> None:
    """Print and write what was found."""
    groups = grouped(records)
    parts = [study.question, *([tuning(tried)] if tried else []), summary(groups), _time([*tried, *records])]
    said = "\n\n".join(parts)
    print(said)
    (options.out / f"{options.study}.md").write_text(said + "\n")
    found = {"environment": environment(), "question": study.question, "tuning": tried, "runs": records}
    (options.out / f"{options.study}.json").write_text(json.dumps(found, indent=1))
    if not options.no_plots:
        draw(groups, options.out, options.study)


def _time(records: list[Json]) -> str:
    """The processor time of all runs that were processes of their own."""
    seconds = [record["processor_seconds"] for record in records if "processor_seconds" in record]
    return f"Processor time of {len(seconds)} runs: {sum(seconds) / 60:.1f} minutes."


def _studies() -> str:
    return "studies:\n" + "\n".join(f"  {name:10} {study.question}" for name, study in STUDIES.items())
