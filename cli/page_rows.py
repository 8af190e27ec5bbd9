"""One MLP, one near miss, one substitution as they are drawn: a row each, and the short form in which folds name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memrewrite.cli.page_html import Html, count, join, named, said, short, tag
from memrewrite.cli.text_output import edited, size
from memrewrite.passes.graphs.provenance import line_at

if TYPE_CHECKING:
    from memrewrite.cli.page_marks import Marks
    from memrewrite.module_node import ModuleNode
    from memrewrite.plans import Plan, Substitution
    from memrewrite.site import NearMiss, Site

PLACED = {"replace": "takes its place", "parallel": "stands beside it, starting at zero"}
TALL, WIDE = 30, 46  # of the picture of an MLP


def site_row(site: Site, marks: Marks, kind: str) -> Html:
    """An MLP: its shape as a picture and in numbers, where its weights are, and the layer a plan puts there."""
    made = marks.made.get(site.path)
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
            layer(made, marks.plan) if made and marks.plan else None,
            class_="body",
        ),
        class_="site made" if made else "site",
        id=marks.anchors[site.path],
        data_site=site.path,
    )


def path_of(path: str) -> Html:
    """A path whose last name stands out."""
    before, _, last = path.rpartition(".")
    return tag("code", tag("span", named(f"{before}.")) if before else None, tag("b", last or "(root)"), class_="path")


def _shape(site: Site) -> Html:
    """The widths of an MLP as an outline: in, hidden, out, to one scale."""
    widths = (site.d_in, site.d_hidden, site.d_model)
    half = [max(3.0, (TALL - 2) / 2 * width / max(widths)) for width in widths]
    xs, middle = (1, WIDE / 2, WIDE - 1), TALL / 2
    upper = [f"{x:g},{middle - h:.1f}" for x, h in zip(xs, half, strict=True)]
    lower = [f"{x:g},{middle + h:.1f}" for x, h in zip(reversed(xs), reversed(half), strict=True)]
    outline = tag("polygon", points=" ".join([*upper, *lower]))
    return tag("svg", outline, viewBox=f"0 0 {WIDE} {TALL}", class_="shape", role="presentation")


def _weights(site: Site) -> Html:
    below = f"{site.path.partition('#')[0]}."
    names = [tag("li", tag("code", named(name.removeprefix(below)))) for name in site.parameters]
    why = [tag("li", binding.why) for binding in site.bindings if binding.why]
    ends = [tag("li", _ends(b.entries, b.exit)) for b in site.bindings if b.exit and b.entries != (b.exit,)]
    summary = tag("summary", count(len(site.parameters), "weight"))
    return tag("details", summary, tag("ul", *names, *ends, *why), class_="weights")


def _ends(entries: tuple[str, ...], exit_: str) -> Html:
    given = [piece for entry in entries for piece in (tag("code", named(entry)), " + ")][:-1]
    return join("from ", *given, " to ", tag("code", named(exit_)))


def miss_row(miss: NearMiss) -> Html:
    """A near miss: why it was refused, at which node, from which line."""
    line = line_at(miss.source)
    at = [tag("span", "node ", tag("code", miss.node))]
    if miss.source:
        at.append(tag("code", named(miss.source), class_="source"))
    return tag(
        "div",
        tag("div", path_of(miss.path), tag("b", "near miss", class_="label"), class_="head"),
        tag("p", said(miss.reason)),
        tag("div", *at, class_="facts"),
        tag("pre", line) if line else None,
        class_="miss",
        data_miss=miss.path,
    )


def layer(made: Substitution, plan: Plan) -> Html:
    """What takes an MLP's place or stands beside it, and what that costs."""
    old, new, calls = made.site.cost(), made.cost(plan.pools), made.site.calls
    costs = [
        ("parameters", short(old.parameters), short(new.parameters)),
        ("FLOPs/token", short(old.flops * calls), short(new.flops * calls)),
        ("read/token", size(old.bytes_read * calls), size(new.bytes_read * calls)),
    ]
    pool = tag("a", made.pool, href=f"#pool-{list(plan.pools).index(made.pool)}", class_="pool") if made.pool else None
    onto = tag("span", "on pool ", pool) if pool else None
    cells = [
        tag("div", tag("dt", name), tag("dd", tag("s", before), " → ", tag("strong", after))) for name, before, after in costs
    ]
    return tag(
        "div",
        tag("div", tag("b", made.kind), tag("span", PLACED[made.placement]), onto, class_="head"),
        tag("dl", *cells),
        class_="layer",
    )


def chips(marks: Marks, blocks: Sequence[ModuleNode]) -> Html:
    """What each of some blocks holds, in a few words."""
    inside = [marks.inside(block) for block in blocks]
    sites, misses = [site for found, _ in inside for site in found], max((found for _, found in inside), key=len)
    shown = [tag("span", f"{s.pattern} {s.d_in:,} → {s.d_hidden:,} → {s.d_model:,}", class_="chip mlp") for s in sites]
    if misses:
        shown.append(tag("span", count(len(misses), "near miss", "near misses"), class_="chip near"))
    layers = dict.fromkeys((made.kind, made.pool) for s in sites if (made := marks.made.get(s.path)))
    shown += [tag("span", kind + (f" → {pool}" if pool else ""), class_="chip memory") for kind, pool in layers]
    return tag("span", *dict.fromkeys(shown), class_="chips")
