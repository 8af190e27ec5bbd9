"""One canonical view of a captured graph, so that no later pass asks how a model spelled its arithmetic.

Flow: a copy whose weights are marked placeholders → in-place ops made functional → casts, asserts, aliases and dropout
dropped → every multiplication by a weight written as `aten.linear`, one for each of its pieces that part for good. Each is
a `torch.fx.passes.infra` pass, so a user may put their own between. Every canonical node names the recorded node it stands
for in `meta["origin"]`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from memrewrite.passes.canonicalize.linear_forms import spell
from memrewrite.passes.canonicalize.sums import cut_of, take_part
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.copying import COPY, copied
from memrewrite.passes.graphs.dataflow import LITERAL, ORIGIN, SPELLED, WEIGHT, Dataflow
from memrewrite.passes.graphs.ops import ALONG, IDENTITY, LAYOUT, is_assertion, is_pointwise, op_name

__all__ = ["ORIGIN", "PASSES", "DropNoise", "Functionalize", "SpellLinear", "canonicalize"]
ALL = torch.iinfo(torch.int64).max  # how torch writes the end of a slice that is left open
ALIASES = {"alias", "detach"}  # of what hands a value on, the ops that never copy


def canonicalize(segment: Segment) -> fx.Graph:
    """The canonical graph of a segment. The segment itself is not changed."""
    manager = PassManager(passes=[step() for step in PASSES])
    graph: fx.Graph = manager(fx.GraphModule({}, _copy(segment))).graph_module.graph
    return graph


def _copy(segment: Segment) -> fx.Graph:
    """A copy in which weights are placeholders marked with their names."""
    graph, copies = copied(
        segment.graph.nodes, instead=lambda new, node: new.placeholder(node.name) if node.op == "get_attr" else COPY
    )
    for node, copy in copies.items():
        copy.meta = {**node.meta, ORIGIN: node}
        if node.name in segment.weights:
            copy.meta[WEIGHT] = segment.weights[node.name]
        if node.name in segment.literals:
            copy.meta[LITERAL] = segment.literals[node.name]
    return graph


class _Pass(PassBase):
    """A pass that rewrites the graph in one walk."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = self.walk(graph_module.graph)
        return PassResult(graph_module, changed)

    def walk(self, graph: fx.Graph) -> bool:
        """Rewrite; True when anything changed."""
        raise NotImplementedError


class Functionalize(_Pass):
    """`x.add_(y)` becomes `add(x, y)`, and whoever read `x` afterwards reads the result."""

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
            functional = _functional_twin(node)
            if functional is not None:
                node.target = functional
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
            while True:  # a write through a view changes what the view was taken of
                current[base] = node
                if op_name(base) not in LAYOUT | ALIASES or not base.all_input_nodes:
                    break
                base = base.all_input_nodes[0]
        return bool(current)


def _mutates(node: fx.Node) -> bool:
    """An in-place op, or one that writes to a tensor it is given as `out`."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    return op_name(node).endswith("_") or isinstance(node.kwargs.get("out"), fx.Node)


def _functional_twin(node: fx.Node) -> Any:
    """The op that computes the same and writes nowhere."""
    target: Any = node.target
    packet = getattr(getattr(torch.ops, target.namespace), op_name(node).removesuffix("_"), None)
    if packet is None or op_name(node).endswith("_"):
        return getattr(packet, target._overloadname, None)
    wanted = [(arg.name, str(arg.type)) for arg in target._schema.arguments if arg.name != "out"]
    overloads = [getattr(packet, name) for name in packet.overloads()]
    alike = [op for op in overloads if [(arg.name, str(arg.type)) for arg in op._schema.arguments] == wanted]
    return alike[0] if alike else None


class DropNoise(_Pass):
    """Casts, copies, asserts and dropout go, their readers read what they handed on; what nobody reads goes as well."""

    def walk(self, graph: fx.Graph) -> bool:
        """Drop what only hands a value on."""
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
            if not node.users and _only_computes(node):
                graph.erase_node(node)
        return len(graph.nodes) != size


def _takes_all(node: fx.Node) -> bool:
    """A slice from the start to the end."""
    return op_name(node) == "slice" and node.args[2:4] in ((0, ALL), (None, ALL), (0, None), (None, None)) and not node.args[4:]


def _only_computes(node: fx.Node) -> bool:
    """Whether a node is of no use but by its value."""
    target = node.target
    return node.target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable)


class SpellLinear(_Pass):
    """Every product of an activation with a weight over the activation's features is written `linear(x, weight, bias)`."""

    def walk(self, graph: fx.Graph) -> bool:
        """Rewrite every known spelling."""
        flow, changed = Dataflow(graph), False
        for node in list(graph.nodes):
            changed |= spell(graph, flow, node)
        return changed


class PartLinear(_Pass):
    """A product whose pieces part for good becomes one product for each: an MLP's first matrix, kept with an attention's."""

    def walk(self, graph: fx.Graph) -> bool:
        """Part every product of which some pieces go to other products, and some to neither these nor any."""
        flow, changed = Dataflow(graph), False
        for product in list(graph.nodes):
            if not flow.is_linear(product):
                continue
            pieces = [piece for user in product.users for piece in (user, *user.users) if cut_of(piece)[0] is product]
            leads = {piece: _leads_to(flow, piece) for piece in pieces}
            for piece, ends in leads.items():
                parted = any(not ends & others for others in leads.values())
                if parted and ends and all(flow.is_linear(end) for end in ends):
                    take_part(graph, flow, piece)
                    changed = True
        return changed


def _leads_to(flow: Dataflow, piece: fx.Node) -> set[fx.Node]:
    """What first reads a value otherwise than feature by feature or along its features."""
    found, pending, seen = set[fx.Node](), [piece], {piece}
    while pending and len(seen) < SPELLED:
        for user in pending.pop().users:
            if not (is_pointwise(user) or op_name(user) in LAYOUT | ALONG) or flow.is_linear(user):
                found.add(user)
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return set() if pending else found


PASSES: tuple[type[_Pass], ...] = (Functionalize, DropNoise, SpellLinear, PartLinear)
