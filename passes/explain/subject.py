"""What someone asks about: a module or container, a parameter, a site or a graph node, as the recorded nodes it made.

Flow: each captured graph with the sites found in it → the name asked for, by all names of the same thing → its nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from torch import fx, nn

from memrewrite.errors import UserError
from memrewrite.passes.canonicalize.canonicalize import canonicalize
from memrewrite.passes.capture.segment import Capture, Segment
from memrewrite.passes.graphs.dataflow import ORIGIN, Dataflow
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.provenance import modules_of, path_of
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.models.tensors import tensors_of

ROOT_NAMES = ("", "(root)", ".")  # how the tables and people write the model itself


class View:
    """One captured graph, and which of its recorded nodes belong to which site."""

    def __init__(self, segment: Segment, before: Capture, locations: LocatedSites) -> None:
        found = [(path, f) for path, calls in locations.found.items() for f in calls if f.segment is segment]
        self.segment = segment
        self.misses = locations.located.near_misses
        self.recorded = found[0][1].recorded if found else RecordedGraph(segment, Dataflow(canonicalize(segment)), before.calls)
        self.flow = self.recorded.flow
        self.site_of = {node: path for path, f in found for node in f.bound.nodes}
        self.made = [node for node in segment.graph.nodes if node.op == "call_function"]
        self.linears = [node for node in self.flow.graph.nodes if self.flow.is_linear(node)]

    def stack(self, node: fx.Node) -> list[str]:
        """The modules around a node, outermost first, by their paths in the whole model."""
        return [self.recorded.paths[call] for call, _ in modules_of(node)]

    def weights(self, node: fx.Node) -> list[str]:
        """The weights that a recorded node reads, through whatever is computed from weights alone."""
        found, pending, seen = dict[str, None](), [node], {node}
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in self.recorded.constant and source not in seen:
                    seen.add(source)
                    pending.append(source)
                    found |= {self.segment.weights[source.name]: None} if source.name in self.segment.weights else {}
        return list(found)

    def used(self, linear: fx.Node) -> list[str]:
        """The weights of a canonical linear."""
        sources = [source for source in linear.all_input_nodes if source in self.flow.constant]
        return list(dict.fromkeys(name for source in sources for name in sorted(self.flow.weights(source))))

    def path(self, node: fx.Node) -> str:
        """The innermost module around a node, by its path in the whole model."""
        return f"{self.segment.path}.{path_of(node)}".strip(".")


class Subject(NamedTuple):
    """What was asked for: its names (one module may have several), and the nodes it made, by view."""

    kind: Literal["module", "parameter", "node"]
    names: frozenset[str]
    nodes: list[tuple[View, set[fx.Node]]]

    def linears(self) -> list[tuple[View, fx.Node]]:
        """The products with weights among the nodes, and those that such a product was made one with."""
        found = []
        for view, nodes in self.nodes:
            lost = [node for node in nodes if node not in view.recorded.twin and node not in view.recorded.constant]
            names = {name for node in lost for name in view.weights(node)}
            found += [(view, at) for at in view.linears if at.meta[ORIGIN] in nodes or names & set(view.used(at))]
        return found

    def covers(self, path: str) -> bool:
        """Whether a module path is one of the names, or lies under one."""
        return "" in self.names or path in self.names or path.startswith(tuple(f"{name}." for name in self.names))

    def computed(self) -> list[str | None]:
        """The site of every node that depends on the model's inputs and is of use to others."""
        read = [(view, node) for view, nodes in self.nodes for node in nodes if node.users and not is_assertion(node)]
        return [view.site_of.get(node) for view, node in read if node not in view.recorded.constant]


def subject_of(model: object, views: list[View], asked: str) -> Subject:
    """What `asked` names. Raises `UserError`, with close matches, when the model has nothing of that name."""
    live = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    tensors = _tensors(model)
    modules = {"", *live} | {prefix for view in views for path in view.recorded.paths.values() for prefix in _prefixes(path)}
    weights = {*tensors} | {name for view in views for name in view.segment.weights.values()}
    wanted = "" if asked in ROOT_NAMES else asked
    site = [(view, {n for n, path in view.site_of.items() if path == asked}) for view in views]
    if "#" in asked and any(nodes for _, nodes in site):  # of two sites in one module, the second has a name of its own
        return Subject("module", frozenset([asked]), site)
    if wanted in modules:
        names = _aliases(live, wanted)
        made = Subject("module", names, [])
        return made._replace(
            nodes=[(view, {n for n in view.made if any(map(made.covers, view.stack(n))) or not wanted}) for view in views]
        )
    if asked in weights:
        names = _aliases(tensors, asked)
        return Subject("parameter", names, [(view, _reading(view, names)) for view in views])
    nodes = [(view, {n for g in (view.flow.graph, view.segment.graph) for n in g.nodes if n.name == asked}) for view in views]
    if any(found for _, found in nodes):
        return Subject("node", frozenset([asked]), [(v, {n.meta.get(ORIGIN, n) for n in found}) for v, found in nodes])
    known = sorted(modules | weights) + [n.name for view in views for n in view.segment.graph.nodes]
    ends = [name for name in known if name.endswith(f".{asked}")]
    near = list(dict.fromkeys([*ends, *get_close_matches(asked, known, n=3, cutoff=0.5)]))[:4]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`memrewrite inspect MODEL` lists what was found"
    raise UserError(f"there is no module, parameter or graph node {asked!r}", where=type(model).__name__, hint=hint)


def _tensors(model: object) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {}
    return dict(tensors_of(model))


def _aliases(known: Mapping[str, object], wanted: str) -> frozenset[str]:
    """All names of one module or tensor: shared ones have several, and the graph knows one."""
    return frozenset([wanted, *(name for name, it in known.items() if it is known.get(wanted))])


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _reading(view: View, names: frozenset[str]) -> set[fx.Node]:
    """The nodes that read a weight, through whatever is computed from weights alone."""
    found: set[fx.Node] = set()
    pending = [node for node in view.segment.graph.nodes if view.segment.weights.get(node.name) in names]
    while pending:
        for user in pending.pop().users:
            if user not in found and user.op == "call_function":
                found.add(user)
                pending.extend([user] if user in view.recorded.constant else [])
    return found
