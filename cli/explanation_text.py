"""Prints an explanation: the verdict, the facts about its MLPs, and every refusal with its source line.

Flow: the summary → the site, or a table of sites → refusals in full → linears that were no candidates, similar ones in one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memrewrite.cli import text_output

if TYPE_CHECKING:
    from rich.console import Console

    from memrewrite.explanation import Explanation, Finding
    from memrewrite.site import Site

MAX_ROWS = 12  # groups of similar findings that are listed; further groups are only counted


def show_explanation(out: Console, why: Explanation) -> None:
    """Print the answer to `inspect --why`."""
    text_output.line(out, f"{why.verdict}: {why.summary}")
    text_output.line(out, f"captured: {why.captured}")
    if len(why.sites) == 1:
        text_output.line(out)
        _pairs(out, _site(why.sites[0]))
    elif why.sites:
        text_output.line(out)
        text_output.show_sites(out, why.sites)
    for finding, similar in _folded(why, "refused"):
        text_output.line(out, f"\nrefused: {finding.path or '(root)'}{_more(similar)}")
        _pairs(out, _refusal(finding))
    never = list(_folded(why, "never"))
    if never and why.verdict != "mlp":
        text_output.line(out, "\nnot the last matrix of an MLP:")
        rows = [(f"{f.path or '(root)'}{_more(n)}", f.reason, f.source) for f, n in never[:MAX_ROWS]]
        text_output.table(out, ("matrix product with a weight", "because", "at"), rows)
        if len(never) > MAX_ROWS:
            text_output.line(out, f"and {len(never) - MAX_ROWS} more groups: --json lists them all")


def _pairs(out: Console, pairs: list[tuple[str, str]]) -> None:
    for name, text in pairs:
        text_output.line(out, f"  {name:<10}  {text}")


def _site(site: Site) -> list[tuple[str, str]]:
    """The facts about one site, as (name, text) pairs."""
    pairs = [
        ("MLP", site.path or "(root)"),
        ("pattern", f"{site.pattern}, {site.activation}"),
        ("widths", f"{site.d_in:,} → {site.d_hidden:,} → {site.d_model:,}, {site.weights + site.biases:,} parameters"),
        ("calls", f"{site.calls:,} in one forward"),
    ]
    if site.block is not None:
        pairs.append(("block", f"{site.block} of {site.tower_blocks} in {site.tower}"))
    pairs += [("weights" if i == 0 else "", name) for i, name in enumerate(site.parameters)]
    pairs.append(("edited", text_output.edited(site)))
    for binding in site.bindings:
        ends = " + ".join(binding.entries)
        if binding.kind == "none":
            pairs.append(("try", binding.advice or "leave it out"))
        elif ends and ends != binding.exit:
            pairs.append(("", f"{ends} → {binding.exit}"))
        elif binding.exit:
            pairs.append(("", binding.exit))
        if binding.why and binding.kind != "none":
            pairs.append(("because", binding.why))
    return pairs


def _refusal(finding: Finding) -> list[tuple[str, str]]:
    pairs = [("rule", finding.rule), ("because", finding.reason)]
    pairs.append(("node", f"{finding.node}{f' in {finding.at}' if finding.at else ''}"))
    pairs += [("line", finding.source), ("", finding.line), ("try", finding.advice)]
    return [(name, text) for name, text in pairs if text]


def _folded(why: Explanation, outcome: str) -> Iterator[tuple[Finding, int]]:
    """Findings of one outcome in groups that differ only in numbers and node names: the first of each, and the group's size."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in why.findings:
        if finding.outcome == outcome:
            key = re.sub(r"\d+", "*", finding.path), re.sub(r"`[^`]*`", "`", finding.reason)
            groups.setdefault(key, []).append(finding)
    return ((group[0], len(group)) for group in groups.values())


def _more(similar: int) -> str:
    return f" and {similar - 1} similar" if similar > 1 else ""
