"""Linears that are written in parts: biases, slices, low-rank factors and concatenations become one `linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.canonicalize.linear_builder import (
    Step,
    aten,
    become_linear,
    derived_weight,
    erase_unused,
    is_own_linear,
    operands_of,
    relaid_weight,
    write_linear,
)
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.ops import SPLITS, op_name
from memrewrite.passes.graphs.shapes import is_tensor, shape_of, sizes_of

TERMS = 64  # of one sum, at most


def _vector(graph: fx.Graph, flow: Dataflow, node: fx.Node, bias: Any, axis: int, width: int) -> fx.Node | None:
    """A bias along one axis as a vector; None when it varies along another."""
    if not isinstance(bias, fx.Node) or bias not in flow.constant or not is_tensor(bias):
        return None
    vector, value = bias, bias.meta["val"]
    at = value.ndim + axis
    if at < 0 or value.shape[at] != width:
        return None
    for other in reversed(range(value.ndim)):
        if other != at and value.shape[other] != 1 and value.stride()[other] != 0:
            return None
        if other != at:
            vector = relaid_weight(graph, flow, node, vector, aten.select.int, other, 0)
    return vector


def add(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """A linear and its bias; linears of all slices of one value; two linears of one value."""
    if node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    return (
        _with_bias(graph, flow, node, first, second)
        or _with_bias(graph, flow, node, second, first)
        or _from_slices(graph, flow, node)
        or _same_input(graph, flow, node, first, second)
    )


def _with_bias(graph: fx.Graph, flow: Dataflow, node: fx.Node, result: fx.Node, bias: fx.Node) -> bool:
    """`linear(x, W) + bias`, the bias along the features alone, wherever moves have put them."""
    moves, inner = list[fx.Node](), result
    while inner.meta.get("relay") and len(inner.users) == 1 and op_name(inner) != "unflatten":
        moves.append(inner)
        inner = inner.all_input_nodes[0]
    if bias not in flow.constant or not is_own_linear(flow, inner) or operands_of(inner)[2] is not None:
        return False
    if shape_of(node) != shape_of(result):
        return False
    steps = [(move.target, *move.args[1:]) for move in reversed(moves)]
    sizes = shape_of(inner)
    vector = _vector(graph, flow, node, bias, _features_axis(steps, len(sizes)) - len(sizes), sizes[-1])
    if vector is None:
        return False
    x, weight, _ = operands_of(inner)
    write_linear(graph, node, x, weight, vector, (), steps)
    erase_unused(graph, result)
    return True


def _features_axis(steps: Sequence[Step], rank: int) -> int:
    """Where moves put the last axis: tried on a tensor whose last size is like no other."""
    probe = torch.empty([2] * (rank - 1) + [3], device="meta")
    for op, *args in steps:
        probe = op(probe, *args)
    return list(probe.shape).index(3)


def _terms(node: fx.Node) -> list[fx.Node]:
    """What a chain of sums adds up, none of the sums read elsewhere."""
    found, pending = list[fx.Node](), [node]
    while pending and len(found) < TERMS:
        at = pending.pop()
        if at is node or (op_name(at) == "add" and len(at.users) == 1 and not at.kwargs):
            pending.extend(arg for arg in reversed(at.args) if isinstance(arg, fx.Node))
        else:
            found.append(at)
    return found


def _from_slices(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """A product written as the sum of products of slices, each with its columns of the weight."""
    terms = [term for term in _terms(node) if not _is_zeros(term, node)]
    if len(terms) < 2 or not all(is_own_linear(flow, term) and operands_of(term)[2] is None for term in terms):
        return False
    cuts = [cut_of(operands_of(term)[0]) for term in terms]
    order = sorted(range(len(terms)), key=lambda i: cuts[i][1:])
    whole, ends = cuts[0][0], [0, *(cuts[i][2] for i in order)]
    if any(cut[0] is not whole for cut in cuts) or any(cuts[i][1] != end for i, end in zip(order, ends, strict=False)):
        return False
    if whole is None or ends[-1] != shape_of(whole)[-1]:
        return False
    weights = [operands_of(terms[i])[1] for i in order]
    joined = derived_weight(graph, flow, node, aten.cat.default, (weights, 1), (shape_of(node)[-1], ends[-1]))
    given = list(node.all_input_nodes)
    become_linear(node, whole, joined, None)
    erase_unused(graph, *given)
    return True


def _is_zeros(term: fx.Node, total: fx.Node) -> bool:
    name = op_name(term)
    filled = name in ("full", "full_like", "new_full") and term.args[-1] == 0
    return (filled or name in ("zeros", "zeros_like", "new_zeros")) and shape_of(term) == shape_of(total)


def cut_of(value: Any) -> tuple[fx.Node | None, int, int]:
    """What a slice of the features is taken of, and from where to where; (None, 0, 0) for others."""
    nothing = (None, 0, 0)
    if not isinstance(value, fx.Node) or not value.all_input_nodes:
        return nothing
    source, rank = value.all_input_nodes[0], len(shape_of(value))
    if op_name(value) == "slice" and len(value.args) == 4 and value.args[1] in (rank - 1, -1):
        start, end = (min(int(at), shape_of(source)[-1]) for at in value.args[2:4])  # type: ignore[arg-type]
        return (source, start, end) if start >= 0 and end >= 0 else nothing
    if op_name(value) == "getitem" and op_name(source) in SPLITS:
        sizes, whole = [sizes_of(part) for part in source.meta["val"]], source.all_input_nodes[0]
        at: Any = value.args[1]
        start = sum(size[-1] for size in sizes[:at])
        return (whole, start, start + sizes[at][-1]) if {size[:-1] for size in sizes} == {shape_of(whole)[:-1]} else nothing
    return nothing


def take_part(graph: fx.Graph, flow: Dataflow, piece: fx.Node) -> None:
    """A piece of a linear's features becomes the product with these rows of its weight."""
    product, start, end = cut_of(piece)
    if product is not None:
        x, weight, bias = operands_of(product)
        rows, shift = (
            part if part is None else relaid_weight(graph, flow, piece, part, aten.slice.Tensor, 0, start, end)
            for part in (weight, bias)
        )
        become_linear(piece, x, rows, shift)


def _same_input(graph: fx.Graph, flow: Dataflow, node: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    """Two linears of one value, added: a matrix and a low-rank change of it, say; either may be scaled by a number."""
    (one, scale), (other, factor) = _scaled(flow, first), _scaled(flow, second)
    if one is None or other is None or one is other or shape_of(one) != shape_of(other):
        return False
    (x, weight, bias), (y, change, shift) = operands_of(one), operands_of(other)
    if x is not y:
        return False
    total = derived_weight(graph, flow, node, weighted_sum, (weight, scale, change, factor), weight.meta["val"].shape)
    if bias is not None or shift is not None:
        bias = derived_weight(graph, flow, node, weighted_sum, (bias, scale, shift, factor), weight.meta["val"].shape[:1])
    become_linear(node, x, total, bias)
    erase_unused(graph, first, second)
    return True


def _scaled(flow: Dataflow, value: fx.Node) -> tuple[fx.Node | None, Any]:
    """A linear nobody else reads, and the number it is multiplied by."""
    scale: Any = 1
    if op_name(value) == "mul" and len(value.users) == 1:
        inner, scale = (
            value.args if not isinstance(value.args[1], fx.Node) else sorted(value.args, key=flow.constant.__contains__)
        )
        number = not isinstance(scale, fx.Node) or (scale in flow.constant and math.prod(shape_of(scale)) == 1)
        if not isinstance(inner, fx.Node) or not number:
            return None, scale
        value = inner
    return (value if is_own_linear(flow, value) else None), scale


def weighted_sum(a: Tensor | None, scale: Any, b: Tensor | None, factor: Any) -> Tensor:
    """`a * scale + b * factor`; None is nothing."""
    terms = [tensor * by for tensor, by in ((a, scale), (b, factor)) if tensor is not None]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def low_rank(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`linear(linear(x, A), B)` with few features between: one matrix, kept as two that have fewer numbers."""
    inner, outer, bias = operands_of(node)
    if not flow.is_linear(node) or not is_own_linear(flow, inner):
        return False
    x, first, shift = operands_of(inner)
    (out, rank), width = shape_of(outer), shape_of(first)[-1]
    if rank * (out + width) >= out * width:  # two matrices for their own sake: a projection, and a head after it
        return False
    weight = derived_weight(graph, flow, node, aten.matmul.default, (outer, first), (out, width))
    if shift is not None:
        moved = derived_weight(graph, flow, node, aten.mv.default, (outer, shift), (out,))
        bias = moved if bias is None else derived_weight(graph, flow, node, aten.add.Tensor, (moved, bias), (out,))
    become_linear(node, x, weight, bias)
    erase_unused(graph, inner)
    return True


def beside(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """Linears of one value with their results beside each other: a product with the rows of all."""
    parts, dim = (*node.args, 0)[:2]
    if not isinstance(parts, (list, tuple)) or dim not in (-1, len(shape_of(node)) - 1):
        return False
    if len(parts) < 2 or not all(is_own_linear(flow, part) for part in parts):
        return False
    xs, weights, biases = zip(*(operands_of(part) for part in parts), strict=True)
    if any(x is not xs[0] for x in xs) or (None in biases and any(b is not None for b in biases)):
        return False
    width = shape_of(node)[-1]
    weight = derived_weight(graph, flow, node, aten.cat.default, (list(weights),), (width, shape_of(weights[0])[-1]))
    bias = derived_weight(graph, flow, node, aten.cat.default, (list(biases),), (width,)) if biases[0] is not None else None
    become_linear(node, xs[0], weight, bias)
    erase_unused(graph, *parts)
    return True
