"""The HTML page of `inspect --html`, one self-contained file: totals, what a recipe would do, and the module tree.

Flow: assign sites and near misses to modules → header with totals → the plan, if there is one → the module tree. No script, no
network: folding is `<details>`, pictures are inline SVG, and the page's content security policy forbids everything else.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from memrewrite.cli.page_html import Html, breakable, count, join, short, tag
from memrewrite.cli.page_marks import Marks, numbered, walk, wildcard_path
from memrewrite.cli.page_modules import Drawing
from memrewrite.cli.page_plan import plan_section

if TYPE_CHECKING:
    from memrewrite.module_node import ModuleNode
    from memrewrite.plans import Plan
    from memrewrite.site import Inspection

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(name: str, root: ModuleNode, inspection: Inspection, plan: Plan | None = None) -> str:
    """The HTML of the whole page.

    Args:
        name: MODEL as written on the command line.
        root: The model's module tree.
        inspection: Its sites and near misses.
        plan: What a recipe would do, if there is a recipe.
    """
    marks = Marks(root, inspection, plan)
    style = files("memrewrite.cli").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", f"{name} · memrewrite"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag(
            "main",
            _header(name, root, inspection, marks.towers_of(root)),
            plan_section(plan, marks) if plan else None,
            _model(root, marks, inspection),
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(name: str, root: ModuleNode, inspection: Inspection, towers: list[ModuleNode]) -> Html:
    inside = sum(site.weights + site.biases for site in inspection.sites)
    share = inside / root.parameters if root.parameters else 0.0
    modules = sum(1 for _ in walk(root))
    misses = "near miss" if len(inspection.near_misses) == 1 else "near misses"
    stacks = len({wildcard_path(tower.path) for tower in towers})  # a tower may have several stages
    blocks = sum(len(numbered(tower)) for tower in towers)
    return tag(
        "header",
        tag("p", "memrewrite inspect", class_="eyebrow"),
        tag("h1", breakable(name, "/")),
        tag("p", f"{root.kind} · captured: {inspection.captured}", class_="captured"),
        tag(
            "div",
            _tile(f"{len(inspection.sites):,}", "MLP" if len(inspection.sites) == 1 else "MLPs", _patterns(inspection), "mlp"),
            _tile(f"{len(inspection.near_misses):,}", misses, "", "near" if inspection.near_misses else ""),
            _tile(f"{blocks:,}", "block" if blocks == 1 else "blocks", f"in {count(stacks, 'tower')}") if towers else None,
            _tile(short(root.parameters), "parameters", f"in {count(modules, 'module')}"),
            _tile(f"{share:.0%}", "of them in MLPs", short(inside), "share", share),
            class_="tiles",
        ),
        class_="top",
    )


def _tile(number: str, name: str, more: str, kind: str = "", share: float | None = None) -> Html:
    bar = None
    if share is not None:
        filled = Html(f'<rect width="{100 * min(share, 1):.1f}" height="4"></rect>')
        bar = tag("svg", filled, viewBox="0 0 100 4", preserveAspectRatio="none", class_="bar", role="presentation")
    return tag(
        "div",
        tag("span", number, class_="figure"),
        tag("span", name, class_="name"),
        tag("span", more, class_="more") if more else None,
        bar,
        class_=f"tile {kind}".strip(),
    )


def _patterns(inspection: Inspection) -> str:
    patterns = [site.pattern for site in inspection.sites]
    return ", ".join(p if len(set(patterns)) == 1 else f"{patterns.count(p)} {p}" for p in dict.fromkeys(patterns))


def _model(root: ModuleNode, marks: Marks, inspection: Inspection) -> Html:
    legend = [("mlp", "an MLP and its widths")]
    if inspection.near_misses:
        legend.append(("near", "a near miss: looked like an MLP, was refused"))
    if marks.used:
        legend.append(("used", "a module with a part of an MLP"))
    if marks.plan:
        legend.append(("memory", "the new memory layer"))
    keys = [tag("li", tag("i", class_=f"key {kind}"), text) for kind, text in legend]
    nothing = None if inspection.sites or inspection.near_misses else tag("p", "Nothing in this model looks like an MLP.")
    return tag(
        "section",
        tag("div", tag("h2", "The model"), tag("ul", *keys, class_="legend"), class_="title"),
        join(nothing, Drawing(root, marks).model()),
        class_="drawing",
    )
