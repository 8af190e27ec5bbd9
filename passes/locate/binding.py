"""How a located region is reached in the live module tree: which module is it, or reads its input and returns its output.

Flow: the recorded nodes of the region → the module calls whose nodes are all inside it → one module, a span from entries to
exit, or neither, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import fx

from memrewrite.passes.graphs.nodes import CanonicalNode, RecordedNode, inputs_of
from memrewrite.passes.graphs.ops import LAYOUT, LOOKS_UP, is_pointwise, op_name
from memrewrite.passes.graphs.provenance import modules_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.areas import Area, CallArea
from memrewrite.passes.locate.recorded_graph import RecordedGraph, origin_of
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.region import Region
from memrewrite.site import Binding


class BoundRegion(NamedTuple):
    """A binding, and what it spans in the recorded graph: `nodes`, from the value `x` to the value `y`."""

    binding: Binding
    nodes: frozenset[RecordedNode]
    x: RecordedNode
    y: RecordedNode


def bind(recorded: RecordedGraph, region: Region) -> BoundRegion:
    """The widest way to reach the region in the module tree; a binding of kind `none` gives the reason why there is none."""
    binder = _Binder(recorded, region)
    return binder.whole() or binder.summed() or (binder.routed() if isinstance(region, Mixture) else binder.span())


class _Binder:
    """The module calls around one region."""

    def __init__(self, recorded: RecordedGraph, region: Region) -> None:
        self.recorded, self.region = recorded, region
        self.closure = recorded.closure(region)
        self.limit = 4 * len(self.closure) + 64  # a module that is the MLP has no more nodes; keeps binding linear
        self.routing = _routing(region)
        self.calls: dict[str, CallArea] = {}

    def area(self, *parts: Iterable[RecordedNode]) -> Area:
        """Several sets of nodes as one."""
        return Area(self.recorded, self.routing, set().union(*parts))

    def around(self, node: fx.Node) -> Iterator[CallArea]:
        """The module calls around a node, outermost first, except the model itself and those far too wide."""
        for call, _ in modules_of(node):
            nodes = self.recorded.by_call.get(call, ())
            if self.recorded.paths[call] and nodes and len(nodes) <= self.limit:
                if call not in self.calls:
                    self.calls[call] = CallArea(self.recorded, self.routing, call)
                yield self.calls[call]

    def is_inside(self, area: Area) -> bool:
        """True if the nodes belong to the region or re-lay its input or output; none may compute the input."""
        ends = (self.region.x, self.region.down)
        return all(
            n in self.closure
            or n in self.recorded.constant
            or (self.recorded.canonical_value(n) in ends and self.recorded.twin.get(n) is not self.region.x)
            for n in area.nodes
        )

    def reads_x(self, node: RecordedNode) -> bool:
        """True if a node reads the region's input, in any layout."""
        return any(self.recorded.canonical_value(source) is self.region.x for source in inputs_of(node))

    def bound(self, area: Area, binding: Binding) -> BoundRegion:
        """The binding of an area that has one input and one output."""
        (x,), (y,) = area.inputs, area.outputs
        return BoundRegion(binding, area.nodes, x, y)

    # ------------------------------------------------------------------------------------------------------ a module

    def whole(self) -> BoundRegion | None:
        """The widest module that reads the MLP's input and returns its output."""
        needed = self.closure - self.recorded.constant
        for call in self.around(self.region.down):
            takes, item = self.recorded.input_argument(call.call), None
            if takes is None or not needed <= call.nodes:
                continue
            if not call.reads_only(self.region.x) or not call.computes_only(self.region.down):
                continue
            if not self.recorded.returns_one_tensor(call.call):
                (y,) = call.outputs
                item = self.recorded.output_item(call.call, y)
                if item is None:
                    continue
            alone = self.recorded.has_one_argument(call.call)
            return self.bound(
                call, Binding(kind="module", entries=(call.path,), exit=call.path, takes=takes, alone=alone, gives=item)
            )
        return None

    # -------------------------------------------------------------------------------------------------------- a span

    def span(self) -> BoundRegion:
        """From the modules that multiply by the first matrices to the one that multiplies by the last."""
        exit_ = self.exit()
        if exit_ is None:
            return self.unreachable(self.no_exit())
        readers = [up for up in self.region.ups if self.recorded.flow.unviewed(inputs_of(up)[0]) is self.region.x]
        entries = {up: self.entry(up) for up in readers}
        calls = list(dict.fromkeys(call for call in entries.values() if call is not None))
        if not readers or None in entries.values():
            return self.unreachable("no single module multiplies by its first matrix")
        area = self.area(self.closure, *(call.nodes for call in (*calls, exit_)))
        if len(area.inputs) != 1:
            return self.unreachable("its first matrices read its input in different layouts")
        widths = tuple(map(self.width, calls))
        return self.bound(
            area, Binding(kind="span", entries=tuple(call.path for call in calls), widths=widths, exit=exit_.path)
        )

    def entry(self, up: CanonicalNode) -> CallArea | None:
        """The widest module inside the region, around a first matrix, that reads the region's input."""
        for call in self.around(up):
            one = len(call.outputs) == 1 and self.is_inside(call)
            if one and call.reads_only(self.region.x) and not call.computes_only(self.region.down) and call.plain:
                return call
        return None

    def exit(self) -> CallArea | None:
        """The widest module inside the region that returns its output."""
        for call in self.around(self.region.down):
            if self.is_inside(call) and call.computes_only(self.region.down) and call.plain:
                return call
        return None

    def width(self, call: CallArea) -> int:
        """Features of what a module returns."""
        (output,) = call.outputs
        value = self.recorded.canonical_value(output)  # its features are last, whatever the axis in the model
        return int(shape_of(output if value is None else value)[-1])

    # ------------------------------------------------------------------------------------------ mixtures of experts

    def summed(self) -> BoundRegion | None:
        """The sum of the outputs of two modules that read one input: routed experts and a shared one.

        The module that runs first is the entry: when the site is replaced, it returns zeros.
        """
        total = origin_of(self.region.down)
        terms = [n for n in inputs_of(total) if n not in self.recorded.constant]
        if op_name(total) != "add" or total.kwargs or len(terms) != 2:
            return None
        calls = [call for call in map(self.term, terms) if call is not None]
        if len(calls) != 2:
            return None
        first, second = sorted(calls, key=lambda call: call.last)
        area = self.area(self.closure, first.nodes, second.nodes)
        if len(area.inputs) != 1 or area.outputs != {total}:
            return None
        width = int(total.meta["val"].shape[-1])
        return self.bound(area, Binding(kind="span", entries=(first.path,), widths=(width,), exit=second.path))

    def term(self, value: RecordedNode) -> CallArea | None:
        """The widest module that computes `value` from the region's input alone."""
        wanted = {self.recorded.canonical_value(value)}
        for call in self.around(value):
            same = {self.recorded.canonical_value(n) for n in call.outputs} == wanted
            if same and self.is_inside(call) and call.reads_only(self.region.x) and call.plain:
                return call
        return None

    def routed(self) -> BoundRegion:
        """From a module that reads the mixture's input, such as a router, to the one that returns its output."""
        for out in self.around(self.region.down):
            returns = out.computes_only(self.region.down) and self.recorded.returns_one_tensor(out.call)
            if not (returns and self.is_inside(out)):
                continue
            for entry in self.readers():
                both = self.area(self.relays(entry.inputs, self.area(self.closure, entry.nodes, out.nodes)))
                if entry is not out and len(both.inputs) == 1:
                    takes = self.recorded.input_argument(entry.call) or 0
                    binding = Binding(kind="span", entries=(entry.path,), takes=takes, exit=out.path, alone=False)
                    (x,), (y,) = both.inputs, out.outputs
                    return BoundRegion(binding, both.nodes, x, y)
            return self.unreachable("no module inside reads its input alone")
        return self.unreachable("no module inside returns its output alone")

    def relays(self, base: frozenset[RecordedNode], area: Area) -> set[RecordedNode]:
        """The nodes of `area`, with the casts and views between the values `base` and what the area reads of them."""
        found = set(area.nodes)
        for source in area.inputs - base:
            chain = [source]
            while (
                chain[-1] not in base
                and self.recorded.canonical_value(chain[-1]) is self.region.x
                and chain[-1].all_input_nodes
            ):
                chain.append(inputs_of(chain[-1])[0])
            found.update(chain[:-1] if chain[-1] in base else ())
        return found

    def readers(self) -> Iterator[CallArea]:
        """The modules inside that read the region's input and nothing else."""
        for node in sorted(self.closure, key=self.recorded.position.__getitem__):
            if self.reads_x(node):
                for call in self.around(node):
                    reads = call.reads_only(self.region.x) and self.recorded.input_argument(call.call) is not None
                    if reads and self.is_inside(call):
                        yield call

    # ------------------------------------------------------------------------------------------------------- neither

    def no_exit(self) -> str:
        """Why no module returns the region's output."""
        call, _ = (modules_of(self.region.down) or [("", "")])[-1]
        nodes = set(self.recorded.by_call.get(call, ()))
        if not call or self.closure - self.recorded.constant <= nodes:
            return "no single module multiplies by its last matrix"  # but one that contains all of it
        path = self.recorded.paths[call]
        if not self.recorded.returns_one_tensor(call):
            return f"the module {path!r}, which multiplies by its last matrix, returns more than one tensor"
        return f"the module {path!r}, which multiplies by its last matrix, returns another value than the MLP's output"

    def unreachable(self, why: str) -> BoundRegion:
        """The region by its bare closure; its input is the layout of `x` that its first node reads."""
        first = next(n for n in sorted(self.closure, key=self.recorded.position.__getitem__) if self.reads_x(n))
        x = next(s for s in inputs_of(first) if self.recorded.canonical_value(s) is self.region.x)
        host = self.host()
        binding = Binding(kind="graph", exit=host, why=why) if host else self.nowhere(why)
        return BoundRegion(binding, frozenset(self.closure), x, origin_of(self.region.down))

    def nowhere(self, why: str) -> Binding:
        """A binding of kind `none`. Where torch cannot trace the segment, there is no graph of the model to rewrite either."""
        segment = self.recorded.segment
        advice = (
            "make the MLP a module of its own, whose only argument and result are its input and output; rewrite a quantized "
        )
        advice += "model before it is quantized; or leave this MLP out"
        if segment.own_segments is None:
            return Binding(kind="none", why=why, advice=f"rewrite the exported program: `--emit graph`; or {advice}")
        around = repr(segment.path) if segment.path else "the model"
        return Binding(kind="none", why=f"{why}, and torch cannot export {around}", advice=advice)

    def host(self) -> str:
        """The narrowest module that contains the whole region and may become a graph; "" when there is none."""
        if self.recorded.segment.own_segments is not None:
            return ""  # torch cannot trace this segment, so its modules cannot become graphs
        needed = self.closure - self.recorded.constant
        for call, _ in reversed(modules_of(self.region.down)):
            path = self.recorded.paths[call]
            if path in self.recorded.calls and path and needed <= set(self.recorded.by_call[call]):
                return path
        return ""


def _routing(region: Region) -> set[CanonicalNode]:
    """The region's extra inputs, and what these are computed from by elementwise ops, layout ops and look-ups."""
    found, pending = set(region.extra_inputs), list(region.extra_inputs)
    while pending:
        node = pending.pop()
        if is_pointwise(node) or op_name(node) in LAYOUT | LOOKS_UP:
            pending.extend(source for source in inputs_of(node) if source not in found)
            found.update(inputs_of(node))
    return found
