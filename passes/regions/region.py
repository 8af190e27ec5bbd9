"""Growing a candidate region back from its last matrix, and holding it against the rules every MLP obeys.

Flow: from a `linear`, back through token-wise ops and more linears until everything comes from one value → nobody outside
reads the inside → no token mixing → the output returns to the residual stream its input was taken from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from memrewrite.passes.graphs.dataflow import SPELLED, Dataflow
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
from memrewrite.passes.regions.residual_stream import MAX_WALK, carries_features, returns_to_stream
from memrewrite.passes.regions.token_axes import Refusal, mixes_tokens


@dataclass(frozen=True)
class Region:
    """A candidate MLP in a canonical graph: everything between the value `x` and the last matrix `down`."""

    x: fx.Node
    down: fx.Node
    inside: tuple[fx.Node, ...]  # in order, without `x`, with `down`
    ups: tuple[fx.Node, ...]  # the linears inside but `down`
    given: frozenset[fx.Node] = field(default=frozenset(), kw_only=True)  # beside `x`: what only helps to choose experts


class Never(NamedTuple):
    """Why a linear never looked like the end of an MLP, and at which node: no near miss, told to whoever asks."""

    reason: str
    node: fx.Node


def grow(flow: Dataflow, down: fx.Node) -> Region | Refusal | None:
    """The region that ends in the linear `down`; a `Refusal` when it looked like an MLP; None when it never did."""
    outcome = attempt(flow, down)
    return None if isinstance(outcome, Never) else outcome


def attempt(flow: Dataflow, down: fx.Node) -> Region | Refusal | Never:
    """As `grow`, and the reason where `down` never looked like the end of an MLP."""
    never = unlike(flow, down)
    if never is not None:
        return never
    inside: set[fx.Node] = {down}
    ups: list[fx.Node] = []
    pending: dict[fx.Node, None] = {}  # values still to be explained, by root
    nonlinear = False

    def need(value: fx.Node) -> None:
        root = flow.unviewed(value)
        while value is not root:
            inside.add(value)
            value = value.all_input_nodes[0]
        pending[root] = None

    need(_fx(down.args[0]))
    while True:
        at = max(pending, key=flow.order.__getitem__)
        if len(pending) == 1 and ups and nonlinear:
            return _checked(flow, down, at, inside, ups)
        del pending[at]
        inside.add(at)
        if len(inside) > MAX_WALK:
            return Never(f"what it reads does not come from one value within {MAX_WALK} operations", at)
        if flow.is_linear(at):
            ups.append(at)
        elif op_name(at) not in LAYOUT:
            if not (is_pointwise(at) or op_name(at) in ALONG | REORDERS or fixed_batch_norm(at)):
                return Refusal(f"`{op_name(at)}` is not known to work token by token", at)
            nonlinear |= not _is_linear_op(flow, at)
        sources = flow.activations(at)
        if not sources:
            return Never(f"what it reads goes back to {len(pending) + 1} values, not one; `{at.name}` is one of them", at)
        for source in sources:
            need(source)


def unlike(flow: Dataflow, down: fx.Node) -> Never | None:
    """None when `down` reads a nonlinear function of another linear, no sum of two streams between: worth a near miss.

    An op that is not known to work token by token is looked past when it reads one value: what it does is for `grow` to say.
    """
    stops = list[Never]()
    pending = [(_fx(down.args[0]), False)]  # a value, and whether a nonlinear op reads it
    seen = {(down, False)}
    while pending and len(seen) < MAX_WALK:
        step = node, nonlinear = pending.pop()
        if step in seen:
            continue
        seen.add(step)
        if flow.is_linear(node):
            if nonlinear:
                return None
            stops.append(Never(f"it reads the linear `{node.name}` with nothing nonlinear between them", node))
            continue
        sources = flow.activations(node)
        known = carries_features(node) or op_name(node) in REORDERS
        if len(sources) > 1 and (not known or (op_name(node) == "add" and not _of_one_value(flow, node))):
            stops.append(Never(_several(node), node))
            continue
        if not sources:
            stops.append(Never(f"it reads no other linear: what it reads is made from the input `{node.name}`", node))
        nonlinear |= carries_features(node) and op_name(node) not in LAYOUT and not _is_linear_op(flow, node)
        pending.extend((source, nonlinear) for source in sources)
    far = Never(f"it reads no nonlinear function of another linear within {MAX_WALK} operations", down)
    return stops[0] if stops and not pending else far


def _several(node: fx.Node) -> str:
    if op_name(node) == "add":
        return f"it reads `{node.name}`, a sum of two streams, and no nonlinear function of one linear alone"
    return f"it reads `{node.name}`, in which `{op_name(node)}` mixes several values, and no nonlinear function of one linear"


def _of_one_value(flow: Dataflow, total: fx.Node) -> bool:
    """Whether the terms of a sum are functions, feature by feature, of one value: part of an activation, and no residual."""
    pending = dict.fromkeys(flow.activations(total))
    for _ in range(SPELLED):
        if len(pending) == 1:
            return True
        node = max(pending, key=flow.order.__getitem__)
        if flow.is_linear(node) or not (carries_features(node) or op_name(node) in LAYOUT):
            return False
        del pending[node]
        pending |= dict.fromkeys(flow.activations(node))
    return False


def _fx(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise TypeError(f"a graph node was expected, not {value!r}")
    return value


def _is_linear_op(flow: Dataflow, node: fx.Node) -> bool:
    """Sums, products with weights, norms: what makes no MLP of two linear maps."""
    name = op_name(node)
    if name in ALONG | OTHER_NORMS:
        return name not in PICKS
    operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg not in flow.constant]  # `x * x`: twice
    return name in LINEAR_POINTWISE and (
        name not in ("mul", "div") or (len(operands) < 2 and not (name == "div" and node.args[1] in operands))
    )


def _checked(flow: Dataflow, down: fx.Node, x: fx.Node, inside: set[fx.Node], ups: list[fx.Node]) -> Region | Refusal:
    inside = {node for node in inside if node is down or not _only_relays(flow, node, x)}
    ordered = tuple(sorted(inside, key=flow.order.__getitem__))
    for node in ordered:
        leak = next((user for user in node.users if user not in inside), None)
        if node is not down and leak is not None:
            return Refusal(f"its inner value `{node.name}` is also read outside, by `{leak.name}`", node)
    mixed = mixes_tokens(flow, ordered)
    if mixed:
        return mixed
    if not returns_to_stream(flow, x, down):
        return Refusal("its output does not return to the residual stream that its input was taken from", down)
    return Region(x, down, ordered, tuple(sorted(ups, key=flow.order.__getitem__)))


def _only_relays(flow: Dataflow, node: fx.Node, x: fx.Node) -> bool:
    """A view of `x` on its way in: not part of the region, others may read it too."""
    return flow.unviewed(node) is x
