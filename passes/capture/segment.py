"""One captured graph with the names of its weights (`Segment`), and the capture of a model (`Capture`).

Flow: an exported program or a graph module → which nodes are weights and which are constants → `Segment`, whose weights have
the names that the whole model gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from memrewrite.passes.models.call_recorder import Call
from memrewrite.passes.models.distance import Distance
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.models.tensors import first_names, tensors_of


@dataclass(frozen=True)
class Segment:
    """One captured graph: of the whole model (`path` is "") or of one block, whose parameter names start with `path`."""

    path: str
    graph: fx.Graph
    weights: Mapping[str, str]  # graph node name -> name of the parameter or buffer in the model
    literals: Mapping[str, torch.Tensor]  # graph node name -> constant tensor
    program: ExportedProgram | fx.GraphModule
    inputs: Inputs  # the example inputs of the capture
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # graph node name -> the parameter or buffer
    values: Mapping[str, str] = field(default_factory=dict)  # lowered graph: node of the given graph -> node of this graph
    written: tuple[str, ...] = ()  # lowered graph: parameters and buffers that it mutates
    own_segments: tuple[str, ...] | None = None  # operator trace: paths of the blocks in it that have their own segments

    @property
    def is_given(self) -> bool:
        """True if this is the graph of a model that the user passed as a graph."""
        return isinstance(self.program, fx.GraphModule) and self.own_segments is None

    def example(self, placeholder: fx.Node) -> Any:
        """The example value of a placeholder that is neither a weight nor a constant."""
        leaves, by_name = tree_leaves(self.inputs), self.inputs[1]
        if self.own_segments is not None:
            return leaves[int(placeholder.name.rpartition("_")[2])]
        if placeholder.name in by_name:
            return by_name[placeholder.name]
        constant = {**self.weights, **self.literals}
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in constant]
        return leaves[placeholders.index(placeholder)]


@dataclass(frozen=True)
class Capture:
    """What the model computes: its graphs, their example inputs, and what one recorded forward showed. Frozen."""

    segments: tuple[Segment, ...]
    inputs: Inputs
    how: str  # how the graphs were captured, as users read it
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)  # of the live modules, by path
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)  # all tensors of the live model, by name
    outputs: Any = None  # of the recorded forward; None where nothing ran, as on meta
    distance: Distance | None = None  # of a program's outputs from those of the live model that it was exported from

    @property
    def is_graph(self) -> bool:
        """True if the user passed the model as a graph: a rewrite copies and edits the graph, and edits no module tree."""
        return any(segment.is_given for segment in self.segments)

    @property
    def is_whole(self) -> bool:
        """Whether the whole model is one graph."""
        return [segment.path for segment in self.segments] == [""]


def segment_of(path: str, program: ExportedProgram, inputs: Inputs) -> Segment:
    """The graph of the module at `path`, which was exported separately."""
    signature = program.graph_signature
    prefix = f"{path}." if path else ""
    own_names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    state = {**program.state_dict, **program.constants}  # non-persistent buffers are among the constants
    tensors = {node: state[name] for node, name in own_names.items()}
    weights = {node: prefix + name for node, name in own_names.items()}
    return Segment(path, program.graph, weights, constants, program, inputs, tensors)


def with_names_of(model: nn.Module, segment: Segment) -> Segment:
    """A block's segment with the first name that `model` has for each weight: two blocks may share a module."""
    if not segment.path:
        return segment
    first = first_names(model)
    names = {name: first[id(tensor)] for name, tensor in tensors_of(model)}
    return replace(segment, weights={node: names.get(name, name) for node, name in segment.weights.items()})


def graph_segment(module: nn.Module, inputs: Inputs) -> Segment:
    """The graph of a graph module; its `get_attr` nodes are weights and constants."""
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"a graph module was expected, not {type(module).__name__}")
    tensors = dict(tensors_of(module))
    attributes = {n.name: str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    weights = {node: name for node, name in attributes.items() if name in tensors}
    others = {node: attrgetter(name)(module) for node, name in attributes.items() if name not in tensors}
    constants = {node: value for node, value in others.items() if isinstance(value, torch.Tensor)}
    by_node = {node: tensors[name] for node, name in weights.items()}
    return Segment("", module.graph, weights, constants, module, inputs, by_node)
