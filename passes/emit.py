"""The second emitter of a Plan: graph in, graph out, for models that arrive already traced.

Flow: a copy of the graph on the same weights → at every site a `call_module` of the layer on the MLP's input → readers of
the MLP's output read the layer, or the sum → dead code and weights nobody reads go → linted. The input is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.capture import Segment
from memrewrite.passes.dataflow import shape_of
from memrewrite.passes.extract import Original
from memrewrite.passes.locate import Found, Locations
from memrewrite.passes.recording import Inputs
from memrewrite.passes.substitute import build_layers, pools_of
from memrewrite.plans import Placement, Plan

LAYERS = "memory_layers"  # the graph module's child that holds the layers


def emit_graph(segment: Segment, plan: Plan, locations: Locations) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    """The rewritten graph, and its layers by site path. Raises `SelectError` when a layer does not fit a site's shapes."""
    result = copy_of(traced_module(segment))
    layers = build_layers(result, plan)
    for substitution in plan.substitutions:
        path = substitution.site.path
        _insert(result, locations.found[path], layers[path], substitution.placement)
    pools = pools_of(result)
    _finished(result, segment.inputs).add_module(plan.root, pools)  # no node names it: the layers hold it
    return result, layers


def emit_originals(segment: Segment, plan: Plan, locations: Locations) -> tuple[fx.GraphModule, dict[str, Original]]:
    """The graph with every selected MLP lifted out and put in the layer's place, and these: for the *null* check."""
    traced = traced_module(segment)
    result = copy_of(traced)
    wrapped: dict[str, Original] = {}
    for substitution in plan.substitutions:
        path = substitution.site.path
        wrapped[path] = Original(traced, locations.found[path])
        _insert(result, locations.found[path], wrapped[path], "replace")
    return _finished(result, segment.inputs), wrapped


def traced_module(segment: Segment) -> fx.GraphModule:
    """The graph module a segment was taken from."""
    if not isinstance(segment.program, fx.GraphModule):
        raise ModelError("this model was captured from a live module, not given as a graph")
    return segment.program


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same nodes, by name, on the same weights, that can train and be exported again."""
    graph, names = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        names[node] = graph.node_copy(node, names.__getitem__)
    graph.set_codegen(module.graph._codegen)
    graph.eliminate_dead_code()  # and with it the weights that nothing reads
    result = fx.GraphModule(module, graph)
    result.meta = dict(module.meta)
    result.meta["twins"] = names
    return result


def _insert(result: fx.GraphModule, calls: tuple[Found, ...], layer: nn.Module, placement: Placement) -> None:
    if not hasattr(result, LAYERS):
        result.add_module(LAYERS, nn.Module())
    names: Mapping[fx.Node, fx.Node] = result.meta["twins"]
    holder = result.get_submodule(LAYERS)
    name = calls[0].region.down.name
    holder.add_module(name, layer)
    for found in calls:
        x, y = names[found.bound.x], names[found.bound.y]
        given, wanted = shape_of(x), shape_of(y)
        if given[:-1] != wanted[:-1]:
            raise SelectError(
                f"the MLP reads {given} and gives {wanted}: its tokens are laid out differently",
                where=found.bound.y.name,
            )
        with result.graph.inserting_after(y):
            new = result.graph.call_module(f"{LAYERS}.{name}", (x,))
        new.meta = {"val": y.meta["val"]}
        if placement == "parallel":
            with result.graph.inserting_after(new):
                total = result.graph.call_function(torch.ops.aten.add.Tensor, (y, new))
            total.meta = {"val": y.meta["val"]}
            for user in [user for user in y.users if user is not total]:
                user.replace_input_with(y, total)
        else:
            y.replace_all_uses_with(new)


def _finished(result: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    del result.meta["twins"]
    result.meta["inputs"] = inputs
    result.graph.eliminate_dead_code()
    result.graph.lint()
    result.delete_all_unused_submodules()
    result.recompile()
    return result
