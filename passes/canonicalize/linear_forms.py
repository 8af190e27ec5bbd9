"""The ways to write a product with a weight, one function each: its node becomes `linear(x, weight, bias)`, or stays.

A product over another axis than the last becomes moves around a `linear`; moves that a rewrite makes are marked `relay`: they
re-lay one value. Weights are laid out, joined and multiplied by nodes computed from weights alone, never by the model's input.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from memrewrite.passes.canonicalize.products import conv, einsum, inner, matmul, plus_product, tensordot
from memrewrite.passes.canonicalize.sums import add, beside, low_rank
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.ops import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, op_name

Rule = Callable[[fx.Graph, Dataflow, fx.Node], bool]


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


# ------------------------------------------------------------------------------------------- products with a matrix


# -------------------------------------------------------------------------------------------------------- convolutions


# ------------------------------------------------------------------------------------------- linears written in parts


SPELLINGS: dict[str, Rule] = {
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
    "cat": beside,
}
