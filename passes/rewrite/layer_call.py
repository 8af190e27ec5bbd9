"""Inserts calls of memory layers into fx graphs, and defines how a layer's output is added to an MLP's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from memrewrite.plans import Placement

CHILD = "memory"  # in a module tree, a layer in parallel with an MLP is a child of this name of the MLP's module


def add_output(mlp: Tensor, layer: Tensor) -> Tensor:
    """The MLP's output [..., d] plus the layer's, which has the same tokens, possibly in other axes or another dtype.

    The sum has the shape and the dtype of the MLP's output.
    """
    output = layer if layer.shape == mlp.shape else layer.reshape(mlp.shape)
    return mlp + output.to(mlp.dtype)


def insert_layer(
    graph: fx.Graph, layer: str, x: fx.Node, y: fx.Node, placement: Placement, add: Callable[..., Any] = add_output
) -> tuple[fx.Node, ...]:
    """Insert a call of the module `layer` on `x`, the input of the MLP whose output is `y`. Returns the new nodes.

    With `placement="replace"` all users of `y` read the layer's output instead; the MLP's nodes stay, unused. With
    "parallel" they read `add(y, layer's output)`. `graph` must contain `x` before `y`.
    """
    with graph.inserting_after(y):
        call = graph.call_module(layer, (x,))
    if placement == "replace":
        y.replace_all_uses_with(call)
        return (call,)
    with graph.inserting_after(call):
        total = graph.call_function(add, (y, call))
    y.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    return call, total
