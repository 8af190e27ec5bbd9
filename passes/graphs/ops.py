"""Which kinds of op there are: by torch's own operator tags, and by short tables of ATen names."""

from __future__ import annotations

import torch
from torch import fx

# Ops that hand on their first input as it is, token by token: casts, copies, dropout, autograd bookkeeping.
IDENTITY = frozenset(
    [
        "to",
        "_to_copy",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "dropout",
        "native_dropout",
        "feature_dropout",
        "alpha_dropout",
        "type_as",
        "conj",
        "resolve_conj",
        "resolve_neg",
    ]
)
LAYOUT = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "_reshape_alias",
        "view_as",
        "reshape_as",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "mT",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "broadcast_to",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
        "hsplit",
        "vsplit",
        "dsplit",
        "slice",
        "select",
        "narrow",
        "cat",
        "concat",
        "stack",
        "getitem",
    ]
)
SIZES = frozenset(["sym_size", "sym_numel"])  # how large a value is, whatever it is
FILLED = frozenset(["zeros_like", "ones_like", "full_like"])
# Elementwise, and not tagged so by torch.
ELEMENTWISE = FILLED | {
    "where",
    "rsub",
    "complex",
    "bucketize",
    "__and__",
    "__or__",
    "__xor__",
    "hardswish",
    "log_sigmoid",
    "prelu",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
}
# Ops over some axes that leave every other axis alone: norms, softmaxes, reductions. Token-wise when the axes are features.
ALONG = frozenset(
    [
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "softmax",
        "_softmax",
        "log_softmax",
        "mean",
        "sum",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "norm",
        "linalg_vector_norm",
        "amax",
        "amin",
        "max",
        "min",
        "topk",
        "kthvalue",
        "median",
        "quantile",
        "sort",
        "prod",
        "argmax",
        "cumsum",
        "logsumexp",
        "glu",
        "normalize",
    ]
)
# Ops that reorder, pick or pad along some axes: token-wise when these are features.
REORDERS = frozenset(["index", "index_select", "gather", "scatter", "flip", "roll", "pad", "constant_pad_nd"])
# Norms over a batch, groups of channels or an image: linear in what the weights are to, and no obstacle on the stream.
# Inside an MLP only a batch norm with fixed statistics is token-wise (`fixed_batch_norm`).
OTHER_NORMS = frozenset(
    [
        "batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "group_norm",
        "native_group_norm",
        "instance_norm",
    ]
)


def op_name(node: fx.Node) -> str:
    """The ATen name without namespace and overload (`linear`, `add`), or the name of a Python function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def is_assertion(node: fx.Node) -> bool:
    """An op that only checks: it reads values and hands nothing on."""
    return op_name(node).startswith("_assert") or op_name(node) in (
        "sym_constrain_range_for_size",
        "sym_constrain_range",
    )


def is_pointwise(node: fx.Node) -> bool:
    """Elementwise with broadcasting, by torch's own tag and a short list of what it leaves out."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or op_name(node) in ELEMENTWISE)


def fixed_batch_norm(node: fx.Node) -> bool:
    """A batch norm that reads its running statistics and none of the batch: a scale and a shift of each channel."""
    name = op_name(node)
    if name == "_native_batch_norm_legit_no_training":
        return True
    return name in ("batch_norm", "native_batch_norm") and len(node.args) > 5 and node.args[5] is False
