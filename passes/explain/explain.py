"""Why a place in a model is an MLP, is part of one, contains some, was rejected, or was never a candidate.

Flow: the requested path → the recorded nodes it computed → which of them belong to sites → every other product with a weight
among them is tried again as a last matrix, this time for the reason only → one verdict in a sentence, and the findings.
"""

from __future__ import annotations

from typing import Any

from memrewrite.explanation import Explanation, Finding, Verdict
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.explain.subject import ROOT_NAMES, Subject, View, subject_of
from memrewrite.passes.graphs.nodes import CanonicalNode, inputs_of, users_of
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.provenance import line_at, source_line
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.locate.recorded_graph import origin_of
from memrewrite.passes.regions.patterns import matched
from memrewrite.passes.regions.region import Region, attempt
from memrewrite.passes.regions.rejection import Rejection, advice_on
from memrewrite.passes.regions.residual_stream import MAX_WALK
from memrewrite.site import Site


def explained(model: object, before: Capture, locations: LocatedSites, path: str) -> Explanation:
    """The explanation of `path`: a module or container, a parameter or buffer, a site, or a graph node.

    Raises `UserError`, with close matches, when the model has nothing of that name.
    """
    views = [View(segment, locations) for segment in before.segments]
    subject = subject_of(model, views, path)
    findings = [_finding(view, linear) for view, linear in subject.linears()]
    if len(findings) == 1 and findings[0].outcome == "never":  # a first matrix: the outcome of the last is the answer
        findings += [f for f in _readers(*subject.linears()[0]) if f.outcome == "refused"]
    findings += _other_misses(subject, locations, findings)
    verdict, its, why = _verdict(subject, before, locations, findings)
    name = f"`{path}`" if path not in ROOT_NAMES else "the model"
    return Explanation(
        asked=path,
        kind=subject.kind,
        verdict=verdict,
        summary=f"{name} {why}",
        sites=tuple(site for site in locations.sites if site.path in its),
        findings=tuple(findings),
        captured=before.how,
    )


# ------------------------------------------------------------------------------------------------------- the findings


def _finding(view: View, linear: CanonicalNode) -> Finding:
    """The outcome of trying a linear as a last matrix."""
    known: dict[str, Any] = {"linear": linear.name, "path": view.path(linear), "weights": tuple(view.used(linear))}
    site = view.site_of.get(origin_of(linear))
    if site is not None:
        return Finding(**known, outcome="site", site=site)
    rejection = _rejection(view, linear)
    reason = rejection.reason + (_two_inputs(view, linear) if rejection.near_miss else "")
    return Finding(
        **known,
        outcome="refused" if rejection.near_miss else "never",
        node=rejection.node.name,
        at=view.path(rejection.node),
        **_rule(rejection.rule, reason, source_line(rejection.node)),
    )


def _rejection(view: View, linear: CanonicalNode) -> Rejection:
    """Why a linear is not the last matrix of an MLP: the rule that rejects it, or the patterns that do not match."""
    region = attempt(view.flow, linear)
    match = matched(view.flow, region) if isinstance(region, Region) else region
    if isinstance(match, Rejection):
        return match
    missed = [miss.reason for miss in view.misses if miss.path == view.path(linear) and miss.rule == "one block"]
    return Rejection("one block", missed[0] if missed else "it is part of a larger region, a mixture of experts", linear)


def _two_inputs(view: View, linear: CanonicalNode) -> str:
    """A remark on first matrices that read different values: then the region starts before both of these."""
    firsts, pending, seen = list[CanonicalNode](), inputs_of(linear)[:1], set[CanonicalNode]()
    while pending and len(seen) < MAX_WALK:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if view.flow.is_linear(node):
            firsts.append(node)
        else:
            pending.extend(view.flow.activations(node))
    values = {view.flow.unviewed(inputs_of(first)[0]).name: first.name for first in firsts}
    if len(values) < 2:
        return ""
    return "; its first matrices read different values: " + ", ".join(f"`{f}` reads `{v}`" for v, f in values.items())


def _other_misses(subject: Subject, locations: LocatedSites, findings: list[Finding]) -> list[Finding]:
    """Near misses inside a module whose last node is no linear, as that of a mixture of experts."""
    if subject.kind != "module":
        return []
    known = {(f.path, f.node) for f in findings}
    inside = [m for m in locations.located.near_misses if subject.covers(m.path) and (m.path, m.node) not in known]
    places = [(miss, {"linear": miss.node, "path": miss.path, "at": miss.path, "node": miss.node}) for miss in inside]
    return [
        Finding(**place, weights=(), outcome="refused", **_rule(miss.rule, miss.reason, miss.source)) for miss, place in places
    ]


def _rule(rule: str, reason: str, source: str) -> dict[str, Any]:
    return {"reason": reason, "rule": rule, "advice": advice_on(rule), "source": source, "line": line_at(source)}


def _readers(view: View, linear: CanonicalNode) -> list[Finding]:
    """The outcomes of the linears that read a linear's output, directly or through ops that are no linears."""
    found, pending, seen = list[CanonicalNode](), users_of(linear), set[CanonicalNode]()
    while pending and len(seen) < MAX_WALK:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if view.flow.is_linear(node):
                found.append(node)
            else:
                pending.extend(users_of(node))
    return [_finding(view, node) for node in sorted(found, key=view.flow.order.__getitem__)]


# --------------------------------------------------------------------------------------------------------- the verdict


def _verdict(
    subject: Subject, before: Capture, locations: LocatedSites, findings: list[Finding]
) -> tuple[Verdict, set[str], str]:
    """The verdict, the sites that it is about, and the sentence without its subject."""
    computed = subject.computed()
    used = {path for path in computed if path is not None}
    its = [s for s in locations.sites if subject.kind == "module" and _is_module_of(s, subject.names)]
    whole = [path for path in (s.path for s in locations.sites) if path in used and _contains_all(subject, path)]
    refused = [f for f in findings if f.outcome == "refused"]
    if len(its) == 1:
        return "mlp", {its[0].path}, _is_mlp(its[0], subject)
    if whole and set(computed) != set(whole[:1]):
        return "holds", set(whole), _contains(whole, refused)
    if used:
        sites = ", ".join(f"`{path}`" for path in sorted(used))
        more = "" if None not in computed else "; its other operations belong to no MLP"
        return "part", used, f"is part of the MLP at {sites}: {_role(subject, findings)}{more}"
    if refused:
        return "refused", used, _refused(subject, refused)
    if not computed:
        return "not run", used, _idle(subject, before)
    return "no candidate", used, f"is not a candidate: {_no_candidate(subject, findings)}"


def _is_module_of(site: Site, names: frozenset[str]) -> bool:
    """True if one of the names is the module of a site."""
    whole = {binding.exit for binding in site.bindings if binding.kind == "module"}
    return bool(names & {site.path, site.path.partition("#")[0], *whole})


def _contains_all(subject: Subject, path: str) -> bool:
    """True if everything that a site computes is among the subject's nodes."""
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
    return "is the narrowest module that contains a whole MLP"


def _role(subject: Subject, findings: list[Finding]) -> str:
    if subject.kind == "parameter":
        return "one of its weights"
    products = [f"`{f.linear}`" for f in findings if f.outcome == "site"]
    if products:
        return f"its product{'s' * (len(products) > 1)} {', '.join(products)} happen{'s' * (len(products) < 2)} here"
    reads = any(view.weights(node) for view, nodes in subject.nodes for node in nodes)
    return "it uses weights of the MLP" if reads else "it runs between its matrices"


def _contains(paths: list[str], refused: list[Finding]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    also = f"; {len(refused)} other products looked like the end of an MLP and were rejected" if refused else ""
    return f"contains {len(paths)} MLP{'s' * (len(paths) > 1)}: {shown}{also}"


def _refused(subject: Subject, refused: list[Finding]) -> str:
    first, more = refused[0], len(refused) - 1
    end = first.path or first.linear
    if subject.kind == "module" and subject.covers(first.path):
        what = "looked like" if end in subject.names else f"contains what looked like an MLP with `{end}` as"
    else:
        what = f"belongs to what looked like an MLP with `{end}` as"
    last = "the last matrix of an MLP" if what == "looked like" else "its last matrix"
    return f"{what} {last}, and was rejected: {first.reason}" + (f" ({more} more below)" if more else "")


def _idle(subject: Subject, before: Capture) -> str:
    ran = any(subject.covers(path) for path in before.calls)
    if subject.kind == "parameter":
        return "is not used in this forward: nothing that depends on these inputs reads it"
    if not ran:
        return "did not run on these inputs"
    if [segment.path for segment in before.segments] != [""]:
        return f"ran outside of what could be captured ({before.how})"
    return "ran, and computed nothing: in evaluation mode it returns its input"


def _no_candidate(subject: Subject, findings: list[Finding]) -> str:
    if findings:
        first = findings[0]
        named = first.path.rpartition(".")[2] or first.linear
        also = f" ({len(findings) - 1} more below)" if len(findings) > 1 else ""
        return f"its linear `{named}` is no last matrix: {first.reason}{also}"
    nodes = [(view, node) for view, found in subject.nodes for node in found if node not in view.recorded.constant]
    if subject.kind == "node":
        return f"it is a `{op_name(nodes[0][1])}`, and the search for an MLP starts from a product with a weight"
    for view, node in nodes:
        if any(s in view.recorded.constant and len(shape_of(s)) > 1 for s in inputs_of(node)):
            return f"its `{op_name(node)}` uses a weight, and is no product of each token's features with a matrix"
    return "it computes no product with a weight in this forward"
