"""The second emitter of a Plan: graph in, graph out, for models that arrive already traced.

Flow: a copy of the graph on the same weights → at every site a `call_module` of the layer on the MLP's input → readers of
the MLP's output read the layer, or the sum → replaced MLPs and weights nobody reads go → linted. The input is left alone.
A graph that was lowered to be understood is edited as it was given, spelled as it was.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import fx, nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.rewrite.build_layers import build_layers, pools_of
from memrewrite.passes.rewrite.given_graph import given_names
from memrewrite.passes.rewrite.original_mlp import OriginalMLP
from memrewrite.plans import Placement, Plan

LAYERS = "memory_layers"  # the graph module's child that holds the layers
TWINS, DEAD = "twins", "dead"  # meta while a graph is rewritten: nodes by the names they were given, nodes of replaced MLPs


def emit_graph(segment: Segment, plan: Plan, locations: LocatedSites) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    """The rewritten graph, and its layers by site path. Raises `SelectError` when a layer does not fit a site's shapes."""
    scratch = copy_of(traced_module(segment))
    layers = build_layers(scratch, plan)
    for layer in layers.values():
        layer.train(scratch.training)
    return emit_layers(segment, plan, locations, layers, pools_of(scratch)), layers


def emit_layers(
    segment: Segment, plan: Plan, locations: LocatedSites, layers: Mapping[str, nn.Module], pools: nn.Module
) -> fx.GraphModule:
    """The rewritten graph with `layers` that were built before, by site path, on `pools`. Raises what `emit_graph` raises."""
    result = copy_of(traced_module(segment))
    for substitution in plan.substitutions:
        path = substitution.site.path
        _insert(result, locations.found[path], layers[path], substitution.placement)
    result = _finished(result, segment.inputs)
    result.add_module(plan.root, pools)  # no node names it: the layers hold it
    return result


def emit_originals(segment: Segment, plan: Plan, locations: LocatedSites) -> tuple[fx.GraphModule, dict[str, OriginalMLP]]:
    """The graph with every selected MLP lifted out and put in the layer's place, and these: for the *null* check."""
    traced = traced_module(segment)
    result = copy_of(traced)
    wrapped: dict[str, OriginalMLP] = {}
    for substitution in plan.substitutions:
        path = substitution.site.path
        wrapped[path] = OriginalMLP(traced, locations.found[path])
        _insert(result, locations.found[path], wrapped[path], "replace")
    return _finished(result, segment.inputs), wrapped


def traced_module(segment: Segment) -> fx.GraphModule:
    """The graph module a segment was taken from."""
    if not isinstance(segment.program, fx.GraphModule):
        raise ModelError("this model was captured from a live module, not given as a graph")
    return segment.program


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same nodes, by name, on the same weights, that can train and be exported again.

    It has its own copies of the modules that the graph calls, on the same tensors.
    """
    graph, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        twins[node] = graph.node_copy(node, twins.__getitem__)
    graph.set_codegen(module.graph._codegen)
    result = _module_of(module, graph)
    _own_modules(result)
    result.meta[TWINS] = {node.name: twin for node, twin in twins.items()}
    return result


def _module_of(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module with what of `module` the graph reads, its meta, and the attributes that a user gave it."""
    result = fx.GraphModule(module, graph)
    result.meta = dict(module.meta)
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in vars(result) and not isinstance(value, MethodType):
            setattr(result, name, value)
    return result


def _own_modules(result: fx.GraphModule) -> None:
    memo: dict[int, Any] = {id(t): t for t in (*result.parameters(), *result.buffers())}
    for target in dict.fromkeys(str(node.target) for node in result.graph.nodes if node.op == "call_module"):
        parent, _, name = target.rpartition(".")
        setattr(result.get_submodule(parent), name, copy.deepcopy(result.get_submodule(target), memo))


def _insert(result: fx.GraphModule, calls: tuple[SiteCall, ...], layer: nn.Module, placement: Placement) -> None:
    if not hasattr(result, LAYERS):
        result.add_module(LAYERS, nn.Module())
    holder = result.get_submodule(LAYERS)
    name = calls[0].region.down.name
    holder.add_module(name, layer)
    for found in calls:
        twins, given = result.meta[TWINS], given_names(found.segment)
        x, y = (twins[given.get(end.name, end.name)] for end in (found.bound.x, found.bound.y))
        _refuse_other_layout(found)
        with result.graph.inserting_after(y):
            new = result.graph.call_module(f"{LAYERS}.{name}", (x,))
        new.meta = _value_of(y)
        if placement == "parallel":
            add = operator.add if found.segment.values else torch.ops.aten.add.Tensor
            with result.graph.inserting_after(new):
                total = result.graph.call_function(add, (y, new))
            total.meta = _value_of(y)
            for user in [user for user in y.users if user is not total]:
                user.replace_input_with(y, total)
        else:
            y.replace_all_uses_with(new)
            result.meta.setdefault(DEAD, set()).update(twins[given.get(n.name, n.name)] for n in _named(found, given))


def _refuse_other_layout(found: SiteCall) -> None:
    given, wanted = shape_of(found.bound.x), shape_of(found.bound.y)
    if given[:-1] != wanted[:-1]:
        raise SelectError(
            f"the MLP reads {given} and gives {wanted}: its tokens are laid out differently",
            where=found.bound.y.name,
        )


def _value_of(node: fx.Node) -> dict[str, Any]:
    """What tracers noted of a node's value: a layer gives the like."""
    return {key: node.meta[key] for key in ("val", "example_value", "tensor_meta", "type") if key in node.meta}


def _named(found: SiteCall, given: Mapping[str, str]) -> list[fx.Node]:
    """The nodes of an MLP that the given graph has too."""
    return [node for node in found.bound.nodes if node.name in given or not found.segment.values]


def _finished(result: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Without what only the replaced MLPs were there for, nodes and weights; linted."""
    _erase(result.graph, result.meta.pop(DEAD, set()))
    del result.meta[TWINS]
    result.meta["inputs"] = inputs
    result.graph.lint()
    return _module_of(result, result.graph)


def _erase(graph: fx.Graph, dead: set[fx.Node]) -> None:
    """Erase the nodes in `dead` that nothing reads, what only checks them, and what only they read, weights included.

    Not `eliminate_dead_code`: in a graph of torch's own functions it cannot tell what writes into its arguments.
    """
    dead |= {user for node in dead for user in node.users if is_assertion(user)}
    for node in reversed(graph.nodes):
        if node in dead and not node.users:
            dead.update(source for source in node.all_input_nodes if source.op != "placeholder")
            graph.erase_node(node)
