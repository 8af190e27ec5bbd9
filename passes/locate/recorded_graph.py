"""A segment's recorded graph next to its canonical one: which value is which, and which nodes each module call computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx

from memrewrite.passes.canonicalize.canonicalize import canonicalize
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.dataflow import ORIGIN, Dataflow
from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.nodes import CanonicalNode, RecordedNode, canonical_nodes, inputs_of, recorded_nodes, users_of
from memrewrite.passes.graphs.ops import FILLS, IDENTITY, is_assertion, op_name
from memrewrite.passes.graphs.provenance import clean, modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.models.call_recorder import Call
from memrewrite.passes.regions.region import Region


def recorded_graph(segment: Segment, calls: Mapping[str, tuple[Call, ...]], *, fragment: bool = False) -> RecordedGraph:
    """Canonicalize a segment, and relate the two graphs. `calls` are the module calls of the whole model (`Capture.calls`)."""
    graph = canonicalize(segment.graph, segment.weights, segment.literals)
    return RecordedGraph(segment, Dataflow(graph, fragment=fragment), calls)


def origin_of(node: CanonicalNode) -> RecordedNode:
    """The recorded node whose value a canonical node computes. Raises `KeyError` for a node that `canonicalize` inserted."""
    return cast(RecordedNode, node.meta[ORIGIN])


class RecordedGraph:
    """Answers questions about recorded nodes by means of the canonical graph; built once for each segment."""

    def __init__(self, segment: Segment, flow: Dataflow, calls: Mapping[str, tuple[Call, ...]]) -> None:
        self.segment, self.flow, self.calls = segment, flow, calls
        self.nodes = recorded_nodes(segment.graph)
        self.twin = {origin_of(node): node for node in canonical_nodes(flow.graph) if ORIGIN in node.meta}
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.constant: set[RecordedNode] = set()  # computed from weights and literals alone
        for node in self.nodes:
            computed = node.op == "call_function" and all(n in self.constant for n in inputs_of(node))
            if computed or op_name(node) in FILLS or node.name in segment.weights or node.name in segment.literals:
                self.constant.add(node)

    @cached_property
    def by_call(self) -> dict[str, list[RecordedNode]]:
        """The nodes that each module call computed, except unused ones and assertions."""
        found: dict[str, list[RecordedNode]] = {}
        for node in self.nodes:
            if node.op == "call_function" and node.users:
                for call, _ in modules_of(node):
                    found.setdefault(call, []).append(node)
        return found

    @cached_property
    def paths(self) -> dict[str, str]:
        """Module path of each call, in the whole model."""
        found = {call: clean(path) for node in self.nodes for call, path in modules_of(node)}
        return {call: f"{self.segment.path}.{path}".strip(".") for call, path in found.items()}

    def canonical_value(self, node: RecordedNode) -> CanonicalNode | None:
        """The canonical value that a recorded node carries, without views, casts and copies; None if it has none."""
        while node not in self.twin:
            if op_name(node) not in IDENTITY or not node.all_input_nodes:
                return None
            node = inputs_of(node)[0]
        return self.flow.unviewed(self.twin[node])

    def closure(self, region: Region) -> set[RecordedNode]:
        """The recorded nodes of a region: from the last matrix back to the input, with what is computed from weights alone."""
        start, ends = origin_of(region.down), {region.x, *map(self.flow.unviewed, region.extra_inputs)}
        inside, pending = {start}, [start]
        while pending:
            for source in inputs_of(pending.pop()):
                weight = source.op != "call_function" or op_name(source) in FILLS
                if source not in inside and not weight and self.canonical_value(source) not in ends:
                    inside.add(source)
                    pending.append(source)
        return inside

    def recorded_inputs(self, nodes: Iterable[RecordedNode]) -> set[RecordedNode]:
        """What a set of nodes reads from outside of it, except weights and literals."""
        inside = set(nodes)
        return {s for n in inside for s in inputs_of(n) if s not in inside and s not in self.constant}

    def recorded_outputs(self, nodes: Iterable[RecordedNode]) -> set[RecordedNode]:
        """The nodes of a set that are read outside of it."""
        inside = set(nodes)
        return {n for n in inside if n not in self.constant and any(u not in inside and _uses(u) for u in users_of(n))}

    # ---------------------------------------------------------------------- module calls, as the call recorder saw them

    def input_argument(self, call: str) -> int | str | None:
        """Position or keyword of a module's only tensor argument; None when it is not the same in every recorded call."""
        found = {seen.takes for seen in self.calls.get(self.paths[call], ())}
        return found.pop() if len(found) == 1 else None

    def has_one_argument(self, call: str) -> bool:
        """True if a module's only argument is a tensor."""
        return all(seen.alone for seen in self.calls.get(self.paths[call], ()))

    def returns_one_tensor(self, call: str) -> bool:
        """True if a module returns one tensor and nothing else, in every recorded call."""
        seen = self.calls.get(self.paths[call], ())
        return bool(seen) and all(c.returns is None and c.gives != (None,) for c in seen)

    def output_item(self, call: str, value: RecordedNode) -> tuple[int, int] | None:
        """Which item of the tuple that a module returns is `value`, and of how many; None where its shape is not unique."""
        wanted = tuple(int(n) for n in value.meta["val"].shape)
        found = {
            (seen.gives.index(wanted), seen.returns)
            for seen in self.calls.get(self.paths[call], ())
            if seen.returns is not None and seen.gives.count(wanted) == 1
        }
        return found.pop() if len(found) == 1 else None


def of_sizes_alone(node: fx.Node) -> Any:
    """The value, in the example, of a node that depends on sizes only; None for other nodes."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return node.meta["val"].node.hint
    if op_name(node) not in FILLS:
        return None
    return evaluate([node], {}, source=_empty)[node]


def _empty(node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return of_sizes_alone(node)
    return torch.empty(shape_of(node), dtype=value.dtype, device=value.device)


def _uses(user: fx.Node) -> bool:
    """True if a user computes something: not an assertion, and not an item of a tuple that is itself unused."""
    return not is_assertion(user) and (bool(user.users) or op_name(user) != "getitem")
