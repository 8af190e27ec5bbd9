"""One captured graph with its weights, and the capture of a whole model."""

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
from memrewrite.passes.models.forward import Inputs


@dataclass(frozen=True)
class Segment:
    """One captured graph: of the whole model (`path` is "") or of one block, whose parameters live under `path`."""

    path: str
    graph: fx.Graph
    weights: Mapping[str, str]  # graph node name -> parameter or buffer name, as the model knows it
    literals: Mapping[str, torch.Tensor]  # graph node name -> constant tensor
    program: ExportedProgram | fx.GraphModule
    inputs: Inputs  # what it was captured with
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # graph node name -> the parameter or buffer itself
    values: Mapping[str, str] = field(default_factory=dict)  # of a lowered graph: given graph's node name -> its value's
    written: tuple[str, ...] = ()  # of a lowered graph: parameters and buffers that it writes into
    own_segments: tuple[str, ...] | None = None  # of a graph of what ran: the blocks in it that are segments of their own

    def example(self, given: fx.Node) -> Any:
        """What a placeholder that is no weight stood for when this was captured."""
        leaves, by_name = tree_leaves(self.inputs), self.inputs[1]
        if self.own_segments is not None:
            return leaves[int(given.name.rpartition("_")[2])]
        places = [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in {**self.weights, **self.literals}]
        return by_name[given.name] if given.name in by_name else leaves[places.index(given)]


@dataclass(frozen=True)
class Capture:
    """What the model computes: graphs, the inputs they were made with, and one recorded forward. Frozen."""

    segments: tuple[Segment, ...]
    inputs: Inputs
    how: str
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)  # of the live modules, by path
    outputs: Any = None  # of the recorded forward; None for a traced program

    @property
    def is_graph(self) -> bool:
        """Whether the model was given as a graph: it is rewritten graph → graph, and no module tree is edited."""
        return isinstance(self.segments[0].program, fx.GraphModule) and self.segments[0].own_segments is None

    @property
    def is_whole(self) -> bool:
        """Whether the whole model is one graph."""
        return [segment.path for segment in self.segments] == [""]


def segment_of(path: str, program: ExportedProgram, inputs: Inputs) -> Segment:
    """The graph of the module at `path`, exported by itself."""
    signature = program.graph_signature
    prefix = f"{path}." if path else ""
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    state = {**program.state_dict, **program.constants}  # buffers that are no part of the state are among the constants
    tensors = {node: state[name] for node, name in held.items()}
    weights = {node: prefix + name for node, name in held.items()}
    return Segment(path, program.graph, weights, constants, program, inputs, tensors)


def of_the_model(model: nn.Module, segment: Segment) -> Segment:
    """A segment of a part, its weights named as the whole model names them first: two parts may share a module."""
    if not segment.path:
        return segment
    first: dict[int, str] = {}
    names = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    called = {name: first.setdefault(id(tensor), name) for name, tensor in names}
    return replace(segment, weights={node: called.get(name, name) for node, name in segment.weights.items()})


def graph_segment(module: nn.Module, inputs: Inputs) -> Segment:
    """The graph of an already traced module; its `get_attr` nodes are the weights."""
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"a graph module was expected, not {type(module).__name__}")
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    named = {n.name: str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    weights = {node: name for node, name in named.items() if name in held}
    literals = {node: attrgetter(name)(module) for node, name in named.items() if name not in held}
    constants = {node: value for node, value in literals.items() if isinstance(value, torch.Tensor)}
    tensors = {node: held[name] for node, name in weights.items()}
    return Segment("", module.graph, weights, constants, module, inputs, tensors)
