"""Growing a candidate region back from its last matrix, and holding it against the rules every MLP obeys.

Flow: from a `linear`, back through token-wise ops and more linears until everything comes from one value → nobody outside
reads the inside → no token mixing → the output returns to the residual stream its input was taken from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from memrewrite.passes.dataflow import (
    ALONG,
    FILLED,
    LAYOUT,
    OTHER_NORMS,
    Dataflow,
    fixed_batch_norm,
    is_pointwise,
    op_name,
)
from memrewrite.passes.tokens import Refusal, mixes_tokens

REACH = 96  # nodes looked at around one linear; an MLP's own ops and norms are far fewer, so locating stays linear
SPELLED = 32  # ops that one activation, written out, is made of at most
LINEAR_POINTWISE = FILLED | {"add", "sub", "neg", "mul", "div", "rsub"}


@dataclass(frozen=True)
class Region:
    """A candidate MLP in a canonical graph: everything between the value `x` and the last matrix `down`."""

    x: fx.Node
    down: fx.Node
    inside: tuple[fx.Node, ...]  # in order, without `x`, with `down`
    ups: tuple[fx.Node, ...]  # the linears inside but `down`


def grow(flow: Dataflow, down: fx.Node) -> Region | Refusal | None:
    """The region that ends in the linear `down`; a `Refusal` when it looked like an MLP; None when it never did."""
    if not looks_like(flow, down):
        return None
    inside: set[fx.Node] = {down}
    ups: list[fx.Node] = []
    pending: dict[fx.Node, None] = {}  # values still to be explained, by root
    nonlinear = False

    def need(value: fx.Node) -> None:
        root = flow.root(value)
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
        if len(inside) > REACH:
            return None
        if flow.is_linear(at):
            ups.append(at)
        elif op_name(at) not in LAYOUT:
            if not (is_pointwise(at) or op_name(at) in ALONG or fixed_batch_norm(at)):
                return Refusal(f"`{op_name(at)}` is not known to work token by token", at)
            nonlinear |= not _is_linear_op(flow, at)
        sources = flow.activations(at)
        if not sources:
            return None
        for source in sources:
            need(source)


def looks_like(flow: Dataflow, down: fx.Node) -> bool:
    """Whether `down` reads a nonlinear function of another linear, no sum of two streams between: worth a reason if not.

    An op that is not known to work token by token is looked past when it reads one value: what it does is for `grow` to say.
    """
    nonlinear = False
    pending, seen = [_fx(down.args[0])], {down}
    while pending and len(seen) < REACH:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if flow.is_linear(node):
            if nonlinear:
                return True
            continue
        sources = flow.activations(node)
        if len(sources) > 1 and (not _passes(node) or (op_name(node) == "add" and not _of_one_linear(flow, node))):
            continue
        nonlinear |= _passes(node) and op_name(node) not in LAYOUT and not _is_linear_op(flow, node)
        pending.extend(sources)
    return False


def _of_one_linear(flow: Dataflow, total: fx.Node) -> bool:
    """Whether the terms of a sum are elementwise functions of one linear: part of an activation, and no residual."""
    sources: set[fx.Node] = set()
    pending, seen = flow.activations(total), set[fx.Node]()
    while pending and len(seen) < SPELLED:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if (is_pointwise(node) or op_name(node) in LAYOUT) and not flow.is_linear(node):
            pending.extend(flow.activations(node))
        else:
            sources.add(node)
    return not pending and len(sources) == 1 and flow.is_linear(sources.pop())


def _fx(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise TypeError(f"a graph node was expected, not {value!r}")
    return value


def _is_linear_op(flow: Dataflow, node: fx.Node) -> bool:
    """Sums, products with weights, norms: what makes no MLP of two linear maps."""
    name = op_name(node)
    if name in ALONG | OTHER_NORMS:
        return name != "glu"  # the one in the table that gates
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
    return flow.root(node) is x


def returns_to_stream(flow: Dataflow, x: fx.Node, down: fx.Node) -> bool:
    """Whether `down`, through norms, gates and sums, is added to the value that `x` was normed or scaled from."""
    stream = _taken_from(flow, x)
    pending, seen = [down], {down}
    while pending and len(seen) < REACH:
        for user in pending.pop().users:
            if user in seen or not _passes(user):
                continue
            seen.add(user)
            pending.append(user)
            if op_name(user) in ("add", "sub"):
                others = [source for source in flow.activations(user) if source not in seen]
                if any(term in stream for other in others for term in _terms(flow, other)):
                    return True
    return False


def _terms(flow: Dataflow, value: fx.Node) -> set[fx.Node]:
    """A value and, when it is a sum, what it sums, two sums deep: `(h + attention) + mlp` returns to `h` as well."""
    found, edge = {flow.root(value)}, {flow.root(value)}
    for _ in range(2):
        edge = {flow.root(s) for at in edge if op_name(at) == "add" for s in flow.activations(at)}
        found |= edge
    return found


def _passes(node: fx.Node) -> bool:
    return is_pointwise(node) or op_name(node) in LAYOUT | ALONG | OTHER_NORMS


def _taken_from(flow: Dataflow, x: fx.Node) -> set[fx.Node]:
    """The values `x` may be a normed, scaled or shifted form of: back to the nearest sums, and their terms."""
    found, pending = {x}, [(x, 0)]
    while pending and len(found) < REACH:
        node, sums = pending.pop(0)
        if not _passes(node) or sums > 2:
            continue
        sources = flow.activations(node)
        sums += op_name(node) in ("add", "sub") and len(sources) > 1
        for source in sources:
            root = flow.root(source)
            if root not in found:
                found.add(root)
                pending.append((root, sums))
    return found
