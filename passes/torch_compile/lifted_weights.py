"""A graph from `torch.compile`: its weights are inputs. Here they become the graph's own again, under the model's names.

Flow: placeholders of parameters and buffers, by their source → a graph module that holds them → (located, rewritten) → the
same placeholders as before, so that the graph is called as it was.
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

from memrewrite.passes.models.block_stacks import block_positions
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.site import Inspection, Site

STACK = "nn_module_stack"
STEP = re.compile(r"\['?([^'\]]+)'?\]|\.(\w+)")
CHECKPOINTED = ("tag_activation_checkpoint",)  # calls of a graph whose results are those of its nodes
PLUMBING = ("_modules", "_parameters", "_buffers", "__dict__")


@dataclass(frozen=True)
class GraphPart:
    """A graph of a model, or of a part of it, as a module that holds its weights."""

    module: fx.GraphModule
    inputs: Inputs  # of the placeholders that are left
    weights: Mapping[str, str]  # placeholder of the given graph -> the weight's name
    root: str  # the path of the module whose forward this is a part of, where the model is known


def attached(gm: fx.GraphModule, examples: Sequence[Any], model: nn.Module | None, aside: Sequence[str] = ()) -> GraphPart:
    """The graph with its weights attached, those named in `aside` left as inputs.

    With a `model` weights and modules have the names they have in it; without, those in the frame that was compiled.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    names, moved = _names(placeholders, examples, model)
    weights = {node: name for node, name in names.items() if name not in aside}
    copied = _Copy(gm, weights, moved)
    copied.output(copied.nodes(gm, {}, ""))
    held = copied.held
    given = dict(zip((node.name for node in placeholders), examples, strict=True))
    held |= {name: given[node] for node, name in weights.items()}
    inputs = tuple(_value(value) for node, value in given.items() if node not in weights)
    return GraphPart(fx.GraphModule(held, copied.graph), (inputs, {}), weights, moved.get("", ""))


class _Copy:
    """A copy of a graph, with weights of its own, and without the calls of graphs that it only calls checkpointed.

    These change when values are computed, and not which; an MLP inside of one could not be named from outside.
    """

    def __init__(self, gm: fx.GraphModule, weights: Mapping[str, str], moved: Mapping[str, str]) -> None:
        self.graph, self.held = fx.Graph(), dict[str, Any]()
        self._gm, self._weights, self._moved = gm, weights, moved

    def nodes(self, module: fx.GraphModule, made: dict[fx.Node, Any], prefix: str) -> Any:
        """Copy the nodes of `module`, its inputs being `made`; what its output is made of."""
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], made.__getitem__)
            if node not in made:
                made[node] = self._copied(module, node, made, prefix)
        raise ValueError("a graph has no output")

    def output(self, value: Any) -> None:
        """End the graph."""
        self.graph.output(value)

    def _copied(self, module: fx.GraphModule, node: fx.Node, made: dict[fx.Node, Any], prefix: str) -> Any:
        source: Any = made.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "call_function" and str(node.target) in CHECKPOINTED and isinstance(source, fx.GraphModule):
            given = [made[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[1:]]
            inputs = dict(zip(source.graph.find_nodes(op="placeholder"), given, strict=True))
            return self.nodes(source, inputs, f"{prefix}{node.name}_")
        if node.target is operator.getitem and isinstance(source, (tuple, list)):
            return source[node.args[1]]  # type: ignore[index]
        if node.op == "get_attr" and all(str(user.target) in CHECKPOINTED for user in node.users):
            return attrgetter(str(node.target))(module)
        return self._node(module, node, made, prefix)

    def _node(self, module: fx.GraphModule, node: fx.Node, made: dict[fx.Node, Any], prefix: str) -> fx.Node:
        if node.name in self._weights and module is self._gm:
            twin = self.graph.create_node("get_attr", self._weights[node.name], name=node.name)
        else:
            twin = self.graph.node_copy(node, made.__getitem__)
        if twin.op in ("get_attr", "call_module") and twin.target == node.target:
            twin.target = f"{prefix}{node.target}"
            self.held[twin.target] = attrgetter(str(node.target))(module)
        stack = node.meta.get(STACK) or {}
        twin.meta[STACK] = {key: (_moved(_plain(path), self._moved), kind) for key, (path, kind) in stack.items()}
        return twin


def given_back(rewritten: fx.GraphModule, gm: fx.GraphModule, weights: Mapping[str, str]) -> fx.GraphModule:
    """A rewritten graph that is called as `gm` was: with every placeholder it had, weights among them."""
    graph, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = {node.name: graph.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")}
    lifted = {name: inputs[node] for node, name in weights.items()}
    for node in rewritten.graph.nodes:
        if node.op == "placeholder":
            twins[node] = inputs[node.name]
        elif node.op == "get_attr" and node.target in lifted:
            twins[node] = lifted[str(node.target)]
        else:
            twins[node] = graph.node_copy(node, twins.__getitem__)
    graph.lint()
    return fx.GraphModule(rewritten, graph)


def source_of(node: fx.Node) -> Any:
    """Where a placeholder's value comes from, as dynamo notes it; None in other graphs."""
    return getattr(node, "_dynamo_source", None)


def sites_as_stored(located: Inspection, part: GraphPart) -> Inspection:
    """The sites, in the type of their weights where autocast computes in a smaller one: a layer is cast as they are."""
    held = dict(tensors_of(part.module))

    def as_stored(site: Site) -> Site:
        stored = held[site.parameters[0]].dtype
        cast = site.dtype in ("bfloat16", "float16") and stored == torch.float32
        return site.model_copy(update={"dtype": "float32"}) if cast else site

    return located.model_copy(update={"sites": tuple(map(as_stored, located.sites))})


def sites_numbered(located: Inspection, model: nn.Module) -> Inspection:
    """The sites with the numbers their blocks have in the model, of which a graph may hold some only."""
    types = {path: type(module).__qualname__ for path, module in model.named_modules() if path}
    where = block_positions([site.path.partition("#")[0] for site in located.sites], types)

    def renumbered(site: Site) -> Site:
        tower, block, blocks = where[site.path.partition("#")[0]]
        return site.model_copy(update={"tower": tower, "block": block, "tower_blocks": blocks})

    return located.model_copy(update={"sites": tuple(map(renumbered, located.sites))})


def _names(
    placeholders: Sequence[fx.Node], examples: Sequence[Any], model: nn.Module | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of the weights among the placeholders; and where in `model` the frame's modules are, by path."""
    known: dict[int, list[str]] = {}
    if model is not None:
        for name, tensor in tensors_of(model):
            known.setdefault(id(tensor), []).append(name)
    names: dict[str, str] = {}
    moved: dict[str, str] = {}
    for node, value in zip(placeholders, examples, strict=True):
        written = _written(node)
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and re.search(r"\._(parameters|buffers)\[", written)):
            here = _plain(written) or node.name
            there = max(known.get(id(value), [here]), key=lambda name: _shared(here, name))
            names[node.name] = f"{there}_{node.name}" if there in names.values() else there
            ends = _shared(here, there)
            if ends > 1 or there == here:  # a name in common, and the module it is in
                frame, path = (".".join(name.split(".")[:-ends]) for name in (here, there))
                moved.setdefault(frame, path)
    return names, moved


def _written(node: fx.Node) -> str:
    source = source_of(node)
    name = "" if source is None else source.name  # a method before torch 2.12
    return str(name() if callable(name) else name)


def _plain(path: str) -> str:
    """`L['self']._modules['blocks']._modules['0']` → `blocks.0`; what hangs on another variable keeps its name."""
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
    """An input to run the graph on: a tensor of no other graph, a size by its value here."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value.detach().clone() if isinstance(value, Tensor) else value
