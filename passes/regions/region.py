"""Grows a candidate region back from its last matrix, and checks it against the rules that every MLP obeys.

Flow: from a `linear`, back through token-wise ops and more linears until everything comes from one value → nothing outside
reads the inside → no token mixing → one step of the residual stream → the output returns to the stream its input was taken
from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from memrewrite.passes.graphs.dataflow import MAX_ACTIVATION_OPS, Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode, inputs_of
from memrewrite.passes.graphs.ops import (
    ALONG,
    LAYOUT,
    LINEAR_POINTWISE,
    OTHER_NORMS,
    PICKS,
    REORDERS,
    fixed_batch_norm,
    is_pointwise,
    op_name,
)
from memrewrite.passes.graphs.shapes import shape_of
from memrewrite.passes.regions.rejection import Rejection
from memrewrite.passes.regions.residual_steps import spans_blocks
from memrewrite.passes.regions.residual_stream import MAX_WALK, carries_features, returns_to_stream
from memrewrite.passes.regions.token_axes import mixes_tokens


@dataclass(frozen=True)
class Region:
    """A candidate MLP in a canonical graph: everything between the value `x` and the last matrix `down`."""

    x: CanonicalNode
    down: CanonicalNode
    inside: tuple[CanonicalNode, ...]  # in graph order, without `x`, with `down`
    ups: tuple[CanonicalNode, ...]  # the linears inside, except `down`
    extra_inputs: frozenset[CanonicalNode] = field(default=frozenset(), kw_only=True)  # read only to choose experts


def attempt(flow: Dataflow, down: CanonicalNode) -> Region | Rejection:
    """The region that ends in the linear `down`, or why there is none."""
    return unlike(flow, down) or _Growth(flow, down).region()


class _Growth:
    """A region that grows back from its last matrix, one value at a time, the latest first."""

    def __init__(self, flow: Dataflow, down: CanonicalNode) -> None:
        self.flow, self.down = flow, down
        self.inside = {down}
        self.ups: list[CanonicalNode] = []
        self.pending: dict[CanonicalNode, None] = {}  # values not yet visited, each without its views
        self.nonlinear = False
        self.add(_node(down.args[0]))

    def add(self, value: CanonicalNode) -> None:
        """Put a value on the list of those to visit; the views on the way to it belong to the region."""
        root = self.flow.unviewed(value)
        while value is not root:
            self.inside.add(value)
            value = inputs_of(value)[0]
        self.pending[root] = None

    def region(self) -> Region | Rejection:
        """Visit values until all that is left is one value, and a linear and a nonlinear op have been passed."""
        rejection = None
        while rejection is None:
            at = max(self.pending, key=self.flow.order.__getitem__)
            if len(self.pending) == 1 and self.ups and self.nonlinear:
                return _checked(self.flow, self.down, at, self.inside, self.ups)
            rejection = self.visit(at)
        return rejection

    def visit(self, at: CanonicalNode) -> Rejection | None:
        """Take a value into the region, and add what it is computed from."""
        del self.pending[at]
        self.inside.add(at)
        if len(self.inside) > MAX_WALK:
            reason = f"what it reads does not come from one value within {MAX_WALK} operations"
            return Rejection("one input", reason, at, near_miss=False)
        if self.flow.is_linear(at):
            self.ups.append(at)
        elif op_name(at) not in LAYOUT:
            if not (is_pointwise(at) or op_name(at) in ALONG | REORDERS or fixed_batch_norm(at)):
                return Rejection("token by token", f"`{op_name(at)}` is not known to work token by token", at)
            self.nonlinear |= not _is_linear_op(self.flow, at)
        sources = self.flow.activations(at)
        if not sources:
            reason = f"what it reads goes back to {len(self.pending) + 1} values, not one; `{at.name}` is one of them"
            return Rejection("one input", reason, at, near_miss=False)
        for source in sources:
            self.add(source)
        return None


def unlike(flow: Dataflow, down: CanonicalNode) -> Rejection | None:
    """A cheap filter before a region is grown, so that not every linear of a model becomes a near miss.

    None if, going back from `down`, another linear is reached through at least one nonlinear op and no sum of two values;
    otherwise the reason. Ops of one operand that are not known to work token by token are skipped here: `attempt` rejects them.
    """
    stops = list[Rejection]()
    pending = [(_node(down.args[0]), False)]  # a value, and whether a nonlinear op reads it
    seen = {(down, False)}
    while pending and len(seen) < MAX_WALK:
        step = node, nonlinear = pending.pop()
        if step in seen:
            continue
        seen.add(step)
        if flow.is_linear(node):
            if nonlinear:
                return None
            stops.append(_never(f"it reads the linear `{node.name}` with nothing nonlinear between them", node))
            continue
        sources = flow.activations(node)
        known = carries_features(node) or op_name(node) in REORDERS
        if len(sources) > 1 and (not known or (op_name(node) == "add" and not _of_one_value(flow, node))):
            stops.append(_never(_several(node), node))
            continue
        if not sources:
            stops.append(_never(f"it reads no other linear: what it reads is computed from the input `{node.name}`", node))
        nonlinear |= carries_features(node) and op_name(node) not in LAYOUT and not _is_linear_op(flow, node)
        pending.extend((source, nonlinear) for source in sources)
    far = _never(f"it reads no nonlinear function of another linear within {MAX_WALK} operations", down)
    return stops[0] if stops and not pending else far


def _never(reason: str, node: CanonicalNode) -> Rejection:
    return Rejection("matrix, nonlinearity, matrix", reason, node, near_miss=False)


def _several(node: CanonicalNode) -> str:
    if op_name(node) == "add":
        return f"it reads `{node.name}`, a sum of two streams, and no nonlinear function of one linear alone"
    return f"it reads `{node.name}`, in which `{op_name(node)}` mixes several values, and no nonlinear function of one linear"


def _of_one_value(flow: Dataflow, total: CanonicalNode) -> bool:
    """True if the terms of a sum are elementwise functions of one value: part of an activation, not a residual sum."""
    pending = dict.fromkeys(flow.activations(total))
    for _ in range(MAX_ACTIVATION_OPS):
        if len(pending) == 1:
            return True
        node = max(pending, key=flow.order.__getitem__)
        if flow.is_linear(node) or not (carries_features(node) or op_name(node) in LAYOUT):
            return False
        del pending[node]
        pending |= dict.fromkeys(flow.activations(node))
    return False


def _node(value: object) -> CanonicalNode:
    if not isinstance(value, fx.Node):
        raise TypeError(f"a graph node was expected, not {value!r}")
    return CanonicalNode(value)


def _is_linear_op(flow: Dataflow, node: CanonicalNode) -> bool:
    """True for sums, products with weights and norms: with only these between, two linears are no MLP."""
    name = op_name(node)
    if name in ALONG | OTHER_NORMS:
        return name not in PICKS
    operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg not in flow.constant]  # `x * x`: twice
    return name in LINEAR_POINTWISE and (
        name not in ("mul", "div") or (len(operands) < 2 and not (name == "div" and node.args[1] in operands))
    )


def _checked(
    flow: Dataflow, down: CanonicalNode, x: CanonicalNode, inside: set[CanonicalNode], ups: list[CanonicalNode]
) -> Region | Rejection:
    """The region, when it obeys every rule; views of `x` are outside of it, so that others may read them too."""
    nodes = [node for node in inside if node is down or flow.unviewed(node) is not x]
    ordered = tuple(sorted(nodes, key=flow.order.__getitem__))
    region = Region(x, down, ordered, tuple(sorted(ups, key=flow.order.__getitem__)))
    rejection = _leak(region) or mixes_tokens(flow, ordered) or spans_blocks(flow, x, down, ordered, {*ups, down})
    return rejection or _outside_the_stream(flow, region) or region


def _outside_the_stream(flow: Dataflow, region: Region) -> Rejection | None:
    """Reject a region that does not update its residual stream, or is a part of a step that mixes its tokens."""
    width, *ends = (
        shape_of(node)[-1] for node in (_node(region.down.args[0]), region.down, *(_node(up.args[1]) for up in region.ups))
    )
    if not returns_to_stream(flow, region.x, region.down):
        reason = "its output does not return to the residual stream that its input was taken from"
        return Rejection("residual", reason, region.down)
    if width <= min(ends) and not returns_to_stream(flow, region.x, region.down, tokenwise=True):
        reason = (
            f"tokens are mixed between the residual stream and its input, and its {width} inner features are no more than"
            f" the {min(ends)} of the stream: these matrices are a part of what mixes the tokens"
        )
        return Rejection("residual", reason, region.down)
    return None


def _leak(region: Region) -> Rejection | None:
    """An inner value that is read outside, if there is one."""
    inside = set(region.inside)
    for node in region.inside:
        user = next((user for user in node.users if user not in inside), None)
        if node is not region.down and user is not None:
            return Rejection("closed", f"its inner value `{node.name}` is also read outside, by `{user.name}`", node)
    return None
