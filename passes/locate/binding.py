"""How a located region is reached in the live module tree: which module is it, or takes its input and gives its output.

Flow: the recorded nodes of the region → the module calls that lie wholly inside it → one module, a span from entries to
exit, or none, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import fx

from memrewrite.passes.canonicalize.canonicalize import ORIGIN
from memrewrite.passes.graphs.ops import LAYOUT, LOOKS_UP, is_pointwise, op_name
from memrewrite.passes.graphs.provenance import modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.region import Region
from memrewrite.site import Binding


class BoundRegion(NamedTuple):
    """A binding, and what it spans in the recorded graph: `nodes`, from the value `x` to the value `y`."""

    binding: Binding
    nodes: frozenset[fx.Node]
    x: fx.Node
    y: fx.Node


def bind(recorded: RecordedGraph, region: Region) -> BoundRegion:
    """The widest way to reach the region in the module tree; a binding of kind `none` says why there is none."""
    calls = _Calls(recorded, region)
    return calls.whole() or calls.summed() or (calls.routed() if isinstance(region, Mixture) else calls.span())


class _Calls:
    """The module calls around one region."""

    def __init__(self, recorded: RecordedGraph, region: Region) -> None:
        self.recorded, self.region = recorded, region
        self.closure = recorded.closure(region)
        self.limit = 4 * len(self.closure) + 64  # no module that is the MLP makes more nodes; keeps binding linear

    def reads(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """What a set of nodes reads from outside, beside what only helps to choose experts."""
        given, pending = set(self.region.given), list(self.region.given)
        while pending:
            node = pending.pop()
            if is_pointwise(node) or op_name(node) in LAYOUT | LOOKS_UP:
                pending.extend(source for source in node.all_input_nodes if source not in given)
                given.update(node.all_input_nodes)
        return {node for node in self.recorded.reads(nodes) if self.recorded.canonical_value(node) not in given}

    def bound(self, binding: Binding, nodes: set[fx.Node]) -> BoundRegion:
        (x,), (y,) = self.reads(nodes), self.recorded.gives(nodes)
        return BoundRegion(binding, frozenset(nodes), x, y)

    def unreachable(self, why: str) -> BoundRegion:
        """The region by its bare closure; its input is what its first matrix is handed."""
        first = next(n for n in sorted(self.closure, key=self.recorded.position.__getitem__) if self._reads_x(n))
        x = next(s for s in first.all_input_nodes if self.recorded.canonical_value(s) is self.region.x)
        host = self.host()
        binding = Binding(kind="graph", exit=host, why=why) if host else Binding(kind="none", why=why)
        return BoundRegion(binding, frozenset(self.closure), x, self.region.down.meta[ORIGIN])

    def host(self) -> str:
        """The narrowest module that holds all of the region and may become a graph; "" when there is none."""
        if self.recorded.segment.own_segments is not None:
            return ""  # what torch could not trace here it will not trace there
        needed = self.closure - self.recorded.constant
        for call, _ in reversed(modules_of(self.region.down)):
            path = self.recorded.paths[call]
            if path in self.recorded.calls and path and needed <= set(self.recorded.by_call[call]):
                return path
        return ""

    def whole(self) -> BoundRegion | None:
        """The widest module that takes the MLP's input and returns its output."""
        needed = self.closure - self.recorded.constant
        for call, nodes in self._around(self.region.down):
            takes, item = self.recorded.takes(call), None
            if takes is None or not needed <= set(nodes) or not self._takes_x(nodes) or not self._gives_y(nodes):
                continue
            if not self.recorded.gives_alone(call):
                (y,) = self.recorded.gives(nodes)
                item = self.recorded.item(call, y)
                if item is None:
                    continue
            path, alone = self.recorded.paths[call], self.recorded.alone(call)
            binding = Binding(kind="module", entries=(path,), exit=path, takes=takes, alone=alone, gives=item)
            return self.bound(binding, set(nodes))
        return None

    def span(self) -> BoundRegion:
        """From the modules that multiply by the first matrices to the one that multiplies by the last."""
        exit_ = self.exit()
        if exit_ is None:
            return self.unreachable("no module of its own does the multiplication by its last matrix")
        readers = [up for up in self.region.ups if self.recorded.flow.unviewed(up.all_input_nodes[0]) is self.region.x]
        entries = [self.entry(up) for up in readers]
        calls = list(dict.fromkeys(call for call in entries if call))
        if not readers or None in entries:
            return self.unreachable("no module of its own does the multiplication by its first matrix")
        nodes = self.closure.union(*(self.recorded.by_call[call] for call in (*calls, exit_)))
        if len(self.reads(nodes)) != 1:
            return self.unreachable("its first matrices are handed its input in different layouts")
        widths = tuple(self.width(call) for call in calls)
        paths = tuple(self.recorded.paths[call] for call in calls)
        return self.bound(Binding(kind="span", entries=paths, widths=widths, exit=self.recorded.paths[exit_]), nodes)

    def summed(self) -> BoundRegion | None:
        """The sum of what two modules make of one input: routed experts and a shared one. The first gives zeros, then."""
        total = self.region.down.meta[ORIGIN]
        parts = [n for n in total.all_input_nodes if n not in self.recorded.constant]
        calls = [self._part(part) for part in parts]
        if op_name(total) != "add" or total.kwargs or len(parts) != 2 or None in calls:
            return None
        made = sorted((c for c in calls if c), key=lambda c: self.recorded.position[self.recorded.by_call[c][-1]])
        nodes = self.closure.union(*(self.recorded.by_call[call] for call in made))
        if len(self.reads(nodes)) != 1 or self.recorded.gives(nodes) != {total}:
            return None
        entry, exit_ = (self.recorded.paths[call] for call in made)
        width = int(total.meta["val"].shape[-1])
        return self.bound(Binding(kind="span", entries=(entry,), widths=(width,), exit=exit_), nodes)

    def _part(self, value: fx.Node) -> str | None:
        """The widest module that makes `value` of the region's input alone."""
        for call, nodes in self._around(value):
            gives = self.recorded.gives(nodes)
            same = {self.recorded.canonical_value(n) for n in gives} == {self.recorded.canonical_value(value)}
            if same and self._inside(nodes) and self._takes_x(nodes) and self._plain(call):
                return call
        return None

    def routed(self) -> BoundRegion:
        """From a module that is given the mixture's input, a router say, to the one that returns its output."""
        for out, made in self._around(self.region.down):
            if not (self._inside(made) and self._gives_y(made) and self.recorded.gives_alone(out)):
                continue
            for entry, nodes in self._readers():
                both = self._from(self.reads(nodes), self.closure.union(nodes, made))
                if entry != out and len(self.reads(both)) == 1:
                    takes, (path, exit_) = self.recorded.takes(entry) or 0, (self.recorded.paths[c] for c in (entry, out))
                    binding = Binding(kind="span", entries=(path,), takes=takes, exit=exit_, alone=False)
                    (x,), (y,) = self.reads(both), self.recorded.gives(made)
                    return BoundRegion(binding, frozenset(both), x, y)
            return self.unreachable("no module of its own is given its input")
        return self.unreachable("no module of its own returns its output")

    def _from(self, base: set[fx.Node], nodes: set[fx.Node]) -> set[fx.Node]:
        """Nodes, with the casts and views between `base` and what they read of it."""
        relays: set[fx.Node] = set()
        for source in self.reads(nodes) - base:
            chain = [source]
            while (
                chain[-1] not in base
                and self.recorded.canonical_value(chain[-1]) is self.region.x
                and chain[-1].all_input_nodes
            ):
                chain.append(chain[-1].all_input_nodes[0])
            relays.update(chain[:-1] if chain[-1] in base else ())
        return nodes | relays

    def _readers(self) -> Iterator[tuple[str, list[fx.Node]]]:
        """The modules inside that are given the region's input and nothing else."""
        for node in sorted(self.closure, key=self.recorded.position.__getitem__):
            if self._reads_x(node):
                for call, nodes in self._around(node):
                    if self._inside(nodes) and self._takes_x(nodes) and self.recorded.takes(call) is not None:
                        yield call, nodes

    def exit(self) -> str | None:
        """The widest module inside the region that returns its output."""
        for call, nodes in self._around(self.region.down):
            if self._inside(nodes) and self._gives_y(nodes) and self._plain(call):
                return call
        return None

    def _plain(self, call: str) -> bool:
        return self.recorded.takes(call) == 0 and self.recorded.gives_alone(call)

    def entry(self, up: fx.Node) -> str | None:
        """The widest module inside the region, around a first matrix, that takes the region's input."""
        for call, nodes in self._around(up):
            one = len(self.recorded.gives(nodes)) == 1 and self._inside(nodes)
            if one and self._takes_x(nodes) and not self._gives_y(nodes) and self._plain(call):
                return call
        return None

    def width(self, call: str) -> int:
        """Features of what a module returns."""
        (given,) = self.recorded.gives(self.recorded.by_call[call])
        value = self.recorded.canonical_value(given)  # there the features are last, wherever the model has them
        return int(shape_of(given if value is None else value)[-1])

    def _around(self, node: fx.Node) -> list[tuple[str, list[fx.Node]]]:
        """Module calls around a canonical node, outermost first, the model itself and what is far too wide aside."""
        calls = [call for call, _ in modules_of(node)]
        made = [(call, self.recorded.by_call.get(call, [])) for call in calls if self.recorded.paths[call]]
        return [(call, nodes) for call, nodes in made if nodes and len(nodes) <= self.limit]

    def _inside(self, nodes: list[fx.Node]) -> bool:
        """Whether a module's nodes belong to the region, or re-lay its input or output; none may make its input."""
        ends, made = (self.region.x, self.region.down), self.recorded.twin.get
        return all(
            n in self.closure
            or n in self.recorded.constant
            or (self.recorded.canonical_value(n) in ends and made(n) is not ends[0])
            for n in nodes
        )

    def _reads_x(self, node: fx.Node) -> bool:
        return any(self.recorded.canonical_value(source) is self.region.x for source in node.all_input_nodes)

    def _takes_x(self, nodes: list[fx.Node]) -> bool:
        reads = self.reads(nodes)
        return len(reads) == 1 and self.recorded.canonical_value(next(iter(reads))) is self.region.x

    def _gives_y(self, nodes: list[fx.Node]) -> bool:
        gives = self.recorded.gives(nodes)
        return len(gives) == 1 and self.recorded.canonical_value(next(iter(gives))) is self.region.down
