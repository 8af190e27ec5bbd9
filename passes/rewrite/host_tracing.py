"""Exports the modules whose forward becomes a graph, in eval and in train mode, and locates the planned MLPs in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from memrewrite.errors import SelectError
from memrewrite.passes.capture.segment import Capture, segment_of
from memrewrite.passes.capture.torch_export import BATCH_AND_SEQUENCE, Refused, export_program
from memrewrite.passes.graphs.copying import COPY, copied
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.forward import Inputs, in_mode, run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.graph_host import ANY, CONSTANT, GraphHost, Trace
from memrewrite.plans import Plan


def trace_hosts(model: nn.Module, plan: Plan, before: Capture) -> dict[str, GraphHost]:
    """The host of every module that the plan edits as a graph, by path.

    Raises `SelectError` where torch cannot export the module, or a planned MLP is not found in its graph.
    """
    paths = dict.fromkeys(b.exit for s in plan.substitutions for b in s.site.bindings if b.kind == "graph")
    if not paths:
        return {}
    with Recorder(model, paths) as recorder:
        run(model, before.inputs)
    return {path: _host(model, path, plan, recorder.block_inputs[path], before) for path in paths}


def _host(model: nn.Module, path: str, plan: Plan, inputs: Inputs, before: Capture) -> GraphHost:
    module = model.get_submodule(path)
    sites = {s.site.path: s.site.parameters for s in plan.substitutions if any(b.exit == path for b in s.site.bindings)}
    traces, constants, skewed = {}, dict[str, Tensor](), set[str]()
    for training in (False, True):
        try:
            with in_mode(module, training=training):
                program = export_program(module, inputs, BATCH_AND_SEQUENCE).program
        except Refused as refusal:
            raise SelectError(f"the module {path!r} cannot become a graph: {refusal}", hint="leave its MLPs out") from refusal
        segment = segment_of(path, program, inputs)
        found = locate(Capture((segment,), inputs, before.how, before.calls), fragment=True)
        ends = _ends(model, found, sites)
        missing = sorted(set(sites) - set(ends))
        if missing:
            name = "train" if training else "eval"
            what = f"in the graph of {path!r} in {name} mode the MLP {missing[0]!r} is not found"
            raise SelectError(what, hint="leave it out")
        traces[training] = _trace(program, ends, constants)
        shapes = {node.name: shape_of(node)[:-1] for node in program.graph.nodes}
        skewed |= {site for site, pairs in ends.items() if any(shapes[x] != shapes[y] for x, y in pairs)}
    return GraphHost(path, traces, constants, frozenset(skewed))


def _ends(
    model: nn.Module, found: LocatedSites, sites: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[tuple[str, str], ...]]:
    """The input and output nodes of each site. Sites are identified by their weight tensors: names may differ here."""
    tensors = dict(tensors_of(model))

    def weights(names: tuple[str, ...]) -> frozenset[int]:
        return frozenset(id(tensors[name]) for name in names if name in tensors)

    by_weights = {weights(site.parameters): found.found[site.path] for site in found.sites}
    calls_of = {path: by_weights.get(weights(names)) for path, names in sites.items()}
    return {path: tuple((c.bound.x.name, c.bound.y.name) for c in calls) for path, calls in calls_of.items() if calls}


def _trace(program: ExportedProgram, ends: Mapping[str, tuple[tuple[str, str], ...]], constants: dict[str, Tensor]) -> Trace:
    """The program's graph with its weights as `get_attr` nodes. Constant tensors are added to `constants` by new names."""
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants

    def instead(graph: fx.Graph, node: fx.Node) -> Any:
        if node.name in weights:
            return graph.get_attr(weights[node.name])
        if node.name not in lifted:
            return COPY
        name = f"{CONSTANT}_{len(constants)}"
        constants[name] = program.constants[lifted[node.name]]
        return graph.get_attr(name)

    graph, copies = copied((node for node in program.graph.nodes if not is_assertion(node)), instead=instead)
    given = tuple(_expected(node) for node, copy in copies.items() if copy.op == "placeholder")
    spec = program.call_spec
    if spec.in_spec is None or spec.out_spec is None:
        raise TypeError("an exported program without the structure of its arguments")
    names = {node.name: copy.name for node, copy in copies.items()}
    ends_here = {site: tuple((names[x], names[y]) for x, y in pairs) for site, pairs in ends.items()}
    return Trace(graph, spec.in_spec, spec.out_spec, given, ends_here)


def _expected(node: fx.Node) -> Any:
    """An entry of `Trace.given`."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(n if isinstance(n, int) else None for n in value.shape)
    return ANY if isinstance(value, torch.SymInt) else value
