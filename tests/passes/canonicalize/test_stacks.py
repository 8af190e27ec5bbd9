"""Two matrices in one weight: experts when each slice goes to a matrix by itself, a gate and value when they meet before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_graphs import SmallGraph, aten

from memrewrite.passes.canonicalize.stacks import are_experts
from memrewrite.passes.graphs.nodes import CanonicalNode

TOKENS, D, HIDDEN, COUNT = 5, 8, 12, 2
Node = CanonicalNode
Build = Callable[[SmallGraph, Node], Node]


def answer(equation: str, then: Build) -> bool:
    """The answer for `einsum(equation, x, [COUNT, D, HIDDEN])`, whose result `then` uses."""
    g = SmallGraph()
    product = g.op(aten.einsum, equation, [g.input(TOKENS, D), g.weight(COUNT, D, HIDDEN)])
    return are_experts(g.flow(then(g, product)), product, equation.partition("->")[2].index("e"))


def item(g: SmallGraph, values: Node, number: int) -> Any:
    import operator

    node = g.graph.call_function(operator.getitem, (values, number))
    node.meta["val"] = values.meta["val"][number]
    return node


def last(g: SmallGraph, h: Node) -> Node:
    return g.op(aten.einsum, "tef,efd->ted", [h, g.weight(COUNT, HIDDEN, D)])


def chunked(g: SmallGraph, h: Node) -> Node:
    """Each expert is gated, by the halves of its own features."""
    half = [item(g, g.op(aten.chunk, h, 2, -1), i) for i in range(2)]
    hidden = g.op(aten.mul.Tensor, g.op(aten.silu, half[0]), half[1])
    return g.op(aten.einsum, "tef,efd->ted", [hidden, g.weight(COUNT, HIDDEN // 2, D)])


def one_by_one(g: SmallGraph, h: Node) -> Node:
    down, total = g.weight(COUNT, HIDDEN, D), []
    for i in range(COUNT):
        hidden = g.op(aten.gelu, g.op(aten.select.int, h, 1, i))
        total.append(g.op(aten.matmul, hidden, g.op(aten.select.int, down, 0, i)))
    return g.op(aten.add.Tensor, *total)


def moved_first(g: SmallGraph, h: Node) -> Node:
    h = g.op(aten.permute, g.op(aten.gelu, h), [1, 0, 2])
    return g.op(aten.bmm, h, g.weight(COUNT, HIDDEN, D))


def weighed(g: SmallGraph, h: Node) -> Node:
    scale = g.op(aten.softmax.int, g.linear(g.input(TOKENS, D), COUNT), -1)
    return last(g, g.op(aten.mul.Tensor, g.op(aten.layer_norm, h, [HIDDEN]), g.op(aten.unsqueeze, scale, -1)))


def pair(g: SmallGraph, h: Node) -> Node:
    gate, value = (item(g, g.op(aten.unbind.int, h, 1), i) for i in range(2))
    return g.linear(g.op(aten.mul.Tensor, g.op(aten.silu, gate), value), D)


def pair_selected(g: SmallGraph, h: Node) -> Node:
    gate, value = (g.op(aten.select.int, h, 1, i) for i in range(2))
    return g.linear(g.op(aten.mul.Tensor, gate, g.op(aten.gelu, g.op(aten.mul.Tensor, value, 2.0))), D)


def pair_flattened(g: SmallGraph, h: Node) -> Node:
    """The slices become halves of one axis."""
    gate, value = (item(g, g.op(aten.chunk, g.op(aten.reshape, h, [TOKENS, 2 * HIDDEN]), 2, -1), i) for i in range(2))
    return g.linear(g.op(aten.mul.Tensor, g.op(aten.silu, gate), value), D)


EXPERTS: tuple[Build, ...] = (lambda g, h: last(g, g.op(aten.gelu, h)), chunked, one_by_one, moved_first, weighed)
PAIRS: tuple[Build, ...] = (
    pair,
    pair_selected,
    pair_flattened,
    lambda g, h: g.linear(g.op(aten.squeeze.dim, g.op(aten.glu, h, 1), 1), D),
    lambda g, h: g.linear(g.op(aten.amax, h, [1]), D),
    lambda g, h: g.linear(item(g, g.op(aten.max.dim, h, 1), 0), D),
)


@pytest.mark.parametrize("then", EXPERTS)
def test_slices_that_do_not_meet_are_experts(then: Build) -> None:
    assert answer("td,edf->tef", then)


@pytest.mark.parametrize("then", PAIRS)
def test_slices_that_meet_are_a_gate_and_its_value(then: Build) -> None:
    assert not answer("td,edf->tef", then)


def test_the_axis_may_be_first() -> None:
    assert answer("td,edf->etf", lambda g, h: g.op(aten.bmm, g.op(aten.gelu, h), g.weight(COUNT, HIDDEN, D)))
    gated: Build = lambda g, h: g.op(aten.mul.Tensor, *(g.op(aten.select.int, h, 0, i) for i in range(2)))  # noqa: E731
    assert not answer("td,edf->etf", lambda g, h: g.linear(gated(g, h), D))


def test_slices_that_reach_no_matrix_are_no_experts() -> None:
    assert not answer("td,edf->tef", lambda g, h: g.op(aten.softmax.int, h, -1))


def test_an_attention_between_keys_and_values_decides_nothing() -> None:
    def attention(g: SmallGraph, h: Node) -> Node:
        key, value = (g.op(aten.unsqueeze, g.op(aten.select.int, h, 1, i), 0) for i in range(2))
        return g.linear(g.op(aten.scaled_dot_product_attention, key, key, value), D)

    assert not answer("td,edf->tef", attention)
