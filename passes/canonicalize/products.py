"""Products of an activation with a weight, one function for each form: its node becomes `linear(x, weight, bias)`, or stays.

A product over another axis than the last becomes layout ops around a `linear`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.canonicalize.linear_builder import LinearBuilder, Step, aten
from memrewrite.passes.canonicalize.stacks import are_experts
from memrewrite.passes.graphs.ops import TRANSPOSED_CONVOLUTIONS, op_name
from memrewrite.passes.graphs.shapes import is_tensor, shape_of


def _matrix(build: LinearBuilder, weight: Any) -> fx.Node | None:
    """The one matrix of a weight whose leading axes only repeat it; None for a stack of several."""
    if not build.is_weight(weight) or not is_tensor(weight) or len(shape_of(weight)) < 2:
        return None
    if op_name(weight) == "repeat" and list(weight.args[1])[-2:] == [1, 1]:
        return _matrix(build, weight.args[0])
    matrix, value = weight, weight.meta["val"]
    lead = range(value.ndim - 2)
    if any(value.shape[axis] != 1 and value.stride()[axis] != 0 for axis in lead):
        return None
    for _ in lead:
        matrix = build.relaid(matrix, aten.select.int, 0, 0)
    found: fx.Node = matrix
    return found


def _product(build: LinearBuilder, left: Any, right: Any) -> bool:
    """`x @ W`, and `W @ x`: the latter over the second to last axis of `x`. The node has the product's shape."""
    node = build.at
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or build.is_weight(left) == build.is_weight(right):
        return False
    if build.is_weight(right):
        matrix = _matrix(build, right)
        if matrix is None or shape_of(left)[:-1] != shape_of(node)[:-1]:  # the product broadcasts `x` to the weight's batch
            return False
        return build.write(left, build.relaid(matrix, aten.t.default), None)
    matrix = _matrix(build, left)
    if matrix is None:
        return False
    if len(shape_of(right)) == 1:
        return build.write(right, matrix, None)
    if shape_of(right)[:-2] != shape_of(node)[:-2]:
        return False
    swap = (aten.transpose.int, -2, -1)
    return build.write(right, matrix, None, (swap,), (swap,))


def matmul(build: LinearBuilder) -> bool:
    """`matmul`, `mm`, `bmm`, `mv`: a product of two operands."""
    return _product(build, *build.at.args[:2])


def inner(build: LinearBuilder) -> bool:
    """`inner(x, W)`: over the last axes of both."""
    x, weight = build.at.args[:2]
    if not isinstance(weight, fx.Node) or not build.is_weight(weight) or build.is_weight(x) or len(shape_of(weight)) != 2:
        return False
    return build.become(x, weight, None)


def plus_product(build: LinearBuilder) -> bool:
    """`addmm(bias, x, W)`, `addmv` and `baddbmm`, if the first operand is computed from weights."""
    node = build.at
    added, left, right = node.args[:3]
    if not isinstance(added, fx.Node) or not build.is_weight(added):
        return False
    beta, alpha = (node.kwargs.get(factor, 1) for factor in ("beta", "alpha"))
    with build.graph.inserting_before(node):
        product = build.graph.call_function(aten.matmul.default, (left, right))
    product.meta = {**node.meta}
    if not _product(replace(build, at=product), left, right):
        build.graph.erase_node(product)
        return False
    if alpha != 1:
        _scale_weight(build, product, alpha)
    if beta != 1:
        added = build.relaid(added, aten.mul.Tensor, beta)
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, added), {}
    return True


def _scale_weight(build: LinearBuilder, product: fx.Node, by: Any) -> None:
    linear = build.flow.unviewed(product) if product.meta.get("relay") else product
    weight: Any = linear.args[1]
    linear.replace_input_with(weight, replace(build, at=linear).relaid(weight, aten.mul.Tensor, by))


def einsum(build: LinearBuilder) -> bool:
    """`einsum` of two operands: with a weight, or elementwise."""
    node = build.at
    equation, given = node.args[:2]
    operands = [operand for operand in given if isinstance(operand, fx.Node)] if isinstance(given, (list, tuple)) else []
    if len(operands) != 2 or str(equation).count(",") != 1:
        return False
    terms, out = _letters(str(equation), [len(shape_of(o)) for o in operands])
    (xs, x), (ws, weight) = sorted(zip(terms, operands, strict=True), key=lambda pair: build.is_weight(pair[1]))
    if xs == ws == out and len(set(xs)) == len(xs):
        node.target, node.args = aten.mul.Tensor, tuple(operands)
        return True
    return _contract(build, (x, xs), (weight, ws), out)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The indices of every operand and of the result, with letters in place of an ellipsis."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(set(left) - set(",."))
        out = ("..." if "..." in left else "") + "".join(c for c in letters if left.count(c) == 1)
    spare = [chr(0x100 + i) for i in range(max(ranks))]
    extra = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    dots = ["".join(spare[len(spare) - n :]) if n > 0 else "" for n in extra]
    full = [term.replace("...", dot) for term, dot in zip(terms, dots, strict=True)]
    return full, out.replace("...", max(dots, key=len))


def tensordot(build: LinearBuilder) -> bool:
    """`tensordot` of a value and a weight."""
    first, second, *axes = build.at.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    one = [chr(0x100 + i) for i in range(len(shape_of(first)))]
    other = [chr(0x200 + i) for i in range(len(shape_of(second)))]
    for a, b in zip(*axes, strict=True):
        other[b] = one[a]
    out = "".join(i for i in (*one, *other) if (i in one) != (i in other))
    pairs = sorted(((first, "".join(one)), (second, "".join(other))), key=lambda pair: build.is_weight(pair[0]))
    return _contract(build, pairs[0], pairs[1], out)


def _contract(build: LinearBuilder, x: tuple[fx.Node, str], weight: tuple[fx.Node, str], out: str) -> bool:
    """A sum over shared indices: the weight's other indices are the features of the result, wherever they are in it."""
    (value, xs), (matrix, ws) = x, weight
    shared, free = [i for i in ws if i in xs], [i for i in ws if i not in xs]
    kept = [i for i in xs if i not in shared]
    proper = len(set(xs)) == len(xs) and len(set(ws)) == len(ws) and len(out) == len(kept) + len(free)
    if build.is_weight(value) or not build.is_weight(matrix) or not proper or not free or not shared:
        return False
    sizes, others = dict(zip(ws, shape_of(matrix), strict=True)), dict(zip(xs, shape_of(value), strict=True))
    if set(out) != {*kept, *free} or any(sizes[i] != others[i] for i in shared):
        return False
    if _is_stack(build, ws, shared, out, sizes[ws[0]]):
        return False
    for op, *args in _permuted(ws, [*free, *shared]):
        matrix = build.relaid(matrix, op, *args)
    if len(ws) > 2:
        shape = [math.prod(sizes[i] for i in free), math.prod(sizes[i] for i in shared)]
        matrix = build.relaid(matrix, aten.reshape.default, shape)
    before, after = _permuted(xs, [*kept, *shared]), _permuted("".join([*kept, *free]), list(out))
    if len(shared) > 1:
        before = [*before, (aten.flatten.using_ints, len(kept), -1)]
    if len(free) > 1:
        after = [(aten.unflatten.int, -1, [sizes[i] for i in free]), *after]
    return build.write(value, matrix, None, before, after)


def _is_stack(build: LinearBuilder, ws: str, shared: list[str], out: str, size: int) -> bool:
    """True if a weight, of indices `ws`, is a stack of `size` matrices, one for each expert.

    Two matrices may be a gate and its value, in gated MLPs with both in one parameter (test row "two in one parameter").
    """
    if len(ws) <= len(shared) + 1 or ws[: len(shared)] == "".join(shared):
        return False
    return size != 2 or (ws[0] in out and are_experts(build.flow, build.at, out.index(ws[0])))


def _permuted(given: str, wanted: list[str]) -> list[Step]:
    order = [given.index(i) for i in wanted]
    return [(aten.permute.default, order)] if order != sorted(order) else []


def conv(build: LinearBuilder) -> bool:
    """A convolution with a kernel of one, stride one and no padding: a linear over the channel axis."""
    node = build.at
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not build.is_weight(weight):
        return False
    stride, padding, groups = _conv_settings(node)
    if any(k != 1 for k in shape_of(weight)[2:]) or any(s != 1 for s in stride) or any(p != 0 for p in padding):
        return False
    if len(shape_of(x)) != len(shape_of(weight)):  # no batch axis
        return False
    per_group, transposed = shape_of(weight)[1], _is_transposed(node)
    if groups != 1 and (per_group == 1 or transposed):  # a scale of every channel
        return False
    weight = build.relaid(weight, aten.flatten.using_ints, 1)
    if transposed:
        weight = build.relaid(weight, aten.t.default)
    if groups != 1:
        weight = build.relaid(weight, block_diagonal, groups)
    return build.write(x, weight, bias, [(aten.movedim.int, 1, -1)], [(aten.movedim.int, -1, 1)])


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """The matrix of a grouped product: every group of outputs reads only its group of inputs."""
    return torch.block_diag(*weight.chunk(groups))  # type: ignore[no-untyped-call, no-any-return]


def _is_transposed(node: fx.Node) -> bool:
    return op_name(node) in TRANSPOSED_CONVOLUTIONS or (op_name(node) == "convolution" and bool(node.args[6]))


def _conv_settings(node: fx.Node) -> tuple[Any, Any, Any]:
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if op_name(node) == "convolution":
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    elif op_name(node) in TRANSPOSED_CONVOLUTIONS:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, node.args[3:], strict=False)) | node.kwargs
    defaults: dict[str, Any] = {"stride": (1,), "padding": (0,), "groups": 1}
    stride, padding, groups = ({**defaults, **given}[key] for key in defaults)
    unpadded = (0,) if padding in ("valid", "same") else padding  # with a kernel of one both mean none
    return _tuple(stride), _tuple(unpadded), groups


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
