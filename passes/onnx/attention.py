"""Rewrites attention so that `torch.onnx` translates it, with the results of torch.

`torch.onnx` differs from torch in three ways:
1. It has no translation for attention without an axis of heads. Such attention is decomposed into products and a softmax.
2. It traces the graph twice, and attention returns other strides the second time, so that a `view` that is valid in the first
   trace fails in the second. Attention's output is copied to contiguous memory, and every view becomes a reshape.
3. For a token that may attend to no token, torch returns zeros, but the translation returns a mean or NaN. A `where` sets these
   rows to zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
RANK_WITH_HEADS = 4  # axes of a query with heads: batch, head, token, width


def prepare_attention(program: ExportedProgram) -> ExportedProgram:
    """Edit `program` in place for `torch.onnx`; returns it, or a new program if attention had to be decomposed."""
    graph, without_heads, attending = program.graph, False, dict[fx.Node, fx.Node]()
    for node in list(graph.nodes):
        if node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default
        if node.target is not ATTENTION:
            continue
        without_heads |= node.args[0].meta["val"].dim() != RANK_WITH_HEADS
        users, mask = list(node.users), dict(enumerate(node.args)).get(3, node.kwargs.get("attn_mask"))
        with graph.inserting_after(node):
            out = _call(graph, torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)
        if isinstance(mask, fx.Node):
            if mask not in attending:
                with graph.inserting_after(mask):
                    attending[mask] = _attending_tokens(graph, mask)
            with graph.inserting_after(out):
                out = _call(graph, torch.ops.aten.where.ScalarOther, attending[mask], out, 0.0)
        for user in users:
            user.replace_input_with(node, out)
    return program.run_decompositions({ATTENTION: _decomposed}) if without_heads else program


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call node whose `meta["val"]` has the shape and dtype of its result."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args), **kwargs)
    return node


def _attending_tokens(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """True for tokens that may attend to at least one token, [..., tokens, 1].

    The tokens are counted: `any` becomes ReduceMax, which ONNX Runtime's symbolic shape inference does not support.
    """
    visible = mask
    if mask.meta["val"].dtype != torch.bool:
        visible = _call(graph, torch.ops.aten.gt.Scalar, mask, -math.inf)
    with graph.inserting_after(visible):
        count = _call(graph, torch.ops.aten.sum.dim_IntList, visible, [-1], True, dtype=torch.int32)
    with graph.inserting_after(count):
        return _call(graph, torch.ops.aten.gt.Scalar, count, 0)


def _decomposed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, *rest: Any, **named: Any) -> Any:
    """Attention without heads as products and a softmax; attention with heads stays one op."""
    if q.dim() == RANK_WITH_HEADS:
        return NotImplemented
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, p, *rest, **named)[0]
