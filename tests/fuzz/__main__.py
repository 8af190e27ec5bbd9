"""`python -m tests.fuzz`: runs fuzzers, and prints what became of the cases."""

from __future__ import annotations

import argparse
import sys

from .kinds import KINDS
from .runner import Result, fuzz


def main() -> int:
    """Run the kinds that the arguments name; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="a kind of file; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each kind (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases (default: 0)")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of docs/security.md at the end")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="run one case again and print its traceback")
    given = parser.parse_args()
    if given.case:
        kind, _, number = given.case.partition(":")
        results = [fuzz(kind, seconds=600, seed=given.seed, first=int(number), cases=1)]
    else:
        results = []
        for kind in given.kind or KINDS:
            results.append(fuzz(kind, seconds=given.seconds, seed=given.seed))
            show(results[-1])
    if given.case:
        show(results[0], trace=True)
    if given.table:
        print(table(results))
    return int(any(result.failures for result in results))


def show(result: Result, *, trace: bool = False) -> None:
    """Print the counts, and the first case of each cause."""
    print(result.line(), flush=True)
    for failure in sorted(result.failures.values(), key=lambda failure: -failure["count"]):
        print(f"  {failure['count']} × {failure['what'][:150]!r} at {failure['where']}: {failure.get('path')}", flush=True)
        if trace:
            print(failure["trace"])


def table(results: list[Result]) -> str:
    """The counts as a Markdown table."""
    rows = ["| kind of file | cases | loaded | refused | failed | violations |", "|---|---|---|---|---|---|"]
    for result in results:
        numbers = (result.tried, result.counts["loaded"], result.counts["refused"], result.counts["failed"], result.violations)
        rows.append(f"| {result.kind} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    total = [sum(r.tried for r in results), *(sum(r.counts[k] for r in results) for k in ("loaded", "refused", "failed"))]
    total.append(sum(result.violations for result in results))
    return "\n".join([*rows, "| all | " + " | ".join(f"{number:,}" for number in total) + " |"])


if __name__ == "__main__":
    sys.exit(main())
