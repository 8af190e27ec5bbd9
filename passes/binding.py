"""How a located region is reached in the live module tree: which module is it, or takes its input and gives its output.

Flow: the recorded nodes of the region → the module calls that lie wholly inside it → one module, a span from entries to
exit, or none, with the reason.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from memrewrite.passes.dataflow import modules_of
from memrewrite.passes.normalize import ORIGIN
from memrewrite.passes.recorded import Recorded
from memrewrite.passes.region import Region
from memrewrite.site import Binding


class Bound(NamedTuple):
    """A binding, and what it spans in the recorded graph: `nodes`, from the value `x` to the value `y`."""

    binding: Binding
    nodes: frozenset[fx.Node]
    x: fx.Node
    y: fx.Node


def bind(recorded: Recorded, region: Region) -> Bound:
    """The widest way to reach the region in the module tree; a binding of kind `none` says why there is none."""
    region_calls = _Calls(recorded, region)
    whole = region_calls.whole()
    if whole:
        path = recorded.paths[whole]
        return region_calls.bound(Binding(kind="module", entries=(path,), exit=path), set(recorded.by_call[whole]))
    exit_ = region_calls.exit()
    if exit_ is None:
        return region_calls.unreachable("no module of its own does the multiplication by its last matrix")
    readers = [up for up in region.ups if recorded.flow.root(up.all_input_nodes[0]) is region.x]
    entries = [region_calls.entry(up) for up in readers]
    calls = list(dict.fromkeys(call for call in entries if call))
    if not readers or None in entries:
        return region_calls.unreachable("no module of its own does the multiplication by its first matrix")
    nodes = region_calls.closure.union(*(recorded.by_call[call] for call in (*calls, exit_)))
    if len(recorded.reads(nodes)) != 1:
        return region_calls.unreachable("its first matrices are handed its input in different layouts")
    widths = tuple(region_calls.width(call) for call in calls)
    entry_paths = tuple(recorded.paths[call] for call in calls)
    return region_calls.bound(Binding(kind="span", entries=entry_paths, widths=widths, exit=recorded.paths[exit_]), nodes)


class _Calls:
    """The module calls around one region."""

    def __init__(self, recorded: Recorded, region: Region) -> None:
        self.recorded, self.region = recorded, region
        self.closure = recorded.closure(region)
        self.limit = 4 * len(self.closure) + 64  # no module that is the MLP makes more nodes; keeps binding linear

    def bound(self, binding: Binding, nodes: set[fx.Node]) -> Bound:
        (x,), (y,) = self.recorded.reads(nodes), self.recorded.gives(nodes)
        return Bound(binding, frozenset(nodes), x, y)

    def unreachable(self, why: str) -> Bound:
        """The region by its bare closure; its input is what its first matrix is handed."""
        first = next(n for n in sorted(self.closure, key=self.recorded.position.__getitem__) if self._reads_x(n))
        x = next(s for s in first.all_input_nodes if self.recorded.root(s) is self.region.x)
        return Bound(Binding(kind="none", why=why), frozenset(self.closure), x, self.region.down.meta[ORIGIN])

    def whole(self) -> str | None:
        """The widest module that takes the MLP's input and returns its output."""
        needed = self.closure - self.recorded.constant
        for call, nodes in self._around(self.region.down):
            if needed <= set(nodes) and self._takes_x(nodes) and self._gives_y(nodes) and self.recorded.convention(call):
                return call
        return None

    def exit(self) -> str | None:
        """The widest module inside the region that returns its output."""
        for call, nodes in self._around(self.region.down):
            if self._inside(nodes) and self._gives_y(nodes) and self.recorded.convention(call):
                return call
        return None

    def entry(self, up: fx.Node) -> str | None:
        """The widest module inside the region, around a first matrix, that takes the region's input."""
        for call, nodes in self._around(up):
            one = len(self.recorded.gives(nodes)) == 1 and self._inside(nodes)
            if one and self._takes_x(nodes) and not self._gives_y(nodes) and self.recorded.convention(call):
                return call
        return None

    def width(self, call: str) -> int:
        """Features of what a module returns."""
        (given,) = self.recorded.gives(self.recorded.by_call[call])
        return int(given.meta["val"].shape[-1])

    def _around(self, node: fx.Node) -> list[tuple[str, list[fx.Node]]]:
        """Module calls around a canonical node, outermost first, the model itself and what is far too wide aside."""
        calls = [call for call, _ in modules_of(node)]
        made = [(call, self.recorded.by_call.get(call, [])) for call in calls if self.recorded.paths[call]]
        return [(call, nodes) for call, nodes in made if nodes and len(nodes) <= self.limit]

    def _inside(self, nodes: list[fx.Node]) -> bool:
        """Whether a module's nodes belong to the region, or re-lay its input or output; none may make its input."""
        ends, made = (self.region.x, self.region.down), self.recorded.twin.get
        return all(
            n in self.closure or n in self.recorded.constant or (self.recorded.root(n) in ends and made(n) is not ends[0])
            for n in nodes
        )

    def _reads_x(self, node: fx.Node) -> bool:
        return any(self.recorded.root(source) is self.region.x for source in node.all_input_nodes)

    def _takes_x(self, nodes: list[fx.Node]) -> bool:
        reads = self.recorded.reads(nodes)
        return len(reads) == 1 and self.recorded.root(next(iter(reads))) is self.region.x

    def _gives_y(self, nodes: list[fx.Node]) -> bool:
        gives = self.recorded.gives(nodes)
        return len(gives) == 1 and self.recorded.root(next(iter(gives))) is self.region.down
