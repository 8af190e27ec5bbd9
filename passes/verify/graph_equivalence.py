"""Compares the graphs before and after an edit: outside of the sites they must compute the same.

Flow: value numbering of both recorded graphs with one table: a node's number depends on its op, its arguments' numbers and
its weights' names → a replaced MLP and the layer in its place get one number, which depends on their input → the sum of a
parallel layer and an MLP gets the number of the MLP's output → equal outputs have equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.ops import IDENTITY, is_assertion, op_name
from memrewrite.passes.graphs.provenance import clean, modules_of
from memrewrite.passes.graphs.shapes import is_tensor, shape_of
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.models.fingerprints import hash_of
from memrewrite.passes.rewrite.layer_call import add_output
from memrewrite.plans import Substitution


class ValueNumbering:
    """Gives equal numbers to equal computations, in all graphs that it is applied to."""

    def __init__(self) -> None:
        self.table: dict[Any, int] = {}

    def of(self, key: Any) -> int:
        """The number of a key; a new number for a new key."""
        return self.table.setdefault(key, len(self.table))

    def outputs(self, segment: Segment, folded: Mapping[fx.Node, Folded]) -> tuple[Any, dict[fx.Node, int]]:
        """The numbers of a graph's outputs, and of every node that they depend on."""
        number: dict[fx.Node, int] = {}
        output = next(node for node in segment.graph.nodes if node.op == "output")
        for node in _needed(segment, output, folded):
            if node in folded:
                number[node] = folded[node].number(self, number)
            elif node.op == "placeholder" or node.op == "get_attr":
                number[node] = self.of(_leaf(segment, node))
            elif _is_noop(node):
                number[node] = number[node.all_input_nodes[0]]
            elif op_name(node) == "add" and any(map(_is_stub_output, node.all_input_nodes)):
                number[node] = number[next(n for n in node.all_input_nodes if not _is_stub_output(n))]
            else:
                number[node] = self.of((str(node.target), _mapped(node.args, number), _mapped(node.kwargs, number)))
        return _mapped(output.args, number), number


def _is_noop(node: fx.Node) -> bool:
    """Whether a node returns its input, with the same dtype and shape.

    Two traces of one computation may differ in such nodes: a cast to the same dtype is recorded only sometimes.
    """
    if (op_name(node) not in IDENTITY and op_name(node) != "slice") or "dropout" in op_name(node):
        return False
    before, after = (n.meta.get("val") for n in (node.all_input_nodes[0], node))
    same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    return same and (op_name(node) != "slice" or shape_of(node) == shape_of(node.all_input_nodes[0]))


def _is_stub_output(node: fx.Node) -> bool:
    """Whether a node is the zeros that a `ZeroStub` returns: adding them changes nothing."""
    return op_name(node) == "expand" and op_name(node.all_input_nodes[0]) == "new_zeros"


class Folded:
    """Overrides a node's number: that of `("site", name, number of reads)`, or, without a name, that of `reads`."""

    def __init__(self, name: str | None, reads: fx.Node) -> None:
        self.name, self.reads = name, reads

    def number(self, numbers: ValueNumbering, known: dict[fx.Node, int]) -> int:
        """The number, where `known` has that of `reads`."""
        return known[self.reads] if self.name is None else numbers.of(("site", self.name, known[self.reads]))


def _needed(segment: Segment, output: fx.Node, folded: Mapping[fx.Node, Folded]) -> list[fx.Node]:
    """The nodes that the output depends on, in order, without assertions and without those inside of folded sites."""
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
        return "literal", hash_of(segment.literals[node.name].detach())
    return "input", node.name


# ------------------------------------------------------------------------------------------------- before and after


class Differs(Exception):  # noqa: N818 - turned into a failed check
    """The graphs differ outside of the sites; the message names the place."""


def compare(
    before: Segment, after: Segment, found: Mapping[str, tuple[SiteCall, ...]], layers: Mapping[str, Substitution]
) -> int:
    """Compare the graph outside of the sites before and after the edit. Returns the number of compared values.

    `found` has the calls of every site before, and `layers` the substitution of each layer, by the layer's module path.
    Raises `Differs`.
    """
    numbers, after = ValueNumbering(), _with_literals_of(before, after)
    sites = {s.site.path: s for s in layers.values()}
    calls = {path: [c for c in found[path] if c.segment is before] for path in sites}
    replaced = [(path, c) for path, own in calls.items() for c in own if sites[path].placement == "replace"]
    old, old_number = numbers.outputs(before, {c.bound.y: Folded(path, c.bound.x) for path, c in replaced})
    folded, reads = _fold_layers(after, layers)
    new, new_number = numbers.outputs(after, folded)
    if old != new:
        raise Differs(_first_difference(after, folded, new_number, set(old_number.values())))
    for path, own in calls.items():
        was = [old_number.get(call.bound.x) for call in own]
        now = [new_number.get(x) for x in reads.get(path, [])]
        if was != now:
            raise Differs(f"the layer at {path!r} does not read what the MLP read")
    return len(new_number)


def _with_literals_of(before: Segment, after: Segment) -> Segment:
    """`after`, in which the constant tensors of `before` are constants too: in a copy of a graph module they become buffers."""
    constant = {str(node.target) for node in before.graph.nodes if node.op == "get_attr" and node.name in before.literals}
    literals = {node: after.tensors[node] for node, name in after.weights.items() if name in constant}
    weights = {node: name for node, name in after.weights.items() if node not in literals}
    return replace(after, weights=weights, literals={**after.literals, **literals})


def _fold_layers(
    segment: Segment, layers: Mapping[str, Substitution]
) -> tuple[dict[fx.Node, Folded], dict[str, list[fx.Node]]]:
    """The numbering of the layers' outputs; and for each site the values that its layer reads, call by call."""
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
    """The nodes that each call of a layer computed, in the order of the calls, for calls that the outputs depend on."""
    found: dict[str, tuple[str, list[fx.Node]]] = {}
    live = set(_needed(segment, next(node for node in segment.graph.nodes if node.op == "output"), {}))
    for node in segment.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            found[node.name] = (str(node.target), [node])
        if node.op != "call_function" or not node.users:
            continue
        for call, path in modules_of(node):
            whole = f"{segment.path}.{clean(path)}".strip(".")
            if whole in layers:
                found.setdefault(call, (whole, []))[1].append(node)
    return [(path, nodes) for path, nodes in found.values() if live.intersection(nodes)]


def _is_weight(segment: Segment, node: fx.Node) -> bool:
    return node.name in segment.weights or node.name in segment.literals


def _sum_with(y: fx.Node, path: str) -> tuple[fx.Node, fx.Node]:
    """The sum of a layer's output `y` and an MLP's output, and the latter."""
    while True:
        users = [user for user in y.users if not is_assertion(user)]
        if len(users) != 1:
            raise Differs(f"the output of the layer at {path!r} has {len(users)} users, not one")
        (user,) = users
        if op_name(user) in IDENTITY or (op_name(user) in ("view", "reshape") and shape_of(user)[-1] == shape_of(y)[-1]):
            y = user
        elif _is_sum(user) and len(user.all_input_nodes) == 2 and not user.kwargs:
            return user, next(n for n in user.all_input_nodes if n is not y)
        else:
            raise Differs(f"the output of the layer at {path!r} is not added to the MLP's output but read by {user.name!r}")


def _is_sum(node: fx.Node) -> bool:
    return op_name(node) == "add" or node.target is add_output


def _first_difference(after: Segment, folded: Mapping[fx.Node, Folded], number: Mapping[fx.Node, int], known: set[int]) -> str:
    new = next((node for node in after.graph.nodes if node in number and number[node] not in known), None)
    if new is None:
        return "the outputs are other values of the graph than before"
    module = clean(modules_of(new)[-1][1]) if modules_of(new) else ""
    return f"`{op_name(new)}` ({new.name}) in module {module!r} was not there before, or read something else"
