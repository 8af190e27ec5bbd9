"""The results of `zoo.py` as totals, as a table on the terminal, and as a page of the docs."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from typing import Any

Row = dict[str, Any]
KINDS = ("none", "graph", "span", "module")  # of bindings; the first one that a site has is counted
STEADY = ("bit-equal", "random forward: not compared")  # results of `score.surgery` if nothing is wrong
TOTALS = ("truth", "found", "missed", "partial", "invented", *KINDS)


def totals(rows: list[Row]) -> dict[str, Any]:
    """Sums over all rows, recall and precision, and the names of rows with an error."""
    total: dict[str, Any] = dict.fromkeys(TOTALS, 0)
    for row in rows:
        for key in ("truth", "found"):
            total[key] += row.get(key, 0)
        for key in ("missed", "partial", "invented"):
            total[key] += len(row.get(key, ()))
        for kind, count in row.get("bindings", {}).items():
            total[kind] += count
    claimed = total["found"] + total["partial"] + total["invented"]
    total["recall"] = total["found"] / max(1, total["truth"])
    total["precision"] = total["found"] / max(1, claimed)
    for check in ("null", "null_train", "locality"):
        total[check] = dict(Counter(row["checks"][check][0] for row in rows if check in row.get("checks", {})))
    total["surgery"] = dict(Counter(row["surgery"] for row in rows if "surgery" in row))
    total["wrong"] = [row["name"] for row in rows if flaws(row)]
    return total


def flaws(row: Row) -> str:
    """The errors of a row in words, or ""."""
    errors = [f"{key}: {', '.join(row[key][:3])}" for key in ("missed", "partial", "invented") if row.get(key)]
    errors += [f"{name}: {sentence}" for name, (outcome, sentence) in row.get("checks", {}).items() if outcome == "failed"]
    if row.get("surgery", STEADY[0]) not in STEADY:
        errors.append(f"surgery: {row['surgery']}")
    return "; ".join([*errors, *([row["error"]] if "error" in row else [])])


def cells(row: Row) -> list[str]:
    """The cells of a row in the table."""
    captured, checks = row.get("captured", "–"), row.get("checks", {})
    how = "whole" if captured.startswith("whole") else captured.partition(" (")[0]
    binding = ", ".join(f"{row['bindings'][k]} {k}" for k in reversed(KINDS) if k in row.get("bindings", {}))
    seconds = row.get("seconds", {})
    spent = [f"{seconds[verb]:.1f}" if verb in seconds else "–" for verb in ("inspect", "apply")]
    found = f"{row.get('found', 0)} / {row.get('truth', '?')}"
    return [row["name"], how, found, binding or "–", *(_outcome(checks, name) for name in ("null", "null_train")), *spent]


def _outcome(checks: dict[str, list[str]], name: str) -> str:
    outcome, sentence = checks.get(name, ["–", ""])
    if outcome == "skipped":
        return f"skipped: {sentence.partition(':')[0]}"
    return {"passed": "bit-equal", "failed": "DIFFERS"}.get(outcome, outcome)


HEAD = ("architecture", "captured", "found / truth", "substitutable by", "null, eval", "null, train", "inspect, s", "apply, s")


RULES = """\
What counts as an MLP: two matrices, or three with a gate, with a nonlinearity between them, that compute each token by itself
and whose output is added to the residual stream that their input was taken from. Attention, heads, embeddings, routers,
adapters (at most half as wide inside as outside) and projections between widths are none. Where a step of the stream first
mixes tokens and has no residual sum before the matrices, these are an MLP only if they widen the stream inside:

- after a convolution of each channel (depthwise), two pointwise convolutions that keep the width, or narrow it, belong to the
  convolution: the local part of a vision block. Those that widen are the MLP of that block (ConvNeXt).
- in a block of attention and MLP whose output one further linear projects into the stream, as hybrids share it among their
  state-space layers, the matrices that widen are the MLP, and the projection stays. A chain of projections without
  attention, or an attention's own nonlinear output projection, is none.
"""


STAGES = {
    "locate": "every MLP of the ground truth is found",
    "parallel": "layers in parallel with every MLP, with zero output: outputs are bit-equal",
    "replace": "layers replace MLPs, with all checks",
    "train": "five steps with dense gradients",
    "fused": "five steps with fused updates",
    "saveload": "`save`, and `load` in a process that has not seen the model: bit-equal",
    "hf": "`save_pretrained` and `from_pretrained`",
    "generate": "`generate`: the original's tokens in parallel; with and without cache",
    "compile": "`torch.compile(fullgraph=True)`",
    "export": "`torch.export`",
    "deepcopy": "a copy is independent",
    "onnx": "export, and ONNX Runtime's outputs",
    "emit": '`emit="graph"`: the exported program rewritten, bit-equal to the original',
}
OUTCOMES = {
    "ok": "ok",
    "base": "the original cannot",
    "na": "does not apply",
    "skip": "skipped: no MLP, or a stage before failed",
    "fail": "failed",
    "timeout": "too slow",
    "crash": "crashed",
}


def chain_section(results: list[Row]) -> list[str]:
    """The lines of the page on the whole chain: how often each stage had each outcome; and what failed."""
    counts = {stage: Counter(str(row["stages"].get(stage, {}).get("status", "crash")) for row in results) for stage in STAGES}
    seen = [outcome for outcome in OUTCOMES if any(count[outcome] for count in counts.values())]
    wrong = [
        f"- `{row['case']}`, {stage}: {row['stages'][stage].get('reason', '')[:200]}"
        for row in results
        for stage in STAGES
        if row["stages"].get(stage, {}).get("status", "crash") in ("fail", "timeout", "crash")
    ]
    return [
        "",
        "## The whole chain",
        "",
        f"The zoo's `chain.py` on {len(results)} of its architectures: how many models each stage works for.",
        "",
        "| stage | what | " + " | ".join(OUTCOMES[outcome] for outcome in seen) + " |",
        "|" + "---|" * (len(seen) + 2),
        *(f"| {s} | {what} | " + " | ".join(str(counts[s][o] or "") for o in seen) + " |" for s, what in STAGES.items()),
        *(["", *wrong] if wrong else []),
    ]


def page(rows: list[Row], command: str, chain: list[Row]) -> str:
    """The docs page; `chain`: the results of the zoo's `chain.py`, which may be empty."""
    total = totals(rows)
    versions = f"torch {version('torch')}, transformers {version('transformers')}, {date.today().isoformat()}"
    lines = [
        "# The zoo",
        "",
        f"Generated by `{command}` ({versions}); not to be edited by hand.",
        "",
        f"{len(rows)} architectures, tiny, with random weights. MLPs found: {total['found']} of {total['truth']}, and "
        f"{total['invented']} invented, {total['partial']} in part: recall {total['recall']:.4f}, "
        f"precision {total['precision']:.4f}.",
        "*null*: with the original MLPs extracted and inserted where the layers will be, all outputs are bit-equal. A memory",
        "with zero output in parallel with every MLP: "
        + ", ".join(f"{n} {result}" for result, n in total["surgery"].items())
        + ".",
        "",
        *RULES.splitlines(),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
    ]
    wrong = [f"- `{row['name']}`: {flaws(row)}" for row in rows if flaws(row)]
    if wrong:
        lines += ["", "What is wrong:", "", *wrong]
    return "\n".join([*lines, *(chain_section(chain) if chain else [])]) + "\n"


def show(rows: list[Row]) -> None:
    """Print the table, the errors, and the totals."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(width=None if sys.stdout.isatty() else 150), Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row), style="red" if flaws(row) else None)
    console.print(table)
    for row in rows:
        if flaws(row):
            console.print(f"{row['name']}: {flaws(row)}", style="red", markup=False)
    total = totals(rows)
    wrong = total.pop("wrong")
    console.print(f"{len(rows)} architectures, {len(wrong)} with errors; {total}", markup=False)
