"""Linears that are written in parts: biases, slices, low-rank factors and concatenations become one `linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.canonicalize.linear_builder import LinearBuilder, Step, aten, operands_of
from memrewrite.passes.graphs.ops import SPLITS, op_name
from memrewrite.passes.graphs.shapes import is_tensor, shape_of, sizes_of

MAX_TERMS = 64  # of one sum


def _vector(build: LinearBuilder, bias: fx.Node, axis: int, width: int) -> fx.Node | None:
    """A bias along one (negative) axis as a vector [width]; None if it varies along another."""
    if not build.is_weight(bias) or not is_tensor(bias):
        return None
    vector, value = bias, bias.meta["val"]
    at = value.ndim + axis
    if at < 0 or value.shape[at] != width:
        return None
    for other in reversed(range(value.ndim)):
        if other != at and value.shape[other] != 1 and value.stride()[other] != 0:
            return None
        if other != at:
            vector = build.relaid(vector, aten.select.int, other, 0)
    return vector


def add(build: LinearBuilder) -> bool:
    """A linear and its bias; linears of all slices of one value; two linears of one value."""
    node = build.at
    if node.kwargs or len(node.args) != 2:
        return False
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    return (
        _with_bias(build, first, second)
        or _with_bias(build, second, first)
        or _from_slices(build)
        or _same_input(build, first, second)
    )


def _with_bias(build: LinearBuilder, result: fx.Node, bias: fx.Node) -> bool:
    """`linear(x, W) + bias`, with layout ops between; the bias varies along the features alone."""
    moves, inner = list[fx.Node](), result
    while inner.meta.get("relay") and len(inner.users) == 1 and op_name(inner) != "unflatten":
        moves.append(inner)
        inner = inner.all_input_nodes[0]
    if not build.is_weight(bias) or not build.is_own_linear(inner) or operands_of(inner)[2] is not None:
        return False
    if shape_of(build.at) != shape_of(result):
        return False
    steps = [(move.target, *move.args[1:]) for move in reversed(moves)]
    sizes = shape_of(inner)
    vector = _vector(build, bias, _features_axis(steps, len(sizes)) - len(sizes), sizes[-1])
    if vector is None:
        return False
    x, weight, _ = operands_of(inner)
    build.write(x, weight, vector, (), steps)
    build.erase_unused(result)
    return True


def _features_axis(steps: Sequence[Step], rank: int) -> int:
    """Where layout ops put the last axis: tried on a tensor whose last size is unique."""
    probe = torch.empty([2] * (rank - 1) + [3], device="meta")
    for op, *args in steps:
        probe = op(probe, *args)
    return list(probe.shape).index(3)


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a chain of sums; a sum that other nodes read too is one term."""
    found, pending = list[fx.Node](), [node]
    while pending and len(found) < MAX_TERMS:
        at = pending.pop()
        if at is node or (op_name(at) == "add" and len(at.users) == 1 and not at.kwargs):
            pending.extend(arg for arg in reversed(at.args) if isinstance(arg, fx.Node))
        else:
            found.append(at)
    return found


def _from_slices(build: LinearBuilder) -> bool:
    """A product written as the sum of products of slices, each with its columns of the weight."""
    node = build.at
    terms = [term for term in _terms(node) if not _is_zeros(term, node)]
    if len(terms) < 2 or not all(build.is_own_linear(term) and operands_of(term)[2] is None for term in terms):
        return False
    cuts = [cut_of(operands_of(term)[0]) for term in terms]
    order = sorted(range(len(terms)), key=lambda i: cuts[i][1:])
    whole, ends = cuts[0][0], [0, *(cuts[i][2] for i in order)]
    if any(cut[0] is not whole for cut in cuts) or any(cuts[i][1] != end for i, end in zip(order, ends, strict=False)):
        return False
    if whole is None or ends[-1] != shape_of(whole)[-1]:
        return False
    weights = [operands_of(terms[i])[1] for i in order]
    joined = build.derived(aten.cat.default, (weights, 1), (shape_of(node)[-1], ends[-1]))
    inputs = list(node.all_input_nodes)
    build.become(whole, joined, None)
    build.erase_unused(*inputs)
    return True


def _is_zeros(term: fx.Node, total: fx.Node) -> bool:
    name = op_name(term)
    filled = name in ("full", "full_like", "new_full") and term.args[-1] == 0
    return (filled or name in ("zeros", "zeros_like", "new_zeros")) and shape_of(term) == shape_of(total)


def cut_of(value: Any) -> tuple[fx.Node | None, int, int]:
    """For a slice of a value's features: the value, and the start and end of the slice; (None, 0, 0) for other nodes."""
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


def take_part(build: LinearBuilder) -> None:
    """Rewrite a slice of a linear's features as the linear with these rows of the weight."""
    product, start, end = cut_of(build.at)
    if product is not None:
        x, weight, bias = operands_of(product)
        rows, shift = (
            part if part is None else build.relaid(part, aten.slice.Tensor, 0, start, end) for part in (weight, bias)
        )
        build.become(x, rows, shift)


def _same_input(build: LinearBuilder, first: fx.Node, second: fx.Node) -> bool:
    """The sum of two linears of one value, such as a matrix and a low-rank change of it; either may be scaled by a number."""
    (one, scale), (other, factor) = _scaled(build, first), _scaled(build, second)
    if one is None or other is None or one is other or shape_of(one) != shape_of(other):
        return False
    (x, weight, bias), (y, change, shift) = operands_of(one), operands_of(other)
    if x is not y:
        return False
    total = build.derived(weighted_sum, (weight, scale, change, factor), weight.meta["val"].shape)
    if bias is not None or shift is not None:
        bias = build.derived(weighted_sum, (bias, scale, shift, factor), weight.meta["val"].shape[:1])
    build.become(x, total, bias)
    build.erase_unused(first, second)
    return True


def _scaled(build: LinearBuilder, value: fx.Node) -> tuple[fx.Node | None, Any]:
    """A linear that only one node reads, and the number it is multiplied by."""
    scale: Any = 1
    if op_name(value) == "mul" and len(value.users) == 1:
        inner, scale = value.args if not isinstance(value.args[1], fx.Node) else sorted(value.args, key=build.is_weight)
        number = not isinstance(scale, fx.Node) or (build.is_weight(scale) and math.prod(shape_of(scale)) == 1)
        if not isinstance(inner, fx.Node) or not number:
            return None, scale
        value = inner
    return (value if build.is_own_linear(value) else None), scale


def weighted_sum(a: Tensor | None, scale: Any, b: Tensor | None, factor: Any) -> Tensor:
    """`a * scale + b * factor`; None counts as zero."""
    terms = [tensor * by for tensor, by in ((a, scale), (b, factor)) if tensor is not None]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def low_rank(build: LinearBuilder) -> bool:
    """`linear(linear(x, A), B)` with few features between: one matrix, stored as two with fewer elements."""
    inner, outer, bias = operands_of(build.at)
    if not build.flow.is_linear(build.at) or not build.is_own_linear(inner):
        return False
    x, first, shift = operands_of(inner)
    (out, rank), width = shape_of(outer), shape_of(first)[-1]
    if rank * (out + width) >= out * width:  # two matrices for another reason: a projection and a head after it
        return False
    weight = build.derived(aten.matmul.default, (outer, first), (out, width))
    if shift is not None:
        moved = build.derived(aten.mv.default, (outer, shift), (out,))
        bias = moved if bias is None else build.derived(aten.add.Tensor, (moved, bias), (out,))
    build.become(x, weight, bias)
    build.erase_unused(inner)
    return True


def concatenation(build: LinearBuilder) -> bool:
    """Concatenated outputs of linears of one value: a linear with the rows of all."""
    node = build.at
    parts, dim = (*node.args, 0)[:2]
    if not isinstance(parts, (list, tuple)) or dim not in (-1, len(shape_of(node)) - 1):
        return False
    if len(parts) < 2 or not all(build.is_own_linear(part) for part in parts):
        return False
    xs, weights, biases = zip(*(operands_of(part) for part in parts), strict=True)
    if any(x is not xs[0] for x in xs) or (None in biases and any(b is not None for b in biases)):
        return False
    width = shape_of(node)[-1]
    weight = build.derived(aten.cat.default, (list(weights),), (width, shape_of(weights[0])[-1]))
    bias = build.derived(aten.cat.default, (list(biases),), (width,)) if biases[0] is not None else None
    build.become(xs[0], weight, bias)
    build.erase_unused(*parts)
    return True
