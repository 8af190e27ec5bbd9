"""A located MLP as a module of its own: the very nodes that were recorded, on the very weights of the live model.

`originals` puts it where the layer would go; the graph emitter and later passes may call it. Nothing is copied but nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.graphs.ops import FILLS, op_name
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import of_sizes_alone


class OriginalMLP(nn.Module):
    """The MLP at one site as it was: called as often as the site is, each call with the nodes recorded for that call.

    `train_noise` switches on what was recorded in eval mode and acts in train mode only.
    """

    def __init__(self, model: nn.Module, calls: Sequence[SiteCall], *, train_noise: bool = False) -> None:
        super().__init__()
        self.calls = [
            extract(model, found, train_noise=train_noise) for found in calls
        ]  # a plain list: the weights stay the model's
        self.outputs: list[Tensor] = []  # with gradients on: leaves, to see what depends on them
        self.stands_for: list[nn.Module] = []  # modules whose attributes the model may ask this one for

    def __getattr__(self, name: str) -> Any:
        """An attribute of what it stands for: some models look at the weights of their own modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "stands_for" not in vars(self) or not any(hasattr(module, name) for module in self.stands_for):
                raise
        return next(getattr(module, name) for module in self.stands_for if hasattr(module, name))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_model]."""
        out: Tensor = self.calls[len(self.outputs) % len(self.calls)](x)
        if not torch.is_grad_enabled():
            self.outputs.append(out)
            return out
        self.outputs.append(out.detach().requires_grad_())
        return self.outputs[-1].clone()  # a model may add to an MLP's output in place, which a leaf does not allow


def extract(model: nn.Module, found: SiteCall, *, train_noise: bool = False) -> fx.GraphModule:
    """One recorded call of an MLP as a `GraphModule` of one input, sharing its parameters with `model`."""
    bound, position = found.bound, found.recorded.position
    graph, root = fx.Graph(), nn.Module()
    made: dict[fx.Node, Any] = {bound.x: graph.placeholder("x")}
    for node in sorted(bound.nodes | _constants(bound.nodes, bound.x), key=position.__getitem__):
        value = of_sizes_alone(node)
        if isinstance(value, Tensor):
            root.register_buffer(f"filled_{len(made)}", value)
            made[node] = graph.call_function(torch.clone, (graph.get_attr(f"filled_{len(made)}"),))  # it may be written into
        elif value is not None:
            made[node] = value
        elif node.op == "call_function":
            made[node] = graph.node_copy(node, made.__getitem__)
            if train_noise:
                _switch_on(made[node])
        elif node is not bound.x:
            name = f"weight_{len(made)}"
            _attach(root, name, held_by(model, found.segment, node))
            made[node] = graph.get_attr(name)
    graph.output(made[bound.y])
    return fx.GraphModule(root, graph)


def _switch_on(node: fx.Node) -> None:
    """Let an op act as it does in train mode: dropouts, batch norms and randomised activations take the mode as a flag."""
    if isinstance(node.target, torch._ops.OpOverload):
        for number, argument in enumerate(node.target._schema.arguments):
            if argument.name not in ("train", "training"):
                continue
            if number < len(node.args):
                node.update_arg(number, True)
            else:
                node.update_kwarg(argument.name, True)


def held_by(model: nn.Module, segment: Segment, node: fx.Node) -> Tensor:
    """The tensor a weight node stands for: the live model's parameter or buffer, a constant of the program, or an example."""
    if node.name in segment.literals:
        return segment.literals[node.name]
    if node.name not in segment.weights:
        given: Tensor = segment.example(node)
        return given
    holder: Any = model
    for part in segment.weights[node.name].split("."):
        holder = getattr(holder, part)
    if not isinstance(holder, Tensor):
        raise TypeError(f"{segment.weights[node.name]} is no tensor")
    return holder


def _constants(nodes: frozenset[RecordedNode], x: RecordedNode) -> set[RecordedNode]:
    """The weights and literals that nodes read, with the arithmetic behind them; sizes, without what they are taken of."""
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


def _attach(root: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
