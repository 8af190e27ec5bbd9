"""Which arrangement of matrices a region has: an input graph, and the pattern or why none matches."""

from __future__ import annotations

import pytest
from small_graphs import SmallGraph, aten, inside

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.patterns import PATTERNS, Match, matched
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.rejection import Rejection

TOKENS, D, HIDDEN = 5, 8, 12


def arrangement(widths: tuple[int, ...], hidden: int, *, in_a_row: bool = False) -> Match | Rejection:
    """The answer for first matrices of these widths, and a last one that reads `hidden` features."""
    g = SmallGraph()
    x = g.input(TOKENS, D)
    ups = [g.linear(x, widths[0])]
    for width in widths[1:]:
        ups.append(g.linear(ups[-1] if in_a_row else x, width))
    values: list[CanonicalNode] = [g.op(aten.gelu, up) for up in ups]
    middle = values[0]
    for value in values[1:]:
        middle = g.op(aten.mul.Tensor, middle, value) if not in_a_row else value
    down = g.linear(g.op(aten.slice.Tensor, middle, 1, 0, hidden), D)
    flow = g.flow(down)
    return matched(flow, Region(x, down, tuple(inside(flow, x, down)), tuple(ups)))


@pytest.mark.parametrize(
    ("widths", "hidden", "pattern"),
    [((HIDDEN,), HIDDEN, "plain"), ((HIDDEN, HIDDEN), HIDDEN, "gated"), ((2 * HIDDEN,), HIDDEN, "gated_packed")],
)
def test_a_match_has_the_width_that_the_last_matrix_reads(widths: tuple[int, ...], hidden: int, pattern: str) -> None:
    assert arrangement(widths, hidden) == Match(pattern, hidden)


@pytest.mark.parametrize(
    ("widths", "hidden", "reason"),
    [
        ((HIDDEN,), HIDDEN - 1, "the first matrix gives 12 features, the last reads 11"),
        ((D // 2,), D // 2, "are a bottleneck between 8 and 8: an adapter"),
        ((HIDDEN, 1), HIDDEN, "its first matrices give [1, 12] features, the last reads 12"),
        ((HIDDEN,) * 3, HIDDEN, "it has 3 first matrices, not two"),
    ],
)
def test_every_pattern_has_its_reason(widths: tuple[int, ...], hidden: int, reason: str) -> None:
    rejection = arrangement(widths, hidden)
    assert isinstance(rejection, Rejection)
    assert (rejection.rule, rejection.near_miss) == ("arrangement", True)
    assert reason in rejection.reason
    assert all(f"not {pattern.name}:" in rejection.reason for pattern in PATTERNS)


def test_a_gate_must_read_the_input() -> None:
    assert isinstance(arrangement((HIDDEN, HIDDEN), HIDDEN, in_a_row=True), Rejection)


def test_the_hidden_width_of_experts_is_that_of_one_expert() -> None:
    g = SmallGraph()
    x = g.input(TOKENS, D)
    up, down = g.weight(3, D, HIDDEN), g.weight(3, HIDDEN, D)
    first = g.op(aten.einsum, "td,edf->tef", [x, up])
    last = g.op(aten.einsum, "tef,efd->ted", [g.op(aten.gelu, first), down])
    flow = g.flow(last)
    region = Mixture(x, last, tuple(inside(flow, x, last)), (first, last), (first, last))
    assert matched(flow, region) == Match("moe", HIDDEN)
    assert region.active(flow) == 3 * 2 * D * HIDDEN
