"""Traces the modules whose forward becomes a graph, in eval and in train mode, and finds their MLPs in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from memrewrite.errors import SelectError
from memrewrite.passes.capture.segment import Capture, segment_of
from memrewrite.passes.capture.torch_export import Refused, export_program
from memrewrite.passes.graphs.ops import is_assertion
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.forward import Inputs, first_run
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.graph_host import ANY, CONSTANT, GraphHost, Trace
from memrewrite.plans import Plan


def trace_hosts(model: nn.Module, plan: Plan, before: Capture) -> dict[str, GraphHost]:
    """The graphs of every module that the plan needs as one, by path. Raises `SelectError` where torch cannot trace it."""
    paths = dict.fromkeys(b.exit for s in plan.substitutions for b in s.site.bindings if b.kind == "graph")
    if not paths:
        return {}
    with Recorder(model, paths) as recorder:
        first_run(model, before.inputs)
    return {path: _host(model, path, plan, recorder.block_inputs[path], before) for path in paths}


def _host(model: nn.Module, path: str, plan: Plan, inputs: Inputs, before: Capture) -> GraphHost:
    module = model.get_submodule(path)
    sites = {s.site.path: s.site.parameters for s in plan.substitutions if any(b.exit == path for b in s.site.bindings)}
    traces, constants, skewed = {}, dict[str, Tensor](), set[str]()
    modes = {m: m.training for m in module.modules()}
    for training in (False, True):
        try:
            module.train(training)
            program = export_program(module, inputs, dynamic=True).program
        except Refused as refusal:
            raise SelectError(f"the module {path!r} cannot become a graph: {refusal}", hint="leave its MLPs out") from refusal
        finally:
            for each, mode in modes.items():
                each.training = mode
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
    """The input and output nodes of each wanted site, told by its weights, whatever name they go by here."""
    held = dict(tensors_of(model))

    def weights(names: tuple[str, ...]) -> frozenset[int]:
        return frozenset(id(held[name]) for name in names if name in held)

    here = {weights(site.parameters): found.found[site.path] for site in found.sites}
    wanted = {path: here.get(weights(names)) for path, names in sites.items()}
    return {path: tuple((c.bound.x.name, c.bound.y.name) for c in calls) for path, calls in wanted.items() if calls}


def _trace(program: ExportedProgram, ends: Mapping[str, tuple[tuple[str, str], ...]], constants: dict[str, Tensor]) -> Trace:
    signature, graph, made = program.graph_signature, fx.Graph(), dict[fx.Node, fx.Node]()
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    given: list[Any] = []
    for node in program.graph.nodes:
        if node.name in held:
            made[node] = graph.get_attr(held[node.name])
        elif node.name in lifted:
            name = f"{CONSTANT}_{len(constants)}"
            constants[name] = program.constants[lifted[node.name]]
            made[node] = graph.get_attr(name)
        elif not is_assertion(node):
            made[node] = graph.node_copy(node, made.__getitem__)
            if node.op == "placeholder":
                given.append(_expected(node))
    spec = program.call_spec
    if spec.in_spec is None or spec.out_spec is None:
        raise TypeError("an exported program without the structure of its arguments")
    names = {node.name: twin.name for node, twin in made.items()}
    here = {site: tuple((names[x], names[y]) for x, y in pairs) for site, pairs in ends.items()}
    return Trace(graph, spec.in_spec, spec.out_spec, tuple(given), here)


def _expected(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(n if isinstance(n, int) else None for n in value.shape)
    return ANY if isinstance(value, torch.SymInt) else value
