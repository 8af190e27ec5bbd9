"""Rewrites a captured graph into a canonical one, so that later passes need not know the ways to write its arithmetic.

Flow: a copy whose weights are marked placeholders → in-place ops made functional → casts, asserts, aliases and dropout
dropped → every multiplication by a weight written as `aten.linear` → packed linears split into one for each slice. Each is a
`torch.fx.passes.infra` pass, so other passes can run between them. Every canonical node has the recorded node that it
represents in `meta["origin"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from memrewrite.passes.canonicalize.linear_builder import LinearBuilder
from memrewrite.passes.canonicalize.linear_forms import rewrite_as_linear
from memrewrite.passes.canonicalize.sums import cut_of, take_part
from memrewrite.passes.graphs.dataflow import LITERAL, MAX_ACTIVATION_OPS, ORIGIN, WEIGHT, Dataflow
from memrewrite.passes.graphs.ops import ALIASES, ALONG, IDENTITY, LAYOUT, is_assertion, is_pointwise, op_name

__all__ = ["ORIGIN", "PASSES", "DropIdentity", "Functionalize", "RewriteLinear", "SplitLinear", "canonicalize"]
OPEN_END = torch.iinfo(torch.int64).max  # the end of a slice without an end


def canonicalize(graph: fx.Graph, weights: Mapping[str, str], literals: Mapping[str, torch.Tensor]) -> fx.Graph:
    """The canonical graph of a recorded graph, which is not changed.

    `weights` maps the names of the graph's nodes that are parameters or buffers to those in the model, `literals` those that
    are constant tensors to their values.
    """
    manager = PassManager(passes=[step() for step in PASSES])
    canonical: fx.Graph = manager(fx.GraphModule({}, _copy(graph, weights, literals))).graph_module.graph
    return canonical


def _copy(recorded: fx.Graph, weights: Mapping[str, str], literals: Mapping[str, torch.Tensor]) -> fx.Graph:
    """A copy in which weights are placeholders marked with their names."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in recorded.nodes:
        weight = node.op == "get_attr"
        twin = graph.placeholder(node.name) if weight else graph.node_copy(node, made.__getitem__)
        twin.meta = {**node.meta, ORIGIN: node}
        if node.name in weights:
            twin.meta[WEIGHT] = weights[node.name]
        if node.name in literals:
            twin.meta[LITERAL] = literals[node.name]
        made[node] = twin
    return graph


class _Pass(PassBase):
    """A pass that rewrites the graph in one walk."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = self.walk(graph_module.graph)
        return PassResult(graph_module, changed)

    def walk(self, graph: fx.Graph) -> bool:
        """Rewrite the graph; True if it changed."""
        raise NotImplementedError


class Functionalize(_Pass):
    """Rewrites `x.add_(y)` as `add(x, y)`; nodes that read `x` afterwards read the result."""

    def walk(self, graph: fx.Graph) -> bool:
        """Make every in-place op functional."""
        current: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if current:
                node.args = fx.map_arg(node.args, lambda n: current.get(n, n))
                node.kwargs = fx.map_arg(node.kwargs, lambda n: current.get(n, n))
            if not _mutates(node):
                continue
            base: Any = node.kwargs.get("out", node.all_input_nodes[0])
            functional = _functional_op(node)
            if functional is not None:
                node.target = functional
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
            while True:  # an in-place op on a view mutates the tensor that it is a view of
                current[base] = node
                if op_name(base) not in LAYOUT | ALIASES or not base.all_input_nodes:
                    break
                base = base.all_input_nodes[0]
        return bool(current)


def _mutates(node: fx.Node) -> bool:
    """True for an in-place op, and for one that writes into its argument `out`."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    return op_name(node).endswith("_") or isinstance(node.kwargs.get("out"), fx.Node)


def _functional_op(node: fx.Node) -> Any:
    """The op that computes the same and mutates nothing; None if there is none."""
    target: Any = node.target
    packet = getattr(getattr(torch.ops, target.namespace), op_name(node).removesuffix("_"), None)
    if packet is None or op_name(node).endswith("_"):
        return getattr(packet, target._overloadname, None)
    wanted = [(arg.name, str(arg.type)) for arg in target._schema.arguments if arg.name != "out"]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    equal = [op for op in overloads if [(arg.name, str(arg.type)) for arg in op._schema.arguments] == wanted]
    return equal[0] if equal else None


class DropIdentity(_Pass):
    """Drops casts, copies, asserts and dropout: their users read the input instead. Dead nodes are dropped as well."""

    def walk(self, graph: fx.Graph) -> bool:
        """Drop every op that returns its input."""
        size = len(graph.nodes)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if is_assertion(node):
                graph.erase_node(node)
            elif (op_name(node) in IDENTITY or _takes_all(node)) and node.all_input_nodes:
                source = node.all_input_nodes[0]
                for user in list(node.users) if op_name(node) == "native_dropout" else ():
                    user.replace_all_uses_with(source)
                    graph.erase_node(user)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        for node in reversed(graph.nodes):
            if not node.users and _is_pure(node):
                graph.erase_node(node)
        return len(graph.nodes) != size


def _takes_all(node: fx.Node) -> bool:
    """True for a slice from the start to the end."""
    bounds = ((0, OPEN_END), (None, OPEN_END), (0, None), (None, None))
    return op_name(node) == "slice" and node.args[2:4] in bounds and not node.args[4:]


def _is_pure(node: fx.Node) -> bool:
    """True for a node that has no effect except its value."""
    target = node.target
    return node.target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable)


class RewriteLinear(_Pass):
    """Rewrites every product of an activation with a weight over the activation's features as `linear(x, weight, bias)`."""

    def walk(self, graph: fx.Graph) -> bool:
        """Rewrite every form in `LINEAR_FORMS`."""
        flow, changed = Dataflow(graph), False
        for node in list(graph.nodes):
            changed |= rewrite_as_linear(graph, flow, node)
        return changed


class SplitLinear(_Pass):
    """Splits a packed linear (such as queries, keys, values and an MLP's first matrix) into one linear for each slice.

    A slice becomes a linear if all that reads it are linears, and none of them reads some other slice.
    """

    def walk(self, graph: fx.Graph) -> bool:
        """Split every linear of which some slices go to other linears than the rest."""
        flow, changed = Dataflow(graph), False
        for linear in list(graph.nodes):
            if not flow.is_linear(linear):
                continue
            pieces = [piece for user in linear.users for piece in (user, *user.users) if cut_of(piece)[0] is linear]
            readers = {piece: _readers(flow, piece) for piece in pieces}
            for piece, ends in readers.items():
                separate = any(not ends & others for others in readers.values())
                if separate and ends and all(flow.is_linear(end) for end in ends):
                    take_part(LinearBuilder(graph, flow, piece))
                    changed = True
        return changed


def _readers(flow: Dataflow, piece: fx.Node) -> set[fx.Node]:
    """The first nodes after `piece` that are not elementwise, layout ops, norms or reductions; empty if they are too far."""
    found, pending, seen = set[fx.Node](), [piece], {piece}
    while pending and len(seen) < MAX_ACTIVATION_OPS:
        for user in pending.pop().users:
            if not (is_pointwise(user) or op_name(user) in LAYOUT | ALONG) or flow.is_linear(user):
                found.add(user)
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return set() if pending else found


PASSES: tuple[type[_Pass], ...] = (Functionalize, DropIdentity, RewriteLinear, SplitLinear)
