"""Applies a Plan to a model that is given as a graph: a graph in, a new graph out.

Flow: a copy of the graph on the same weights → at every site a `call_module` of the layer on the MLP's input → users of the
MLP's output read the layer's output, or the sum → nodes of replaced MLPs and their unused weights are erased → linted. The
given graph does not change. A graph at torch level, which was lowered to find its MLPs, is edited at torch level.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import fx, nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.copying import copied
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.rewrite.build_layers import build_layers, pools_of, read_pools_of
from memrewrite.passes.rewrite.given_graph import given_names
from memrewrite.passes.rewrite.layer_call import add_output, insert_layer
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.plans import Placement, Plan

LAYERS = "memory_layers"  # the graph module's child that contains the layers


def emit_graph(segment: Segment, plan: Plan, locations: LocatedSites) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    """The rewritten graph, and its layers by site path.

    Raises `SelectError` where a layer cannot replace an MLP, because the MLP changes the layout of its tokens.
    """
    scratch = copy_of(graph_module_of(segment))
    layers = build_layers(scratch, plan)
    for layer in layers.values():
        layer.train(scratch.training)
    result = emit_layers(segment, plan, locations, layers, pools_of(scratch))
    read_pools_of(result, plan, layers)
    return result, layers


def emit_layers(
    segment: Segment, plan: Plan, locations: LocatedSites, layers: Mapping[str, nn.Module], pools: nn.Module
) -> fx.GraphModule:
    """The rewritten graph with `layers` that were built before, by site path, on `pools`. Raises what `emit_graph` raises."""
    edit = GraphEdit(segment)
    for substitution in plan.substitutions:
        path = substitution.site.path
        edit.insert(locations.found[path], layers[path], substitution.placement)
    result = edit.finished()
    result.add_module(plan.root, pools)  # no node calls it: the layers read the pools
    return result


def emit_originals(segment: Segment, plan: Plan, locations: LocatedSites) -> tuple[fx.GraphModule, dict[str, OriginalMLP]]:
    """The graph with every selected MLP replaced by itself as an `OriginalMLP`, and these by site path; for *null*."""
    edit, given = GraphEdit(segment), graph_module_of(segment)
    wrapped: dict[str, OriginalMLP] = {}
    for substitution in plan.substitutions:
        path = substitution.site.path
        wrapped[path] = OriginalMLP(given, locations.found[path])
        edit.insert(locations.found[path], wrapped[path], "replace", any_layout=True)
    return edit.finished(), wrapped


def graph_module_of(segment: Segment) -> fx.GraphModule:
    """The graph module that a segment was captured from. Raises `ModelError` for a segment of a live module."""
    if not isinstance(segment.program, fx.GraphModule):
        raise ModelError("this model was captured from a live module, not given as a graph")
    return segment.program


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same nodes, by name, on the same weights, that can be trained and exported again.

    It has its own copies of the modules that the graph calls, on the same tensors.
    """
    return _copy_and_nodes(module)[0]


def with_own_parameters(module: nn.Module) -> nn.Module:
    """The result of an edit, its parameters replaced by new ones on the same memory: the given model's keep their flags."""
    own: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                own[p] = own[p] if p in own else nn.Parameter(p.detach(), requires_grad=p.requires_grad)
                part._parameters[name] = own[p]
    return module


class GraphEdit:
    """Inserts layers into a copy of a segment's graph module."""

    def __init__(self, segment: Segment) -> None:
        self.module, copies = _copy_and_nodes(graph_module_of(segment))
        self._nodes = {node.name: copy for node, copy in copies.items()}  # of the copy, by their names in the given graph
        self._given_names, self._lowered = given_names(segment), bool(segment.values)
        self._dead: set[fx.Node] = set()  # nodes of replaced MLPs

    def insert(self, calls: tuple[SiteCall, ...], layer: nn.Module, placement: Placement, *, any_layout: bool = False) -> None:
        """Call `layer` at every call of one site.

        Raises `SelectError` for a layer that replaces an MLP whose input and output have different token layouts, unless
        the layer supports it (`any_layout`).
        """
        if not hasattr(self.module, LAYERS):
            self.module.add_module(LAYERS, nn.Module())
        name = calls[0].region.down.name
        self.module.get_submodule(LAYERS).add_module(name, layer)
        for call in calls:
            same_layout = _same_layout(call)
            if placement == "replace" and not (same_layout or any_layout):
                x, y = shape_of(call.bound.x), shape_of(call.bound.y)
                raise SelectError(
                    f"the MLP's input has the shape {x} and its output {y}: a layer cannot replace it",
                    where=call.bound.y.name,
                    hint="add the layer to the MLP: `placement: parallel`",
                )
            x_node, y_node = self._copy(call.bound.x), self._copy(call.bound.y)
            new = insert_layer(self.module.graph, f"{LAYERS}.{name}", x_node, y_node, placement, self._adder(call))
            for node in new if same_layout or placement == "replace" else new[1:]:
                node.meta = _value_of(y_node)
            if placement == "replace":
                self._dead.update(self._copy(node) for node in call.bound.nodes if self._is_given(node))

    def finished(self) -> fx.GraphModule:
        """The edited graph module, linted, without the nodes and weights that only replaced MLPs used."""
        _erase(self.module.graph, self._dead)
        self.module.graph.lint()
        return _module_of(self.module, self.module.graph)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The copy of a node of the segment's graph, or of the given graph's node with its value."""
        return self._nodes[self._given_names.get(node.name, node.name)]

    def _is_given(self, node: fx.Node) -> bool:
        """Whether the given graph has a node with this value."""
        return not self._lowered or node.name in self._given_names

    def _adder(self, call: SiteCall) -> Callable[..., Any]:
        """How the outputs of layer and MLP are added: a plain add where their shapes and dtypes are equal."""
        x, y = call.bound.x.meta.get("val"), call.bound.y.meta.get("val")
        if not _same_layout(call) or getattr(x, "dtype", None) != getattr(y, "dtype", None):
            return add_output
        return operator.add if self._lowered else torch.ops.aten.add.Tensor


def _copy_and_nodes(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph, copies = copied(module.graph.nodes)
    graph.set_codegen(module.graph._codegen)
    result = _module_of(module, graph)
    _copy_called_modules(result)
    return result, copies


def _module_of(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module of `graph` with the tensors and modules of `module` that it uses, its meta, and its user's attributes."""
    result = fx.GraphModule(module, graph)
    result.meta = dict(module.meta)
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(result) and not isinstance(value, MethodType):
            setattr(result, name, value)
    return result


def _copy_called_modules(result: fx.GraphModule) -> None:
    memo: dict[int, Any] = {id(t): t for t in (*result.parameters(), *result.buffers())}
    for target in dict.fromkeys(str(node.target) for node in result.graph.nodes if node.op == "call_module"):
        parent, _, name = target.rpartition(".")
        setattr(result.get_submodule(parent), name, copy.deepcopy(result.get_submodule(target), memo))


def _same_layout(call: SiteCall) -> bool:
    """Whether the MLP's input and output have the same axes before the last."""
    return shape_of(call.bound.x)[:-1] == shape_of(call.bound.y)[:-1]


def _value_of(node: fx.Node) -> dict[str, Any]:
    """What tracers recorded about a node's value: shape, dtype, example."""
    return {key: node.meta[key] for key in ("val", "example_value", "tensor_meta", "type") if key in node.meta}


def _erase(graph: fx.Graph, dead: set[fx.Node]) -> None:
    """Erase the nodes in `dead` that are unused, assertions about them, and what only they read, weights included.

    `eliminate_dead_code` is no alternative: in a graph at torch level it does not know which nodes mutate their arguments.
    """
    dead |= {user for node in dead for user in node.users if is_assertion(user)}
    for node in reversed(graph.nodes):
        if node in dead and not node.users:
            dead.update(source for source in node.all_input_nodes if source.op != "placeholder")
            graph.erase_node(node)
