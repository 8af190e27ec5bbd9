"""Tables of finished runs: one row per setting, with every seed, the mean and the standard deviation."""

from __future__ import annotations

import platform
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from statistics import mean, stdev

from settings import Json, Setting


def groups(records: list[Json]) -> dict[str, list[Json]]:
    """Records by the label of their setting, in order."""
    found: dict[str, list[Json]] = defaultdict(list)
    for record in records:
        found[Setting(**record["setting"]).label].append(record)
    return dict(found)


def table(records: list[Json]) -> str:
    """A Markdown table."""
    lines = [
        "| setting | recall %, each seed | recall % | bits a fact | CPU ms a step | state bytes a slot | slots read % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups(records).items():
        each = " / ".join(f"{run['recall']:.1f}" for run in runs)
        pool = runs[0]["usage"]["pools"][0] if runs[0]["usage"] else None
        numbers = (
            _spread([run["recall"] for run in runs], 1),
            _spread([run["bits"] for run in runs], 2),
            f"{mean(run['cpu_ms'] for run in runs):.0f}",
            "" if pool is None else f"{runs[0]['state_bytes'] / pool['slots']:.0f}",
            "" if pool is None else f"{100 * mean(run['usage']['pools'][0]['share_read'] for run in runs):.0f}",
        )
        lines.append(f"| {name} | {each} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _spread(numbers: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    around = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{around}"


def environment() -> Json:
    """Where and when the numbers were measured."""
    found = {name: version(name) for name in ("torch", "transformers", "memrewrite", "airportsdata")}
    return {"date": date.today().isoformat(), "python": platform.python_version(), "machine": platform.machine()} | found
