"""Values of fx nodes, computed in order; sizes of symbolic dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.export import Dim

from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.shapes import SAMPLE, UNBACKED, sizes_of

aten = torch.ops.aten


def graph_of(*calls: Any) -> tuple[fx.Node, list[fx.Node]]:
    """A placeholder and a chain of calls, each of the value before it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes: list[fx.Node] = []
    for target, *args in calls:
        nodes.append(graph.call_function(target, (nodes[-1] if nodes else x, *args)))
    return x, nodes


def test_nodes_are_computed_from_what_is_known() -> None:
    x, (double, last) = graph_of((aten.mul.Tensor, 2), (aten.sum.default,))
    values = evaluate([double, last], {x: torch.ones(3)})
    assert values[last] == 6
    assert evaluate([double, last], {double: torch.ones(4)})[last] == 4  # a known node is not computed


def test_unknown_inputs_come_from_the_source() -> None:
    _, nodes = graph_of((aten.neg.default,))
    assert evaluate(nodes, {}, source=lambda _: torch.ones(()))[nodes[0]] == -1
    with pytest.raises(KeyError):
        evaluate(nodes, {})


def test_a_view_may_copy() -> None:
    x, (view,) = graph_of((aten.view.default, [6]))
    assert evaluate([view], {x: torch.arange(6).view(2, 3).t()})[view].tolist() == [0, 3, 1, 4, 2, 5]


def test_in_place_ops_do_not_change_read_only_values() -> None:
    x, nodes = graph_of((aten.add_.Tensor, 1))
    given = torch.zeros(2)
    assert evaluate(nodes, {x: given}, read_only={x})[nodes[0]].tolist() == [1, 1]
    assert given.tolist() == [0, 0]
    evaluate(nodes, {x: given})
    assert given.tolist() == [1, 1]


def test_a_result_may_be_replaced() -> None:
    x, (first, second) = graph_of((aten.neg.default,), (aten.neg.default,))
    values = evaluate([first, second], {x: torch.ones(())}, result=lambda node, v, _: v * 10 if node is first else v)
    assert values[second] == 10


class Picked(torch.nn.Module):
    """A size of the example, and one that depends on data."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        picked = x[x > 0]
        return x + 1, torch.cat([picked, picked])


def test_sizes_of_symbolic_dimensions() -> None:
    program = torch.export.export(Picked(), (torch.randn(5),), dynamic_shapes=({0: Dim("n", min=2)},))
    known, unknown = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert sizes_of(known) == sizes_of(known, SAMPLE) == (5,)
    assert sizes_of(unknown) == (UNBACKED,)
    assert sizes_of(unknown, SAMPLE) == (2 * SAMPLE,)
