"""The table that `benchmarks/gpu` prints at the end, and the JSON that it writes.

Flow: results → cells → columns of the necessary width; a result with several targets has several rows.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from harness import Bench, Result

HEAD = ("section", "case", "ms", "GB/s", "of floor", "times as fast as", "target", "met", "note")
RIGHT = {2, 3, 4}
WIDEST = 58  # longer cells are truncated, in the table only
MET = {True: "yes", False: "NO", None: "–"}


def table(results: list[Result]) -> str:
    """The table as text; if all correctness checks passed, they are one line."""
    lines: list[tuple[str, ...]] = [HEAD]
    for result in _shortened(results):
        lines += _cells(result)
    widths = [min(WIDEST, max(len(line[i]) for line in lines)) for i in range(len(HEAD))]
    note = len(HEAD) - 1  # the last column is never truncated
    rows = []
    for line in lines:
        cells = [c if i == note or len(c) <= WIDEST else c[: WIDEST - 1] + "…" for i, c in enumerate(line)]
        rows.append(
            "  ".join(c.rjust(w) if i in RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        )
    rows.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(row.rstrip() for row in rows)


def concluded(file: Path, outcome: dict[str, Any], results: list[Result], where: Callable[[Result], str]) -> int:
    """Write the results to `file`, print the table, print errors with `where` on stderr; returns the exit code."""
    file.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    print()
    print(table(results))
    wrong = [result for result in results if result.status.startswith(("WRONG", "FAILED"))]
    for result in wrong:
        print(f"{where(result)}: {result.status}", file=sys.stderr)
    return 1 if wrong else 0


def _shortened(results: list[Result]) -> Iterable[Result]:
    checks = [r for r in results if r.section == "correctness"]
    if checks and all(r.status == "ok" for r in checks):
        errors = {r.case: float(r.note.split()[-1]) for r in checks if r.note.startswith("relative error")}
        worst = max(errors, key=errors.__getitem__, default="")
        note = f"largest relative error {errors[worst]:.1e} ({worst})" if worst else ""
        yield Result("correctness", f"{len(checks)} checks", note=note)
    else:
        yield from checks
    yield from (r for r in results if r.section != "correctness")


def _cells(result: Result) -> list[tuple[str, ...]]:
    """The rows of a result: the first has all columns, the others have further targets and baselines."""
    ms = "" if result.ms is None else f"{result.ms:.3f}" if result.ms < 100 else f"{result.ms:.0f}"
    note = result.note if result.status == "ok" else ", ".join(filter(None, (result.status, result.note)))
    gbps = "" if result.gbps is None else f"{result.gbps:.0f}"
    floor = "" if result.of_floor is None else f"{result.of_floor:.0%}"
    baselines = [
        f"{name} {result.ratios[name]:.2f}×" if name in result.ratios else f"{name}: {t}" for name, t in result.rivals.items()
    ]
    targets = [(text, MET[met]) for text, met in result.targets]
    rows: list[tuple[str, ...]] = []
    for i in range(max(1, len(baselines), len(targets))):
        first = (result.section, result.case, ms, gbps, floor) if i == 0 else ("",) * 5
        baseline = baselines[i] if i < len(baselines) else ""
        target = targets[i] if i < len(targets) else ("", "")
        rows.append((*first, baseline, *target, note if i == 0 else ""))
    return rows


def record(bench: Bench, results: list[Result], seconds: float) -> dict[str, Any]:
    """The JSON: device, versions, every result, and how many targets were met."""
    met = [met for result in results for _, met in result.targets]
    return {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "rehearsal": bench.rehearse,  # a rehearsal has no times
        "seconds": round(seconds, 1),
        "device": device(bench.rehearse),
        "versions": versions(),
        "ceilings": {"copy_gbps": _rate(bench.copy / 1e9), "matmul_tflops": _rate(bench.matmul / 1e12)},
        "targets": {"met": met.count(True), "missed": met.count(False), "open": met.count(None)},
        "rows": [asdict(result) for result in results],
    }


def _rate(rate: float) -> float | None:
    return None if math.isnan(rate) else round(rate, 1)


def device(rehearse: bool) -> dict[str, Any]:
    """The properties of the device on which the numbers depend."""
    if rehearse:
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str | None]:
    """Versions of all packages that affect times; None for packages that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "memrewrite", "fbgemm_gpu"):
        found[name] = _version(name)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # it may be importable without being installed
        importable = importlib.util.find_spec(name) is not None
        return str(getattr(__import__(name), "__version__", "unknown")) if importable else None
