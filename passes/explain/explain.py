"""Why a place in a model is an MLP, is part of one, holds some, was refused, or was never a candidate.

Flow: the path asked for → the recorded nodes it made → which of them belong to sites → every other product with a weight
among them is tried again as a last matrix, this time for the reason alone → one verdict in a sentence, and the findings.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from memrewrite.explanation import Explanation, Finding, Verdict
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.explain.rule_advice import rule_of
from memrewrite.passes.explain.subject import ROOT_NAMES, Subject, View, subject_of
from memrewrite.passes.graphs.dataflow import ORIGIN
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.provenance import line_at, source_line
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.regions.region import Never, Region, attempt
from memrewrite.passes.regions.residual_stream import MAX_WALK
from memrewrite.passes.regions.token_axes import Refusal
from memrewrite.site import Site


def explained(model: object, before: Capture, locations: LocatedSites, asked: str) -> Explanation:
    """The explanation of `asked`: a module or container, a parameter or buffer, a site, or a graph node.

    Raises `UserError`, with close matches, when the model has nothing of that name.
    """
    views = [View(segment, before, locations) for segment in before.segments]
    subject = subject_of(model, views, asked)
    findings = [_finding(view, linear) for view, linear in subject.linears()]
    if len(findings) == 1 and findings[0].outcome == "never":  # a first matrix: what became of the last is the answer
        findings += [f for f in _readers(*subject.linears()[0]) if f.outcome == "refused"]
    findings += _other_misses(subject, locations, findings)
    verdict, held, why = _verdict(subject, before, locations, findings)
    name = f"`{asked}`" if asked not in ROOT_NAMES else "the model"
    return Explanation(
        asked=asked,
        kind=subject.kind,
        verdict=verdict,
        summary=f"{name} {why}",
        sites=tuple(site for site in locations.sites if site.path in held),
        findings=tuple(findings),
        captured=before.how,
    )


# ------------------------------------------------------------------------------------------------------- the findings


def _finding(view: View, linear: fx.Node) -> Finding:
    """What comes of a linear as a last matrix."""
    known: dict[str, Any] = {"linear": linear.name, "path": view.path(linear), "weights": tuple(view.used(linear))}
    site = view.site_of.get(linear.meta[ORIGIN])
    if site is not None:
        return Finding(**known, outcome="site", site=site)
    outcome = attempt(view.flow, linear)
    if isinstance(outcome, Region):  # it obeys the rules of dataflow: no pattern knows how its matrices are arranged
        missed = next((m.reason for m in view.misses if m.node == linear.name and m.path == known["path"]), None)
        outcome = Refusal(missed or "it obeys the rules, and locating left it out", linear)
    reason = outcome.reason + (_two_inputs(view, linear) if isinstance(outcome, Refusal) else "")
    return Finding(
        **known,
        outcome="never" if isinstance(outcome, Never) else "refused",
        node=outcome.node.name,
        at=view.path(outcome.node),
        **_told(reason, source_line(outcome.node)),
    )


def _two_inputs(view: View, linear: fx.Node) -> str:
    """A remark on first matrices that read different values: then `grow` ends at whatever lies before both."""
    firsts, pending, seen = list[fx.Node](), [linear.args[0]], set[object]()
    while pending and len(seen) < MAX_WALK:
        node = pending.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        if view.flow.is_linear(node):
            firsts.append(node)
        else:
            pending.extend(view.flow.activations(node))
    values = {view.flow.unviewed(first.all_input_nodes[0]).name: first.name for first in firsts}
    if len(values) < 2:
        return ""
    return "; its first matrices read different values: " + ", ".join(f"`{f}` reads `{v}`" for v, f in values.items())


def _other_misses(subject: Subject, locations: LocatedSites, findings: list[Finding]) -> list[Finding]:
    """Near misses inside a module that end in no product with a weight of its own, as mixtures of experts do."""
    if subject.kind != "module":
        return []
    known = {(f.path, f.node) for f in findings}
    inside = [m for m in locations.located.near_misses if subject.covers(m.path) and (m.path, m.node) not in known]
    told = [(miss, {"linear": miss.node, "path": miss.path, "at": miss.path, "node": miss.node}) for miss in inside]
    return [Finding(**place, weights=(), outcome="refused", **_told(miss.reason, miss.source)) for miss, place in told]


def _told(reason: str, source: str) -> dict[str, Any]:
    rule = rule_of(reason)
    return {
        "reason": reason,
        "rule": rule.name if rule else "",
        "advice": rule.advice if rule else "",
        "source": source,
        "line": line_at(source),
    }


def _readers(view: View, linear: fx.Node) -> list[Finding]:
    """What came of the linears that read a linear's output, through everything but other linears."""
    found, pending, seen = list[fx.Node](), list(linear.users), set[fx.Node]()
    while pending and len(seen) < MAX_WALK:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            found, pending = ([*found, node], pending) if view.flow.is_linear(node) else (found, [*pending, *node.users])
    return [_finding(view, node) for node in sorted(found, key=view.flow.order.__getitem__)]


# --------------------------------------------------------------------------------------------------------- the verdict


def _verdict(
    subject: Subject, before: Capture, locations: LocatedSites, findings: list[Finding]
) -> tuple[Verdict, set[str], str]:
    """The verdict, the sites it speaks of, and the sentence without its subject."""
    computed = subject.computed()
    held = {path for path in computed if path is not None}
    its = [s for s in locations.sites if subject.kind == "module" and _stands_for(s, subject.names)]
    whole = [path for path in (s.path for s in locations.sites) if path in held and _holds_all(subject, path)]
    refused = [f for f in findings if f.outcome == "refused"]
    if len(its) == 1:
        return "mlp", {its[0].path}, _is_mlp(its[0], subject)
    if whole and set(computed) != set(whole[:1]):
        return "holds", set(whole), _holds(whole, refused)
    if held:
        more = "" if None not in computed else "; what else it does belongs to none"
        return (
            "part",
            held,
            f"is part of the MLP at {', '.join(f'`{p}`' for p in sorted(held))}: {_role(subject, findings)}{more}",
        )
    if refused:
        return "refused", held, _refused(subject, refused)
    if not computed:
        return "not run", held, _idle(subject, before)
    return "no candidate", held, f"is not a candidate: {_no_candidate(subject, findings)}"


def _stands_for(site: Site, names: frozenset[str]) -> bool:
    whole = {binding.exit for binding in site.bindings if binding.kind == "module"}
    return bool(names & {site.path, site.path.partition("#")[0], *whole})


def _holds_all(subject: Subject, path: str) -> bool:
    """Whether everything a site computes is among the nodes asked about."""
    parts = [
        (nodes, n)
        for view, nodes in subject.nodes
        for n, p in view.site_of.items()
        if p == path and n not in view.recorded.constant
    ]
    return all(n in nodes for nodes, n in parts)


def _is_mlp(site: Site, subject: Subject) -> str:
    if any(binding.kind == "module" for binding in site.bindings):
        return "is an MLP" if site.path in subject.names else f"is the MLP at `{site.path}`"
    if "#" in site.path:
        return "is an MLP, one of several in its module"
    return "is the narrowest module that holds the whole of an MLP"


def _role(subject: Subject, findings: list[Finding]) -> str:
    if subject.kind == "parameter":
        return "one of its weights"
    products = [f"`{f.linear}`" for f in findings if f.outcome == "site"]
    if products:
        return f"its product{'s' * (len(products) > 1)} {', '.join(products)} happen{'s' * (len(products) < 2)} here"
    reads = any(view.weights(node) for view, nodes in subject.nodes for node in nodes)
    return "it uses weights of it" if reads else "it runs between its matrices"


def _holds(paths: list[str], refused: list[Finding]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    also = f"; {len(refused)} other products looked like the end of one and were refused" if refused else ""
    return f"holds {len(paths)} MLP{'s' * (len(paths) > 1)}: {shown}{also}"


def _refused(subject: Subject, refused: list[Finding]) -> str:
    first, more = refused[0], len(refused) - 1
    end = first.path or first.linear
    if subject.kind == "module" and subject.covers(first.path):
        what = "looked like" if end in subject.names else f"holds what looked like an MLP with `{end}` as"
    else:
        what = f"belongs to what looked like an MLP with `{end}` as"
    last = "the last matrix of an MLP" if what == "looked like" else "its last matrix"
    return f"{what} {last}, and was refused: {first.reason}" + (f" ({more} more below)" if more else "")


def _idle(subject: Subject, before: Capture) -> str:
    ran = any(subject.covers(path) for path in before.calls)
    if subject.kind == "parameter":
        return "is not read in this forward: it takes part in nothing that depends on these inputs"
    if not ran:
        return "did not run on these inputs"
    if [segment.path for segment in before.segments] != [""]:
        return f"ran outside of what could be captured ({before.how})"
    return "ran, and computed nothing: in evaluation mode it hands on what it is given"


def _no_candidate(subject: Subject, findings: list[Finding]) -> str:
    if findings:
        first = findings[0]
        named = first.path.rpartition(".")[2] or first.linear
        also = f" ({len(findings) - 1} more below)" if len(findings) > 1 else ""
        return f"its linear `{named}` is no last matrix: {first.reason}{also}"
    nodes = [(view, node) for view, found in subject.nodes for node in found if node not in view.recorded.constant]
    if subject.kind == "node":
        return f"it is a `{op_name(nodes[0][1])}`, and an MLP is looked for back from its last product with a weight"
    for view, node in nodes:
        if any(s in view.recorded.constant and len(shape_of(s)) > 1 for s in node.all_input_nodes):
            return f"its `{op_name(node)}` uses a weight, and is no product of each token's features with a matrix"
    return "no product with a weight happens in it in this forward"
