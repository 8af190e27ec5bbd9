"""What an explanation is about: a module or container, a parameter, a site or a graph node, as the recorded nodes it computed.

Flow: each captured graph with the sites found in it → the requested name, and all other names of the same thing → its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from torch import fx, nn

from memrewrite.errors import UserError
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.dataflow import ORIGIN
from memrewrite.passes.graphs.nodes import CanonicalNode, RecordedNode, canonical_nodes, inputs_of, users_of
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.provenance import modules_of, path_of, path_prefixes
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.locate.recorded_graph import origin_of
from memrewrite.passes.models.tensors import tensors_of

ROOT_NAMES = ("", "(root)", ".")  # ways to write the path of the model itself


class View:
    """One captured graph, and which of its recorded nodes belong to which site."""

    def __init__(self, segment: Segment, locations: LocatedSites) -> None:
        found = [(path, f) for path, calls in locations.found.items() for f in calls if f.segment is segment]
        self.segment = segment
        self.misses = locations.located.near_misses
        self.recorded = locations.recorded[segment.path]
        self.flow = self.recorded.flow
        self.site_of = {node: path for path, f in found for node in f.bound.nodes}
        self.computed = [node for node in self.recorded.nodes if node.op == "call_function"]
        self.linears = [node for node in canonical_nodes(self.flow.graph) if self.flow.is_linear(node)]

    def stack(self, node: fx.Node) -> list[str]:
        """The modules around a node, outermost first, by their paths in the whole model."""
        return [self.recorded.paths[call] for call, _ in modules_of(node)]

    def weights(self, node: RecordedNode) -> list[str]:
        """The weights that a recorded node reads, directly or through values computed from weights alone."""
        found, pending, seen = dict[str, None](), [node], {node}
        while pending:
            for source in inputs_of(pending.pop()):
                if source in self.recorded.constant and source not in seen:
                    seen.add(source)
                    pending.append(source)
                    found |= {self.segment.weights[source.name]: None} if source.name in self.segment.weights else {}
        return list(found)

    def used(self, linear: CanonicalNode) -> list[str]:
        """The weights of a canonical linear."""
        sources = [source for source in linear.all_input_nodes if source in self.flow.constant]
        return list(dict.fromkeys(name for source in sources for name in sorted(self.flow.weights(source))))

    def path(self, node: fx.Node) -> str:
        """The innermost module around a node, by its path in the whole model."""
        return f"{self.segment.path}.{path_of(node)}".strip(".")


class Subject(NamedTuple):
    """What an explanation is about: its names (one module may have several), and the nodes it computed, by view."""

    kind: Literal["module", "parameter", "node"]
    names: frozenset[str]
    nodes: list[tuple[View, set[RecordedNode]]]

    def linears(self) -> list[tuple[View, CanonicalNode]]:
        """The products with weights among the nodes, and those that `canonicalize` merged one of the nodes into."""
        found = []
        for view, nodes in self.nodes:
            lost = [node for node in nodes if node not in view.recorded.twin and node not in view.recorded.constant]
            names = {name for node in lost for name in view.weights(node)}
            found += [(view, at) for at in view.linears if origin_of(at) in nodes or names & set(view.used(at))]
        return found

    def covers(self, path: str) -> bool:
        """True if a module path is one of the names, or inside one."""
        return "" in self.names or path in self.names or path.startswith(tuple(f"{name}." for name in self.names))

    def computed(self) -> list[str | None]:
        """The site (or None) of every node that depends on the model's inputs and is used."""
        read = [(view, node) for view, nodes in self.nodes for node in nodes if node.users and not is_assertion(node)]
        return [view.site_of.get(node) for view, node in read if node not in view.recorded.constant]


def subject_of(model: object, views: list[View], path: str) -> Subject:
    """What `path` names. Raises `UserError`, with close matches, when the model has nothing of that name."""
    live = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    tensors = _tensors(model)
    modules = {"", *live} | {prefix for view in views for at in view.recorded.paths.values() for prefix in path_prefixes(at)}
    weights = {*tensors} | {name for view in views for name in view.segment.weights.values()}
    wanted = "" if path in ROOT_NAMES else path
    site = [(view, {n for n, at in view.site_of.items() if at == path}) for view in views]
    if "#" in path and any(nodes for _, nodes in site):  # of two sites in one module, the second has its own name
        return Subject("module", frozenset([path]), site)
    if wanted in modules:
        names = _aliases(live, wanted)
        subject = Subject("module", names, [])
        return subject._replace(
            nodes=[
                (view, {n for n in view.computed if any(map(subject.covers, view.stack(n))) or not wanted}) for view in views
            ]
        )
    if path in weights:
        names = _aliases(tensors, path)
        return Subject("parameter", names, [(view, _reading(view, names)) for view in views])
    nodes = [(view, _named(view, path)) for view in views]
    if any(found for _, found in nodes):
        return Subject("node", frozenset([path]), nodes)
    known = sorted(modules | weights) + [n.name for view in views for n in view.segment.graph.nodes]
    ends = [name for name in known if name.endswith(f".{path}")]
    near = list(dict.fromkeys([*ends, *get_close_matches(path, known, n=3, cutoff=0.5)]))[:4]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`memrewrite inspect MODEL` lists what was found"
    raise UserError(f"there is no module, parameter or graph node {path!r}", where=type(model).__name__, hint=hint)


def _named(view: View, name: str) -> set[RecordedNode]:
    """The recorded nodes of a name, and those whose value a canonical node of that name computes or re-lays."""
    found = {node for node in view.recorded.nodes if node.name == name}
    for node in canonical_nodes(view.flow.graph):
        if node.name == name:
            while ORIGIN not in node.meta:  # inserted by `canonicalize`
                node = inputs_of(node)[0]
            found.add(origin_of(node))
    return found


def _tensors(model: object) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    return dict(tensors_of(model))


def _aliases(known: Mapping[str, object], wanted: str) -> frozenset[str]:
    """All names of one module or tensor: shared ones have several, and the graph knows one."""
    return frozenset([wanted, *(name for name, it in known.items() if it is known.get(wanted))])


def _reading(view: View, names: frozenset[str]) -> set[RecordedNode]:
    """The nodes that read a weight, directly or through values computed from weights alone."""
    found: set[RecordedNode] = set()
    pending = [node for node in view.recorded.nodes if view.segment.weights.get(node.name) in names]
    while pending:
        for user in users_of(pending.pop()):
            if user not in found and user.op == "call_function":
                found.add(user)
                pending.extend([user] if user in view.recorded.constant else [])
    return found
