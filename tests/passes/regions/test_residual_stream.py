"""Whether an output returns to the stream that an input was taken from: an input graph, and yes or no."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_graphs import SmallGraph, aten

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.regions.residual_stream import returns_to_stream

BATCH, TOKENS, D = 2, 3, 8
Node = CanonicalNode
# From the stream and a graph: the region's input, its output, and the value that the model computes next.
Build = Callable[[SmallGraph, Node], tuple[Node, Node, Node]]


def mlp(g: SmallGraph, x: Node) -> Node:
    return g.linear(g.op(aten.gelu, g.linear(x, 2 * D)), D)


def norm(g: SmallGraph, h: Node) -> Node:
    return g.op(aten.layer_norm, h, [D])


def pre_norm(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    x = norm(g, h)
    y = mlp(g, x)
    return x, y, g.op(aten.add.Tensor, h, y)


def post_norm(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, norm(g, g.op(aten.add.Tensor, h, y))


def gated_output(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    x = norm(g, h)
    y = mlp(g, x)
    gate = g.op(aten.sigmoid, g.linear(x, 1))
    return x, y, g.op(aten.add.Tensor, h, g.op(aten.mul.Tensor, gate, norm(g, y)))


def after_another_sum(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    """`(h + attention) + mlp(norm(h))`: the stream is two sums away."""
    x = norm(g, h)
    y, other = mlp(g, x), g.linear(x, D)
    return x, y, g.op(aten.add.Tensor, g.op(aten.add.Tensor, h, other), y)


def flattened(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    x = g.op(aten.view, norm(g, h), [BATCH * TOKENS, D])
    y = mlp(g, x)
    return x, y, g.op(aten.add.Tensor, h, g.op(aten.view, y, [BATCH, TOKENS, D]))


def subtracted(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, g.op(aten.sub.Tensor, h, y)


def stacked_and_summed(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, g.op(aten.sum.dim_IntList, g.op(aten.stack, [h, y]), [0])


def head(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    x = norm(g, h)
    y = mlp(g, x)
    return x, y, g.op(aten.softmax.int, y, -1)


def other_stream(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, g.op(aten.add.Tensor, g.input(BATCH, TOKENS, D), y)


def product_of_the_stream(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    """The other term is the stream times a matrix."""
    y = mlp(g, h)
    return h, y, g.op(aten.add.Tensor, g.linear(h, D), y)


def gate_of_the_stream(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, g.op(aten.mul.Tensor, h, g.op(aten.sigmoid, y))


def one_vector_for_all(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    x = g.op(aten.mean.dim, h, [1], True)
    y = mlp(g, x)
    return x, y, g.op(aten.add.Tensor, h, y)


def through_another_matrix(g: SmallGraph, h: Node) -> tuple[Node, Node, Node]:
    y = mlp(g, h)
    return h, y, g.op(aten.add.Tensor, h, g.linear(y, D))


RETURNS: tuple[Build, ...] = (pre_norm, post_norm, gated_output, after_another_sum, flattened, subtracted, stacked_and_summed)
LEAVES: tuple[Build, ...] = (
    head,
    other_stream,
    product_of_the_stream,
    gate_of_the_stream,
    one_vector_for_all,
    through_another_matrix,
)


def answer(build: Build, *, fragment: bool = False) -> bool:
    graph = SmallGraph()
    x, y, after = build(graph, graph.input(BATCH, TOKENS, D))
    flow = graph.flow(after)
    flow.fragment = fragment
    return returns_to_stream(flow, x, y)


@pytest.mark.parametrize("build", RETURNS, ids=lambda build: build.__name__)
def test_it_returns(build: Build) -> None:
    assert answer(build)


@pytest.mark.parametrize("build", LEAVES, ids=lambda build: build.__name__)
def test_it_does_not_return(build: Build) -> None:
    assert not answer(build)


def test_the_stream_of_a_fragment_may_be_outside_of_it() -> None:
    assert answer(head, fragment=True)
