"""Which axes are tokens: an input graph, and the first node of it that is not token-wise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import SmallGraph, aten, inside
from torch import Tensor, fx

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.passes.regions.token_axes import mixes_tokens

BATCH, TOKENS, FEATURES = 2, 3, 20


def answer(build: Callable[[SmallGraph, CanonicalNode], fx.Node]) -> Rejection | None:
    """The answer for what `build` computes from the output of a linear, [BATCH, TOKENS, FEATURES]."""
    graph = SmallGraph()
    x = graph.input(BATCH, TOKENS, 6)
    end = build(graph, graph.linear(x, FEATURES))
    flow = graph.flow(end)
    return mixes_tokens(flow, inside(flow, x, end))


def square(g: SmallGraph, h: CanonicalNode) -> CanonicalNode:
    """As many features as tokens."""
    return g.op(aten.slice.Tensor, h, 2, 0, TOKENS)


TOKEN_WISE: dict[str, Callable[[SmallGraph, CanonicalNode], fx.Node]] = {
    "elementwise": lambda g, h: g.op(aten.gelu, h),
    "elementwise of two": lambda g, h: g.op(aten.mul.Tensor, h, g.op(aten.sigmoid, h)),
    "another linear": lambda g, h: g.linear(g.op(aten.relu, h), 6),
    "tokens flattened": lambda g, h: g.op(aten.view, h, [BATCH * TOKENS, FEATURES]),
    "features split": lambda g, h: g.op(aten.view, h, [BATCH, TOKENS, 4, 5]),
    "features first": lambda g, h: g.op(aten.permute, h, [2, 0, 1]),
    "norm over features": lambda g, h: g.op(aten.layer_norm, h, [FEATURES]),
    "softmax over features": lambda g, h: g.op(aten.softmax.int, h, -1),
    "sum over features": lambda g, h: g.op(aten.sum.dim_IntList, h, [2]),
    "features cut": lambda g, h: g.op(aten.slice.Tensor, h, 2, 0, 10),
    "features joined": lambda g, h: g.op(aten.cat, [h, g.op(aten.relu, h)], 2),
    "features flipped": lambda g, h: g.op(aten.flip, h, [-1]),
    "features padded": lambda g, h: g.op(aten.constant_pad_nd, h, [1, 1]),
    "a vector for all tokens": lambda g, h: g.op(aten.add.Tensor, h, g.weight(FEATURES)),
    "largest features": lambda g, h: g.op(aten.topk, h, 2),
    "a fixed batch norm": lambda g, h: g.op(
        aten.batch_norm,
        *(g.op(aten.permute, h, [0, 2, 1]), None, None, g.weight(FEATURES), g.weight(FEATURES)),
        *(False, 0.1, 1e-5, False),
    ),
}
MIXING: dict[str, tuple[Callable[[SmallGraph, CanonicalNode], fx.Node], str]] = {
    "an axis of length 1 that is made of tokens": (  # the batch, in a model traced with a batch of one
        lambda g, h: g.op(aten.sum.dim_IntList, g.op(aten.reshape, h, [1, BATCH * TOKENS, FEATURES]), [0]),
        "works across tokens",
    ),
    "tokens in another order": (lambda g, h: g.op(aten.permute, h, [1, 0, 2]), "`permute` changes the order of the tokens"),
    "tokens with features": (lambda g, h: g.op(aten.view, h, [BATCH, TOKENS * FEATURES]), "`view` merges tokens with features"),
    "softmax over tokens": (lambda g, h: g.op(aten.softmax.int, h, 1), "`softmax` works across tokens"),
    "sum over everything": (lambda g, h: g.op(aten.sum, h), "`sum` works across tokens"),
    "running sum": (lambda g, h: g.op(aten.cumsum, h, 1), "`cumsum` works across tokens"),
    "norm over two axes": (lambda g, h: g.op(aten.layer_norm, h, [TOKENS, FEATURES]), "`layer_norm` works across tokens"),
    "a token cut out": (lambda g, h: g.op(aten.select.int, h, 1, 0), "`select` cuts or joins along the token axis"),
    "tokens joined": (lambda g, h: g.op(aten.cat, [h, h], 1), "`cat` cuts or joins along the token axis"),
    "tokens flipped": (lambda g, h: g.op(aten.flip, h, [1]), "`flip` reorders, picks or pads the tokens"),
    "tokens rolled": (lambda g, h: g.op(aten.roll, h, [1], [1]), "`roll` reorders, picks or pads the tokens"),
    "tokens padded": (lambda g, h: g.op(aten.constant_pad_nd, h, [0, 0, 1, 0]), "`constant_pad_nd` reorders, picks or pads"),
    "tokens plus features": (
        lambda g, h: g.op(aten.add.Tensor, square(g, h), g.op(aten.permute, square(g, h), [0, 2, 1])),
        "`add` combines a token axis with a feature axis",
    ),
    "a matrix over tokens": (
        lambda g, h: g.linear(g.op(aten.permute, h, [0, 2, 1]), TOKENS),
        "`linear` multiplies along the token axis",
    ),
    "an unknown op": (
        lambda g, h: g.op(aten.bmm, h, g.op(aten.permute, h, [0, 2, 1])),
        "`bmm` is not known to work token by token",
    ),
}


@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise(name: str) -> None:
    assert answer(TOKEN_WISE[name]) is None


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name: str) -> None:
    build, reason = MIXING[name]
    rejection = answer(build)
    assert rejection is not None
    assert (rejection.rule, rejection.near_miss) == ("token by token", True)
    assert reason in rejection.reason


def test_the_first_node_that_mixes_is_reported() -> None:
    rejection = answer(lambda g, h: g.op(aten.cumsum, g.op(aten.softmax.int, g.op(aten.relu, h), 1), 1))
    assert rejection is not None
    assert rejection.node.name == "softmax_int"


# ----------------------------------------------------------------- views and permutations, against the tokens' own numbers


def numbered() -> Tensor:
    """The number of its token at each element of [BATCH, TOKENS, FEATURES]."""
    return torch.arange(BATCH * TOKENS).view(BATCH, TOKENS, 1).expand(-1, -1, FEATURES)


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """A few layout ops, each of which fits the shape that those before it lead to."""
    shape, steps = [BATCH, TOKENS, FEATURES], []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            steps.append(("permute", order))
            shape = [shape[axis] for axis in order]
        else:
            size = draw(st.sampled_from(sorted({d for d in range(1, 13) if math.prod(shape) % d == 0})))
            rest = math.prod(shape) // size
            other = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
            shape = draw(st.permutations([size, other, rest // other]))
            steps.append(("reshape", list(shape)))
    return steps


@settings(max_examples=300, deadline=None)
@given(steps=layouts(), data=st.data())
def test_what_is_accepted_keeps_tokens_separate(steps: list[tuple[str, Any]], data: st.DataObject) -> None:
    """A reduction is accepted only over elements of one token, and the tokens that remain are in their order."""
    graph = SmallGraph()
    x = graph.input(BATCH, TOKENS, 6)
    end, tokens = graph.linear(x, FEATURES), numbered()
    for name, argument in steps:
        end, tokens = graph.op(getattr(aten, name), end, argument), getattr(tokens, name)(argument)
    axis = data.draw(st.integers(0, tokens.ndim - 1))
    end = graph.op(aten.sum.dim_IntList, end, [axis])
    flow = graph.flow(end)
    rejection = mixes_tokens(flow, inside(flow, x, end))
    separate = bool((tokens.amax(axis) == tokens.amin(axis)).all())
    if rejection is None:
        assert separate
        left = tokens.amax(axis)
        for other in reversed(range(left.ndim)):  # drop the axes of features
            if (left.amax(other) == left.amin(other)).all():
                left = left.amax(other)
        assert left.flatten().tolist() == list(range(BATCH * TOKENS))
    elif rejection.node is end and tokens.shape[axis] > 1:  # what an axis of length 1 is made of is in MIXING
        assert not separate
