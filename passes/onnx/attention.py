"""Attention as `torch.onnx` can translate it, and as torch computes it.

It has no translation where there is no axis of heads: there attention is written out. It traces a graph twice, with other
strides of what attention returns, so that a view of the first is none in the second: a copy settles them, and views reshape.
And a token that may look at no other gets zeros from torch, but a mean, or NaN, from the translation: zeros are put there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
HEADED = 4  # axes of a query with heads: batch, head, token, width


def attention_spelled(program: ExportedProgram) -> ExportedProgram:
    """`program`, edited in place, or a new one where attention had to be written out."""
    graph, headless, reached = program.graph, False, dict[fx.Node, fx.Node]()
    for node in list(graph.nodes):
        if node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default
        if node.target is not ATTENTION:
            continue
        headless |= node.args[0].meta["val"].dim() != HEADED
        users, mask = list(node.users), dict(enumerate(node.args)).get(3, node.kwargs.get("attn_mask"))
        with graph.inserting_after(node):
            out = _call(graph, torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)
        if isinstance(mask, fx.Node):
            if mask not in reached:
                with graph.inserting_after(mask):
                    reached[mask] = _reached(graph, mask)
            with graph.inserting_after(out):
                out = _call(graph, torch.ops.aten.where.ScalarOther, reached[mask], out, 0.0)
        for user in users:
            user.replace_input_with(node, out)
    return program.run_decompositions({ATTENTION: _spelled}) if headless else program


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node, with the shape and type that it has."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args), **kwargs)
    return node


def _reached(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """Which tokens may look at any other, [..., tokens, 1]."""
    if mask.meta["val"].dtype == torch.bool:
        return _call(graph, torch.ops.aten.any.dim, mask, -1, True)
    seen = _call(graph, torch.ops.aten.gt.Scalar, mask, -math.inf)
    with graph.inserting_after(seen):
        return _call(graph, torch.ops.aten.any.dim, seen, -1, True)


def _spelled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, *rest: Any, **named: Any) -> Any:
    if q.dim() == HEADED:
        return NotImplemented
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, p, *rest, **named)[0]
