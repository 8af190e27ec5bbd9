"""Whether a region works token by token: follows through its ops which axes are tokens and which are features.

Flow: all axes of a linear's output except the last are tokens → each op keeps, regroups or moves the axes, or mixes tokens →
the first op that mixes them, or is not known, is a `Rejection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode, inputs_of
from memrewrite.passes.graphs.ops import ALONG, LAYOUT, REORDERS, fixed_batch_norm, is_pointwise, op_name
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.regions.rejection import Rejection

BY_NUMBERS = ("index", "index_select")  # the numbers must be the same for every token, so they are no activation
STANDING = {"vsplit": 0, "hsplit": 1, "dsplit": 2}  # the axes these cut
Axes = tuple[bool, ...]  # one entry an axis: True where it counts tokens


class _Mixed(Exception):  # noqa: N818 - control flow inside this file
    """An op that touches the token axes."""


def mixes_tokens(flow: Dataflow, nodes: Iterable[CanonicalNode]) -> Rejection | None:
    """Reject the first of `nodes`, in graph order, that is not token-wise; None when all are."""
    axes: dict[CanonicalNode, Axes] = {}
    for node in nodes:
        inputs = [source for source in flow.activations(node) if source in axes]
        try:
            if flow.is_linear(node):
                x = inputs_of(node)[0]
                if x in axes and axes[x][-1]:
                    raise _Mixed("multiplies along the token axis")
                axes[node] = (*(axes[x][:-1] if x in axes else (True,) * (len(shape_of(node)) - 1)), False)
            elif inputs:
                axes[node] = _through(node, [axes[source] for source in inputs], inputs)
        except _Mixed as why:
            return Rejection("token by token", f"`{op_name(node)}` {why}", node)
    return None


def _through(node: fx.Node, given: list[Axes], inputs: Sequence[fx.Node]) -> Axes:
    name = op_name(node)
    if is_pointwise(node):
        return _broadcast(node, given, inputs)
    if name in REORDERS and len(set(given)) > 1:
        raise _Mixed("combines token axes with feature axes")
    if name in RULES and (len(given) == 1 or name not in BY_NUMBERS):
        return RULES[name](node, given[0], shape_of(inputs[0]))
    if name in ALONG:
        return _along(node, given[0], shape_of(inputs[0]))
    if fixed_batch_norm(node) and not given[0][1]:  # its channels are the second axis
        return given[0]
    raise _Mixed("is not known to work token by token")


def _broadcast(node: fx.Node, given: list[Axes], inputs: Sequence[fx.Node]) -> Axes:
    out = [False] * len(shape_of(node))
    for axes, source in zip(given, inputs, strict=True):
        shape = shape_of(source)
        for back in range(1, len(axes) + 1):
            out[-back] = out[-back] or (axes[-back] and shape[-back] != 1)
    for axes, source in zip(given, inputs, strict=True):
        shape = shape_of(source)
        if any(out[-back] and not axes[-back] and shape[-back] != 1 for back in range(1, len(axes) + 1)):
            raise _Mixed("combines a token axis with a feature axis")
    return tuple(out)


def _regroup(node: fx.Node, axes: Axes, before: tuple[Any, ...]) -> Axes:
    """view, reshape: axes merge and split in groups of equal size; a group must be all tokens or all features."""
    after, out = shape_of(node), []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while _size(before, left) != _size(after, right):
            if _size(before, left) < _size(after, right) and i < len(before):
                left, i = [*left, i], i + 1
            elif j < len(after):
                right, j = [*right, j], j + 1
            else:
                raise _Mixed("cannot be followed")
        kinds = {axes[a] for a in left if before[a] != 1}
        if len(kinds) > 1:
            raise _Mixed("merges tokens with features")
        out += [bool(kinds and kinds.pop())] * len(right)
    return tuple(out)


def _size(shape: tuple[Any, ...], at: list[int]) -> int:
    return math.prod(shape[a] for a in at)


def _permute(order: list[int], axes: Axes, shape: tuple[Any, ...]) -> Axes:
    tokens = [a for a in order if axes[a] and shape[a] != 1]
    if tokens != sorted(tokens):
        raise _Mixed("changes the order of the tokens")
    return tuple(axes[a] for a in order)


def _order(node: fx.Node, shape: tuple[Any, ...]) -> list[int]:
    name, n = op_name(node), len(shape)
    order = list(range(n))
    if name == "permute":
        return [int(a) % n for a in _ints(node.args[1])]
    if name in ("t", "numpy_T"):
        return order[::-1]
    if name in ("movedim", "moveaxis"):
        source, target = ([int(a) % n for a in _ints(arg)] for arg in node.args[1:3])
        rest = iter(a for a in order if a not in source)
        return [source[target.index(a)] if a in target else next(rest) for a in order]
    first, second = (-2, -1) if name == "mT" else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
    order[first % n], order[second % n] = second % n, first % n
    return order


def _ints(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _cut(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """split, chunk, slice, select, unbind, cat: along a feature axis."""
    name = op_name(node)
    at: Any = node.args[1] if len(node.args) > 1 else 0
    if name in STANDING:
        at = STANDING[name] if len(shape) > 1 else 0
    elif name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        at = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    axis = int(at) % len(shape)
    whole = name == "slice" and shape_of(node) == shape
    if axes[axis] and not whole:
        raise _Mixed("cuts or joins along the token axis")
    return axes[:axis] + axes[axis + 1 :] if name in ("select", "unbind") else axes


def _reorder(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """index, gather, flip, roll, pad and the like: along feature axes."""
    name, args = op_name(node), node.args
    if name == "index":
        touched = [axis for axis, index in enumerate(args[1]) if index is not None]  # type: ignore[arg-type]
        if len(touched) != 1 or len(shape_of(node)) != len(shape):
            raise _Mixed("picks along several axes")
    elif name in ("pad", "constant_pad_nd"):
        widths = _ints(args[1])
        touched = [len(shape) - 1 - i // 2 for i, width in enumerate(widths) if width != 0]
    else:
        at = args[2] if name == "roll" and len(args) > 2 else args[1] if name != "roll" else range(len(shape))
        touched = [int(a) % len(shape) for a in (at if isinstance(at, range) else _ints(at))]
    if any(axes[axis] for axis in touched):
        raise _Mixed("reorders, picks or pads the tokens")
    return axes


def _squeeze(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    return _regroup(node, axes, shape)


def _expand(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    return (False,) * (len(shape_of(node)) - len(axes)) + axes


def _getitem(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    return axes


def _stack(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    at: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    axis = int(at) % (len(shape) + 1)
    return (*axes[:axis], False, *axes[axis:])


def _along(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """Norms, softmaxes and reductions: over feature axes only."""
    name = op_name(node)
    if name in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"):
        touched = list(range(len(shape) - len(_ints(node.args[1])), len(shape)))
    else:
        place = 2 if name in ("norm", "linalg_vector_norm", "topk", "kthvalue", "quantile") else 1
        at: Any = node.args[place] if len(node.args) > place else None
        at = node.kwargs.get("dim", -1 if name in ("glu", "topk", "kthvalue", "sort") else None) if at is None else at
        touched = list(range(len(shape))) if at is None else [int(a) % len(shape) for a in _ints(at)]
    if any(axes[a] for a in touched):
        raise _Mixed("works across tokens")
    out = len(shape_of(node))
    return axes if out in (0, len(axes)) else tuple(a for i, a in enumerate(axes) if i not in touched)


RULES: dict[str, Callable[[fx.Node, Axes, tuple[Any, ...]], Axes]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_as", "reshape_as"), _regroup
    ),
    **dict.fromkeys(("squeeze", "unsqueeze"), _squeeze),
    **dict.fromkeys(
        ("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"),
        lambda node, axes, shape: _permute(_order(node, shape), axes, shape),
    ),
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "slice", "select", "narrow", "cat", "concat"),
        _cut,
    ),
    **dict.fromkeys(STANDING, _cut),
    **dict.fromkeys(REORDERS, _reorder),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "getitem": _getitem,
    "stack": _stack,
}
assert set(RULES) <= LAYOUT | REORDERS  # noqa: S101 - a table against a table, at import
