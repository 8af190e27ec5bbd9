"""Turns the weights of a graph from `torch.compile`, which are inputs, into attributes with the model's names, and back.

Flow: placeholders of parameters and buffers, by their source → a graph module with these as attributes → (located, rewritten)
→ the same placeholders as before, so that the graph accepts the same arguments.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.graphs.copying import COPY, copied
from memrewrite.passes.models.block_stacks import block_positions
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.site import Inspection, Site

STACK = "nn_module_stack"
STEP = re.compile(r"\['?([^'\]]+)'?\]|\.(\w+)")
CHECKPOINTED = ("tag_activation_checkpoint",)  # calls of a subgraph; its nodes compute the same when they are inlined
PLUMBING = ("_modules", "_parameters", "_buffers", "__dict__")


@dataclass(frozen=True)
class GraphPart:
    """A graph of a model, or of a part of it, as a module with its weights as attributes."""

    module: fx.GraphModule
    inputs: Inputs  # of the remaining placeholders
    weights: Mapping[str, str]  # placeholder of the given graph -> the weight's name
    root: str  # the path of the module whose forward contains this graph, if the model is known


def attached(
    gm: fx.GraphModule, examples: Sequence[Any], model: nn.Module | None, *, as_inputs: Sequence[str] = ()
) -> GraphPart:
    """The graph with its weights as attributes, except those named in `as_inputs`, which stay inputs.

    With a `model` weights and modules have the names they have in it; without, those in the frame that is compiled.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    names, moved = _names(placeholders, examples, model)
    weights = {node: name for node, name in names.items() if name not in as_inputs}
    inlined = _Inlined(gm, weights, moved)
    inlined.graph.output(inlined.add(gm, {}, ""))
    given = dict(zip((node.name for node in placeholders), examples, strict=True))
    attributes = inlined.attributes | {name: given[node] for node, name in weights.items()}
    inputs = tuple(_value(value) for node, value in given.items() if node not in weights)
    return GraphPart(fx.GraphModule(attributes, inlined.graph), (inputs, {}), weights, moved.get("", ""))


class _Inlined:
    """A copy of a graph with weights as attributes, and with the subgraphs of activation checkpointing inlined.

    Checkpointing changes when values are computed, and not which; an MLP in a subgraph has no node in the graph around it.
    """

    def __init__(self, gm: fx.GraphModule, weights: Mapping[str, str], moved: Mapping[str, str]) -> None:
        self.graph, self.attributes = fx.Graph(), dict[str, Any]()
        self._gm, self._weights, self._moved = gm, weights, moved

    def add(self, module: fx.GraphModule, values: dict[fx.Node, Any], prefix: str) -> Any:
        """Append the nodes of `module`, whose inputs have `values`. Returns the values of its output."""
        copied(
            (node for node in module.graph.nodes if node.op != "output"),
            instead=lambda _, node: self._instead(module, node, values, prefix),
            after=lambda node, copy: self._adapt(module, node, copy, prefix),
            into=self.graph,
            values=values,
        )
        return fx.map_arg(module.graph.output_node().args[0], values.__getitem__)

    def _instead(self, module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], prefix: str) -> Any:
        source: Any = values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "call_function" and str(node.target) in CHECKPOINTED and isinstance(source, fx.GraphModule):
            given = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[1:]]
            inputs = dict(zip(source.graph.find_nodes(op="placeholder"), given, strict=True))
            return self.add(source, inputs, f"{prefix}{node.name}_")
        if node.target is operator.getitem and isinstance(source, (tuple, list)):
            return source[node.args[1]]  # type: ignore[index]
        if node.op == "get_attr" and all(str(user.target) in CHECKPOINTED for user in node.users):
            return attrgetter(str(node.target))(module)
        if node.name in self._weights and module is self._gm:
            return self.graph.create_node("get_attr", self._weights[node.name], name=node.name)
        return COPY

    def _adapt(self, module: fx.GraphModule, node: fx.Node, copy: fx.Node, prefix: str) -> None:
        """Give a copied node the attribute that it reads or calls, and the paths of its modules in the model."""
        if copy.op in ("get_attr", "call_module"):
            copy.target = f"{prefix}{node.target}"
            self.attributes[copy.target] = attrgetter(str(node.target))(module)
        stack = node.meta.get(STACK) or {}
        copy.meta[STACK] = {key: (_moved(_plain(path), self._moved), kind) for key, (path, kind) in stack.items()}


def with_weights_as_inputs(rewritten: fx.GraphModule, gm: fx.GraphModule, weights: Mapping[str, str]) -> fx.GraphModule:
    """A rewritten graph that accepts the arguments of `gm`: with every placeholder of it, weights included."""
    graph, placeholders = copied(gm.graph.find_nodes(op="placeholder"))
    inputs = {node.name: copy for node, copy in placeholders.items()}
    by_weight = {name: inputs[node] for node, name in weights.items()}

    def instead(_: fx.Graph, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return inputs[node.name]
        return by_weight.get(str(node.target), COPY) if node.op == "get_attr" else COPY

    copied(rewritten.graph.nodes, instead=instead, into=graph)
    graph.lint()
    return fx.GraphModule(rewritten, graph)


def source_of(node: fx.Node) -> Any:
    """Where a placeholder's value comes from, as dynamo records it; None in other graphs."""
    return getattr(node, "_dynamo_source", None)


def sites_as_stored(located: Inspection, part: GraphPart) -> Inspection:
    """The sites with the dtype of their weights where autocast computes in a smaller one: layers are autocast, too."""
    tensors = dict(tensors_of(part.module))

    def as_stored(site: Site) -> Site:
        stored = tensors[site.parameters[0]].dtype
        cast = site.dtype in ("bfloat16", "float16") and stored == torch.float32
        return site.model_copy(update={"dtype": "float32"}) if cast else site

    return located.model_copy(update={"sites": tuple(map(as_stored, located.sites))})


def sites_numbered(located: Inspection, model: nn.Module) -> Inspection:
    """The sites with the numbers of their blocks in the model; a graph may contain only some blocks."""
    types = {path: type(module).__qualname__ for path, module in model.named_modules() if path}
    where = block_positions([site.path.partition("#")[0] for site in located.sites], types)

    def renumbered(site: Site) -> Site:
        tower, block, blocks = where[site.path.partition("#")[0]]
        return site.model_copy(update={"tower": tower, "block": block, "tower_blocks": blocks})

    return located.model_copy(update={"sites": tuple(map(renumbered, located.sites))})


def _names(
    placeholders: Sequence[fx.Node], examples: Sequence[Any], model: nn.Module | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of the weights among the placeholders; and the paths in `model` of the frame's modules, by their path there."""
    known: dict[int, list[str]] = {}
    if model is not None:
        for name, tensor in tensors_of(model):
            known.setdefault(id(tensor), []).append(name)
    names: dict[str, str] = {}
    moved: dict[str, str] = {}
    for node, value in zip(placeholders, examples, strict=True):
        source = _source_text(node)
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and re.search(r"\._(parameters|buffers)\[", source)):
            here = _plain(source) or node.name
            there = max(known.get(id(value), [here]), key=lambda name: _shared(here, name))
            names[node.name] = f"{there}_{node.name}" if there in names.values() else there
            ends = _shared(here, there)
            if ends > 1 or there == here:  # the weight's name and its module's agree
                frame, path = (".".join(name.split(".")[:-ends]) for name in (here, there))
                moved.setdefault(frame, path)
    return names, moved


def _source_text(node: fx.Node) -> str:
    source = source_of(node)
    name = "" if source is None else source.name  # a method before torch 2.12
    return str(name() if callable(name) else name)


def _plain(path: str) -> str:
    """`L['self']._modules['blocks']._modules['0']` → `blocks.0`; the name of another variable than `self` is kept."""
    steps = [a or b for a, b in STEP.findall(path.partition("@")[0])]
    start = 1 if steps[:1] == ["self"] else 0
    return ".".join(step for step in steps[start:] if step not in PLUMBING)


def _shared(one: str, other: str) -> int:
    """How many steps, from the end, two paths have in common."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


def _moved(path: str, moved: Mapping[str, str]) -> str:
    """The path in the model of a path in the frame."""
    for frame in sorted(moved, key=len, reverse=True):
        if not frame or f"{path}.".startswith(f"{frame}."):
            return ".".join(filter(None, (moved[frame], path[len(frame) :].lstrip("."))))
    return path


def _value(value: Any) -> Any:
    """An input to run the graph on: a detached copy of a tensor, the hint of a symbolic size."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value.detach().clone() if isinstance(value, Tensor) else value
