"""Writes the winners of a sweep into the table of plans: `python benchmarks/gpu/sweep.py build/gpu/results.jsonl`.

A plan replaces the launcher's own only if it is at least GAIN faster on average over the patterns of reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memrewrite.kernels import triton_plans

GAIN = 0.02  # below it, the difference is noise


def winners(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries for kernels/plans.json from the lines of a record; the device is that of the last run before a line."""
    run: dict[str, Any] = {}
    best: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
    for line in lines:
        if line.get("kind") == "run":
            run = line
        facts = line.get("extra") or {}
        if (
            line.get("kind") != "result"
            or line.get("section") != "sweep"
            or line.get("status") != "ok"
            or not facts.get("plan")
        ):
            continue
        device = run["device"]["name"]
        key = (device, json.dumps([facts["kernel"], facts["dtype"], facts["size"]]))
        ratios = [facts["times"][pattern] / facts["own"][pattern] for pattern in facts["own"]]
        relative = sum(ratios) / len(ratios)
        entry = {
            "device": device, "date": run["date"][:10], "triton": str(run["versions"]["triton"]), "kernel": facts["kernel"],
            "dtype": facts["dtype"], "size": facts["size"], "plan": facts["plan"],
            "ms": round(sum(facts["times"].values()), 4), "default_ms": round(sum(facts["own"].values()), 4),
        }  # fmt: skip
        if relative <= 1 - GAIN and relative < best.get(key, (1.0, {}))[0]:
            best[key] = (relative, entry)
    return [entry for _, entry in best.values()]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old entries, replaced by new ones for the same device, kernel, dtype and size; sorted."""

    def key(entry: dict[str, Any]) -> tuple[str, str, str, list[int]]:
        return entry["device"], entry["kernel"], entry["dtype"], entry["size"]

    replaced = [key(entry) for entry in new]
    return sorted([*(entry for entry in old if key(entry) not in replaced), *new], key=key)


def text(entries: list[dict[str, Any]]) -> str:
    """The file, one entry a line."""
    rows = ",\n".join("  " + json.dumps(entry) for entry in entries)
    return f'{{\n "plans": [\n{rows}\n ]\n}}\n' if entries else '{\n "plans": []\n}\n'


def main(argv: Sequence[str]) -> int:
    """Merge the winners of a record into the table, check it, and print what was added."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.jsonl of a run of benchmarks/gpu with the section sweep")
    parser.add_argument("--plans", type=Path, default=triton_plans.FILE, help="the table (kernels/plans.json)")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = winners(lines)
    content = text(merged(triton_plans.entries(args.plans), found))
    proposed = args.plans.with_suffix(".proposed")
    proposed.write_text(content, encoding="utf-8")
    triton_plans.table(proposed)  # an invalid table does not replace the valid one
    proposed.replace(args.plans)
    for entry in found:
        gain = 1 - entry["ms"] / entry["default_ms"]
        print(f"{entry['kernel']} {entry['dtype']} {entry['size']}: {entry['plan']}, {gain:.0%} less time")
    print(f"{len(found)} plans written to {args.plans}")
    return 0
