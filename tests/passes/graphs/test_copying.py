"""Copies of graphs, whole or in part, with some nodes replaced by other values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.graphs.copying import COPY, copied


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.weight) + 1


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Scaled())


def described(graph: fx.Graph) -> list[tuple[str, str, str]]:
    return [(node.op, node.name, str(node.target)) for node in graph.nodes]


X = torch.tensor([-1.0, 2.0])


def test_a_whole_copy_has_the_same_nodes_and_shares_none() -> None:
    module = traced()
    graph, copies = copied(module.graph.nodes)
    assert described(graph) == described(module.graph)
    assert list(copies) == list(module.graph.nodes)
    assert not set(graph.nodes) & set(module.graph.nodes)
    assert torch.equal(fx.GraphModule(module, graph)(X), module(X))


def test_nodes_are_replaced_by_new_nodes_and_by_constants() -> None:
    def instead(graph: fx.Graph, node: fx.Node) -> Any:
        return graph.placeholder("w") if node.op == "placeholder" else 2.0 if node.op == "get_attr" else COPY

    module = traced()
    graph, copies = copied(module.graph.nodes, instead=instead)
    assert [node.name for node in graph.find_nodes(op="placeholder")] == ["w"]
    assert 2.0 in copies.values()
    assert torch.equal(fx.GraphModule({}, graph)(X), torch.tensor([1.0, 5.0]))


def test_a_part_is_appended_to_a_graph_and_reads_values_known_before() -> None:
    module, graph, seen = traced(), fx.Graph(), dict[fx.Node, fx.Node]()
    x, weight, *rest = module.graph.nodes
    values = {x: graph.placeholder("y"), weight: 3.0}
    same_graph, same_values = copied([weight, *rest], after=seen.__setitem__, into=graph, values=values)
    assert same_graph is graph
    assert same_values is values
    assert list(seen) == rest  # `after` receives only what was copied
    assert torch.equal(fx.GraphModule({}, graph)(X), module(X))
