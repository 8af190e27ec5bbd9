"""On which axis of an MLP's input and output the features are: the last, except for convolutions and similar ops.

A layer works on the last axis. Where the model keeps features elsewhere, hooks of the layer move them there and back. Flow: the
layout ops between that value and the one that a matrix reads or returns → applied to numbered elements → the axes that match.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from memrewrite.passes.canonicalize.canonicalize import ORIGIN
from memrewrite.passes.graphs.dataflow import Dataflow, nodes_between
from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.ops import PERMUTES, op_name
from memrewrite.passes.graphs.shapes import SAMPLE, shape_of
from memrewrite.passes.locate.binding import BoundRegion
from memrewrite.passes.regions.region import Region

LAST = -1


def feature_axis(flow: Dataflow, region: Region, bound: BoundRegion) -> int | None:
    """The axis of features of a layer's input and output; None if it is not one axis, the same for both."""
    reader = next((up.all_input_nodes[0] for up in region.ups if flow.unviewed(up.all_input_nodes[0]) is region.x), region.x)
    before, after = nodes_between(region.x, reader), _relayed(region.down)
    if not any(op_name(node) in PERMUTES for node in (*before, *after)):
        return LAST
    axes = _axes_before(before, region.x) & _axes_after(after, region.down)
    whole = shape_of(bound.x) == shape_of(region.x) and shape_of(bound.y) == (shape_of(after[-1]) if after else None)
    return axes.pop() if len(axes) == 1 and whole else None


def _relayed(down: fx.Node) -> list[fx.Node]:
    """The layout ops after `down` that represent the same recorded node."""
    after: list[fx.Node] = []
    at: fx.Node | None = down
    while at is not None:
        at = next((user for user in at.users if user.meta.get(ORIGIN) is down.meta[ORIGIN]), None)
        after += [at] if at is not None else []
    return after


def _axes_before(moves: list[fx.Node], x: fx.Node) -> set[int]:
    """The axes of `x` that the last axis may be, after the moves."""
    numbered = _numbered(x)
    moved = _moved(moves, x, numbered)
    return {axis for axis in range(numbered.ndim) if _same(numbered.movedim(axis, -1), moved)}


def _axes_after(moves: list[fx.Node], down: fx.Node) -> set[int]:
    """The axes, after the moves, that the last axis of `down` may be."""
    numbered = _numbered(down)
    moved = _moved(moves, down, numbered)
    return {axis for axis in range(moved.ndim) if _same(moved.movedim(axis, -1), numbered)}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape[-1] == other.shape[-1] and torch.equal(one.reshape(-1), other.reshape(-1))


def _numbered(node: fx.Node) -> Tensor:
    shape = shape_of(node, SAMPLE)
    return torch.arange(math.prod(shape)).reshape(shape)


def _moved(moves: list[fx.Node], start: fx.Node, value: Tensor) -> Tensor:
    moved: Tensor = evaluate(moves, {start: value})[moves[-1]] if moves else value
    return moved
