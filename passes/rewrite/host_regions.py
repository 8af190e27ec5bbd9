"""Compares the MLPs found in the graph of a module that becomes one with those found in the model: by what they compute.

Flow: the region of the host's graph and the region of the model's graph, each as a function of one tensor → both run on the
same random tensor → a region that only has the same weights, such as one that adds the residual stream too, is refused. For an
MLP that is not in the host's graph: what differs there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.graphs.dataflow import WEIGHT
from memrewrite.passes.graphs.nodes import canonical_nodes, inputs_of
from memrewrite.passes.graphs.provenance import source_line
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.located_sites import LocatedSites, SiteCall
from memrewrite.passes.models.distance import distance
from memrewrite.passes.models.process_state import seeded
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.regions.region import attempt
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.passes.rewrite.original_mlp import extract
from memrewrite.site import Site

SHOWN = 3  # names listed in a message, at most


def what_differs(model: nn.Module, in_host: Sequence[SiteCall], in_model: Sequence[SiteCall]) -> str:
    """How the region found in a host's graph differs from the one found in the model's; "" if both compute the same.

    Random ops of train mode are off in the comparison. Regions that are random all the same are not compared, nor are those
    of models on meta.
    """
    for host, original in zip(in_host, in_model, strict=False):
        x, given = original.bound.x.meta["val"], host.bound.x.meta["val"]
        ends = f"it is from {_at(host.bound.x)} to {_at(host.bound.y)}; in the model's graph, from {_at(original.bound.x)}"
        ends += f" to {_at(original.bound.y)}"
        if x.device.type == "meta":
            return ""
        if (shape_of(host.bound.x), given.dtype) != (shape_of(original.bound.x), x.dtype):
            return f"its input has the shape {shape_of(host.bound.x)}, and not {shape_of(original.bound.x)}: {ends}"
        with StateGuard(model), torch.no_grad():
            found, again, wanted = (_output(model, call, seed) for call, seed in ((host, 0), (host, 1), (original, 0)))
        far = distance(found, wanted)
        if not far.rounding and distance(found, again).exact:
            return f"on the same input, its output is {far}: {ends}"
    return ""


def _output(model: nn.Module, call: SiteCall, seed: int) -> Tensor:
    """What a region computes of a random input, without the noise of train mode; `seed` is that of the noise that remains."""
    like = call.bound.x.meta["val"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape_of(call.bound.x), generator=generator).to(dtype=like.dtype, device=like.device)
    region = extract(model, call, training=False)
    with seeded():
        torch.manual_seed(seed)
        out: Tensor = region(x)
    return out


def why_missing(model: nn.Module, found: LocatedSites, site: Site) -> str:
    """Why an MLP of the model is not among those `found` in a host's graph: what the graph does with its weights."""
    (recorded,) = found.recorded.values()
    flow, ids = recorded.flow, {name: id(tensor) for name, tensor in tensors_of(model)}
    weights = {ids[name] for name in site.parameters if name in ids}
    read = {ids[node.meta[WEIGHT]] for node in flow.graph.nodes if WEIGHT in node.meta and node.users}
    if not read & weights:
        return f"it does not read {_listed(site.parameters)}"
    for other in found.sites:
        used = {ids[name] for name in other.parameters if name in ids}
        more = [name for name in other.parameters if ids.get(name) in used - weights]
        less = [name for name in site.parameters if ids.get(name) in weights - used]
        if used & weights and (more or less):
            differs = [f"with {_listed(more)}"] if more else []
            return f"an MLP is found {' and '.join([*differs, *([f'without {_listed(less)}'] if less else [])])}"
    for node in reversed(canonical_nodes(flow.graph)):
        own = {ids[name] for name in flow.weights(inputs_of(node)[1])} if flow.is_linear(node) else set()
        outcome = attempt(flow, node) if own & weights else None
        if isinstance(outcome, Rejection):
            return f"{outcome.rule}: {outcome.reason}, at {_at(outcome.node)}"
    return "no region of it computes one value from one value with its weights"


def _at(node: fx.Node) -> str:
    line = source_line(node)
    return f"{node.name!r} ({line})" if line else repr(node.name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
