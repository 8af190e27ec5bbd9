"""Whether a weight of two matrices is a stack of two experts, or a gate and its value in one parameter: by its use.

Flow: each slice of the product with the weight gets a number → layout ops move the numbers, elementwise ops keep them → where
two numbers meet before the next product with a weight, the slices are a gate and its value; where none do, they are experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.graphs.dataflow import MAX_ACTIVATION_OPS, Dataflow
from memrewrite.passes.graphs.evaluate import evaluate, example_size
from memrewrite.passes.graphs.ops import ALONG, LAYOUT, MIXES, Kind, axes_of, is_pointwise, op_name, op_of
from memrewrite.passes.graphs.shapes import SAMPLE, is_tensor, shape_of

OTHER = -1  # the number of elements that are computed from no slice


def are_experts(flow: Dataflow, product: fx.Node, axis: int) -> bool:
    """True if the slices of `product` along `axis` reach other products with weights without meeting before.

    False if they meet first, as a gate is multiplied by its value, and if they reach no such product.
    """
    slices, reached, seen = _Slices(product, axis), False, {product}
    pending = _users(product)
    while pending and len(seen) < 2 * MAX_ACTIVATION_OPS:
        node = min(pending, key=lambda user: flow.order[user])
        pending.discard(node)
        seen.add(node)
        if op_name(node) in MIXES | {"linear"}:
            reached |= any(source in flow.constant for source in node.all_input_nodes)
        elif slices.meet_in(node):
            return False
        elif node in slices.numbers:
            pending |= _users(node) - seen
    return reached and not pending


def _users(node: fx.Node) -> set[fx.Node]:
    return {user for user in node.users if user.op == "call_function"}


class _Slices:
    """Which slice each element of a value is computed from."""

    def __init__(self, product: fx.Node, axis: int) -> None:
        shape = shape_of(product, SAMPLE)
        sizes = [size if i == axis else 1 for i, size in enumerate(shape)]
        numbers = torch.arange(shape[axis], dtype=torch.int8).reshape(sizes).expand(shape)
        self.numbers: dict[fx.Node, Any] = {product: numbers}  # of lists too, as `unbind` returns them

    def meet_in(self, node: fx.Node) -> bool:
        """True if an element of a node is computed from several slices. Else its numbers are added, if its op is known."""
        if op_name(node) in LAYOUT:
            self.numbers[node] = evaluate([node], self.numbers, source=_other)[node]
        elif is_pointwise(node):
            operands = [self.numbers[source] for source in node.all_input_nodes if source in self.numbers]
            shape = shape_of(node, SAMPLE)
            return self.combined(node, torch.stack([operand.expand(shape) for operand in operands]), [0])
        elif op_name(node) in ALONG and node.all_input_nodes[0] in self.numbers:
            numbers = self.numbers[node.all_input_nodes[0]]
            return self.combined(node, numbers, _axes(node, numbers.ndim))
        return False

    def combined(self, node: fx.Node, numbers: Tensor, axes: list[int]) -> bool:
        """As `meet_in`, for a node that combines the elements of `numbers` along `axes`."""
        high = numbers.amax(axes, keepdim=True)
        if bool(((numbers != high) & (numbers != OTHER)).any()):
            return True
        if is_tensor(node):
            shape = shape_of(node, SAMPLE)
            same = len(shape) == numbers.ndim and not is_pointwise(node)
            self.numbers[node] = (high if same else high.squeeze(axes)).expand(shape)
        return False


def _axes(node: fx.Node, rank: int) -> list[int]:
    """The axes that a norm, a softmax or a reduction works along."""
    op = op_of(node)
    if op is not None and op.kind is Kind.LAST_AXES:
        sizes: Any = node.args[1]
        return list(range(rank - len(sizes), rank))
    return axes_of(node, rank)


def _other(node: fx.Node) -> Any:
    """In place of a value that is computed from no slice: a size as it is, `OTHER` at each element of a tensor."""
    return torch.tensor(OTHER, dtype=torch.int8).expand(shape_of(node, SAMPLE)) if is_tensor(node) else example_size(node)
