"""How `torch.onnx` writes the operators `torch.ops.memrewrite.*`: each as one node of the domain `memrewrite`.

The exporter inlines every function that a translation calls, so a function with the operator's body would leave no node for a
native kernel. These functions have one line each, and belong to another domain: after inlining, that line remains, which is the
node. The module is imported by the first export.
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

_memory = onnxscript.values.Opset(DOMAIN, VERSION)
_inlined = onnxscript.script(onnxscript.values.Opset(f"{DOMAIN}.export", 1), default_opset=onnxscript.opset18)


@_inlined
def _sparse_lookup(values: Number, indices: Index, weights: Weight) -> Number:
    return _memory.SparseLookup(values, indices, weights)  # type: ignore[no-any-return]


@_inlined
def _product_key_topk(scores1: Number, scores2: Number, k: int, softmax: bool = False) -> tuple[FLOAT, INT64]:
    scores, slots = _memory.ProductKeyTopk(scores1, scores2, k=k, softmax=softmax)
    return scores, slots


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.memrewrite.sparse_lookup.default: _sparse_lookup,
    torch.ops.memrewrite.product_key_topk.default: _product_key_topk,
}
ARGUMENTS = {target: len(function.op_signature.params) for target, function in TRANSLATIONS.items()}  # how many ONNX has
