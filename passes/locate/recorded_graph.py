"""A segment's recorded graph beside its canonical one: which value is which, and which nodes each module call made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx

from memrewrite.passes.canonicalize.canonicalize import ORIGIN, canonicalize
from memrewrite.passes.capture.segment import Segment
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.ops import FILLED, IDENTITY, is_assertion, op_name
from memrewrite.passes.graphs.provenance import clean, modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.models.call_recorder import Call
from memrewrite.passes.regions.region import Region

FILLS = FILLED | {"new_zeros", "new_ones", "new_full"}  # they read a value's shape, and not the value


def recorded_graph(segment: Segment, calls: Mapping[str, tuple[Call, ...]], *, fragment: bool = False) -> RecordedGraph:
    """Canonicalize a segment, and relate the two graphs. `calls` are the module calls of the whole model (`Capture.calls`)."""
    return RecordedGraph(segment, Dataflow(canonicalize(segment), fragment=fragment), calls)


class RecordedGraph:
    """Questions about recorded nodes, answered through the canonical graph; built once for each segment."""

    def __init__(self, segment: Segment, flow: Dataflow, calls: Mapping[str, tuple[Call, ...]]) -> None:
        self.segment, self.flow, self.calls = segment, flow, calls
        self.twin = {node.meta[ORIGIN]: node for node in flow.graph.nodes if ORIGIN in node.meta}
        self.position = {node: i for i, node in enumerate(segment.graph.nodes)}
        self.constant: set[fx.Node] = set()  # computed from weights and literals alone
        for node in segment.graph.nodes:
            made = node.op == "call_function" and all(n in self.constant for n in node.all_input_nodes)
            if made or op_name(node) in FILLS or node.name in segment.weights or node.name in segment.literals:
                self.constant.add(node)

    @cached_property
    def by_call(self) -> dict[str, list[fx.Node]]:
        """The nodes each module call made; dead constants and assertions aside."""
        made: dict[str, list[fx.Node]] = {}
        for node in self.segment.graph.nodes:
            if node.op == "call_function" and node.users:
                for call, _ in modules_of(node):
                    made.setdefault(call, []).append(node)
        return made

    @cached_property
    def paths(self) -> dict[str, str]:
        """Module path of each call, in the whole model."""
        found = {call: clean(path) for node in self.segment.graph.nodes for call, path in modules_of(node)}
        return {call: f"{self.segment.path}.{path}".strip(".") for call, path in found.items()}

    def canonical_value(self, node: fx.Node) -> fx.Node | None:
        """The canonical value a recorded node carries, views and whatever `canonicalize` dropped aside; None for others."""
        while node not in self.twin:
            if op_name(node) not in IDENTITY or not node.all_input_nodes:
                return None
            node = node.all_input_nodes[0]
        return self.flow.unviewed(self.twin[node])

    def closure(self, region: Region) -> set[fx.Node]:
        """The recorded nodes of a region: back from the last matrix to the input, the weights' own arithmetic included."""
        start, ends = region.down.meta[ORIGIN], {region.x, *map(self.flow.unviewed, region.given)}
        inside, pending = {start}, [start]
        while pending:
            for source in pending.pop().all_input_nodes:
                weight = source.op != "call_function" or op_name(source) in FILLS
                if source not in inside and not weight and self.canonical_value(source) not in ends:
                    inside.add(source)
                    pending.append(source)
        return inside

    def reads(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """What a set of nodes reads from outside, weights and literals aside."""
        inside = set(nodes)
        return {s for n in inside for s in n.all_input_nodes if s not in inside and s not in self.constant}

    def gives(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """What of a set of nodes is read outside."""
        inside = set(nodes)
        return {n for n in inside if n not in self.constant and any(u not in inside and _reads(u) for u in n.users)}

    def takes(self, call: str) -> int | str | None:
        """Where among its arguments a module is given its only tensor; None when that is not the same in every call seen."""
        found = {seen.takes for seen in self.calls.get(self.paths[call], ())}
        return found.pop() if len(found) == 1 else None

    def alone(self, call: str) -> bool:
        """Whether a module is given nothing beside its only tensor."""
        return all(seen.alone for seen in self.calls.get(self.paths[call], ()))

    def gives_alone(self, call: str) -> bool:
        """Whether a module returns one tensor and nothing else, in every call seen."""
        seen = self.calls.get(self.paths[call], ())
        return bool(seen) and all(c.returns is None and c.gives != (None,) for c in seen)

    def item(self, call: str, value: fx.Node) -> tuple[int, int] | None:
        """Which item of the tuple that a module returns is `value`, and of how many; None where its shape does not tell."""
        wanted = tuple(int(n) for n in value.meta["val"].shape)
        found = {
            (seen.gives.index(wanted), seen.returns)
            for seen in self.calls.get(self.paths[call], ())
            if seen.returns is not None and seen.gives.count(wanted) == 1
        }
        return found.pop() if len(found) == 1 else None


def of_sizes_alone(node: fx.Node) -> Any:
    """The value of a node that depends on nothing but sizes, in the example; None for other nodes."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return node.meta["val"].node.hint
    if op_name(node) not in FILLS:
        return None
    target: Any = node.target
    like: Any = lambda n: of_sizes_alone(n) if not isinstance(n.meta["val"], torch.Tensor) else _like(n)  # noqa: E731
    return target(*fx.map_arg(node.args, like), **fx.map_arg(node.kwargs, like))


def _like(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(shape_of(node), dtype=value.dtype, device=value.device)


def _reads(user: fx.Node) -> bool:
    """Whether a user makes something of what it is given: a check does not, nor does taking an item nobody wants."""
    return not is_assertion(user) and (bool(user.users) or op_name(user) != "getitem")
