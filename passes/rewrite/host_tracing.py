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
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.locate.missing import why_missing
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.forward import Inputs, in_mode, run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.graph_host import ANY, CONSTANT, GraphHost, Trace
from memrewrite.passes.rewrite.host_regions import what_differs
from memrewrite.plans import Plan
from memrewrite.site import Site


def trace_hosts(model: nn.Module, plan: Plan, before: Capture, locations: LocatedSites) -> dict[str, GraphHost]:
    """The host of every module that the plan edits as a graph, by path; `locations` are those of the plan's sites.

    Raises `SelectError` where torch cannot export the module, or a planned MLP is not found in its graph, or not as in the
    model's graph.
    """
    paths = dict.fromkeys(b.exit for s in plan.substitutions for b in s.site.bindings if b.kind == "graph")
    if not paths:
        return {}
    with Recorder(model, paths) as recorder:
        run(model, before.inputs)
    return {path: _host(model, path, plan, recorder.block_inputs[path], before, locations) for path in paths}


def _host(model: nn.Module, path: str, plan: Plan, inputs: Inputs, before: Capture, locations: LocatedSites) -> GraphHost:
    module = model.get_submodule(path)
    sites = {s.site.path: s.site for s in plan.substitutions if any(b.exit == path for b in s.site.bindings)}
    traces, constants, skewed = {}, dict[str, Tensor](), set[str]()
    for training in (False, True):
        try:
            with in_mode(module, training=training):
                program = export_program(module, inputs, BATCH_AND_SEQUENCE).program
        except Refused as refusal:
            raise SelectError(f"the module {path!r} cannot become a graph: {refusal}", hint="leave its MLPs out") from refusal
        segment = segment_of(path, program, inputs)
        found = locate(Capture((segment,), inputs, before.how, before.calls), fragment=True)
        mode = f"{path!r} in {'train' if training else 'eval'} mode"
        calls = {name: _calls(model, mode, site, found, locations.found[name]) for name, site in sites.items()}
        ends = {name: tuple((c.bound.x.name, c.bound.y.name) for c in own) for name, own in calls.items()}
        traces[training] = _trace(program, ends, constants)
        shapes = {node.name: shape_of(node)[:-1] for node in program.graph.nodes}
        skewed |= {site for site, pairs in ends.items() if any(shapes[x] != shapes[y] for x, y in pairs)}
    return GraphHost(path, traces, constants, frozenset(skewed))


def _calls(
    model: nn.Module, mode: str, site: Site, found: LocatedSites, in_model: tuple[SiteCall, ...]
) -> tuple[SiteCall, ...]:
    """The calls of a site among those `found` in a host's graph: of the same weights, and with the same output.

    Weights are compared as tensors, because names may differ here; experts of one stack of matrices have the same ones. Raises
    `SelectError` with what differs where there is none.
    """
    tensors = dict(tensors_of(model))

    def weights(of: Site) -> set[int]:
        return {id(tensors[name]) for name in of.parameters if name in tensors}

    hint = "leave it out, or rewrite the exported program: `--emit graph`"
    differs = ""
    for other in found.sites:
        if weights(other) == weights(site):
            difference = what_differs(model, found.found[other.path], in_model)
            if not difference:
                return found.found[other.path]
            differs = differs or difference
    if differs:
        what = f"in the graph of {mode} the region of the MLP {site.path!r} is another one than in the model's graph"
        raise SelectError(what, where=differs, hint=hint)
    what = f"in the graph of {mode} the MLP {site.path!r} is not found: {why_missing(model, found, site)}"
    raise SelectError(what, hint=hint)


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
