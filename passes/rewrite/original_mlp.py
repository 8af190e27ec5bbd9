"""A located MLP as a module: the recorded nodes, on the weights of the live model.

The *null* check puts it in the layer's place; the checks of single tokens call it. Nodes are copied, weights are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.layers.replaced import Transparent
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.copying import COPY, copied
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.graphs.ops import FILLS, op_name
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import of_sizes_alone


class _Returned:
    """Keeps what an `OriginalMLP` returned: a list of the module would be restored after a forward."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []


class OriginalMLP(Transparent):
    """The MLP at one site, to be called as often as the site is: the n-th call runs the nodes recorded for the n-th call.

    `train_noise=True` switches on dropout and other random ops that were recorded in eval mode.
    """

    def __init__(self, model: nn.Module, calls: Sequence[SiteCall], *, train_noise: bool = False) -> None:
        super().__init__()
        # a plain list: the weights stay registered in `model` alone
        self.calls = [extract(model, call, training=True if train_noise else None) for call in calls]
        self._returned = _Returned()

    @property
    def outputs(self) -> list[Tensor]:
        """What it returned so far; with gradients on: leaves, to find out what depends on them."""
        return self._returned.outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_model]."""
        out: Tensor = self.calls[len(self.outputs) % len(self.calls)](x)
        if not torch.is_grad_enabled():
            self.outputs.append(out)
            return out
        self.outputs.append(out.detach().requires_grad_())
        return self.outputs[-1].clone()  # a model may add to an MLP's output in place, which a leaf does not allow


def extract(model: nn.Module, found: SiteCall, *, training: bool | None = None) -> fx.GraphModule:
    """One recorded call of an MLP as a `GraphModule` of one input, sharing its parameters with `model`.

    `training` sets the mode of ops that have one, such as dropout; None leaves it as recorded.
    """
    bound, position, root = found.bound, found.recorded.position, nn.Module()

    def attribute(graph: fx.Graph, kind: str, value: Tensor) -> fx.Node:
        name = f"{kind}_{len(graph.nodes)}"
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value)
        return graph.get_attr(name)

    def instead(graph: fx.Graph, node: fx.Node) -> Any:
        value = of_sizes_alone(node)
        if isinstance(value, Tensor):
            filled = attribute(graph, "filled", value)
            return graph.call_function(torch.clone, (filled,))  # a later node may mutate it
        if value is None and node.op != "call_function":
            return attribute(graph, "weight", tensor_of(model, found.segment, node))
        return COPY if value is None else value

    graph = fx.Graph()
    nodes = sorted(bound.nodes | _constants(bound.nodes, bound.x), key=position.__getitem__)
    _, values = copied(
        nodes,
        instead=instead,
        after=lambda _, copy: None if training is None else _set_mode(copy, training),
        into=graph,
        values={bound.x: graph.placeholder("x")},
    )
    graph.output(values[bound.y])
    return fx.GraphModule(root, graph)


def _set_mode(node: fx.Node, training: bool) -> None:
    """Make an op act as in one mode: dropouts, batch norms and randomized activations have the mode as an argument."""
    if isinstance(node.target, torch._ops.OpOverload):
        for number, argument in enumerate(node.target._schema.arguments):
            if argument.name not in ("train", "training"):
                continue
            if number < len(node.args):
                node.update_arg(number, training)
            else:
                node.update_kwarg(argument.name, training)


def tensor_of(model: nn.Module, segment: Segment, node: fx.Node) -> Tensor:
    """The tensor of a weight node: a parameter or buffer of the live model, a constant of the program, or an example input."""
    if node.name in segment.literals:
        return segment.literals[node.name]
    if node.name not in segment.weights:
        example: Tensor = segment.example(node)
        return example
    tensor = attrgetter(segment.weights[node.name])(model)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{segment.weights[node.name]} is not a tensor")
    return tensor


def _constants(nodes: frozenset[RecordedNode], x: RecordedNode) -> set[RecordedNode]:
    """The weights and literals that nodes read, with the nodes that compute them; sizes, without the tensors they are of."""
    found: set[RecordedNode] = set()
    pending = [source for node in nodes for source in _sources(node) if source not in nodes and source is not x]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(_sources(node))
    return found


def _sources(node: RecordedNode) -> list[RecordedNode]:
    return [] if isinstance(node.meta.get("val"), torch.SymInt) or op_name(node) in FILLS else inputs_of(node)
