"""What the passes know about ATen ops: one table of rows, `OPS`, and the classes of ops that are derived from it.

A new op is one row. `Kind` decides how token axes go through it; the other facts state what the op means for the residual
stream, for activations and for mixtures of experts. Elementwise ops need no row unless they have such facts: torch tags them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import fx


class Kind(Enum):
    """What an op does to the axes of its first input."""

    IDENTITY = auto()  # returns its input, token by token: casts, copies, dropout, autograd bookkeeping
    # Layout ops
    REGROUP = auto()  # merges or splits neighboring axes
    PERMUTE = auto()  # changes the order of the axes
    EXPAND = auto()  # broadcasts, with new axes in front
    SPLIT = auto()  # cuts an axis into a list of pieces
    SLICE = auto()  # keeps part of an axis
    TAKE = auto()  # keeps one place of an axis, or lists all; the axis is removed
    JOIN = auto()  # concatenates along an axis
    STACK = auto()  # concatenates along a new axis
    ITEM = auto()  # takes a value out of a list
    # Ops that reorder, pick or pad along some axes: token-wise if these are features
    INDEX = auto()  # one index tensor or None for each axis
    REORDER = auto()
    PAD = auto()
    MOVE = auto()  # copies, repeats or overwrites whole feature vectors; never token-wise
    # Ops along some axes that keep every other axis separate: token-wise if these are features
    LAST_AXES = auto()  # norms over as many of the last axes as `normalized_shape` has sizes
    ALONG = auto()  # softmaxes and reductions
    CHANNEL_NORM = auto()  # over a batch, groups of channels or an image; token-wise only as in `fixed_batch_norm`
    # Ops with tensors of other shapes
    PRODUCT = auto()  # multiplies by a matrix: mixes several streams by weights, or tokens by attention
    CONVOLUTION = auto()
    TRANSPOSED_CONVOLUTION = auto()
    GATED_SUM = auto()  # a weighted sum of input and state, the weights computed inside the op
    CHOICE = auto()  # returns indices, or a mask of them
    LOOKUP = auto()
    FILL = auto()  # reads the shape of its input, and not its values
    SIZE = auto()  # the size of a tensor
    # Elementwise ops
    ELEMENTWISE = auto()  # that torch does not tag as such
    TAGGED = auto()  # that torch tags as such; the row has other facts


Terms = tuple[tuple[int, ...], ...]
SUM: Terms = ((0,), (1,))


@dataclass(frozen=True)
class Op:
    """The facts of one row, true of each of its names."""

    kind: Kind
    names: str  # ATen names without overload, separated by spaces
    axis: int | None = None  # which argument names the axis or the axes
    default: int | None = None  # the axis if that argument is missing; None for all
    like: bool = False  # the new shape is that of a second tensor
    aliases: bool = False  # never copies
    shared_index: bool = False  # the indices are the same for every token, so they must not depend on the input
    moves: bool = False  # carries whole feature vectors of the residual stream: all, some, or among others
    terms: Terms = ()  # of a sum: the argument positions of each term; several positions of one term are its factors
    adds_up: bool = False  # the sum or the mean over an axis
    affine: bool = False  # linear in each operand: two matrices with only such ops between them are no MLP
    picks: bool = False  # along an axis: gates, chooses or weighs, so that it may be an activation
    chooses: bool = False  # may choose experts
    replayed: bool = False  # a choice: its indices are kept fixed while one token is changed, and not the values at them
    looks_up: bool = False  # reads rows of a table
    weighs: bool = False  # computes the weights of experts
    elementwise: bool = False  # elementwise too, though of another kind


OPS: tuple[Op, ...] = (
    Op(Kind.IDENTITY, "alias detach", aliases=True),
    Op(Kind.IDENTITY, "to _to_copy type_as clone contiguous lift lift_fresh lift_fresh_copy conj resolve_conj resolve_neg"),
    Op(Kind.IDENTITY, "dropout native_dropout feature_dropout alpha_dropout"),
    Op(Kind.REGROUP, "view reshape _unsafe_view _reshape_alias flatten unflatten squeeze unsqueeze"),
    Op(Kind.REGROUP, "view_as reshape_as", like=True),
    Op(Kind.PERMUTE, "permute transpose t numpy_T mT swapaxes swapdims movedim moveaxis"),
    Op(Kind.EXPAND, "expand broadcast_to"),
    Op(Kind.EXPAND, "expand_as", like=True),
    Op(Kind.SPLIT, "split split_with_sizes chunk tensor_split", axis=2, default=0),
    Op(Kind.SPLIT, "vsplit", default=0),
    Op(Kind.SPLIT, "hsplit", default=1),
    Op(Kind.SPLIT, "dsplit", default=2),
    Op(Kind.SLICE, "slice narrow", axis=1, default=0),
    Op(Kind.TAKE, "select unbind", axis=1, default=0),
    Op(Kind.JOIN, "cat concat", axis=1, default=0),
    Op(Kind.STACK, "stack", axis=1, default=0),
    Op(Kind.ITEM, "getitem"),
    Op(Kind.INDEX, "index", shared_index=True, moves=True, looks_up=True),
    Op(Kind.REORDER, "index_select", axis=1, shared_index=True, moves=True, looks_up=True),
    Op(Kind.REORDER, "gather", axis=1, moves=True, looks_up=True),
    Op(Kind.REORDER, "scatter", axis=1, moves=True),
    Op(Kind.REORDER, "flip", axis=1),
    Op(Kind.REORDER, "roll", axis=2),
    Op(Kind.PAD, "pad constant_pad_nd", moves=True),
    Op(Kind.MOVE, "take_along_dim", moves=True, looks_up=True),
    Op(Kind.MOVE, "index_copy masked_select masked_scatter slice_scatter select_scatter copy", moves=True),
    Op(Kind.MOVE, "repeat repeat_interleave tile", moves=True),
    Op(Kind.MOVE, "index_add scatter_add scatter_reduce", moves=True, terms=((0,), (3,))),
    Op(Kind.MOVE, "index_put", moves=True, terms=((0,), (2,))),
    Op(Kind.LAST_AXES, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    Op(Kind.ALONG, "softmax _softmax", axis=1, weighs=True),
    Op(Kind.ALONG, "log_softmax logsumexp cumsum var std var_mean std_mean", axis=1),
    Op(Kind.ALONG, "sum mean", axis=1, adds_up=True),
    Op(Kind.ALONG, "norm linalg_vector_norm", axis=2),
    Op(Kind.ALONG, "amax amin prod", axis=1, picks=True),
    Op(Kind.ALONG, "max min median", axis=1, picks=True, replayed=True),  # a choice where the indices are read
    Op(Kind.ALONG, "glu", axis=1, default=-1, picks=True),
    Op(Kind.ALONG, "quantile", axis=2, picks=True),
    Op(Kind.ALONG, "sort", axis=1, default=-1, picks=True, chooses=True, replayed=True),
    Op(Kind.ALONG, "topk kthvalue", axis=2, default=-1, picks=True, chooses=True, replayed=True),
    Op(Kind.ALONG, "argmax", axis=1, chooses=True, replayed=True),
    Op(Kind.CHANNEL_NORM, "batch_norm native_batch_norm group_norm native_group_norm instance_norm"),
    Op(Kind.CHANNEL_NORM, "_native_batch_norm_legit _native_batch_norm_legit_no_training"),
    Op(Kind.PRODUCT, "matmul mm bmm mv einsum tensordot scaled_dot_product_attention"),
    Op(Kind.PRODUCT, "addmm baddbmm", terms=((0,), (1, 2))),
    Op(Kind.CONVOLUTION, "conv1d conv2d conv3d convolution"),
    Op(Kind.TRANSPOSED_CONVOLUTION, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    # Blocks that update their stream by a recurrent cell instead of a sum (test row "recurrent cell").
    Op(Kind.GATED_SUM, "gru_cell", terms=SUM),
    Op(Kind.CHOICE, "one_hot", chooses=True),
    Op(Kind.CHOICE, "argsort nonzero nonzero_numpy multinomial", chooses=True, replayed=True),
    Op(Kind.LOOKUP, "embedding", looks_up=True),
    Op(Kind.FILL, "zeros_like ones_like full_like", elementwise=True, affine=True),
    Op(Kind.FILL, "new_zeros new_ones new_full"),
    Op(Kind.SIZE, "sym_size sym_numel"),
    Op(Kind.ELEMENTWISE, "where masked_fill complex polar bucketize floor_divide __and__ __or__ __xor__"),
    Op(Kind.ELEMENTWISE, "hardswish log_sigmoid prelu"),
    Op(Kind.ELEMENTWISE, "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"),
    Op(Kind.ELEMENTWISE, "rsub", terms=SUM, affine=True),
    Op(Kind.TAGGED, "add sub", terms=SUM, affine=True),
    Op(Kind.TAGGED, "neg mul div", affine=True),
    Op(Kind.TAGGED, "addcmul addcdiv", terms=((0,), (1, 2))),
    Op(Kind.TAGGED, "lerp", terms=SUM),
    Op(Kind.TAGGED, "sigmoid", weighs=True),
)
BY_NAME: dict[str, Op] = {name: op for op in OPS for name in op.names.split()}


def _of(*kinds: Kind) -> frozenset[str]:
    return frozenset(name for name, op in BY_NAME.items() if op.kind in kinds)


def _with(fact: str) -> frozenset[str]:
    return frozenset(name for name, op in BY_NAME.items() if getattr(op, fact))


LAYOUT_KINDS = (
    *(Kind.REGROUP, Kind.PERMUTE, Kind.EXPAND, Kind.SPLIT, Kind.SLICE),
    *(Kind.TAKE, Kind.JOIN, Kind.STACK, Kind.ITEM),
)
REORDER_KINDS = (Kind.INDEX, Kind.REORDER, Kind.PAD)
ALONG_KINDS = (Kind.LAST_AXES, Kind.ALONG)
IDENTITY, ALIASES = _of(Kind.IDENTITY), _with("aliases")
LAYOUT, REORDERS, ALONG, OTHER_NORMS = _of(*LAYOUT_KINDS), _of(*REORDER_KINDS), _of(*ALONG_KINDS), _of(Kind.CHANNEL_NORM)
VIEWS = _of(Kind.REGROUP) - _with("like")  # of one tensor
PERMUTES, SPLITS = _of(Kind.PERMUTE), _of(Kind.SPLIT)
JOINS = _of(Kind.JOIN, Kind.STACK)  # put several values side by side
SIZES, FILLS = _of(Kind.SIZE), _of(Kind.FILL)
ELEMENTWISE = _of(Kind.ELEMENTWISE) | _with("elementwise")
CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS = _of(Kind.CONVOLUTION), _of(Kind.TRANSPOSED_CONVOLUTION)
MOVES, MIXES, GATED_SUMS, ADDS_UP = _with("moves"), _of(Kind.PRODUCT), _of(Kind.GATED_SUM), _with("adds_up")
TERMS: dict[str, Terms] = {name: op.terms for name, op in BY_NAME.items() if op.terms}
ELEMENTWISE_SUMS = frozenset(TERMS) & _of(Kind.ELEMENTWISE, Kind.TAGGED)
PICKS, LINEAR_POINTWISE = _with("picks"), _with("affine")
CHOOSES, REPLAYED, LOOKS_UP, WEIGHS = _with("chooses"), _with("replayed"), _with("looks_up"), _with("weighs")


def op_name(node: fx.Node) -> str:
    """The ATen name without namespace and overload (`linear`, `add`), or the name of a Python function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def op_of(node: fx.Node) -> Op | None:
    """The row of a node's op; None if the table has none."""
    return BY_NAME.get(op_name(node))


def axes_of(node: fx.Node, rank: int) -> list[int]:
    """The axes, of `rank` many, that a node with a row works along: those of its axis argument, or the row's default."""
    op = BY_NAME[op_name(node)]
    given = node.args[op.axis] if op.axis is not None and len(node.args) > op.axis else None
    if given is None:
        given = node.kwargs.get("dim", op.default)
    if given is None:
        return list(range(rank))
    return [int(axis) % rank for axis in (given if isinstance(given, (list, tuple)) else [given])]  # type: ignore[arg-type]


def is_assertion(node: fx.Node) -> bool:
    """True for an op that only checks values and returns none."""
    return op_name(node).startswith("_assert") or op_name(node) in (
        "sym_constrain_range_for_size",
        "sym_constrain_range",
    )


def is_pointwise(node: fx.Node) -> bool:
    """True for an elementwise op with broadcasting, by torch's tag or by the table."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or op_name(node) in ELEMENTWISE)


def fixed_batch_norm(node: fx.Node) -> bool:
    """True for a batch norm that reads its running statistics and not those of the batch: one scale and shift a channel."""
    name = op_name(node)
    if name == "_native_batch_norm_legit_no_training":
        return True
    return name in ("batch_norm", "native_batch_norm") and len(node.args) > 5 and node.args[5] is False
