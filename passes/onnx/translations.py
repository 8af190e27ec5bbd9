"""How `torch.onnx` writes the operators `torch.ops.memrewrite.*`: each as one node of the domain `memrewrite`, and for
`product_keys` the product that computes the scores before it.

The exporter inlines every function that a translation calls, so a function with the operator's body would leave no node for a
native kernel. These functions call a node of the domain, and belong to another domain: after inlining, their lines remain. The
module is imported by the first export.
"""
# No postponed annotations here: onnxscript reads them as types.

from typing import Any, TypeVar, Union

import onnxscript
import torch
from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT32, INT64

from memrewrite.kernels import ops  # noqa: F401 - registers the operators
from memrewrite.kernels.onnx_functions import DOMAIN, VERSION

Number = TypeVar("Number", bound=Union[FLOAT, FLOAT16, BFLOAT16])  # noqa: UP007 - the form that onnxscript reads
Weight = TypeVar("Weight", bound=Union[FLOAT, FLOAT16, BFLOAT16])  # noqa: UP007 - float, or the type of the values
Index = TypeVar("Index", bound=Union[INT64, INT32])  # noqa: UP007

op: Any = onnxscript.opset18  # its own types know no type variable
_memory = onnxscript.values.Opset(DOMAIN, VERSION)
_inlined = onnxscript.script(onnxscript.values.Opset(f"{DOMAIN}.export", 1), default_opset=onnxscript.opset18)


@_inlined
def _sparse_lookup(values: Number, indices: Index, weights: Weight) -> Number:
    return _memory.SparseLookup(values, indices, weights)  # type: ignore[no-any-return]


@_inlined
def _sparse_dots(values: Number, indices: Index, x: Weight) -> FLOAT:
    return _memory.SparseDots(values, indices, x)  # type: ignore[no-any-return]


@_inlined
def _product_key_topk(scores1: Number, scores2: Number, k: int, softmax: bool = False) -> tuple[FLOAT, INT64]:
    scores, slots = _memory.ProductKeyTopk(scores1, scores2, k=k, softmax=softmax)
    return scores, slots


@_inlined
def _product_keys(queries: Number, keys: Number, k: int, softmax: bool = True) -> tuple[FLOAT, INT64]:
    by_half = op.Transpose(queries, perm=[1, 0, 2])
    columns = op.Transpose(keys, perm=[0, 2, 1])
    scores = op.MatMul(by_half, columns)
    axis = op.Constant(value_ints=[0])
    end = op.Constant(value_ints=[2**31 - 1])
    two = op.Constant(value_ints=[2])
    one = op.Constant(value_ints=[1])
    scores1 = op.Slice(scores, axis, end, axis, two)
    scores2 = op.Slice(scores, one, end, axis, two)
    weights, slots = _memory.ProductKeyTopk(scores1, scores2, k=k, softmax=softmax)
    return weights, slots


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.memrewrite.product_keys.default: _product_keys,
    torch.ops.memrewrite.sparse_lookup.default: _sparse_lookup,
    torch.ops.memrewrite.sparse_dots.default: _sparse_dots,
    torch.ops.memrewrite.product_key_topk.default: _product_key_topk,
}
ARGUMENTS = {target: len(function.op_signature.params) for target, function in TRANSLATIONS.items()}  # how many ONNX has
