"""Questions about a graph's dataflow, asked by every pass: what kind of op, which values are weights, what reads what.

Kinds come from torch's own operator tags and from short tables of ATen names; nothing here knows a model.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import fx

TORCH = str(Path(torch.__file__).parent)
WEIGHT = "weight"  # node.meta key: the name of the parameter or buffer a placeholder stands for
ORIGIN = "origin"  # node.meta key: the recorded node that a canonical one stands for
LITERAL = "literal"  # node.meta key: the constant tensor a placeholder stands for
SPELLED = 32  # ops that one activation, written out, is made of at most
UNBACKED = 1_000_003  # stands for a size that depends on data

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


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor value, symbolic sizes by their size in the example; () where it has none."""
    val = node.meta.get("val")
    return sizes_of(val) if isinstance(val, torch.Tensor) else ()


def sizes_of(value: torch.Tensor) -> tuple[int, ...]:
    """A tensor's shape, symbolic sizes by their size in the example."""
    return tuple(_size(n) for n in value.shape)


def _size(n: int | torch.SymInt) -> int:
    """A size without guarding on it. One that depends on data has no example: a prime that equals no other size."""
    hint = n if isinstance(n, int) else n.node.hint
    return UNBACKED if hint is None else int(hint)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


class Dataflow:
    """Facts of one canonical graph, computed once, in time linear in its nodes."""

    def __init__(self, graph: fx.Graph, *, fragment: bool = False) -> None:
        self.graph, self.fragment = graph, fragment  # of a fragment, the residual stream may lie outside
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.constant: set[fx.Node] = set()  # computed from weights, literals and sizes alone
        for node in graph.nodes:
            made = node.op == "call_function" and all(source in self.constant for source in node.all_input_nodes)
            if WEIGHT in node.meta or LITERAL in node.meta or made or op_name(node) in SIZES:
                self.constant.add(node)
        self.held = {node.meta[WEIGHT]: node.meta["val"] for node in graph.nodes if WEIGHT in node.meta}  # by weight's name
        self._roots: dict[fx.Node, fx.Node] = {}

    def activations(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that depend on the model's inputs."""
        return [source for source in node.all_input_nodes if source not in self.constant]

    def weights(self, node: fx.Node) -> set[str]:
        """Names of the weights a constant value is computed from."""
        found: set[str] = set()
        pending, seen = [node], {node}
        while pending:
            at = pending.pop()
            if WEIGHT in at.meta:
                found.add(at.meta[WEIGHT])
            for source in at.all_input_nodes if op_name(at) not in SIZES else ():
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return found

    def root(self, node: fx.Node) -> fx.Node:
        """The value this one only re-lays: views that keep the last axis, and moves made by `normalize`."""
        if node not in self._roots:
            at = node
            while self._relays(at):
                at = at.all_input_nodes[0]
            self._roots[node] = at
        return self._roots[node]

    def _relays(self, node: fx.Node) -> bool:
        if node.meta.get("relay"):
            return True
        if op_name(node) not in (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "unsqueeze",
            "squeeze",
            "_reshape_alias",
        ):
            return False
        source = node.all_input_nodes[0]
        before, after = shape_of(source), shape_of(node)
        return bool(before and after) and before[-1] == after[-1] and math.prod(before) == math.prod(after)

    def is_linear(self, node: fx.Node) -> bool:
        """A canonical `linear` whose weight is a weight (and not an activation)."""
        return op_name(node) == "linear" and node.args[0] not in self.constant and node.args[1] in self.constant


def modules_of(node: fx.Node) -> list[tuple[str, str]]:
    """The module calls a node was recorded in, outermost first, as (call, path).

    A call is the path with a count for repeats (`encoder.layer@1`): one module called twice gives two calls.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), str(value[0])) for key, value in stack.items()]


def path_of(node: fx.Node) -> str:
    """The innermost module a node was recorded in."""
    stack = modules_of(node)
    return clean(stack[-1][1]) if stack else ""


def clean(path: str) -> str:
    """A module path as `get_submodule` takes it: without the tracer's root prefix and repeat count."""
    path = path.partition("@")[0]
    for prefix in ("L['self'].", "L__self___", "L__self__."):
        path = path.removeprefix(prefix)
    return "" if path in ("L['self']", "L__self__") else path


def source_line(node: fx.Node) -> str:
    """The innermost `file:line` of the model's own code that made a node (torch's own files aside), or ""."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ") and TORCH not in line]
    if not frames:
        return ""
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{file}:{rest.partition(',')[0]}"
