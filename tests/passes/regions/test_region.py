"""The region that ends in a linear: an input graph, and the region, or the rule that rejects it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_graphs import SmallGraph, aten

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.regions.region import Region, attempt
from memrewrite.passes.regions.rejection import Rejection

BATCH, TOKENS, D, HIDDEN = 2, 3, 8, 12
Node = CanonicalNode
# From the stream: the linear that is tried, and the value that the model computes next.
Build = Callable[[SmallGraph, Node], tuple[Node, Node]]


def attempted(build: Build) -> tuple[Node, Region | Rejection]:
    """The stream, and the answer for the linear."""
    g = SmallGraph()
    h = g.input(BATCH, TOKENS, D)
    down, after = build(g, h)
    return h, attempt(g.flow(after), down)


def around(middle: Callable[[SmallGraph, Node], Node]) -> Build:
    """`h + down(middle(up(norm(h))))`."""

    def build(g: SmallGraph, h: Node) -> tuple[Node, Node]:
        down = g.linear(middle(g, g.linear(g.op(aten.layer_norm, h, [D]), HIDDEN)), D)
        return down, g.op(aten.add.Tensor, h, down)

    return build


def test_a_region_is_everything_after_the_norm() -> None:
    _, region = attempted(around(lambda g, u: g.op(aten.gelu, u)))
    assert isinstance(region, Region)
    assert region.x.name == "layer_norm_default"
    assert [node.name for node in region.inside] == ["linear_default", "gelu_default", "linear_default_1"]
    assert [node.name for node in region.ups] == ["linear_default"]


def leaking(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    hidden = g.op(aten.gelu, g.linear(h, D))
    down = g.linear(hidden, D)
    return down, g.op(aten.add.Tensor, g.op(aten.add.Tensor, h, down), hidden)


def head(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    down = g.linear(g.op(aten.gelu, g.linear(h, HIDDEN)), D)
    return down, g.op(aten.softmax.int, down, -1)


def two_streams(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    down = g.linear(g.op(aten.add.Tensor, h, g.linear(h, D)), D)
    return down, g.op(aten.add.Tensor, h, down)


def two_inputs(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    gate, value = g.linear(h, HIDDEN), g.linear(g.input(BATCH, TOKENS, D), HIDDEN)
    down = g.linear(g.op(aten.mul.Tensor, g.op(aten.silu, gate), value), D)
    return down, g.op(aten.add.Tensor, h, down)


def too_far(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    """One first matrix is near, the other is a hundred operations away."""
    far = g.linear(h, HIDDEN)
    for _ in range(100):
        far = g.op(aten.relu, far)
    down = g.linear(g.op(aten.mul.Tensor, far, g.op(aten.silu, g.linear(h, HIDDEN))), D)
    return down, g.op(aten.add.Tensor, h, down)


def first(g: SmallGraph, h: Node) -> tuple[Node, Node]:
    up = g.linear(h, HIDDEN)
    return up, g.op(aten.gelu, up)


REJECTED: dict[str, tuple[Build, str, bool]] = {  # the rule, and whether it is a near miss
    "tokens mixed": (around(lambda g, u: g.op(aten.gelu, g.op(aten.cumsum, u, 1))), "token by token", True),
    "an unknown op": (around(lambda g, u: g.op(aten.gelu, g.op(aten.tril, u))), "token by token", True),
    "an inner value read outside": (leaking, "closed", True),
    "no residual sum": (head, "residual", True),
    "an input of the model inside": (two_inputs, "token by token", True),
    "too many operations": (too_far, "one input", False),
    "nothing between": (around(lambda g, u: u), "matrix, nonlinearity, matrix", False),
    "only a scale between": (around(lambda g, u: g.op(aten.mul.Tensor, u, 2.0)), "matrix, nonlinearity, matrix", False),
    "a sum of two streams": (two_streams, "matrix, nonlinearity, matrix", False),
    "a first matrix": (first, "matrix, nonlinearity, matrix", False),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_rejection_names_its_rule(name: str) -> None:
    build, rule, near_miss = REJECTED[name]
    _, rejection = attempted(build)
    assert isinstance(rejection, Rejection)
    assert (rejection.rule, rejection.near_miss) == (rule, near_miss)
    assert rejection.reason
