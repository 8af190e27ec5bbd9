"""How many steps of the residual stream a region contains: an input graph, and the sum at which there are too many."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from small_graphs import SmallGraph, aten, inside

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.graphs.ops import op_name
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.passes.regions.residual_steps import spans_blocks

BATCH, TOKENS, D = 2, 3, 8
Node = CanonicalNode


def add(g: SmallGraph, *terms: Node) -> Node:
    total = terms[0]
    for term in terms[1:]:
        total = g.op(aten.add.Tensor, total, term)
    return total


def mlp(g: SmallGraph, x: Node) -> Node:
    return g.linear(g.op(aten.gelu, g.linear(x, 2 * D)), D)


def norm(g: SmallGraph, x: Node) -> Node:
    return g.op(aten.rms_norm, x, [D])


def answer(g: SmallGraph, x: Node, y: Node, *outputs: Node) -> Rejection | None:
    flow = g.flow(*outputs, y)
    nodes = inside(flow, x, y)
    return spans_blocks(flow, x, y, nodes, {node for node in nodes if op_name(node) == "linear"})


Build = Callable[[SmallGraph, Node], Node]
ONE: dict[str, Build] = {
    "an MLP": mlp,
    "a gated MLP": lambda g, x: g.linear(g.op(aten.mul.Tensor, g.op(aten.silu, g.linear(x, D)), g.linear(x, D)), D),
    "an MLP and a shared one": lambda g, x: add(g, mlp(g, x), mlp(g, x)),
    "an activation written as a sum": lambda g, x: g.linear(add(g, x, g.op(aten.tanh, x)), D),
    "a sum of the input inside": lambda g, x: g.linear(g.op(aten.gelu, add(g, x, g.linear(x, D))), D),
    "experts that add their input": lambda g, x: add(g, add(g, x, mlp(g, x)), add(g, x, mlp(g, x))),
    "experts added to the input one by one": lambda g, x: add(g, x, mlp(g, x), mlp(g, x), mlp(g, x)),
    "steps of another stream": lambda g, x: two_steps(g, g.linear(x, D)),
}


def two_steps(g: SmallGraph, h: Node) -> Node:
    """Two blocks with a norm before each MLP."""
    h = add(g, h, mlp(g, norm(g, h)))
    return add(g, h, mlp(g, norm(g, h)))


def two_steps_norm_after(g: SmallGraph, h: Node) -> Node:
    h = norm(g, add(g, h, mlp(g, h)))
    return norm(g, add(g, h, mlp(g, h)))


def two_steps_scaled(g: SmallGraph, h: Node) -> Node:
    h = add(g, g.op(aten.mul.Tensor, h, 0.5), mlp(g, h))
    return add(g, g.op(aten.view, h, [BATCH, TOKENS, D]), mlp(g, h))


def attention_and_mlp(g: SmallGraph, h: Node) -> Node:
    q = g.linear(norm(g, h), D)
    h = add(g, h, g.linear(g.op(aten.scaled_dot_product_attention, q, q, q), D))
    return add(g, h, mlp(g, norm(g, h)))


TWO: tuple[Build, ...] = (two_steps, two_steps_norm_after, two_steps_scaled, attention_and_mlp)


@pytest.mark.parametrize("name", ONE)
def test_one_step(name: str) -> None:
    g = SmallGraph()
    x = g.input(BATCH, TOKENS, D)
    assert answer(g, x, ONE[name](g, x)) is None


@pytest.mark.parametrize("build", TWO, ids=lambda build: build.__name__)
def test_two_steps(build: Build) -> None:
    g = SmallGraph()
    x = g.input(BATCH, TOKENS, D)
    rejection = answer(g, x, build(g, x))
    assert rejection is not None
    assert rejection.rule == "one block"
    assert op_name(rejection.node) == "add"


def test_a_sum_that_the_stream_goes_on_from() -> None:
    """The region ends before the second sum, which is outside, and reads the first one."""
    g = SmallGraph()
    x = g.input(BATCH, TOKENS, D)
    first = add(g, x, mlp(g, x))
    y = mlp(g, norm(g, first))
    rejection = answer(g, x, y, g.op(aten.add.Tensor, first, y))
    assert rejection is not None
    assert rejection.node is first


def spans(steps: Iterable[bool]) -> bool:
    """Whether a chain of MLPs with (True) and without (False) a sum around them is too long."""
    g = SmallGraph()
    x = h = g.input(BATCH, TOKENS, D)
    for residual in steps:
        h = add(g, h, mlp(g, h)) if residual else mlp(g, h)
    return answer(g, x, h) is not None


@pytest.mark.parametrize("steps", [(True,), (True, False), (False, True), (False, True, True), (True, False, True)])
def test_a_product_ends_the_stream(steps: tuple[bool, ...]) -> None:
    assert not spans(steps)


@pytest.mark.parametrize("steps", [(True, True), (True, True, False), (True, True, True)])
def test_two_sums_in_a_row(steps: tuple[bool, ...]) -> None:
    assert spans(steps)
