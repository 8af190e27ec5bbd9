"""The arrangements of an MLP's matrices, one small class each, which returns a match with the widths, or the reason why not.

A region here already obeys the rules of `region` and `experts`; a pattern only looks at its matrices. Patterns are tried in
the order of `PATTERNS`, and the first match names the site. A new pattern is a class and an entry in `PATTERNS`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import fx

from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.rejection import Rejection

# An MLP that is this many times narrower inside than at both ends is a bottleneck: an adapter after or in parallel with the
# MLP of a block (test row "adapter").
NARROW = 2  # an MLP this many times narrower inside than at both ends is an adapter or a squeeze


class Match(NamedTuple):
    """The name of the pattern that a region matches, and the width of the value that the last matrix reads."""

    pattern: str
    d_hidden: int


class Pattern(Protocol):
    """One arrangement of matrices."""

    name: str

    def match(self, flow: Dataflow, region: Region) -> Match | str:
        """The match, or the reason why not."""
        ...


def _width(region: Region) -> int:
    hidden = region.down.args[0]
    return int(shape_of(hidden)[-1])  # type: ignore[arg-type]


def _reads(flow: Dataflow, up: fx.Node, region: Region) -> bool:
    """True if a first matrix reads what another first matrix computed."""
    inside, pending, seen = set(region.inside), [up], {up}
    while pending:
        fresh = [source for source in flow.activations(pending.pop()) if source in inside and source not in seen]
        if any(source in region.ups for source in fresh):
            return True
        seen.update(fresh)
        pending.extend(fresh)
    return False


class Plain:
    """`down(act(up(x)))`."""

    name = "plain"

    def match(self, flow: Dataflow, region: Region) -> Match | str:
        """One first matrix, as wide as the last one reads."""
        if len(region.ups) != 1:
            return f"it has {len(region.ups)} first matrices, not one"
        up, width = int(shape_of(region.ups[0])[-1]), _width(region)
        ends = [int(shape_of(matrix.args[1])[axis]) for matrix, axis in ((region.ups[0], 1), (region.down, 0))]  # type: ignore[arg-type]
        if NARROW * width <= min(ends):
            return f"its {width} inner features are a bottleneck between {ends[0]} and {ends[1]}: an adapter"
        return Match(self.name, width) if up == width else f"the first matrix gives {up} features, the last reads {width}"


class Gated:
    """`down(act(gate(x)) * up(x))`, with two separate first matrices."""

    name = "gated"

    def match(self, flow: Dataflow, region: Region) -> Match | str:
        """Two first matrices of equal width that both read the input, perhaps through different norms."""
        if len(region.ups) != 2:
            return f"it has {len(region.ups)} first matrices, not two"
        widths = {int(shape_of(up)[-1]) for up in region.ups}
        reads = not any(_reads(flow, up, region) for up in region.ups)
        width = _width(region)
        if widths != {width} or not reads:
            return f"its first matrices give {sorted(widths)} features, the last reads {width}"
        return Match(self.name, width)


class GatedPacked:
    """`down(act(a) * b)` where `a` and `b` are the halves of one product, in any layout."""

    name = "gated_packed"

    def match(self, flow: Dataflow, region: Region) -> Match | str:
        """One first matrix, twice as wide as the last one reads."""
        if len(region.ups) != 1:
            return f"it has {len(region.ups)} first matrices, not one"
        up, width = int(shape_of(region.ups[0])[-1]), _width(region)
        return Match(self.name, width) if up == 2 * width else f"the first matrix gives {up} features, not twice {width}"


class MixtureOfExperts:
    """`sum over chosen e of weight_e(x) * expert_e(x)`, and a shared expert, if one is added."""

    name = "moe"

    def match(self, flow: Dataflow, region: Region) -> Match | str:
        """A region that was found by its routing."""
        if not isinstance(region, Mixture) or not region.experts:
            return "no token chooses among experts"
        last = region.experts[-1]
        stack = next((s for s in last.all_input_nodes if s in flow.constant and len(shape_of(s)) > 1), last)
        inner = [int(n) for n in shape_of(stack)[-2:]]  # of the last matrix; one of them is the width of the experts' output
        outer = next(int(shape_of(n)[-1]) for n in (region.down, last, stack) if int(shape_of(n)[-1]) in inner)
        return Match(self.name, inner[0] if inner[1] == outer else inner[1])


PATTERNS: tuple[Pattern, ...] = (MixtureOfExperts(), Plain(), Gated(), GatedPacked())


def matched(flow: Dataflow, region: Region) -> Match | Rejection:
    """The match of the first pattern that fits a region, or the reasons of all."""
    reasons = []
    for pattern in PATTERNS:
        verdict = pattern.match(flow, region)
        if isinstance(verdict, Match):
            return verdict
        reasons.append(f"not {pattern.name}: {verdict}")
    return Rejection("arrangement", "; ".join(reasons), region.down)
