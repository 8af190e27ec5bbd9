"""The plan on the HTML page: totals before and after, and the new layers with lines to the pools that they share."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from memrewrite.cli.page_html import Html, breakable, count, short, tag
from memrewrite.cli.text_output import size

if TYPE_CHECKING:
    from memrewrite.cli.page_marks import Marks
    from memrewrite.plans import Plan, Substitution

ROW_HEIGHT = 40  # of a row of the wiring, in SVG units; the picture is stretched to the rows
MAX_NUMBERS = 8  # more block numbers are abbreviated
MAX_ROWS = 12  # with more layers, consecutive blocks share one row


class _Row(NamedTuple):
    """One row of the wiring: the layer of one site, or the layers of consecutive blocks."""

    layers: list[Substitution]

    @property
    def pool(self) -> str | None:
        return self.layers[0].pool


def plan_section(plan: Plan, marks: Marks) -> Html:
    """The section of the plan: totals, then the wiring."""
    replaced = sum(layer.placement == "replace" for layer in plan.substitutions)
    kept = len(plan.substitutions) - replaced
    counts = [
        f"{count(replaced, 'MLP')} replaced" if replaced else "",
        f"{kept:,} kept, with a layer in parallel" if kept else "",
    ]
    return tag(
        "section",
        tag("div", tag("h2", "The recipe"), tag("p", ", ".join(filter(None, counts))), class_="title"),
        _totals(plan),
        _wiring(plan, marks),
        class_="plan",
    )


def _totals(plan: Plan) -> Html:
    before, after = plan.before(), plan.after()
    rows = [
        ("Parameters", before.parameters, after.parameters, short),
        ("Stored", before.parameter_bytes, after.parameter_bytes, size),
        ("FLOPs per token", before.flops, after.flops, short),
        ("Read per token", before.bytes_read, after.bytes_read, size),
    ]
    cells = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", _bars(old, new), tag("span", tag("s", text(old)), " → ", tag("strong", text(new))), _change(old, new)),
        )
        for name, old, new, text in rows
    ]
    return tag("dl", *cells, class_="totals")


def _bars(old: int, new: int) -> Html:
    """Two bars, before above after, at the same scale."""
    most = max(old, new, 1)
    bars = [
        tag("rect", y=y, width=f"{max(100 * value / most, 0.6):.2f}", height=5, class_=kind)
        for y, value, kind in ((0, old, "before"), (7, new, "after"))
    ]
    return tag("svg", *bars, viewBox="0 0 100 12", preserveAspectRatio="none", class_="bars", role="presentation")


def _change(old: int, new: int) -> Html:
    return tag("span", f"×{new / old:.3g}" if old else "new", class_="change")


def _wiring(plan: Plan, marks: Marks) -> Html:
    rows, pools = _rows(plan), list(plan.pools)
    height = max(ROW_HEIGHT * len(rows), 1)
    lines = []
    for i, row in enumerate(rows):
        if row.pool is not None:
            start, end = ROW_HEIGHT * (i + 0.5), height * (pools.index(row.pool) + 0.5) / len(pools)
            lines.append(tag("path", d=f"M0,{start:g} C60,{start:g} 40,{end:g} 100,{end:g}"))
    wires = tag("svg", *lines, viewBox=f"0 0 100 {height}", preserveAspectRatio="none", class_="wires", role="presentation")
    return tag(
        "div",
        tag("ol", *(_layer(row, marks) for row in rows), class_="layers"),
        wires if pools else None,
        tag("div", *(_pool(plan, i, name) for i, name in enumerate(pools)), class_="pools") if pools else None,
        class_="wiring",
    )


def _rows(plan: Plan) -> list[_Row]:
    if len(plan.substitutions) <= MAX_ROWS:
        return [_Row([layer]) for layer in plan.substitutions]
    similar = groupby(plan.substitutions, lambda s: (s.site.tower, s.kind, s.placement, s.pool))
    return [_Row(list(group)) for _, group in similar]


def _layer(row: _Row, marks: Marks) -> Html:
    first = row.layers[0]
    where = [f"{s.site.block}" for s in row.layers if s.site.block is not None]
    name: Html | str = tag("a", breakable(first.site.path or "(root)"), href=f"#{marks.anchors[first.site.path]}")
    if len(row.layers) > 1:
        numbers = where if len(where) <= MAX_NUMBERS else [*where[:3], "…", where[-1]]
        blocks = f" {', '.join(numbers)} · {len(row.layers)} layers".replace(", …,", " …")
        name = tag("a", breakable(first.site.tower), blocks, href=f"#{marks.anchors[first.site.path]}")
    title = f"blocks {', '.join(where)}" if len(row.layers) > 1 else None
    to = tag("span", f" → {first.pool}", class_="to") if first.pool else None
    how = {"replace": "replaces it", "parallel": "in parallel"}[first.placement]
    return tag("li", tag("code", name), tag("span", tag("b", first.kind), f" {how}", to), title=title)


def _pool(plan: Plan, number: int, name: str) -> Html:
    spec, cost = plan.pools[name], plan.pools[name].cost()
    layers = sum(layer.pool == name for layer in plan.substitutions)
    facts = [
        ("slots", f"{spec.slots:,} = {spec.keys:,}²"),
        ("width", " + ".join(f"{width:,}" for width in spec.widths)),
        ("parameters", short(cost.parameters)),
        ("stored", f"{size(cost.parameter_bytes)}, {spec.dtype}"),
    ]
    return tag(
        "div",
        tag("h3", "pool ", tag("code", name)),
        tag("p", f"read by {count(layers, 'layer')}"),
        tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts)),
        id=f"pool-{number}",
        class_="pool",
    )
