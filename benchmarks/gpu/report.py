"""The summary of a record: progress lines, a table for the terminal, a page for docs/measurements.md, and JSON.

Flow: record → results, each marked if its kernels are wrong or unchecked → cells → columns of the necessary width; a result
with several targets has several rows. Without torch, so that a summary can be made on every machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sections
from record import WHOLE, CaseRecord, Contents
from results import Result

HEAD = ("section", "case", "ms", "GB/s", "of floor", "times as fast as", "target", "met", "note")
RIGHT = {2, 3, 4}
WIDEST = 58  # longer cells are truncated, in the terminal only
MET = {True: "yes", False: "NO", None: "not decided"}
CORRECTNESS = "correctness"


def conclude(folder: Path, contents: Contents, also: Path | None = None) -> int:
    """Write gpu.json and table.md into `folder`, and the JSON to `also`; print table and errors. Returns the exit code."""
    results = all_results(contents)
    summary = json.dumps(record(contents, results), indent=2, ensure_ascii=False) + "\n"
    for path, text in ((folder / "gpu.json", summary), (folder / "table.md", page(contents, results)), (also, summary)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print()
    print(table(results))
    wrong = [result for result in results if result.status.startswith(("WRONG:", "FAILED"))]
    for result in wrong:
        print(f"benchmarks/gpu: {result.section}, {result.case}: {result.status}", file=sys.stderr)
    return 1 if wrong else 0


# ------------------------------------------------------------------------------------------------------------- results


def all_results(contents: Contents) -> list[Result]:
    """The lines of all cases in the order of the sections, each failure a line of its own."""
    order = [*sections.NAMES, *(name for name in contents.cases if name not in sections.NAMES)]
    marks = {section.name: mark(contents, section) for section in sections.SECTIONS}
    results = []
    for name in order:
        for case, recorded in contents.cases.get(name, {}).items():
            results += [_marked(result, marks.get(name, "")) for result in recorded.results]
            if status := _failure(recorded):
                results.append(Result(name, case if case != WHOLE else "all cases", status))
    return results


def mark(contents: Contents, section: sections.Section) -> str:
    """Why the times of a section are not comparable: a kernel that it measures is wrong, or was not checked; else ""."""
    own = contents.cases.get(section.name, {})  # a section may have checks of its own
    checks = {name: case for name, case in contents.cases.get(CORRECTNESS, {}).items() if concerns(section, name)}
    for name, case in {**own, **checks}.items():
        if case.why.startswith("WRONG"):
            return f"WRONG kernel: times are not comparable ({name})"
    missing = [name for name, case in checks.items() if case.state != "done"]
    if missing:
        return f"kernel not checked ({missing[0]})"
    return "kernel not checked" if section.checks and not checks else ""


def concerns(section: sections.Section, check: str) -> bool:
    """True if the section times the kernel of this correctness case; a case that names no known kernel concerns all."""
    known = tuple({prefix for each in sections.SECTIONS for prefix in each.checks})
    return check.startswith(section.checks) or (bool(section.checks) and not check.startswith(known))


def _marked(result: Result, why: str) -> Result:
    timed = result.ms is not None or result.status == "rehearsed"
    return replace(result, status=why) if why and timed else result


def _failure(case: CaseRecord) -> str:
    """The status of a case that is not done; "" if it is done."""
    if case.state == "failed":
        return case.why
    return {"listed": "not run (the run ended before)", "begun": "FAILED: the run ended in this case"}.get(case.state, "")


# ---------------------------------------------------------------------------------------------------------------- JSON


def record(contents: Contents, results: list[Result]) -> dict[str, Any]:
    """The JSON: device, versions, every result, and how many targets were met."""
    met = [met for result in results for _, met in result.targets]
    run = contents.runs[0] if contents.runs else {}
    return {
        "benchmark": "gpu",
        "date": run.get("date"),
        "rehearsal": run.get("rehearsal"),  # a rehearsal has no times
        "seconds": round(contents.seconds, 1),
        "device": run.get("device", {}),
        "versions": run.get("versions", {}),
        "ceilings": {
            "copy_gbps": _rate(contents.values.get("copy"), 1e9),
            "matmul_tflops": _rate(contents.values.get("matmul"), 1e12),
        },
        "targets": {"met": met.count(True), "missed": met.count(False), "open": met.count(None)},
        "unreadable_lines": contents.torn,
        "rows": [asdict(result) for result in results],
    }


def _rate(rate: float | None, unit: float) -> float | None:
    return None if rate is None else round(rate / unit, 1)


# --------------------------------------------------------------------------------------------------------------- tables


def progress(line: dict[str, Any]) -> str:
    """A line of the record as text, with the numbers of a result; "" for lines that say nothing new.

    A line that cannot be formatted is returned as it is: it must not end the run.
    """
    try:
        return _progress(line)
    except (KeyError, TypeError, ValueError):
        return json.dumps(line, ensure_ascii=False)


def _progress(line: dict[str, Any]) -> str:
    at = f"{line.get('section')}: "
    if line["kind"] == "failed":
        return f"{at}{line['of'] or 'all cases'}: {line['why']}"
    if line["kind"] != "result":
        return ""
    parts = [line["status"]]
    if line["ms"] is not None:
        parts = [f"{line['ms']:.4g} ms"]
    if line["moved"]:
        parts.append(f"{line['moved'] / 1e9:.4g} GB moved")
    if line["gbps"] is not None:
        parts.append(f"{line['gbps']:.0f} GB/s")
    if line["of_floor"] is not None:
        parts.append(f"{line['of_floor']:.0%} of floor")
    for name, taken in line["rivals"].items():
        ratio = f" ({line['ratios'][name]:.2f}×)" if name in line["ratios"] else ""
        parts.append(f"{name} {taken}" if isinstance(taken, str) else f"{name} {taken:.4g} ms{ratio}")
    parts += [f"{text}: {MET[met]}" for text, met in line["targets"]]
    return at + ", ".join([line["case"] + ": " + parts[0], *parts[1:], *filter(None, [line["note"]])])


def table(results: list[Result]) -> str:
    """The table as text; if all correctness checks passed, they are one line."""
    lines = _rows(results)
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


def page(contents: Contents, results: list[Result]) -> str:
    """The table as Markdown, with device, date and versions."""
    unknown: dict[str, Any] = {"date": "unknown", "rehearsal": False, "device": {}, "versions": {}}
    run = contents.runs[0] if contents.runs else unknown
    summary = record(contents, results)
    device, versions = (", ".join(f"{k} {v}" for k, v in run[name].items()) for name in ("device", "versions"))
    rates, targets = summary["ceilings"], summary["targets"]
    lines = [
        f"`python benchmarks/gpu`, {run['date'][:10]}, {summary['seconds']:.0f} s. Device: {device}. Versions: {versions}.",
        "",
        f"Measured peak rates: copy {rates['copy_gbps']} GB/s, bf16 matmul {rates['matmul_tflops']} TFLOP/s. "
        f"Targets: {targets['met']} met, {targets['missed']} missed, {targets['open']} not decided.",
    ]
    if run["rehearsal"]:
        lines += ["", "A rehearsal on the CPU: no times."]
    if contents.torn:
        lines += ["", f"{contents.torn} line(s) of the record could not be read."]
    lines += ["", _markdown_row(HEAD), "|" + "|".join("--:" if i in RIGHT else "---" for i in range(len(HEAD))) + "|"]
    lines += [_markdown_row(row) for row in _rows(results)[1:]]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rows(results: list[Result]) -> list[tuple[str, ...]]:
    """The cells of all rows, the head first."""
    return [HEAD, *(row for result in _shortened(results) for row in _cells(result))]


def _shortened(results: list[Result]) -> Iterable[Result]:
    """The results, where the passed checks of a section are one line."""
    for section in dict.fromkeys(result.section for result in results):
        mine = [result for result in results if result.section == section]
        checks = [result for result in mine if result.status == "ok" and result.ms is None and not result.targets]
        if checks:
            errors = {r.case: float(r.note.split()[-1]) for r in checks if r.note.startswith("relative error")}
            worst = max(errors, key=errors.__getitem__, default="")
            note = f"largest relative error {errors[worst]:.1e} ({worst})" if worst else ""
            yield Result(section, f"{len(checks)} checks passed", note=note)
        yield from (result for result in mine if result not in checks)


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
