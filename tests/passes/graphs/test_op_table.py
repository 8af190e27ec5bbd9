"""The table of ATen ops: every name exists, has one row, and every kind of layout op has a rule for token axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memrewrite.passes.graphs import ops
from memrewrite.passes.graphs.ops import ALONG_KINDS, BY_NAME, LAYOUT_KINDS, OPS, REORDER_KINDS, Kind, is_pointwise
from memrewrite.passes.regions.token_axes import RULES

aten = torch.ops.aten
PYTHON = {"getitem"}  # Python functions that exported graphs call


def node_of(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of `target` with a placeholder as first argument."""
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args), kwargs)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_op_exists(name: str) -> None:
    assert name in PYTHON or hasattr(aten, name)


def test_every_op_has_one_row() -> None:
    names = [name for op in OPS for name in op.names.split()]
    assert len(names) == len(set(names))


def test_every_kind_has_a_row_and_token_rules_are_complete() -> None:
    assert {op.kind for op in OPS} == set(Kind)
    assert set(RULES) == {*LAYOUT_KINDS, *REORDER_KINDS, *ALONG_KINDS}


def test_elementwise_rows_are_tagged_by_torch_or_listed() -> None:
    tagged = {
        name: any(torch.Tag.pointwise in getattr(getattr(aten, name), o).tags for o in getattr(aten, name).overloads())
        for name, op in BY_NAME.items()
        if op.kind is Kind.TAGGED
    }
    assert all(tagged.values()), tagged
    assert {"where", "zeros_like", "rsub"} <= ops.ELEMENTWISE
    assert "new_zeros" not in ops.ELEMENTWISE


@pytest.mark.parametrize(
    "call",
    [
        lambda x: aten.floor_divide.default(x, 2),
        lambda x: aten.masked_fill.Tensor(x, x < 0, torch.zeros(())),
        lambda x: aten.polar.default(x.abs(), x),
        lambda x: aten.where.self(x < 0, x, x * 2),
    ],
    ids=["floor_divide", "masked_fill", "polar", "where"],
)
def test_ops_that_are_listed_as_elementwise_are(call: Any) -> None:
    """A change of one element changes that element of the result alone."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    x[1, 2], changed[1, 2] = -1.3, 3.7
    assert (call(x) != call(changed)).nonzero().tolist() == [[1, 2]]
    traced = make_fx(call)(x).graph
    assert all(is_pointwise(node) for node in traced.nodes if node.op == "call_function" and node.all_input_nodes)


def test_facts_fit_the_kind() -> None:
    sums = {name for name in ops.TERMS if BY_NAME[name].kind not in (Kind.MOVE, Kind.PRODUCT, Kind.GATED_SUM)}
    assert sums == ops.ELEMENTWISE_SUMS
    assert ops.PICKS <= ops.ALONG
    assert ops.REPLAYED <= ops.CHOOSES | ops.PICKS  # a maximum chooses where its place is read
    moves_none = ops.REORDERS - ops.MOVES
    assert moves_none == {"flip", "roll"}


@pytest.mark.parametrize(
    ("target", "args", "axes"),
    [
        (aten.softmax.int, (-1,), [2]),
        (aten.amax.default, ([0, -1],), [0, 2]),
        (aten.sum.default, (), [0, 1, 2]),
        (aten.topk.default, (2,), [2]),
        (aten.topk.default, (2, 0), [0]),
        (aten.split.Tensor, (1,), [0]),
        (aten.hsplit.int, (2,), [1]),
        (aten.roll.default, ([1],), [0, 1, 2]),
        (aten.roll.default, ([1], [1]), [1]),
    ],
)
def test_axes_come_from_the_argument_or_the_row(target: Any, args: tuple[Any, ...], axes: list[int]) -> None:
    assert ops.axes_of(node_of(target, *args), 3) == axes


def test_an_axis_given_by_name_counts() -> None:
    assert ops.axes_of(node_of(aten.sort.stable, stable=True, dim=0), 3) == [0]
