"""Whether a region works token by token, tried on values: one token of its input changes, no other token's output may move.

For regions that reorder rows by their values, where `token_axes` cannot decide. Flow: the region's recorded nodes and their
weights → the region runs on random tokens, or on the example's → `token_perturbation`, with choices kept fixed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from memrewrite.errors import in_one_line
from memrewrite.passes.capture.operator_trace import captured_separately
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.nodes import RecordedNode, inputs_of
from memrewrite.passes.graphs.ops import Kind, axes_of, op_name, op_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.recorded_graph import RecordedGraph, of_sizes_alone, origin_of
from memrewrite.passes.locate.token_perturbation import Tokens, repeatable, run_repeatable, trial
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.rejection import Rejection

# How far other tokens' outputs may move, relative to the largest output: rows that are multiplied in other groups are rounded
# differently, and by less than this.
MOVED = 1e-4


def mixes(recorded: RecordedGraph, region: Region) -> Rejection | None:
    """Reject a region in which one token's output depends on another token. On meta tensors nothing is tested: None.

    A region whose operators fit the example's values alone, as loops do that were unrolled for them, is rejected too.
    """
    try:
        return _mixes(recorded, region)
    except _OfOtherValues as error:
        return Rejection("token by token", f"its operators do not run on other values: {error}", region.down)


class _OfOtherValues(Exception):  # noqa: N818 - turned into a rejection
    """A recorded operator fails on values that it was not recorded with."""


def _mixes(recorded: RecordedGraph, region: Region) -> Rejection | None:
    nodes = _needed(recorded, region)
    leaves: dict[fx.Node, Tensor] = {node: value for node in nodes if (value := value_of(recorded.segment, node)) is not None}
    if any(value.is_meta for value in leaves.values()):
        return None
    origin, generator = origin_of(region.x), torch.Generator().manual_seed(0)
    like = origin.meta["val"]
    x, other = (
        torch.randn([int(n) for n in like.shape], generator=generator).to(dtype=like.dtype, device=like.device)
        for _ in range(2)
    )
    outside = {origin, *recorded.recorded_inputs(nodes)}
    # A graph of the operators that ran has its loops unrolled for the values of the example: they must be the same here.
    if recorded.segment.own_segments is not None and (values := _example_values(recorded, outside)):
        x = values[origin]
        leaves |= {node: values[node] for node in outside if recorded.canonical_value(node) is not region.x}
    chosen: dict[fx.Node, _Choice] = {}

    def call(given: Tensor) -> Tensor:
        try:
            return _output(recorded, region, nodes, leaves, given, chosen)
        except (RuntimeError, IndexError) as error:
            raise _OfOtherValues(in_one_line(error)) from error

    def rejected(reason: str) -> Rejection:
        return Rejection("token by token", reason, region.down)

    before = run_repeatable(call, x)
    if not before.isfinite().all():
        return rejected("its outputs on random inputs are not finite, so that it cannot be tested token by token")
    rows = x.numel() // x.shape[-1]
    into, out = (Tokens.consecutive(value.numel(), rows) for value in (x, before))
    seen = trial(call, x, other, before, into, out, MOVED)
    if seen.leak:
        return rejected("the output of one token depends on other tokens")
    return rejected("its output depends only on what is chosen") if seen.own <= MOVED and before.any() else None


def _example_values(recorded: RecordedGraph, wanted: Collection[RecordedNode]) -> dict[fx.Node, Any]:
    """The values of a graph of operators that ran, up to the wanted ones; {} if a block in it is a segment by itself."""
    segment = recorded.segment
    last = max(recorded.position[node] for node in wanted)
    nodes = [node for node in recorded.nodes[: last + 1] if node.op == "call_function"]
    if any(node.target is captured_separately for node in nodes):
        return {}

    def weight(node: fx.Node) -> Tensor:
        value = value_of(segment, node)
        if value is None:
            raise KeyError(node)
        return value.clone()  # in-place ops, through views too, must not change the model's own

    inputs: dict[fx.Node, Any] = {node: segment.example(node) for node in recorded.nodes if node.op == "placeholder"}
    with repeatable():
        return evaluate(nodes, inputs, source=weight)


def value_of(segment: Segment, node: fx.Node) -> Tensor | None:
    """The tensor of a weight or literal of a segment; None for other nodes."""
    return segment.literals[node.name] if node.name in segment.literals else segment.tensors.get(node.name)


def _needed(recorded: RecordedGraph, region: Region) -> list[RecordedNode]:
    """The recorded nodes of a region, in order, with the weights they read and the nodes that compute these."""
    needed = recorded.closure(region)
    pending = [source for node in needed for source in inputs_of(node) if source in recorded.constant]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(inputs_of(node) if of_sizes_alone(node) is None else ())
    return sorted(needed, key=recorded.position.__getitem__)


def _is_choice(node: fx.Node) -> bool:
    """True if a node returns indices, and they are read."""
    op = op_of(node)
    if op is None or not op.replayed:
        return False  # a maximum whose place nobody reads, as in an activation, is no choice
    return op.chooses or any(op_name(user) == "getitem" and user.args[1] == 1 for user in node.users)


class _Choice(NamedTuple):
    """What a choice read and returned in the first run."""

    read: Tensor
    made: Any

    def again(self, node: fx.Node, read: Tensor) -> Any:
        """Its result in a later run, in which it reads `read`: always the same indices.

        Where it chooses among tokens, with the values that are at these indices now: a kept value would hide that tokens mix.
        Where each token chooses for itself, with the same values: they are weights, which a router may take from other tokens.
        """
        kept = tree_map(torch.clone, self.made)
        op = op_of(node)
        if isinstance(kept, Tensor) or op is None or op.kind is not Kind.ALONG:
            return kept
        (axis,) = axes_of(node, read.ndim)
        moved = (read != self.read) & ~(read.isnan() & self.read.isnan())
        if bool((moved.any(axis) == moved.all(axis)).all()):
            return kept
        indices = kept[1] if kept[1].ndim == read.ndim else kept[1].unsqueeze(axis)
        values = read.take_along_dim(indices, axis)
        return values.view_as(kept[1]), kept[1]


def _output(
    recorded: RecordedGraph,
    region: Region,
    nodes: list[RecordedNode],
    leaves: dict[fx.Node, Tensor],
    x: Tensor,
    chosen: dict[fx.Node, _Choice],
) -> Tensor:
    """The region's output for `x`. The first call adds its choices to `chosen`; later calls use them again.

    What is chosen may depend on several tokens: on how full an expert is, or on which tokens it prefers. What is computed of it
    may not.
    """

    def source(node: fx.Node) -> Any:
        size = of_sizes_alone(node)
        if size is not None:
            return size
        if recorded.canonical_value(RecordedNode(node)) is region.x:  # in one of its layouts
            return x.reshape([int(n) for n in node.meta["val"].shape])
        return torch.ones(shape_of(node), dtype=node.meta["val"].dtype, device=x.device)  # only helps to choose: any number

    def result(node: fx.Node, made: Any, values: Mapping[fx.Node, Any]) -> Any:
        if not _is_choice(node):
            return made
        read = values[node.all_input_nodes[0]]
        if node not in chosen:
            chosen[node] = _Choice(read.clone(), tree_map(torch.clone, made))
        return chosen[node].again(node, read)

    known: dict[fx.Node, Any] = {**leaves}
    known |= {node: value for node in nodes if node not in leaves and (value := of_sizes_alone(node)) is not None}
    values = evaluate(nodes, known, source=source, read_only=leaves, result=result)
    out: Tensor = values[origin_of(region.down)]
    return out
