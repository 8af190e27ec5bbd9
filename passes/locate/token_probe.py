"""Whether a region works token by token, tried on values: one token of its input changed, no other token's output may move.

For regions in which rows are reordered by what they hold, where following the axes (`tokens`) cannot tell.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from memrewrite.passes.capture.operator_trace import captured_separately
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.recorded_graph import RecordedGraph, of_sizes_alone
from memrewrite.passes.models.forward import SEED
from memrewrite.passes.regions.region import Region

MOVED = 1e-4  # relative to the outputs' size: above it a token changed; rows multiplied in other groups differ by less


def mixes(recorded: RecordedGraph, region: Region) -> str:
    """Why the region is not token-wise, or "". A model on `meta` has no values to try: then it is believed."""
    nodes = _needed(recorded, region)
    leaves = {node: value for node in nodes if (value := value_of(recorded.segment, node)) is not None}
    if any(value.is_meta for value in leaves.values()):
        return ""
    origin, generator = region.x.meta["origin"], torch.Generator().manual_seed(0)
    shape = [int(n) for n in origin.meta["val"].shape]
    like = {"dtype": origin.meta["val"].dtype, "device": origin.meta["val"].device}
    x = torch.randn(shape, generator=generator).to(**like)
    outside = {origin, *recorded.reads(nodes)}
    if recorded.segment.own_segments is not None and (
        seen := _seen(recorded, outside)
    ):  # its loops hold for the values that it saw
        x = seen[origin]
        leaves |= {node: seen[node] for node in outside if recorded.canonical_value(node) is not region.x}
    chosen: dict[fx.Node, Any] = {}
    before = _run(recorded, region, nodes, leaves, x, chosen)
    if not before.isfinite().all():
        return "it gives no finite numbers on random inputs, so that it cannot be tried token by token"
    rows, alive = x.numel() // shape[-1], False
    for row in sorted({0, rows // 2, rows - 1}):
        changed = x.clone().reshape(-1, shape[-1])
        changed[row] = torch.randn(shape[-1], generator=generator).to(**like)
        after = _run(recorded, region, nodes, leaves, changed.reshape(shape), chosen)
        moved = (after - before).float().abs().reshape(rows, -1).amax(1) > MOVED * before.float().abs().max()
        alive |= bool(moved[row])
        moved[row] = False
        if moved.any():
            return "the output of one token depends on other tokens"
    return "" if alive or not before.any() else "its output depends on nothing but what is chosen"


def _seen(recorded: RecordedGraph, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """The values that a graph of what ran had, up to the wanted ones; none where a block in it was captured by itself."""
    segment, env = recorded.segment, dict[fx.Node, Any]()
    last = max(recorded.position[node] for node in wanted)
    env |= {node: segment.example(node) for node in segment.graph.nodes if node.op == "placeholder"}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for node in segment.graph.nodes:
            if node.target is captured_separately:
                return {}
            if node not in env and node.op == "call_function":
                weights = {source: value_of(segment, source) for source in node.all_input_nodes if source not in env}
                env |= {source: value.clone() for source, value in weights.items() if value is not None}
                target: Any = node.target
                env[node] = target(*fx.map_arg(node.args, env.__getitem__), **fx.map_arg(node.kwargs, env.__getitem__))
            if recorded.position[node] == last:
                break
    return env


def value_of(segment: Segment, node: fx.Node) -> Tensor | None:
    """The tensor that a weight or literal of a segment holds; None for other nodes."""
    return segment.literals[node.name] if node.name in segment.literals else segment.tensors.get(node.name)


def _needed(recorded: RecordedGraph, region: Region) -> list[fx.Node]:
    """The recorded nodes of a region, in order, with the weights they read and the arithmetic behind these."""
    needed = recorded.closure(region)
    pending = [source for node in needed for source in node.all_input_nodes if source in recorded.constant]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes if of_sizes_alone(node) is None else ())
    return sorted(needed, key=recorded.position.__getitem__)


def _chooses_experts(node: fx.Node, tokens: int) -> bool:
    """Whether a node chooses, and not among tokens."""
    place = {"topk": 2, "kthvalue": 2, "argmax": 1, "multinomial": 3}.get(op_name(node))
    if place is None:
        return False
    axis = node.args[place] if len(node.args) > place else -1
    return isinstance(axis, int) and shape_of(node.all_input_nodes[0])[axis] != tokens


def _run(
    recorded: RecordedGraph,
    region: Region,
    nodes: list[fx.Node],
    leaves: dict[fx.Node, Tensor],
    x: Tensor,
    chosen: dict[fx.Node, Any],
) -> Tensor:
    """The region's output. What was `chosen` before is chosen again, for routers may look at several tokens; experts do not."""
    env: dict[fx.Node, Any] = dict(leaves)
    cuda = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(SEED)  # dropout, in train mode, drops the same each time
        for node in nodes:
            if node in leaves:
                continue
            sizes = {n: of_sizes_alone(n) for n in (node, *node.all_input_nodes) if n not in env}
            env |= {n: value for n, value in sizes.items() if value is not None}
            if node in env:
                continue
            for source in node.all_input_nodes:
                if (
                    source not in env and recorded.canonical_value(source) is not region.x
                ):  # what helps to choose: any number will do
                    env[source] = torch.ones(shape_of(source), dtype=source.meta["val"].dtype, device=x.device)
                elif source not in env:  # the region's input, in one of its layouts
                    env[source] = x.reshape([int(n) for n in source.meta["val"].shape])
            target: Any = node.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:  # a weight is not ours to write to
                env |= {source: env[source].clone() for source in node.all_input_nodes if source in leaves}
            if node not in chosen:
                env[node] = target(*fx.map_arg(node.args, env.__getitem__), **fx.map_arg(node.kwargs, env.__getitem__))
                if _chooses_experts(node, x.shape[:-1].numel()):
                    chosen[node] = tree_map(torch.clone, env[node])
            env[node] = tree_map(torch.clone, chosen[node]) if node in chosen else env[node]
    out: Tensor = env[region.down.meta["origin"]]
    return out
