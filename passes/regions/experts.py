"""Mixtures of experts: regions in which every token chooses its own weights, found whole with router and shared expert.

Flow: an op that chooses (`topk`, `argmax`, ...) or multiplies by a stack of matrices is a trigger → forward from it, the
values that all it leads to passes through are possible outputs → back from one, the first value that explains everything is
the input → the output returns to the stream the input was taken from, and one token's output depends on that token alone,
which is tried on values, because routing reorders rows and no table of ops can tell a reordering undone from one that is not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx

from memrewrite.passes.graphs.dataflow import SPELLED, Dataflow
from memrewrite.passes.graphs.ops import (
    ALONG,
    CHOOSES,
    LAYOUT,
    LOOKS_UP,
    MIXES,
    OTHER_NORMS,
    WEIGHS,
    is_assertion,
    is_pointwise,
    op_name,
)
from memrewrite.passes.graphs.shapes import is_tensor, shape_of
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.residual_stream import returns_to_stream

CUTS = 32  # possible outputs tried for one trigger
WALK = 1 << 15  # nodes walked from one trigger at most; a mixture written out expert by expert is long
SLACK = 256  # nodes of router and norms that may lie before a trigger


@dataclass(frozen=True)
class Mixture(Region):
    """A candidate mixture of experts; `ups` are all its multiplications by weights, `experts` those of routed rows."""

    experts: tuple[fx.Node, ...]

    def middle(self, flow: Dataflow) -> Region | None:
        """One expert by itself: from its first matrices to its last, when that is how the routed rows are multiplied."""
        if not self.experts:
            return None
        last, inside = self.experts[-1], set(self.inside)
        found: set[fx.Node] = set()
        pending = [source for source in flow.activations(last) if source in inside][:1]  # the rest says whose row is whose
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(s for s in flow.activations(node) if node not in self.experts and s in inside)
        ups = tuple(node for node in self.experts if node in found)
        return Region(self.x, last, tuple(sorted(found | {last}, key=flow.order.__getitem__)), ups) if ups else None

    def active(self, flow: Dataflow) -> int:
        """Multiplications by weights for one token, as the graph does them."""
        return sum(_multiplications(flow, node) for node in self.ups) // math.prod(shape_of(self.x)[:-1])


def _multiplications(flow: Dataflow, node: fx.Node) -> int:
    shape = shape_of(node)
    if _draws(flow, node):
        return math.prod(shape)  # each matrix drawn multiplies one row
    matrix = shape_of(node.args[1] if flow.is_linear(node) else _stacks(flow, node)[0])[-2:]  # type: ignore[arg-type]
    return math.prod(shape) * (matrix[0] if matrix[1] == shape[-1] else matrix[1])


def mixtures(flow: Dataflow, is_local: Callable[[Mixture], bool] = lambda _: True) -> Iterator[tuple[Mixture, ...]]:
    """Every region that looks like a mixture of experts, returns to its stream and `is_local`, in order.

    Each comes as a tuple: ends where it may, narrowest first, before or after a shared expert is added.
    """
    done: set[fx.Node] = set()
    given = _choices(flow)
    for node in flow.graph.nodes:
        if node in done or not _is_trigger(flow, node):
            continue
        found = tuple({region.down: region for region in _around(flow, node, given)}.values())
        if found and is_local(found[0]):
            done.update(*(region.inside for region in found))
            given |= _handed_on(found)
            yield found


def _handed_on(found: tuple[Mixture, ...]) -> set[fx.Node]:
    """What a router hands to the next: numbers of its own that are read outside of its mixture, and views of them."""
    inside = {node for region in found for node in region.inside}
    inner = [node for node in found[0].inside[:-1] if any(user not in inside for user in node.users)]
    views = {user for node in inner for user in node.users if user not in inside and op_name(user) in LAYOUT}
    return {*inner, *views}


def _choices(flow: Dataflow) -> set[fx.Node]:
    """Numbers and masks that the model is given, and what is made of them alone: they choose experts, and are no features."""
    found, masks = set[fx.Node](), set[fx.Node]()
    for node in flow.graph.nodes:
        if node in flow.constant or not is_tensor(node):
            continue
        features = node.meta["val"].is_floating_point() or node.meta["val"].is_complex()
        if node.op == "placeholder":
            (masks if features else found).update(() if features and _is_stream(flow, node) else [node])
        elif all(s in found or s in masks for s in flow.activations(node)) and (op_name(node) in LAYOUT or not features):
            (masks if features else found).add(node)
    return found


def _is_stream(flow: Dataflow, given: fx.Node) -> bool:
    """Whether an input of the graph is features: multiplied by a weight, or normed."""
    pending, seen = [given], {given}
    while pending:
        for user in pending.pop().users:
            if flow.is_linear(user) or op_name(user) in ALONG | OTHER_NORMS:
                return True
            if user not in seen and flow.unviewed(user) is given:
                seen.add(user)
                pending.append(user)
    return False


def _is_trigger(flow: Dataflow, node: fx.Node) -> bool:
    if node.op != "call_function" or node in flow.constant:
        return False
    return op_name(node) in CHOOSES or is_stacked(flow, node) or _draws(flow, node)


def is_stacked(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a node multiplies activations by a stack of matrices: one for each expert."""
    name = op_name(node)
    others = ("conv", "index", "scatter", "scaled_dot_product")
    if is_pointwise(node) or name in LAYOUT | ALONG | OTHER_NORMS | LOOKS_UP or name.startswith(others):
        return False
    return bool(flow.activations(node) and any(flow.weights(stack) for stack in _stacks(flow, node)))


def _stacks(flow: Dataflow, node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source in flow.constant and len(shape_of(source)) > 2]


def _draws(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a node looks matrices up by numbers that depend on the input; or rows, each a small expert, by chosen ones."""
    table = node.all_input_nodes[0] if node.all_input_nodes else None
    if op_name(node) not in LOOKS_UP or table not in flow.constant or not flow.weights(table):
        return False
    rows = len(shape_of(table)) == 2 and _is_chosen(flow, node.all_input_nodes[-1]) and _is_multiplied(node)
    return len(shape_of(table)) > 2 or rows


def _is_multiplied(node: fx.Node) -> bool:
    """Whether a value is a factor of products, and not only a term of sums: biases are looked up as well."""
    users = [user for user in node.users if op_name(user) in LAYOUT]
    return any(op_name(user) in MIXES | {"mul"} for user in node.users) or any(map(_is_multiplied, users))


def _is_chosen(flow: Dataflow, numbers: fx.Node) -> bool:
    """Whether numbers come from an op that chooses."""
    pending, seen = [numbers], {numbers}
    while pending and len(seen) < SPELLED:
        node = pending.pop()
        if op_name(node) in CHOOSES:
            return True
        fresh = [source for source in flow.activations(node) if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _around(flow: Dataflow, trigger: fx.Node, given: Collection[fx.Node]) -> Iterator[Mixture]:
    """The regions around a trigger, narrowest first, all from one input."""
    x: fx.Node | None = None
    for y, distance in _cuts(flow, trigger):
        if x is not None and _is_residual(flow, x, y):
            return
        region = _back(flow, y, distance + SLACK, x, given)
        if region is None:
            continue
        x = region.x
        yield region


def _cuts(flow: Dataflow, start: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """The few first values, in order, that everything computed from `start` goes through, and the nodes walked to each."""
    frontier, seen, cuts, walked = [(flow.order[start], start)], {start}, 0, 0
    while frontier and walked < WALK and cuts < CUTS:
        _, node = heapq.heappop(frontier)
        if not frontier and node is not start and is_tensor(node):
            cuts += 1
            yield node, walked
        walked += 1
        for user in node.users:
            if user not in seen and user.op == "call_function" and not is_assertion(user) and _has_value(user):
                seen.add(user)
                heapq.heappush(frontier, (flow.order[user], user))


def _has_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, list, tuple))


def _back(flow: Dataflow, y: fx.Node, budget: int, wanted: fx.Node | None, given: Collection[fx.Node] = ()) -> Mixture | None:
    """The region that ends in `y`: back until all but what is `given` comes from one value of the stream (from `wanted`)."""
    y = flow.unviewed(y)
    inside, aside = set[fx.Node](), set[fx.Node]()
    pending: dict[fx.Node, None] = {y: None}
    while pending and len(inside) <= budget:
        at = max(pending, key=flow.order.__getitem__)
        if len(pending) == 1 and at is not y and (wanted is None or at is wanted) and _fits(flow, at, y, inside):
            return _mixture(flow, at, y, inside, aside)
        del pending[at]
        inside.add(at)
        if not flow.activations(at):
            return None  # the model's own input: the mask of an attention, say
        for source in flow.activations(at):
            if source in given:
                aside.add(source)
                continue
            root = flow.unviewed(source)
            while source is not root:
                inside.add(source)
                source = source.all_input_nodes[0]
            pending[root] = None
    return None


def _mixture(flow: Dataflow, x: fx.Node, y: fx.Node, inside: set[fx.Node], aside: Iterable[fx.Node] = ()) -> Mixture:
    ordered = tuple(sorted((node for node in inside if flow.unviewed(node) is not x), key=flow.order.__getitem__))
    products = _products(flow, ordered)
    stacked = tuple(node for node in products if not flow.is_linear(node))
    before = set(takewhile(lambda node: op_name(node) not in CHOOSES, ordered))
    experts = stacked or tuple(node for node in products if node not in before)
    return Mixture(x, y, ordered, products, experts, given=frozenset(aside))


def _fits(flow: Dataflow, x: fx.Node, y: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the nodes between two values choose among experts, and the second is what the first's stream is added to."""
    before, after = shape_of(x), shape_of(y)
    if len(before) < 2 or len(after) < 2 or math.prod(before) != math.prod(after) or before[-1] != after[-1]:
        return False
    return _chooses(flow, inside) and len(_mixture(flow, x, y, inside).experts) > 1 and returns_to_stream(flow, x, y)


def _chooses(flow: Dataflow, nodes: Collection[fx.Node]) -> bool:
    """Whether a number of `nodes` says which expert: an op that chooses, or a weight for each expert of a stack."""
    stacks = {shape_of(source)[0] for node in nodes if is_stacked(flow, node) for source in _stacks(flow, node)}
    stacks |= {shape_of(node.all_input_nodes[0])[0] for node in nodes if _draws(flow, node)}
    weighs = [node for node in nodes if op_name(node) in WEIGHS]
    return any(op_name(n) in CHOOSES for n in nodes) or any(shape_of(n)[-1:] == (stack,) for n in weighs for stack in stacks)


def _products(flow: Dataflow, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The multiplications by weights, in order."""
    found = [node for node in nodes if flow.is_linear(node) or is_stacked(flow, node) or _draws(flow, node)]
    return tuple(sorted(found, key=flow.order.__getitem__))


def _is_residual(flow: Dataflow, x: fx.Node, y: fx.Node) -> bool:
    """Whether `y` is the sum of a region's output with the stream it was taken from: beyond it the next layer begins."""
    return op_name(flow.unviewed(y)) in ("add", "sub") and not returns_to_stream(flow, x, y)
