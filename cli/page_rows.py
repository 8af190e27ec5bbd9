"""The rows of the HTML page: one MLP, one near miss, one new layer; and the short labels of folded blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memrewrite.cli.page_html import Html, breakable, count, join, short, tag, with_code
from memrewrite.cli.text_output import edited, size
from memrewrite.passes.graphs.provenance import line_at

if TYPE_CHECKING:
    from memrewrite.cli.page_marks import Marks
    from memrewrite.module_node import ModuleNode
    from memrewrite.plans import Plan, Substitution
    from memrewrite.site import NearMiss, Site

PLACEMENT = {"replace": "replaces the MLP", "parallel": "in parallel with the MLP, its output starts at zero"}
HEIGHT, WIDTH = 30, 46  # of the picture of an MLP, in SVG units


def site_row(site: Site, marks: Marks, kind: str) -> Html:
    """The row of an MLP: its shape as picture and numbers, its weights, and the new layer of the plan."""
    substitution = marks.layers.get(site.path)
    facts = [
        f"{site.d_in:,} → {site.d_hidden:,} → {site.d_model:,}",
        site.activation,
        f"{short(site.weights + site.biases)} parameters",
        count(site.calls, "call") if site.calls > 1 else None,
        f"edited {edited(site)}",
    ]
    return tag(
        "div",
        _shape(site),
        tag(
            "div",
            tag("div", path_of(site.path), tag("span", kind, class_="class"), class_="head"),
            tag("div", tag("b", site.pattern), *(tag("span", fact) for fact in facts if fact), class_="facts"),
            _weights(site),
            layer(substitution, marks.plan) if substitution and marks.plan else None,
            class_="body",
        ),
        class_="site made" if substitution else "site",
        id=marks.anchors[site.path],
        data_site=site.path,
    )


def path_of(path: str) -> Html:
    """A path with its last name in bold."""
    before, _, last = path.rpartition(".")
    return tag("code", tag("span", breakable(f"{before}.")) if before else None, tag("b", last or "(root)"), class_="path")


def _shape(site: Site) -> Html:
    """The widths of an MLP (input, hidden, output) as an outline, at the same scale."""
    widths = (site.d_in, site.d_hidden, site.d_model)
    half = [max(3.0, (HEIGHT - 2) / 2 * width / max(widths)) for width in widths]
    xs, middle = (1, WIDTH / 2, WIDTH - 1), HEIGHT / 2
    upper = [f"{x:g},{middle - h:.1f}" for x, h in zip(xs, half, strict=True)]
    lower = [f"{x:g},{middle + h:.1f}" for x, h in zip(reversed(xs), reversed(half), strict=True)]
    outline = tag("polygon", points=" ".join([*upper, *lower]))
    return tag("svg", outline, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="shape", role="presentation")


def _weights(site: Site) -> Html:
    below = f"{site.path.partition('#')[0]}."
    names = [tag("li", tag("code", breakable(name.removeprefix(below)))) for name in site.parameters]
    why = [tag("li", binding.why) for binding in site.bindings if binding.why]
    ends = [tag("li", _ends(b.entries, b.exit)) for b in site.bindings if b.exit and b.entries != (b.exit,)]
    summary = tag("summary", count(len(site.parameters), "weight"))
    return tag("details", summary, tag("ul", *names, *ends, *why), class_="weights")


def _ends(entries: tuple[str, ...], exit_: str) -> Html:
    names = [piece for entry in entries for piece in (tag("code", breakable(entry)), " + ")][:-1]
    return join("from ", *names, " to ", tag("code", breakable(exit_)))


def miss_row(miss: NearMiss) -> Html:
    """The row of a near miss: why it was refused, the graph node, and the source line."""
    line = line_at(miss.source)
    at = [tag("span", "node ", tag("code", miss.node))]
    if miss.source:
        at.append(tag("code", breakable(miss.source), class_="source"))
    return tag(
        "div",
        tag("div", path_of(miss.path), tag("b", "near miss", class_="label"), class_="head"),
        tag("p", with_code(miss.reason)),
        tag("div", *at, class_="facts"),
        tag("pre", line) if line else None,
        class_="miss",
        data_miss=miss.path,
    )


def layer(substitution: Substitution, plan: Plan) -> Html:
    """The new layer at an MLP, its placement, and the cost before and after."""
    old, new, calls = substitution.site.cost(), substitution.cost(plan.pools), substitution.site.calls
    costs = [
        ("parameters", short(old.parameters), short(new.parameters)),
        ("FLOPs/token", short(old.flops * calls), short(new.flops * calls)),
        ("read/token", size(old.bytes_read * calls), size(new.bytes_read * calls)),
    ]
    pool = (
        tag("a", substitution.pool, href=f"#pool-{list(plan.pools).index(substitution.pool)}", class_="pool")
        if substitution.pool
        else None
    )
    onto = tag("span", "on pool ", pool) if pool else None
    cells = [
        tag("div", tag("dt", name), tag("dd", tag("s", before), " → ", tag("strong", after))) for name, before, after in costs
    ]
    return tag(
        "div",
        tag("div", tag("b", substitution.kind), tag("span", PLACEMENT[substitution.placement]), onto, class_="head"),
        tag("dl", *cells),
        class_="layer",
    )


def chips(marks: Marks, blocks: Sequence[ModuleNode]) -> Html:
    """Labels for folded blocks: their MLPs, near misses and new layers."""
    inside = [marks.inside(block) for block in blocks]
    sites, misses = [site for found, _ in inside for site in found], max((found for _, found in inside), key=len)
    shown = [tag("span", f"{s.pattern} {s.d_in:,} → {s.d_hidden:,} → {s.d_model:,}", class_="chip mlp") for s in sites]
    if misses:
        shown.append(tag("span", count(len(misses), "near miss", "near misses"), class_="chip near"))
    layers = dict.fromkeys((substitution.kind, substitution.pool) for s in sites if (substitution := marks.layers.get(s.path)))
    shown += [tag("span", kind + (f" → {pool}" if pool else ""), class_="chip memory") for kind, pool in layers]
    return tag("span", *dict.fromkeys(shown), class_="chips")
