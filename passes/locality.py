"""Whether a region works token by token, tried on values: one token of its input changed, no other token's output may move.

For regions in which rows are reordered by what they hold, where following the axes (`tokens`) cannot tell.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from memrewrite.passes.capture import Segment
from memrewrite.passes.recorded import Recorded, of_sizes_alone
from memrewrite.passes.region import Region

MOVED = 1e-4  # relative to the outputs' size: above it a token changed; rows multiplied in other groups differ by less


def mixes(recorded: Recorded, region: Region) -> str:
    """Why the region is not token-wise, or "". A model on `meta` has no values to try: then it is believed."""
    nodes = _needed(recorded, region)
    leaves = {node: value for node in nodes if (value := value_of(recorded.segment, node)) is not None}
    if any(value.is_meta for value in leaves.values()):
        return ""
    origin = region.x.meta["origin"]
    shape = [int(n) for n in origin.meta["val"].shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(origin.meta["val"])
    before = _run(region, nodes, leaves, x)
    if not before.isfinite().all():
        return "it gives no finite numbers on random inputs, so that it cannot be tried token by token"
    rows = x.numel() // shape[-1]
    for row in sorted({0, rows // 2, rows - 1}):
        changed = x.clone().reshape(-1, shape[-1])
        changed[row] = torch.randn(shape[-1], generator=generator).to(x)
        after = _run(region, nodes, leaves, changed.reshape(shape))
        moved = (after - before).float().abs().reshape(rows, -1).amax(1) > MOVED * before.float().abs().max()
        moved[row] = False
        if moved.any():
            return "the output of one token depends on other tokens"
    return ""


def value_of(segment: Segment, node: fx.Node) -> Tensor | None:
    """The tensor that a weight or literal of a segment holds; None for other nodes."""
    if node.name in segment.literals:
        return segment.literals[node.name]
    if node.name not in segment.weights:
        return None
    name = segment.weights[node.name].removeprefix(f"{segment.path}." if segment.path else "")
    if isinstance(segment.program, ExportedProgram):
        held: dict[str, Tensor] = {**segment.program.state_dict, **segment.program.constants}
        return held[name]
    found: Tensor = attrgetter(name)(segment.program)
    return found


def _needed(recorded: Recorded, region: Region) -> list[fx.Node]:
    """The recorded nodes of a region, in order, with the weights they read and the arithmetic behind these."""
    needed = recorded.closure(region)
    pending = [source for node in needed for source in node.all_input_nodes if source in recorded.constant]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes if of_sizes_alone(node) is None else ())
    return sorted(needed, key=recorded.position.__getitem__)


def _run(region: Region, nodes: list[fx.Node], leaves: dict[fx.Node, Tensor], x: Tensor) -> Tensor:
    env: dict[fx.Node, Any] = dict(leaves)
    with torch.no_grad():
        for node in nodes:
            if node in leaves:
                continue
            sizes = {n: of_sizes_alone(n) for n in (node, *node.all_input_nodes) if n not in env}
            env |= {n: value for n, value in sizes.items() if value is not None}
            if node in env:
                continue
            for source in node.all_input_nodes:
                if source not in env:  # the region's input, in one of its layouts
                    env[source] = x.reshape([int(n) for n in source.meta["val"].shape])
            target: Any = node.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:  # a weight is not ours to write to
                env |= {source: env[source].clone() for source in node.all_input_nodes if source in leaves}
            env[node] = target(*fx.map_arg(node.args, env.__getitem__), **fx.map_arg(node.kwargs, env.__getitem__))
    out: Tensor = env[region.down.meta["origin"]]
    return out
