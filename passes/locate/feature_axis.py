"""On which axis of an MLP's input and output the features lie: the last, but for convolutions and the like.

A layer works on the last axis. Where the model keeps features elsewhere, hooks of the layer move them there and back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from memrewrite.passes.canonicalize.canonicalize import ORIGIN
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.ops import PERMUTES, op_name
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.regions.region import Region

LAST = -1


def feature_axis(flow: Dataflow, region: Region, bound: BoundRegion) -> int | None:
    """The axis of features of the values a layer is given and gives; None when it is not one axis, and the same of both."""
    reader = next((up.all_input_nodes[0] for up in region.ups if flow.unviewed(up.all_input_nodes[0]) is region.x), region.x)
    before = _chain(reader, region.x)
    twin = next((n for n in region.down.users if n.meta.get(ORIGIN) is region.down.meta[ORIGIN]), None)
    after: list[fx.Node] = []
    while twin is not None:
        after.append(twin)
        twin = next((n for n in twin.users if n.meta.get(ORIGIN) is region.down.meta[ORIGIN]), None)
    if not any(op_name(node) in PERMUTES for node in (*before, *after)):
        return LAST
    axes = _taken(before, region.x) & _given(after, region.down)
    whole = shape_of(bound.x) == shape_of(region.x) and shape_of(bound.y) == (shape_of(after[-1]) if after else None)
    return axes.pop() if len(axes) == 1 and whole else None


def _chain(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    chain: list[fx.Node] = []
    while end is not start and end.all_input_nodes:
        chain.insert(0, end)
        end = end.all_input_nodes[0]
    return chain


def _taken(moves: list[fx.Node], x: fx.Node) -> set[int]:
    """The axes of `x` that the last axis may be, after the moves."""
    numbered = _numbered(shape_of(x))
    moved = _run(moves, numbered)
    return {axis for axis in range(numbered.ndim) if _same(numbered.movedim(axis, -1), moved)}


def _given(moves: list[fx.Node], down: fx.Node) -> set[int]:
    """The axes, after the moves, that the last axis of `down` may be."""
    numbered = _numbered(shape_of(down))
    moved = _run(moves, numbered)
    return {axis for axis in range(moved.ndim) if _same(moved.movedim(axis, -1), numbered)}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape[-1] == other.shape[-1] and torch.equal(one.reshape(-1), other.reshape(-1))


def _numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def _run(moves: list[fx.Node], value: Tensor) -> Tensor:
    for node in moves:
        target: Any = node.target
        size = {n: n.meta["val"].node.hint for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)}
        known = {n: size.get(n, value) for n in node.all_input_nodes}
        value = target(*fx.map_arg(node.args, known.__getitem__), **node.kwargs)
    return value
