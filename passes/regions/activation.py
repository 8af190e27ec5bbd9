"""Which activation an MLP uses, recognized by the values that its middle computes and not by its ops.

Flow: the ops between the first matrices and the last are evaluated in float64 on sample values → compared with the known
functions, for gated MLPs with either half as the gate. A middle that has weights or norms has no such name: "?".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.layers.activations import ACTIVATIONS
from memrewrite.passes.graphs.dataflow import LITERAL, Dataflow
from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.graphs.shapes import SAMPLE, shape_of
from memrewrite.passes.regions.region import Region

UNKNOWN = "?"
LIMIT = 1 << 24  # elements evaluated at most


def activation_of(flow: Dataflow, region: Region, cache: dict[Any, str]) -> str:
    """The activation's name, "?" if it is not known; regions of the same ops are evaluated once, by `cache`."""
    middle = [node for node in region.inside if node is not region.down and node not in region.ups]
    key = _key(flow, region, middle)
    if key not in cache:
        cache[key] = _evaluate(flow, region, middle)
    return cache[key]


def _key(flow: Dataflow, region: Region, middle: list[CanonicalNode]) -> Any:
    """Equal for two middles that compute the same: their ops, with nodes numbered."""
    number = {node: i for i, node in enumerate((*region.ups, *middle))}
    numbered: Any = lambda node: f"%{number.get(node, 'outside')}"  # noqa: E731
    ops = [(str(n.target), str(fx.map_arg(n.args, numbered)), str(fx.map_arg(n.kwargs, numbered))) for n in middle]
    return tuple(shape_of(up) for up in region.ups), tuple(ops), numbered(region.down.all_input_nodes[0])


def _evaluate(flow: Dataflow, region: Region, middle: list[CanonicalNode]) -> str:
    constants = {source for node in middle for source in node.all_input_nodes if source in flow.constant}
    shapes = [shape_of(up, SAMPLE) for up in region.ups]
    size = sum(math.prod(shape) for shape in shapes)
    if len(region.ups) > 2 or size > LIMIT or any(flow.weights(constant) for constant in constants):
        return UNKNOWN
    samples = [_samples(shape, seed) for seed, shape in enumerate(shapes)]
    hidden = _hidden(flow, region, middle, dict(zip(region.ups, samples, strict=True)))
    if hidden is None:
        return UNKNOWN
    for a, b in _halves(samples, hidden.shape[-1]):
        for name, known in ACTIVATIONS.items():
            if torch.allclose(hidden.reshape(-1), (known(a) * b).reshape(-1), rtol=1e-6, atol=1e-6):
                return name
    return UNKNOWN


def _samples(shape: tuple[Any, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([int(n) for n in shape], dtype=torch.float64, generator=generator) * 3


def _halves(samples: list[Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """The possible pairs (gate, value): one input and ones; two inputs; or the halves of a packed one, cut in any way."""
    if len(samples) == 2:
        first, second = samples
        return [(first, second), (second, first)] if first.shape == second.shape else []
    (packed,) = samples
    if packed.shape[-1] == width:
        return [(packed, torch.ones_like(packed))]
    if packed.shape[-1] != 2 * width:
        return []
    low, high = packed[..., :width], packed[..., width:]
    even, odd = packed[..., 0::2], packed[..., 1::2]
    return [(low, high), (high, low), (even, odd), (odd, even)]


def _hidden(flow: Dataflow, region: Region, middle: list[CanonicalNode], ups: dict[fx.Node, Tensor]) -> Tensor | None:
    """The value `down` reads, computed from outputs of the first matrices; None if the CPU cannot do so in float64."""

    def constant(node: fx.Node) -> Any:
        if node not in flow.constant:
            raise KeyError(node)
        return _constant(node)

    nodes = [node for node in middle if op_name(node) == "getitem" or isinstance(node.target, torch._ops.OpOverload)]
    try:
        hidden: Tensor = evaluate(nodes, ups, source=constant)[region.down.all_input_nodes[0]]
    except (RuntimeError, KeyError, TypeError):
        return None
    return hidden


def _constant(node: fx.Node) -> Any:
    """A constant of the graph: a literal tensor, or computed from its arguments (`full`, `arange`)."""
    if LITERAL in node.meta:
        return node.meta[LITERAL]
    target: Any = node.target
    return target(*fx.map_arg(node.args, _constant), **fx.map_arg(node.kwargs, _constant))
