"""The name of an activation: an input graph between two matrices, and the name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_graphs import SmallGraph, aten, inside

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.regions.activation import activation_of
from memrewrite.passes.regions.region import Region

TOKENS, D, HIDDEN = 5, 6, 8
Node = CanonicalNode
Build = Callable[..., Node]


def region(middle: Build, *widths: int) -> tuple[object, Region]:
    """The graph and the region of `down(middle(up(x), ...))`, with one first matrix for each width."""
    g = SmallGraph()
    x = g.input(TOKENS, D)
    ups = [g.linear(x, width) for width in widths]
    down = g.linear(middle(g, *ups), D)
    flow = g.flow(down)
    return flow, Region(x, down, tuple(inside(flow, x, down)), tuple(ups))


def name(middle: Build, *widths: int) -> str:
    flow, found = region(middle, *widths)
    return activation_of(flow, found, {})  # type: ignore[arg-type]


def written_gelu(g: SmallGraph, h: Node) -> Node:
    erf = g.op(aten.erf, g.op(aten.mul.Tensor, h, 0.5**0.5))
    return g.op(aten.mul.Tensor, g.op(aten.mul.Tensor, h, 0.5), g.op(aten.add.Tensor, erf, 1.0))


PLAIN: dict[str, tuple[str, Build]] = {
    "relu": ("relu", lambda g, h: g.op(aten.relu, h)),
    "clamp": ("relu", lambda g, h: g.op(aten.clamp, h, 0)),
    "gelu": ("gelu", lambda g, h: g.op(aten.gelu, h)),
    "gelu, by erf": ("gelu", written_gelu),
    "tanh gelu": ("gelu_tanh", lambda g, h: g.op(aten.gelu, h, approximate="tanh")),
    "silu, as a product": ("silu", lambda g, h: g.op(aten.mul.Tensor, h, g.op(aten.sigmoid, h))),
    "squared relu": ("relu2", lambda g, h: g.op(aten.square, g.op(aten.relu, h))),
    "nothing": ("identity", lambda g, h: g.op(aten.view, h, [TOKENS, HIDDEN])),
    "unknown": ("?", lambda g, h: g.op(aten.sin, h)),
    "with a weight": ("?", lambda g, h: g.op(aten.relu, g.op(aten.mul.Tensor, h, g.weight(HIDDEN)))),
    "with a norm": ("?", lambda g, h: g.op(aten.relu, g.op(aten.layer_norm, h, [HIDDEN]))),
}


def halves(g: SmallGraph, h: Node, step: int = 1) -> tuple[Node, Node]:
    """The features [0:n], [n:2n]; or with a step of 2, the even and the odd ones."""
    ends = ((0, HIDDEN), (HIDDEN, 2 * HIDDEN)) if step == 1 else ((0, 2 * HIDDEN), (1, 2 * HIDDEN))
    first, second = (g.op(aten.slice.Tensor, h, 1, *end, step) for end in ends)
    return first, second


PACKED: dict[str, tuple[str, Build]] = {
    "glu": ("sigmoid", lambda g, h: g.op(aten.glu, h)),
    "gate first": ("silu", lambda g, h: g.op(aten.mul.Tensor, g.op(aten.silu, (p := halves(g, h))[0]), p[1])),
    "gate second": ("relu", lambda g, h: g.op(aten.mul.Tensor, (p := halves(g, h))[0], g.op(aten.relu, p[1]))),
    "interleaved": ("gelu", lambda g, h: g.op(aten.mul.Tensor, g.op(aten.gelu, (p := halves(g, h, 2))[0]), p[1])),
}


@pytest.mark.parametrize("case", PLAIN)
def test_one_matrix(case: str) -> None:
    wanted, middle = PLAIN[case]
    assert name(middle, HIDDEN) == wanted


@pytest.mark.parametrize("case", PACKED)
def test_one_matrix_of_gate_and_value(case: str) -> None:
    wanted, middle = PACKED[case]
    assert name(middle, 2 * HIDDEN) == wanted


def test_two_matrices_whichever_is_the_gate() -> None:
    assert name(lambda g, a, b: g.op(aten.mul.Tensor, g.op(aten.silu, a), b), HIDDEN, HIDDEN) == "silu"
    assert name(lambda g, a, b: g.op(aten.mul.Tensor, a, g.op(aten.tanh, b)), HIDDEN, HIDDEN) == "tanh"
    assert name(lambda g, a, b: g.op(aten.add.Tensor, a, b), HIDDEN, HIDDEN) == "?"


def test_regions_of_equal_ops_share_one_evaluation() -> None:
    cache: dict[object, str] = {}
    for _ in range(2):
        flow, found = region(PLAIN["gelu"][1], HIDDEN)
        assert activation_of(flow, found, cache) == "gelu"  # type: ignore[arg-type]
    assert len(cache) == 1
    flow, found = region(PLAIN["gelu"][1], 2 * HIDDEN)
    activation_of(flow, found, cache)  # type: ignore[arg-type]
    assert len(cache) == 2
