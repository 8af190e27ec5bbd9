"""Whether a region works token by token: follows through its ops which axes are tokens and which are features.

Flow: all axes of a linear's output except the last are tokens → each op keeps, regroups or moves the axes, or mixes tokens →
the first op that mixes them, or is not known, is a `Rejection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode, inputs_of
from memrewrite.passes.graphs.ops import REORDERS, Kind, axes_of, fixed_batch_norm, is_pointwise, op_name, op_of
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.regions.rejection import Rejection

Axes = tuple[bool, ...]  # one entry for each axis: True for a token axis


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


def _through(node: fx.Node, before: list[Axes], inputs: Sequence[fx.Node]) -> Axes:
    name = op_name(node)
    if is_pointwise(node):
        return _broadcast(node, before, inputs)
    if name in REORDERS and len(set(before)) > 1:
        raise _Mixed("combines token axes with feature axes")
    op = op_of(node)
    if op is not None and op.kind in RULES and (len(before) == 1 or not op.shared_index):
        return RULES[op.kind](node, before[0], shape_of(inputs[0]))
    if fixed_batch_norm(node) and not before[0][1]:  # its channels are the second axis
        return before[0]
    raise _Mixed("is not known to work token by token")


def _broadcast(node: fx.Node, before: list[Axes], inputs: Sequence[fx.Node]) -> Axes:
    out = [False] * len(shape_of(node))
    for axes, source in zip(before, inputs, strict=True):
        shape = shape_of(source)
        for back in range(1, len(axes) + 1):
            out[-back] = out[-back] or (axes[-back] and shape[-back] != 1)
    for axes, source in zip(before, inputs, strict=True):
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


def _permute(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """permute, transpose, t and others: the tokens keep their order. Found by the op itself, on axes of distinct sizes."""
    target: Any = node.target
    probe = target(torch.empty(list(range(len(shape))), device="meta"), *node.args[1:], **node.kwargs)
    order = [int(axis) for axis in probe.shape]
    tokens = [a for a in order if axes[a] and shape[a] != 1]
    if tokens != sorted(tokens):
        raise _Mixed("changes the order of the tokens")
    return tuple(axes[a] for a in order)


def _expand(node: fx.Node, axes: Axes, _: tuple[Any, ...]) -> Axes:
    return (False,) * (len(shape_of(node)) - len(axes)) + axes


def _join(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """cat, split, chunk and others: along a feature axis."""
    if any(axes[axis] for axis in axes_of(node, len(shape))):
        raise _Mixed("cuts or joins along the token axis")
    return axes


def _slice(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """A slice of a feature axis, or of everything."""
    return axes if shape_of(node) == shape else _join(node, axes, shape)


def _take(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """select, unbind: the axis is removed."""
    (axis,) = axes_of(node, len(shape))
    kept = _join(node, axes, shape)
    return kept[:axis] + kept[axis + 1 :]


def _stack(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    (axis,) = axes_of(node, len(shape) + 1)
    return (*axes[:axis], False, *axes[axis:])


def _item(_: fx.Node, axes: Axes, __: tuple[Any, ...]) -> Axes:
    return axes


def _index(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    indices: Any = node.args[1]
    touched = [axis for axis, index in enumerate(indices) if index is not None]
    if len(touched) != 1 or len(shape_of(node)) != len(shape):
        raise _Mixed("picks along several axes")
    return _reordered(axes, touched)


def _pad(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    widths: Any = node.args[1]
    return _reordered(axes, [len(shape) - 1 - i // 2 for i, width in enumerate(widths) if width != 0])


def _reorder(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """gather, flip, roll and others: along feature axes."""
    return _reordered(axes, axes_of(node, len(shape)))


def _reordered(axes: Axes, touched: list[int]) -> Axes:
    if any(axes[axis] for axis in touched):
        raise _Mixed("reorders, picks or pads the tokens")
    return axes


def _last_axes(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """Norms over as many of the last axes as `normalized_shape` has sizes."""
    sizes: Any = node.args[1]
    return _reduced(node, axes, list(range(len(shape) - len(sizes), len(shape))))


def _along(node: fx.Node, axes: Axes, shape: tuple[Any, ...]) -> Axes:
    """Softmaxes and reductions: over feature axes only."""
    return _reduced(node, axes, axes_of(node, len(shape)))


def _reduced(node: fx.Node, axes: Axes, touched: list[int]) -> Axes:
    if any(axes[a] for a in touched):
        raise _Mixed("works across tokens")
    out = len(shape_of(node))
    return axes if out in (0, len(axes)) else tuple(a for i, a in enumerate(axes) if i not in touched)


RULES: dict[Kind, Callable[[fx.Node, Axes, tuple[Any, ...]], Axes]] = {
    Kind.REGROUP: _regroup,
    Kind.PERMUTE: _permute,
    Kind.EXPAND: _expand,
    Kind.SPLIT: _join,
    Kind.SLICE: _slice,
    Kind.TAKE: _take,
    Kind.JOIN: _join,
    Kind.STACK: _stack,
    Kind.ITEM: _item,
    Kind.INDEX: _index,
    Kind.REORDER: _reorder,
    Kind.PAD: _pad,
    Kind.LAST_AXES: _last_axes,
    Kind.ALONG: _along,
}
