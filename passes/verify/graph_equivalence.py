"""Whether a model outside its sites computes what it did: the graphs before and after, sites folded away, compared.

Flow: every live node of both recorded graphs gets a number by what it computes (op, arguments, weights by name), one table
for both → an MLP that was replaced, and the layer in its place, fold into the same number of the same input → a layer beside
an MLP folds into that MLP's output → equal outputs have equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.ops import IDENTITY, is_assertion, op_name
from memrewrite.passes.graphs.provenance import clean, modules_of
from memrewrite.passes.graphs.shapes import is_tensor, shape_of
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.plans import Substitution


class ValueNumbering:
    """Numbers values by what computes them; equal computations get equal numbers."""

    def __init__(self) -> None:
        self.table: dict[Any, int] = {}

    def of(self, key: Any) -> int:
        """The number of a key, new when it was never seen."""
        return self.table.setdefault(key, len(self.table))

    def outputs(self, segment: Segment, folded: Mapping[fx.Node, Folded]) -> tuple[Any, dict[fx.Node, int]]:
        """The numbers of a graph's outputs, and of every value that they need."""
        number: dict[fx.Node, int] = {}
        output = next(node for node in segment.graph.nodes if node.op == "output")
        for node in _needed(segment, output, folded):
            if node in folded:
                number[node] = folded[node].number(self, number)
            elif node.op == "placeholder" or node.op == "get_attr":
                number[node] = self.of(_leaf(segment, node))
            elif _hands_on(node):
                number[node] = number[node.all_input_nodes[0]]
            elif op_name(node) == "add" and any(map(_hollow, node.all_input_nodes)):
                number[node] = number[next(n for n in node.all_input_nodes if not _hollow(n))]
            else:
                number[node] = self.of((str(node.target), _mapped(node.args, number), _mapped(node.kwargs, number)))
        return _mapped(output.args, number), number


def _hands_on(node: fx.Node) -> bool:
    """Whether a node's value is its input's, type and all.

    Such nodes come and go: a tracer takes a tensor that is cast to what it is already for the cast.
    """
    if (op_name(node) not in IDENTITY and op_name(node) != "slice") or "dropout" in op_name(node):
        return False
    given, made = (n.meta.get("val") for n in (node.all_input_nodes[0], node))
    same = isinstance(given, Tensor) and isinstance(made, Tensor) and given.dtype == made.dtype
    return same and (op_name(node) != "slice" or shape_of(node) == shape_of(node.all_input_nodes[0]))


def _hollow(node: fx.Node) -> bool:
    """The zeros that a `ZeroStub` hands on: a sum with them is what is added to them."""
    return op_name(node) == "expand" and op_name(node.all_input_nodes[0]) == "new_zeros"


class Folded:
    """A node that counts as something else: `site` of an input, or simply as another node."""

    def __init__(self, name: str | None, reads: fx.Node) -> None:
        self.name, self.reads = name, reads

    def number(self, numbers: ValueNumbering, known: dict[fx.Node, int]) -> int:
        """Its number, from that of what it reads."""
        return known[self.reads] if self.name is None else numbers.of(("site", self.name, known[self.reads]))


def _needed(segment: Segment, output: fx.Node, folded: Mapping[fx.Node, Folded]) -> list[fx.Node]:
    """The nodes the output needs, in order, those inside a fold left out."""
    live: set[fx.Node] = set()
    pending = list(output.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend([folded[node].reads] if node in folded else node.all_input_nodes)
    return [node for node in segment.graph.nodes if node in live and not is_assertion(node)]


def _mapped(value: Any, number: Mapping[fx.Node, int]) -> str:
    numbered: Any = lambda node: _Numbered(number[node])  # noqa: E731
    return str(fx.map_arg(value, numbered))


class _Numbered:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _leaf(segment: Segment, node: fx.Node) -> Any:
    if node.name in segment.weights:
        return "weight", segment.weights[node.name]
    if node.name in segment.literals:
        value = segment.literals[node.name]
        content = () if value.is_meta else tuple(value.detach().to("cpu", torch.float64).flatten().tolist())
        return "literal", str(value.dtype), tuple(value.shape), content
    return "input", node.name


# ------------------------------------------------------------------------------------------------- before and after


class Differs(Exception):  # noqa: N818 - a verdict, turned into a failed check
    """The frame is not the same; the message says where."""


def compare(
    before: Segment, after: Segment, found: Mapping[str, tuple[SiteCall, ...]], layers: Mapping[str, Substitution]
) -> int:
    """Hold the graph outside the sites before and after against each other; the number of values compared.

    `layers` gives the substitution behind each layer's module path. Raises `Differs`.
    """
    numbers = ValueNumbering()
    sites = {s.site.path: s for s in layers.values()}
    calls = {path: [c for c in found[path] if c.segment is before] for path in sites}
    replaced = [(path, c) for path, made in calls.items() for c in made if sites[path].placement == "replace"]
    old, old_number = numbers.outputs(before, {c.bound.y: Folded(path, c.bound.x) for path, c in replaced})
    folded, reads = _fold_layers(after, layers)
    new, new_number = numbers.outputs(after, folded)
    if old != new:
        raise Differs(_first_difference(after, folded, new_number, set(old_number.values())))
    for path, made in calls.items():
        was = [old_number.get(call.bound.x) for call in made]
        now = [new_number.get(x) for x in reads.get(path, [])]
        if was != now:
            raise Differs(f"the layer at {path!r} does not read what the MLP read")
    return len(new_number)


def _fold_layers(
    segment: Segment, layers: Mapping[str, Substitution]
) -> tuple[dict[fx.Node, Folded], dict[str, list[fx.Node]]]:
    """What the layers' outputs fold into; and for each site the values its layer reads, call by call."""
    folded: dict[fx.Node, Folded] = {}
    inputs: dict[str, list[fx.Node]] = {}
    for path, nodes in _calls_of(segment, layers):
        substitution, inside = layers[path], set(nodes)
        reads = {r for n in nodes for r in n.all_input_nodes if r not in inside and not _is_weight(segment, r) and is_tensor(r)}
        gives = {n for n in nodes if any(user not in inside and not is_assertion(user) for user in n.users)}
        if len(reads) != 1 or len(gives) != 1:
            raise Differs(f"the layer at {path!r} reads {len(reads)} values and gives {len(gives)}, not one each")
        (x,), (y,) = reads, gives
        inputs.setdefault(substitution.site.path, []).append(x)
        if substitution.placement == "replace":
            folded[y] = Folded(substitution.site.path, x)
        else:
            total, mlp = _sum_with(y, path)
            folded[total] = Folded(None, mlp)
    return folded, inputs


def _calls_of(segment: Segment, layers: Mapping[str, Substitution]) -> list[tuple[str, list[fx.Node]]]:
    """The nodes each call of a layer made, in the order of the calls."""
    made: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in segment.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            made[node.name] = (str(node.target), [node])
        if node.op != "call_function" or not node.users:
            continue
        for call, path in modules_of(node):
            whole = f"{segment.path}.{clean(path)}".strip(".")
            if whole in layers:
                made.setdefault(call, (whole, []))[1].append(node)
    return list(made.values())


def _is_weight(segment: Segment, node: fx.Node) -> bool:
    return node.name in segment.weights or node.name in segment.literals


def _sum_with(y: fx.Node, path: str) -> tuple[fx.Node, fx.Node]:
    """The sum a layer's output goes into, and the MLP's output that it is added to."""
    while True:
        users = [user for user in y.users if not is_assertion(user)]
        if len(users) != 1:
            raise Differs(f"the output of the layer at {path!r} has {len(users)} readers, not one")
        (user,) = users
        if op_name(user) in IDENTITY or (op_name(user) in ("view", "reshape") and shape_of(user)[-1] == shape_of(y)[-1]):
            y = user
        elif op_name(user) == "add" and len(user.all_input_nodes) == 2 and not user.kwargs:
            return user, next(n for n in user.all_input_nodes if n is not y)
        else:
            raise Differs(f"the output of the layer at {path!r} is not added to the MLP's output but read by {user.name!r}")


def _first_difference(after: Segment, folded: Mapping[fx.Node, Folded], number: Mapping[fx.Node, int], known: set[int]) -> str:
    new = next((node for node in after.graph.nodes if node in number and number[node] not in known), None)
    if new is None:
        return "the outputs are other values of the graph than they were"
    module = clean(modules_of(new)[-1][1]) if modules_of(new) else ""
    return f"`{op_name(new)}` ({new.name}) in module {module!r} was not there, or read something else"
