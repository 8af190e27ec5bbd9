"""The ways to write a product with a weight, by op: one function each rewrites its node as `linear`, or leaves it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from memrewrite.passes.canonicalize.linear_builder import LinearBuilder
from memrewrite.passes.canonicalize.products import conv, einsum, inner, matmul, plus_product, tensordot
from memrewrite.passes.canonicalize.sums import add, concatenation, low_rank
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.ops import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, op_name

LINEAR_FORMS: dict[str, Callable[[LinearBuilder], bool]] = {
    "mm": matmul,
    "matmul": matmul,
    "bmm": matmul,
    "mv": matmul,
    "inner": inner,
    "addmm": plus_product,
    "addmv": plus_product,
    "baddbmm": plus_product,
    "einsum": einsum,
    "tensordot": tensordot,
    **dict.fromkeys(CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS, conv),
    "linear": low_rank,
    "add": add,
    "cat": concatenation,
}


def rewrite_as_linear(graph: fx.Graph, flow: Dataflow, node: fx.Node) -> bool:
    """Rewrite `node` if it has a known form, repeatedly: the result may be a part of a wider linear. True if it changed."""
    changed = False
    while node.op == "call_function" and node not in flow.constant:
        rewrite = LINEAR_FORMS.get(op_name(node))
        if rewrite is None or not rewrite(LinearBuilder(graph, flow, node)):
            break
        changed = True
    return changed
