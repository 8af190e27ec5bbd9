"""The ways to write a product with a weight, one function each: its node becomes `linear(x, weight, bias)`, or stays.

A product over another axis than the last becomes moves around a `linear`; moves that a rewrite makes are marked `relay`: they
re-lay one value. Weights are laid out, joined and multiplied by nodes computed from weights alone, never by the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.graphs.dataflow import ORIGIN, Dataflow, is_tensor, op_name, shape_of, sizes_of

aten = torch.ops.aten
Rule = Callable[[fx.Graph, Dataflow, fx.Node], bool]
Step = tuple[Any, ...]  # an op and its arguments after the first: a move of axes
TERMS = 64  # of one sum, at most


def spell(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """Rewrite `node` when it is a known spelling; a linear so made may be a spelling of a wider one."""
    changed = False
    while node.op == "call_function" and node not in flow.constant:
        rule = SPELLINGS.get(op_name(node))
        if rule is None or not rule(graph, flow, node):
            break
        changed = True
    return changed


# ------------------------------------------------------------------------------------------------------ writing a linear


def _turned(graph: fx.Graph, flow: Dataflow, node: fx.Node, weight: fx.Node, turn: Any, *args: Any) -> fx.Node:
    """A weight laid out otherwise, before `node`."""
    with graph.inserting_before(node):
        turned = graph.call_function(turn, (weight, *args))
    if "val" in weight.meta:
        turned.meta["val"] = turn(weight.meta["val"], *args)
    flow.constant.add(turned)
    return turned


def _made(graph: fx.Graph, flow: Dataflow, node: fx.Node, make: Any, args: tuple[Any, ...], shape: Sequence[Any]) -> fx.Node:
    """A weight computed from others, of a known shape: they may be of several dtypes, now that casts are gone."""
    with graph.inserting_before(node):
        made = graph.call_function(make, args)
    made.meta["val"] = node.meta["val"].new_empty(tuple(shape))
    flow.constant.add(made)
    return made


def _become_linear(node: fx.Node, x: Any, weight: Any, bias: Any) -> bool:
    node.target, node.args, node.kwargs = aten.linear.default, (x, weight, bias), {}
    return True


def _move(graph: fx.Graph, like: fx.Node, x: fx.Node, *steps: Step) -> fx.Node:
    """`x` re-laid by moves of its axes."""
    for op, *args in steps:
        value = op(x.meta["val"], *args)
        x = graph.call_function(op, (x, *args))
        x.meta = {**{key: kept for key, kept in like.meta.items() if key != ORIGIN}, "val": value, "relay": True}
    return x


def _write(
    graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, before: Sequence[Step], after: Sequence[Step]
) -> bool:
    """`node` becomes the moves `after` a linear of `x` moved as in `before`; it stands for the same recorded node as that."""
    with graph.inserting_before(node):
        inner = _move(graph, node, x, *before)
        if not after:
            return _become_linear(node, inner, weight, bias)
        result = graph.call_function(aten.linear.default, (inner, weight, bias))
        out = (*inner.meta["val"].shape[:-1], weight.meta["val"].shape[0])
        result.meta = {**node.meta, "val": node.meta["val"].new_empty(out)}
        moved = _move(graph, node, result, *after[:-1])
    (op, *args), node.kwargs = after[-1], {}
    node.target, node.args = op, (moved, *args)
    node.meta["relay"] = True
    return True


def _retire(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase what nobody reads any more, and what only it read."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and node.graph is graph and not node._erased:
            pending.extend(node.all_input_nodes)
            graph.erase_node(node)


# ------------------------------------------------------------------------------------------- products with a matrix


def _matrix(graph: fx.Graph, flow: Dataflow, node: fx.Node, weight: Any) -> fx.Node | None:
    """The one matrix of a weight whose leading axes only repeat it; None for a stack of several."""
    if not isinstance(weight, fx.Node) or weight not in flow.constant or not is_tensor(weight) or len(shape_of(weight)) < 2:
        return None
    if op_name(weight) == "repeat" and list(weight.args[1])[-2:] == [1, 1]:  # type: ignore[arg-type]
        return _matrix(graph, flow, node, weight.args[0])
    matrix, value = weight, weight.meta["val"]
    lead = range(value.ndim - 2)
    if any(value.shape[axis] != 1 and value.stride()[axis] != 0 for axis in lead):
        return None
    for _ in lead:
        matrix = _turned(graph, flow, node, matrix, aten.select.int, 0, 0)
    return matrix


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
            vector = _turned(graph, flow, node, vector, aten.select.int, other, 0)
    return vector


def _product(graph: fx.Graph, flow: Dataflow, node: fx.Node, left: Any, right: Any) -> bool:
    """`x @ W`, and `W @ x`: the latter over the second to last axis of `x`. `node` has the product's shape."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or (left in flow.constant) == (right in flow.constant):
        return False
    if right in flow.constant:
        matrix = _matrix(graph, flow, node, right)
        if matrix is None or shape_of(left)[:-1] != shape_of(node)[:-1]:  # the weight repeats what it reads
            return False
        return _write(graph, node, left, _turned(graph, flow, node, matrix, aten.t.default), None, (), ())
    matrix = _matrix(graph, flow, node, left)
    if matrix is None:
        return False
    if len(shape_of(right)) == 1:
        return _write(graph, node, right, matrix, None, (), ())
    if shape_of(right)[:-2] != shape_of(node)[:-2]:
        return False
    turn = (aten.transpose.int, -2, -1)
    return _write(graph, node, right, matrix, None, (turn,), (turn,))


def _matmul(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    return _product(graph, flow, node, *node.args[:2])


def _inner(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`inner(x, W)`: over the last axes of both."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight not in flow.constant or x in flow.constant or len(shape_of(weight)) != 2:
        return False
    return _become_linear(node, x, weight, None)


def _plus_product(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`addmm(bias, x, W)` and its kin. With another value than a bias the sum cannot be told from the product by others."""
    added, left, right = node.args[:3]
    if not isinstance(added, fx.Node) or added not in flow.constant:
        return False
    beta, alpha = (node.kwargs.get(factor, 1) for factor in ("beta", "alpha"))
    with graph.inserting_before(node):
        product = graph.call_function(aten.matmul.default, (left, right))
    product.meta = {**node.meta}
    if not _product(graph, flow, product, left, right):
        graph.erase_node(product)
        return False
    if alpha != 1:
        _scale_weight(graph, flow, product, alpha)
    if beta != 1:
        added = _turned(graph, flow, node, added, aten.mul.Tensor, beta)
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, added), {}
    return True


def _scale_weight(graph: fx.Graph, flow: Dataflow, product: fx.Node, by: Any) -> None:
    linear = flow.root(product) if product.meta.get("relay") else product
    weight = _turned(graph, flow, linear, linear.args[1], aten.mul.Tensor, by)  # type: ignore[arg-type]
    linear.replace_input_with(linear.args[1], weight)  # type: ignore[arg-type]


def _einsum(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`einsum` of two operands: with a weight, or elementwise."""
    equation, given = node.args[:2]
    operands = [operand for operand in given if isinstance(operand, fx.Node)] if isinstance(given, (list, tuple)) else []
    if len(operands) != 2 or str(equation).count(",") != 1:
        return False
    terms, out = _letters(str(equation), [len(shape_of(o)) for o in operands])
    (xs, x), (ws, weight) = sorted(zip(terms, operands, strict=True), key=lambda pair: pair[1] in flow.constant)
    if xs == ws == out and len(set(xs)) == len(xs):
        node.target, node.args = aten.mul.Tensor, tuple(operands)
        return True
    return _contract(graph, flow, node, (x, xs), (weight, ws), out)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The indices of every operand and of the result, an ellipsis written out."""
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


def _tensordot(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`tensordot` of a value and a weight."""
    first, second, *axes = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    one = [chr(0x100 + i) for i in range(len(shape_of(first)))]
    other = [chr(0x200 + i) for i in range(len(shape_of(second)))]
    for a, b in zip(*axes, strict=True):
        other[b] = one[a]
    out = "".join(i for i in (*one, *other) if (i in one) != (i in other))
    pairs = sorted(((first, "".join(one)), (second, "".join(other))), key=lambda pair: pair[0] in flow.constant)
    return _contract(graph, flow, node, pairs[0], pairs[1], out)


def _contract(graph: fx.Graph, flow: Dataflow, node: fx.Node, x: Any, weight: Any, out: str) -> bool:
    """A sum over shared indices: the weight's others are the features of the result, wherever they stand in it."""
    (value, xs), (matrix, ws) = x, weight
    shared, free = [i for i in ws if i in xs], [i for i in ws if i not in xs]
    kept = [i for i in xs if i not in shared]
    proper = len(set(xs)) == len(xs) and len(set(ws)) == len(ws) and len(out) == len(kept) + len(free)
    if value in flow.constant or matrix not in flow.constant or not proper or not free or not shared:
        return False
    sizes, others = dict(zip(ws, shape_of(matrix), strict=True)), dict(zip(xs, shape_of(value), strict=True))
    if set(out) != {*kept, *free} or any(sizes[i] != others[i] for i in shared) or _is_stack(matrix, ws, shared):
        return False
    laid = _turned_to(graph, flow, node, matrix, ws, [*free, *shared])
    if len(ws) > 2:
        shape = [math.prod(sizes[i] for i in free), math.prod(sizes[i] for i in shared)]
        laid = _turned(graph, flow, node, laid, aten.reshape.default, shape)
    before, after = _permuted(xs, [*kept, *shared]), _permuted("".join([*kept, *free]), list(out))
    if len(shared) > 1:
        before = [*before, (aten.flatten.using_ints, len(kept), -1)]
    if len(free) > 1:
        after = [(aten.unflatten.int, -1, [sizes[i] for i in free]), *after]
    return _write(graph, node, value, laid, None, before, after)


def _is_stack(matrix: fx.Node, ws: str, shared: list[str]) -> bool:
    """Whether a weight is one matrix for each of several experts; two of them are a gate and its value."""
    return len(ws) > len(shared) + 1 and ws[: len(shared)] != "".join(shared) and shape_of(matrix)[0] != 2


def _permuted(given: str, wanted: list[str]) -> list[Step]:
    order = [given.index(i) for i in wanted]
    return [(aten.permute.default, order)] if order != sorted(order) else []


def _turned_to(graph: fx.Graph, flow: Dataflow, node: fx.Node, weight: fx.Node, given: str, wanted: list[str]) -> fx.Node:
    for op, *args in _permuted(given, wanted):
        weight = _turned(graph, flow, node, weight, op, *args)
    return weight


# -------------------------------------------------------------------------------------------------------- convolutions


def _conv(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """A convolution with a kernel of one, stride one and no padding: a linear over the channel axis."""
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight not in flow.constant:
        return False
    stride, padding, groups = _conv_settings(node)
    if any(k != 1 for k in shape_of(weight)[2:]) or any(s != 1 for s in stride) or any(p != 0 for p in padding):
        return False
    if len(shape_of(x)) != len(shape_of(weight)):  # no batch axis
        return False
    each, transposed = shape_of(weight)[1], _is_transposed(node)
    if groups != 1 and (each == 1 or transposed):  # a scale of every channel
        return False
    weight = _turned(graph, flow, node, weight, aten.flatten.using_ints, 1)
    if transposed:
        weight = _turned(graph, flow, node, weight, aten.t.default)
    if groups != 1:
        weight = _turned(graph, flow, node, weight, block_diagonal, groups)
    return _write(graph, node, x, weight, bias, [(aten.movedim.int, 1, -1)], [(aten.movedim.int, -1, 1)])


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """The matrix of a grouped product: every group of outputs reads its own group of inputs."""
    return torch.block_diag(*weight.chunk(groups))  # type: ignore[no-untyped-call, no-any-return]


def _is_transposed(node: fx.Node) -> bool:
    return op_name(node).startswith("conv_transpose") or (op_name(node) == "convolution" and bool(node.args[6]))


def _conv_settings(node: fx.Node) -> tuple[Any, Any, Any]:
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if op_name(node) == "convolution":
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    elif op_name(node).startswith("conv_transpose"):
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, node.args[3:], strict=False)) | node.kwargs
    defaults: dict[str, Any] = {"stride": (1,), "padding": (0,), "groups": 1}
    stride, padding, groups = ({**defaults, **given}[key] for key in defaults)
    unpadded = (0,) if padding in ("valid", "same") else padding  # with a kernel of one both mean none
    return _tuple(stride), _tuple(unpadded), groups


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


# ------------------------------------------------------------------------------------------- linears written in parts


def _own_linear(flow: Dataflow, value: Any) -> bool:
    """A linear that only one node reads."""
    return isinstance(value, fx.Node) and flow.is_linear(value) and len(value.users) == 1


def _parts(node: fx.Node) -> tuple[Any, Any, Any]:
    x, weight, bias = (*node.args, None)[:3]
    return x, weight, bias


def _add(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
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
    if bias not in flow.constant or not _own_linear(flow, inner) or _parts(inner)[2] is not None:
        return False
    if shape_of(node) != shape_of(result):
        return False
    steps = [(move.target, *move.args[1:]) for move in reversed(moves)]
    sizes = shape_of(inner)
    vector = _vector(graph, flow, node, bias, _features_axis(steps, len(sizes)) - len(sizes), sizes[-1])
    if vector is None:
        return False
    x, weight, _ = _parts(inner)
    _write(graph, node, x, weight, vector, (), steps)
    _retire(graph, result)
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
    if len(terms) < 2 or not all(_own_linear(flow, term) and _parts(term)[2] is None for term in terms):
        return False
    cuts = [cut_of(_parts(term)[0]) for term in terms]
    order = sorted(range(len(terms)), key=lambda i: cuts[i][1:])
    whole, ends = cuts[0][0], [0, *(cuts[i][2] for i in order)]
    if any(cut[0] is not whole for cut in cuts) or any(cuts[i][1] != end for i, end in zip(order, ends, strict=False)):
        return False
    if whole is None or ends[-1] != shape_of(whole)[-1]:
        return False
    weights = [_parts(terms[i])[1] for i in order]
    joined = _made(graph, flow, node, aten.cat.default, (weights, 1), (shape_of(node)[-1], ends[-1]))
    given = list(node.all_input_nodes)
    _become_linear(node, whole, joined, None)
    _retire(graph, *given)
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
    if op_name(value) == "getitem" and op_name(source) in ("split", "split_with_sizes", "chunk", "tensor_split"):
        sizes, whole = [sizes_of(part) for part in source.meta["val"]], source.all_input_nodes[0]
        at: Any = value.args[1]
        start = sum(size[-1] for size in sizes[:at])
        return (whole, start, start + sizes[at][-1]) if {size[:-1] for size in sizes} == {shape_of(whole)[:-1]} else nothing
    return nothing


def take_part(graph: fx.Graph, flow: Dataflow, piece: fx.Node) -> None:
    """A piece of a linear's features becomes the product with these rows of its weight."""
    product, start, end = cut_of(piece)
    if product is not None:
        x, weight, bias = _parts(product)
        rows, shift = (
            part if part is None else _turned(graph, flow, piece, part, aten.slice.Tensor, 0, start, end)
            for part in (weight, bias)
        )
        _become_linear(piece, x, rows, shift)


def _same_input(graph: fx.Graph, flow: Dataflow, node: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    """Two linears of one value, added: a matrix and a low-rank change of it, say; either may be scaled by a number."""
    (one, scale), (other, factor) = _scaled(flow, first), _scaled(flow, second)
    if one is None or other is None or one is other or shape_of(one) != shape_of(other):
        return False
    (x, weight, bias), (y, change, shift) = _parts(one), _parts(other)
    if x is not y:
        return False
    total = _made(graph, flow, node, weighted_sum, (weight, scale, change, factor), weight.meta["val"].shape)
    if bias is not None or shift is not None:
        bias = _made(graph, flow, node, weighted_sum, (bias, scale, shift, factor), weight.meta["val"].shape[:1])
    _become_linear(node, x, total, bias)
    _retire(graph, first, second)
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
    return (value if _own_linear(flow, value) else None), scale


def weighted_sum(a: Tensor | None, scale: Any, b: Tensor | None, factor: Any) -> Tensor:
    """`a * scale + b * factor`; None is nothing."""
    terms = [tensor * by for tensor, by in ((a, scale), (b, factor)) if tensor is not None]
    total: Tensor = sum(terms[1:], terms[0])
    return total


def _low_rank(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """`linear(linear(x, A), B)` with few features between: one matrix, kept as two that have fewer numbers."""
    inner, outer, bias = _parts(node)
    if not flow.is_linear(node) or not _own_linear(flow, inner):
        return False
    x, first, shift = _parts(inner)
    (out, rank), width = shape_of(outer), shape_of(first)[-1]
    if rank * (out + width) >= out * width:  # two matrices for their own sake: a projection, and a head after it
        return False
    weight = _made(graph, flow, node, aten.matmul.default, (outer, first), (out, width))
    if shift is not None:
        moved = _made(graph, flow, node, aten.mv.default, (outer, shift), (out,))
        bias = moved if bias is None else _made(graph, flow, node, aten.add.Tensor, (moved, bias), (out,))
    _become_linear(node, x, weight, bias)
    _retire(graph, inner)
    return True


def _beside(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """Linears of one value with their results beside each other: a product with the rows of all."""
    parts, dim = (*node.args, 0)[:2]
    if not isinstance(parts, (list, tuple)) or dim not in (-1, len(shape_of(node)) - 1):
        return False
    if len(parts) < 2 or not all(_own_linear(flow, part) for part in parts):
        return False
    xs, weights, biases = zip(*(_parts(part) for part in parts), strict=True)
    if any(x is not xs[0] for x in xs) or (None in biases and any(b is not None for b in biases)):
        return False
    width = shape_of(node)[-1]
    weight = _made(graph, flow, node, aten.cat.default, (list(weights),), (width, shape_of(weights[0])[-1]))
    bias = _made(graph, flow, node, aten.cat.default, (list(biases),), (width,)) if biases[0] is not None else None
    _become_linear(node, xs[0], weight, bias)
    _retire(graph, *parts)
    return True


SPELLINGS: dict[str, Rule] = {
    "mm": _matmul,
    "matmul": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "inner": _inner,
    "addmm": _plus_product,
    "addmv": _plus_product,
    "baddbmm": _plus_product,
    "einsum": _einsum,
    "tensordot": _tensordot,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    "linear": _low_rank,
    "add": _add,
    "cat": _beside,
}
