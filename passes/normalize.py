"""One canonical view of a captured graph, so that no later pass asks how a model spelled its arithmetic.

Flow: a copy whose weights are marked placeholders → in-place ops made functional → casts, asserts, aliases and dropout
dropped → every multiplication by a weight written as `aten.linear`. Each is a `torch.fx.passes.infra` pass, so a user may
put their own between. Every canonical node names the recorded node it stands for in `meta["origin"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from memrewrite.passes.capture import Segment
from memrewrite.passes.dataflow import (
    IDENTITY,
    LAYOUT,
    LITERAL,
    WEIGHT,
    Dataflow,
    is_assertion,
    is_tensor,
    op_name,
    shape_of,
)

aten = torch.ops.aten
ORIGIN = "origin"


def normalize(segment: Segment) -> fx.Graph:
    """The canonical graph of a segment. The segment itself is not changed."""
    manager = PassManager(passes=[step() for step in PASSES])
    graph: fx.Graph = manager(fx.GraphModule({}, _copy(segment))).graph_module.graph
    return graph


def _copy(segment: Segment) -> fx.Graph:
    """A copy in which weights are placeholders marked with their names."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in segment.graph.nodes:
        weight = node.op == "get_attr"
        twin = graph.placeholder(node.name) if weight else graph.node_copy(node, made.__getitem__)
        twin.meta = {**node.meta, ORIGIN: node}
        if node.name in segment.weights:
            twin.meta[WEIGHT] = segment.weights[node.name]
        if node.name in segment.literals:
            twin.meta[LITERAL] = segment.literals[node.name]
        made[node] = twin
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
            functional = _functional_twin(node)
            if functional is not None:
                node.target = functional
            base: Any = node.all_input_nodes[0]
            while True:  # a write through a view changes what the view was taken of
                current[base] = node
                if op_name(base) not in LAYOUT or not base.all_input_nodes:
                    break
                base = base.all_input_nodes[0]
        return bool(current)


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and op_name(node).endswith("_")


def _functional_twin(node: fx.Node) -> Any:
    target: Any = node.target
    packet = getattr(getattr(torch.ops, target.namespace), op_name(node)[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


class DropNoise(_Pass):
    """Casts, copies, asserts and dropout go; their readers read what they handed on."""

    def walk(self, graph: fx.Graph) -> bool:
        """Drop what only hands a value on."""
        size = len(graph.nodes)
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if is_assertion(node):
                graph.erase_node(node)
            elif op_name(node) in IDENTITY and node.all_input_nodes:
                source = node.all_input_nodes[0]
                for user in list(node.users) if op_name(node) == "native_dropout" else ():
                    user.replace_all_uses_with(source)
                    graph.erase_node(user)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        return len(graph.nodes) != size


class SpellLinear(_Pass):
    """Every product of an activation with a weight over the activation's features is written `linear(x, weight, bias)`."""

    def walk(self, graph: fx.Graph) -> bool:
        """Rewrite every known spelling."""
        flow, changed = Dataflow(graph), False
        for node in list(graph.nodes):
            rule = SPELLINGS.get(op_name(node)) if node.op == "call_function" else None
            if rule is not None and node not in flow.constant:
                changed |= rule(graph, flow, node)
        return changed


def _turned(graph: fx.Graph, flow: Dataflow, node: fx.Node, weight: fx.Node, turn: Any, *args: Any) -> fx.Node:
    """A weight laid out as `linear` takes it: [out, in]."""
    with graph.inserting_before(node):
        turned = graph.call_function(turn, (weight, *args))
    if "val" in weight.meta:
        turned.meta["val"] = turn(weight.meta["val"], *args)
    flow.constant.add(turned)
    return turned


def _become_linear(node: fx.Node, x: Any, weight: Any, bias: Any) -> bool:
    node.target, node.args, node.kwargs = aten.linear.default, (x, weight, bias), {}
    return True


def _addmm(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`addmm(bias, x, W)` with unit factors."""
    bias, x, weight = node.args
    plain = all(factor == 1 for factor in node.kwargs.values())
    if not plain or x in flow.constant or weight not in flow.constant or bias not in flow.constant:
        return False
    return _become_linear(node, x, _turned(graph, flow, node, weight, aten.t.default), bias)  # type: ignore[arg-type]


def _matmul(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`x @ W` with a matrix `W`."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight not in flow.constant or len(shape_of(weight)) != 2 or x in flow.constant:
        return False
    return _become_linear(node, x, _turned(graph, flow, node, weight, aten.t.default), None)


def _einsum(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`einsum("...d,df->...f", x, W)`: the one shared index is the last of `x`, the free one of `W` the last of the result."""
    equation, operands = node.args[0], node.args[1]
    left, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return False
    pairs = list(zip(terms, operands, strict=True))
    (xs, x), (ws, weight) = sorted(pairs, key=lambda pair: pair[1] in flow.constant)
    if x in flow.constant or weight not in flow.constant or len(ws) != 2:
        return False
    free = [i for i in ws if i not in xs]
    shared = [i for i in ws if i in xs]
    is_linear = len(free) == 1 and len(shared) == 1 and xs[-1] == shared[0] and out == xs[:-1] + free[0]
    if is_linear and ws[0] == shared[0]:
        weight = _turned(graph, flow, node, weight, aten.t.default)
    return is_linear and _become_linear(node, x, weight, None)


def _conv(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """A convolution with a kernel of one, stride one, no padding and one group: a linear over the channel axis."""
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(weight, fx.Node) or weight not in flow.constant or any(k != 1 for k in shape_of(weight)[2:]):
        return False
    stride, padding, _, groups = _conv_settings(node)
    if any(s != 1 for s in stride) or any(p != 0 for p in padding) or groups != 1:
        return False
    weight = _turned(graph, flow, node, weight, aten.flatten.using_ints, 1)
    with graph.inserting_before(node):
        inner = _move(graph, node, x, 1, -1)
    result = graph.create_node("call_function", aten.linear.default, (inner, weight, bias))
    inner.append(result)
    result.meta = {**node.meta, "val": node.meta["val"].movedim(1, -1)}
    node.target, node.args, node.kwargs = aten.movedim.int, (result, -1, 1), {}
    node.meta["relay"] = True
    return True


def _conv_settings(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    given = dict(zip(("stride", "padding", "dilation", "groups"), node.args[3:], strict=False)) | node.kwargs
    defaults: dict[str, Any] = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
    stride, padding, dilation, groups = ({**defaults, **given}[key] for key in defaults)
    unpadded = (0,) if padding in ("valid", "same") else padding  # with a kernel of one both mean none
    return _tuple(stride), _tuple(unpadded), dilation, groups


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _move(graph: fx.Graph, like: fx.Node, x: Any, source: int, destination: int) -> fx.Node:
    moved = graph.create_node("call_function", aten.movedim.int, (x, source, destination))
    meta = {key: value for key, value in like.meta.items() if key != ORIGIN}
    moved.meta = {**meta, "val": x.meta["val"].movedim(source, destination), "relay": True}
    return moved


def _add(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`linear(x, W) + bias`, the bias a vector of weights."""
    if node.kwargs or len(node.args) != 2:
        return False
    for result, bias in (node.args, node.args[::-1]):
        if (
            isinstance(result, fx.Node)
            and isinstance(bias, fx.Node)
            and bias in flow.constant
            and is_tensor(bias)
            and flow.is_linear(result)
            and len(result.users) == 1
            and (len(result.args) < 3 or result.args[2] is None)
            and shape_of(bias)[-1:] == shape_of(node)[-1:]
            and len(shape_of(bias)) == 1
        ):
            _become_linear(node, result.args[0], result.args[1], bias)
            graph.erase_node(result)
            return True
    return False


Rule = Callable[[fx.Graph, Dataflow, fx.Node], bool]
SPELLINGS: dict[str, Rule] = {
    "addmm": _addmm,
    "mm": _matmul,
    "matmul": _matmul,
    "einsum": _einsum,
    "conv1d": _conv,
    "conv2d": _conv,
    "convolution": lambda graph, flow, node: not any(node.args[6:7]) and _conv(graph, flow, node),
    "add": _add,
}
PASSES: tuple[type[_Pass], ...] = (Functionalize, DropNoise, SpellLinear)
