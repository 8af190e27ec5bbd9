"""Why an MLP of the model is not found in the graph of a part of the model: what that graph does with its weights.

Flow: weights that the graph does not read → an MLP there with other weights → the rule that a region with these weights breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from memrewrite.passes.graphs.dataflow import WEIGHT
from memrewrite.passes.graphs.nodes import canonical_nodes, inputs_of
from memrewrite.passes.graphs.provenance import source_line
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.regions.region import attempt
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.site import Site

SHOWN = 3  # names listed in a message, at most


def why_missing(model: nn.Module, found: LocatedSites, site: Site) -> str:
    """Why an MLP of `model` is not among those `found` in one graph of a part of it."""
    (recorded,) = found.recorded.values()
    flow, ids = recorded.flow, {name: id(tensor) for name, tensor in tensors_of(model)}
    weights = {ids[name] for name in site.parameters if name in ids}
    read = {ids.get(node.meta[WEIGHT]) for node in flow.graph.nodes if WEIGHT in node.meta and node.users}
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
        own = {ids.get(name) for name in flow.weights(inputs_of(node)[1])} if flow.is_linear(node) else set()
        outcome = attempt(flow, node) if own & weights else None
        if isinstance(outcome, Rejection):
            line = source_line(outcome.node)
            return f"{outcome.rule}: {outcome.reason}, at {outcome.node.name!r}{f' ({line})' if line else ''}"
    return "no region of it computes one value from one value with its weights"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
