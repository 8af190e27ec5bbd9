"""Whether a region's output is added to the residual stream that its input was computed from, whatever the form of the sum.

Flow: back from the input, through ops that only norm, scale, move or mix whole feature vectors → the values that it may be a
form of; forward from the output through the same ops → every sum that it is a term of → the output returns to the stream if
another term is a form of one of those values. A product with a matrix over the features ends both walks; except in a branch
that is a block without residual sums, attention and then the MLP, whose output a further linear projects into the stream.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from torch import fx

from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode, users_of
from memrewrite.passes.graphs.ops import (
    ADDS_UP,
    ALONG,
    CONVOLUTIONS,
    ELEMENTWISE_SUMS,
    GATED_SUMS,
    JOINS,
    LAYOUT,
    MIXES,
    MOVES,
    OTHER_NORMS,
    TERMS,
    is_pointwise,
    op_name,
)
from memrewrite.passes.graphs.shapes import UNBACKED, is_tensor, shape_of

MAX_WALK = 96  # nodes visited from one value; a block has far fewer norms, gates and scales, so locating stays linear
BRANCH = 4 * MAX_WALK  # values visited back from one attention, at most
SUMS = 2  # nested sums that a term may be inside: `(h + attention) + mlp` returns to `h` as well


def carries_features(node: fx.Node) -> bool:
    """True for elementwise ops, views and norms: the ops between a stream and a matrix."""
    return is_pointwise(node) or op_name(node) in LAYOUT | ALONG | OTHER_NORMS


def returns_to_stream(flow: Dataflow, x: CanonicalNode, down: CanonicalNode, *, tokenwise: bool = False) -> bool:
    """True if `down`, through norms, gates and sums, is added to the value that `x` was normed or scaled from.

    `x` may also be what a step of the stream returns that mixes tokens, without a residual sum of its own: a convolution of
    each channel; or attention, if a further linear projects `down` into the stream. With `tokenwise`, it may not.
    Always true in a fragment, whose residual sum may be outside of the graph.
    """
    if flow.fragment or _Return(flow, x, down, tokenwise=tokenwise).exists():
        return True
    end = None if tokenwise else _projected(flow, down)
    return end is not None and _Branch(flow, x, end).returns()


def adds_stream(flow: Dataflow, x: CanonicalNode, y: CanonicalNode) -> bool:
    """True if the value that `x` was normed or scaled from is a term of the sum `y`: then a region from `x` ends before it."""
    stream, seen, pending = _Return(flow, x, y).stream, {y}, [y]
    while pending and len(seen) < MAX_WALK:
        node = flow.unviewed(pending.pop())
        if node in stream:
            return True
        terms = flow.activations(node) if op_name(node) in ELEMENTWISE_SUMS else []
        pending += [term for term in terms if term not in seen]
        seen.update(terms)
    return False


class _Return:
    """The ways from the output of one region to sums with the stream of its input."""

    def __init__(self, flow: Dataflow, x: CanonicalNode, down: CanonicalNode, *, tokenwise: bool = False) -> None:
        self.flow, self.x, self.down = flow, x, down
        self.size, self.widths = _size(down), {shape_of(down)[-1:], shape_of(x)[-1:]}
        self.ends = CONVOLUTIONS if tokenwise else frozenset[str]()  # ops that end the walk back from the input
        self.stream = self.forms(x, self.ends)
        # True: next to the stream on an axis of streams, which a later op sums (test row "returns: weighted stack").
        self.seen: dict[CanonicalNode, bool] = {down: False}
        self.added: list[CanonicalNode] = []  # what is added to the output on the way

    def exists(self) -> bool:
        """True if the output is added to the stream, or to another stream that is updated in turn."""
        return self.returns() or self.crosses()

    def returns(self) -> bool:
        """Forward from the output, to a sum with the stream."""
        pending = [self.down]
        while pending and len(self.seen) < MAX_WALK:
            node = pending.pop()
            for user in users_of(node):
                if user in self.seen or not self.carries(user) or self.shrinks(node, user):
                    continue
                others = self.others(node, user)
                back = any(map(self.is_stream, others))
                joins = op_name(user) in JOINS
                if (back and not joins) or (self.seen[node] and _sums_an_axis(node, user)):
                    return True
                self.seen[user] = (back and joins) or self.seen[node]
                pending.append(user)
                self.added += others
        return False

    def is_stream(self, other: CanonicalNode) -> bool:
        """True if a value is a form of the stream that the region's input is a form of."""
        return not self.stream.isdisjoint(self.forms(other))

    def others(self, node: CanonicalNode, user: CanonicalNode) -> list[CanonicalNode]:
        """What `user` adds to `node`, or joins to it."""
        name = op_name(user)
        if name in JOINS:
            return [source for source in self.flow.activations(user) if source not in self.seen]
        terms = [_at(user, places) for places in TERMS.get(name, ())]
        if name == "index_put" and user.args[3:4] != (True,):  # overwrites instead of adding
            return []
        if name in ELEMENTWISE_SUMS and _spreads(node, user):
            return []  # one value for many tokens: a context, not an update of each token
        mine = [term for term in terms if node in term]
        return [
            other
            for term in terms
            if mine and term is not mine[0]
            for other in term
            if other not in self.seen and other not in self.flow.constant
        ]

    def forms(self, value: CanonicalNode, ends: Collection[str] = ()) -> set[CanonicalNode]:
        """The values, as large as the output, that `value` may be a form of: back through `SUMS` sums, with their terms.

        Ops named in `ends` end the walk.
        """
        root = self.flow.unviewed(value)
        found, pending = {value, root}, deque([(value, 0), (root, 0)])
        while pending and len(found) < MAX_WALK:
            node, sums = pending.popleft()
            sources = [source for source in self.flow.activations(node) if not _is_integer(source)]
            sums += op_name(node) in TERMS and len(sources) > 1
            if not self.carries(node) or sums > SUMS or op_name(node) in ends:
                continue
            for root in map(self.flow.unviewed, sources):
                if root not in found:
                    found.add(root)
                    pending.append((root, sums))
        return {node for node in found if not self.smaller(node)}

    def carries(self, node: CanonicalNode) -> bool:
        """True if a node passes feature vectors on, without a product with a matrix over the features."""
        name, widths = op_name(node), [shape_of(source)[-1:] for source in self.flow.activations(node)]
        if self.flow.is_linear(node):  # over an axis of streams, of another width
            return not self.widths & {shape_of(node)[-1:], *widths}
        if name in MIXES:
            return shape_of(node)[-1:] in self.widths
        return carries_features(node) or name in MOVES | GATED_SUMS or _one_channel_each(self.flow, node)

    def smaller(self, node: CanonicalNode) -> bool:
        """True if a value has fewer elements than the output: a mask, a gate, a mean. False where sizes depend on data."""
        unknown = UNBACKED in shape_of(node) or UNBACKED in shape_of(self.down)
        return is_tensor(node) and not unknown and _size(node) < self.size

    def shrinks(self, node: CanonicalNode, user: CanonicalNode) -> bool:
        """True if `user` reduces `node`, and neither selects some of its elements nor mixes several streams."""
        known = is_tensor(user) and UNBACKED not in (*shape_of(node), *shape_of(user))
        if not known or _size(user) >= _size(node) or op_name(user) in LAYOUT | MOVES | MIXES | {"linear"}:
            return False
        return op_name(user) not in ADDS_UP or shape_of(user)[-1:] not in self.widths

    def crosses(self) -> bool:
        """True if two streams update each other: the input is a sum `a + f(b)` that is used again, and `g(a)` is added to `b`.

        Reversible blocks need it (test row "reversible").
        """
        total = self.x
        while self.carries(total) and op_name(total) not in self.ends.union(TERMS) and self.flow.activations(total):
            total = max(self.flow.activations(total), key=_size)
        if op_name(total) not in TERMS or len(total.users) < 2 or _size(total) != self.size:
            return False
        read = {node for term in self.flow.activations(total) if not self.carries(term) for node in self.read_by(term)}
        return any(read & self.forms(other) for other in self.added)

    def read_by(self, branch: CanonicalNode) -> set[CanonicalNode]:
        """What a branch is computed from, back to the nearest sums."""
        found, pending = {branch}, deque([branch])
        while pending and len(found) < 2 * MAX_WALK:
            node = pending.popleft()
            sources = self.flow.activations(node)
            if op_name(node) in TERMS and len(sources) > 1:
                continue
            fresh = [root for root in map(self.flow.unviewed, sources) if root not in found]
            found.update(fresh)
            pending.extend(fresh)
        return {node for node in found if not self.smaller(node)}


class _Branch(_Return):
    """The ways from the end of a branch to the stream that the branch reads: a block of attention and MLP, without sums.

    `down` is the projection that the branch adds. Its MLP's input `x` is what attention returns, perhaps through one linear,
    norms and gates; attention reads the stream, perhaps next to other values.
    """

    def carries(self, node: CanonicalNode) -> bool:
        """As of any region, except that what the branch adds is not mixed over tokens again."""
        return op_name(node) not in MIXES and super().carries(node)

    def is_stream(self, other: CanonicalNode) -> bool:
        """True if attention, whose output `x` is, reads a form of `other`."""
        stream = self.forms(other)
        # A residual sum before `x` is allowed at another width: then `x` is a form of the stream next to other features.
        sums = not self.stream.isdisjoint(stream)
        pending, seen = [(self.x, 0)], {(self.x, 0)}
        while pending and len(seen) < MAX_WALK:
            node, linears = pending.pop()
            is_sum = op_name(node) in TERMS and len(self.flow.activations(node)) > 1
            if node in stream or linears > 1 or (is_sum and not sums):
                continue
            if _mixes_activations(self.flow, node):
                if self.reads(node, stream):
                    return True
                continue
            if not (self.carries(node) or self.flow.is_linear(node)):
                continue
            fresh = {(source, linears + self.flow.is_linear(node)) for source in self.flow.activations(node)} - seen
            seen |= fresh
            pending.extend(fresh)
        return False

    def reads(self, attention: CanonicalNode, stream: set[CanonicalNode]) -> bool:
        """True if attention reads a value of `stream` through at most two linears in a row."""
        pending, least = deque([(attention, 0)]), {attention: 0}  # the fewest linears on a way to each value
        while pending and len(least) < BRANCH:
            node, linears = pending.popleft()
            if node in stream:
                return True
            linears += self.flow.is_linear(node)
            for source in self.flow.activations(node):
                if linears <= least.get(source, 3) - 1 and not _is_integer(source):
                    least[source] = linears
                    pending.append((source, linears))
        return False


def _projected(flow: Dataflow, value: CanonicalNode) -> CanonicalNode | None:
    """The output of the one linear that reads a value, through norms and scales; None if there is no such linear."""
    while len(value.users) == 1:
        (user,) = users_of(value)
        if flow.is_linear(user):
            return user
        if not carries_features(user) or len(flow.activations(user)) > 1:
            break
        value = user
    return None


def _mixes_activations(flow: Dataflow, node: CanonicalNode) -> bool:
    """True for a product of activations over tokens, as attention and scans compute it."""
    return op_name(node) in MIXES and len(flow.activations(node)) > 1


def _is_integer(node: fx.Node) -> bool:
    """True for integer and boolean tensors (ids, indices, masks)."""
    value = node.meta.get("val")
    return is_tensor(node) and not (value.is_floating_point() or value.is_complex())  # type: ignore[union-attr]


def _at(node: CanonicalNode, places: tuple[int, ...]) -> list[CanonicalNode]:
    return [CanonicalNode(arg) for place in places for arg in node.args[place : place + 1] if isinstance(arg, fx.Node)]


def _size(node: fx.Node) -> int:
    return math.prod(shape_of(node)) if is_tensor(node) else 0


def _spreads(node: fx.Node, total: fx.Node) -> bool:
    sizes = (*shape_of(node), *shape_of(total))
    return UNBACKED not in sizes and _size(node) < _size(total)


def _sums_an_axis(node: fx.Node, user: fx.Node) -> bool:
    """True if `user` sums over an axis of `node`."""
    name = op_name(user)
    return name in MIXES or name == "linear" or (name in ADDS_UP and _size(user) < _size(node))


def _one_channel_each(flow: Dataflow, node: fx.Node) -> bool:
    """True for a convolution that mixes no channels: a weighted mean of neighbors."""
    if op_name(node) not in CONVOLUTIONS:
        return False
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight not in flow.constant:
        return False
    channels = {shape_of(value)[1:2] for value in (node, node.all_input_nodes[0])}
    return shape_of(weight)[1:2] == (1,) and channels == {shape_of(weight)[:1]}
