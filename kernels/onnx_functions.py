"""The memory operators in ONNX: a function of standard operators for each, which runtimes without a native kernel execute.

A runtime with a kernel for a node of the domain `memrewrite` runs that kernel (`kernels/onnxruntime/`, for the operators in
`NATIVE`); others inline the function. Kernel and function follow the same contract:

`SparseLookup(values [N, D], indices [T, K], weights [T, K]) -> [T, D]`: values and result of one type (float, float16,
bfloat16), weights of that type or float, indices int64 or int32, sums in fp32. An index outside [0, N) is an error; a negative
index does not count from the end.

`SparseDots(values [N, D], indices [T, K], x [T, D]) -> [T, K]`: values and x each of one of these types, the result float; the
products of rows with x, in fp32. Indices as for `SparseLookup`.

`ProductKeyTopk(scores1 [..., n1], scores2 [..., n2]; k, softmax = 0) -> scores [..., k], indices [..., k]`: the k best sums of
one score of each half, in descending order, and their slots `i * n2 + j` (int64). With `softmax`, scores are the softmax of the
sums. Scores are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import FunctionProto

DOMAIN = "memrewrite"
VERSION = 1  # of the domain

# The rows that are read, converted to fp32: [T, K, D]. Gather counts a negative index from the end, so it is replaced by one
# past the end, which is an error.
_WIDE_ROWS = """
    zero = Constant <value_int = 0> ()
    no_row = Shape <start = 0, end = 1> (values)
    first = CastLike (zero, indices)
    past = CastLike (no_row, indices)
    negative = Less (indices, first)
    checked = Where (negative, past, indices)
    rows = Gather <axis = 0> (values, checked)
    wide_rows = Cast <to = 1> (rows)
"""

# The rows are summed by a product of [1, K] and [K, D].
SPARSE_LOOKUP = f"""
SparseLookup (values, indices, weights) => (y)
{{{_WIDE_ROWS}
    wide_weights = Cast <to = 1> (weights)
    before_last = Constant <value_ints = [-2]> ()
    bags = Unsqueeze (wide_weights, before_last)
    sums = MatMul (bags, wide_rows)
    flat = Squeeze (sums, before_last)
    y = CastLike (flat, values)
}}
"""

SPARSE_DOTS = f"""
SparseDots (values, indices, x) => (dots)
{{{_WIDE_ROWS}
    wide_x = Cast <to = 1> (x)
    last = Constant <value_ints = [-1]> ()
    columns = Unsqueeze (wide_x, last)
    products = MatMul (wide_rows, columns)
    dots = Squeeze (products, last)
}}
"""

# Of the two sorted halves, only pairs of ranks with i * j <= k (from 1) can be among the k best. These ranks depend only on k,
# so a runtime folds them into constants.
PRODUCT_KEY_TOPK = """
ProductKeyTopk <k, softmax: int = 0> (scores1, scores2) => (scores, indices)
{
    one = Constant <value_int = 1> ()
    k_number = Constant <value_int: int = @k> ()
    above = Add (k_number, one)
    ranks = Range (one, above, one)
    axis = Constant <value_ints = [1]> ()
    column = Unsqueeze (ranks, axis)
    products = Mul (column, ranks)
    possible = LessOrEqual (products, k_number)
    pairs = NonZero (possible)
    begin = Constant <value_int = 0> ()
    ranks1 = Gather <axis = 0> (pairs, begin)
    ranks2 = Gather <axis = 0> (pairs, one)
    flat = Constant <value_ints = [1]> ()
    k_list = Reshape (k_number, flat)
    wide1 = Cast <to = 1> (scores1)
    wide2 = Cast <to = 1> (scores2)
    best1, slots1 = TopK <axis = -1> (wide1, k_list)
    best2, slots2 = TopK <axis = -1> (wide2, k_list)
    sums1 = Gather <axis = -1> (best1, ranks1)
    sums2 = Gather <axis = -1> (best2, ranks2)
    sums = Add (sums1, sums2)
    best, chosen = TopK <axis = -1> (sums, k_list)
    chosen1 = Gather <axis = 0> (ranks1, chosen)
    chosen2 = Gather <axis = 0> (ranks2, chosen)
    i = GatherElements <axis = -1> (slots1, chosen1)
    j = GatherElements <axis = -1> (slots2, chosen2)
    n2 = Shape <start = -1> (scores2)
    row = Mul (i, n2)
    indices = Add (row, j)
    soft = Softmax <axis = -1> (best)
    asked = Constant <value_int: int = @softmax> ()
    is_soft = Cast <to = 9> (asked)
    scores = Where (is_soft, soft, best)
}
"""

FUNCTIONS = (SPARSE_LOOKUP, SPARSE_DOTS, PRODUCT_KEY_TOPK)
NATIVE = ("SparseLookup", "ProductKeyTopk")  # the operators for which the native library has kernels


def functions(opset: int) -> list[FunctionProto]:
    """The functions, their bodies in standard operators of `opset` (18 or later)."""
    import onnx.parser

    head = f'<opset_import: ["": {opset}], domain: "{DOMAIN}">'
    return [onnx.parser.parse_function(head + text) for text in FUNCTIONS]
