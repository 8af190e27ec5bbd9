"""Finds mixtures of experts: regions in which every token selects its own weights, with their router and shared expert.

Flow: an op that selects (`topk`, `argmax`, ...) or multiplies by a stack of matrices is a trigger → forward from it, the
values through which all paths pass (dominators) are possible outputs → back from an output, the first value from which
everything inside is computed is the input → the output returns to the residual stream that the input was taken from, and one
token's output depends on that token alone. The latter is tested on values (`is_local`): routing reorders rows, and a table of
ops cannot show whether every reordering is undone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch

from memrewrite.passes.graphs.dataflow import MAX_ACTIVATION_OPS, Dataflow
from memrewrite.passes.graphs.nodes import CanonicalNode, canonical_nodes, inputs_of, users_of
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
from memrewrite.passes.regions.residual_steps import spans_blocks
from memrewrite.passes.regions.residual_stream import adds_stream, returns_to_stream

CUTS = 32  # possible outputs tried for one trigger, at most
WALK = 1 << 15  # nodes visited from one trigger, at most; a mixture written as a loop over its experts is long
SLACK = 256  # nodes of router and norms that may precede a trigger


@dataclass(frozen=True)
class Mixture(Region):
    """A candidate mixture of experts. `ups` are all its products with weights, `experts` those that multiply routed rows."""

    experts: tuple[CanonicalNode, ...]

    def middle(self, flow: Dataflow) -> Region | None:
        """One expert as a region, from its first matrices to its last; None if the routed rows are multiplied another way."""
        if not self.experts:
            return None
        last, inside = self.experts[-1], set(self.inside)
        found: set[CanonicalNode] = set()
        pending = [source for source in flow.activations(last) if source in inside][:1]  # other operands are the routing
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(s for s in flow.activations(node) if node not in self.experts and s in inside)
        ups = tuple(node for node in self.experts if node in found)
        return Region(self.x, last, tuple(sorted(found | {last}, key=flow.order.__getitem__)), ups) if ups else None

    def active(self, flow: Dataflow) -> int:
        """Multiplications by weights for one token, as the graph computes them."""
        tokens = math.prod(shape_of(self.x)[:-1])
        return sum(_multiplications(flow, node) for node in self.ups) // tokens


def _multiplications(flow: Dataflow, node: CanonicalNode) -> int:
    shape = shape_of(node)
    if _selects_weights(flow, node):
        return math.prod(shape)  # each selected matrix multiplies one row
    matrix = shape_of(node.args[1] if flow.is_linear(node) else _stacks(flow, node)[0])[-2:]  # type: ignore[arg-type]
    return math.prod(shape) * (matrix[0] if matrix[1] == shape[-1] else matrix[1])


def mixtures(flow: Dataflow, is_local: Callable[[Mixture], bool] = lambda _: True) -> Iterator[tuple[Mixture, ...]]:
    """Every mixture of experts that returns to its residual stream and is `is_local`, in graph order.

    Yields a tuple of regions for each mixture, one for each possible output, narrowest first: a shared expert, for example,
    may or may not be part of it.
    """
    done: set[CanonicalNode] = set()
    extra_inputs = _choices(flow)
    for node in canonical_nodes(flow.graph):
        if node in done or not _is_trigger(flow, node):
            continue
        found = tuple({region.down: region for region in _around(flow, node, extra_inputs)}.values())
        if found and is_local(found[0]):
            done.update(*(region.inside for region in found))
            extra_inputs |= _router_outputs(found)
            yield found


def _router_outputs(found: tuple[Mixture, ...]) -> set[CanonicalNode]:
    """Routing outputs that are read after the mixture, and views of them: the next router may take them as extra inputs."""
    inside = {node for region in found for node in region.inside}
    inner = [node for node in found[0].inside[:-1] if any(user not in inside for user in users_of(node))]
    views = {user for node in inner for user in users_of(node) if user not in inside and op_name(user) in LAYOUT}
    return {*inner, *views}


def _choices(flow: Dataflow) -> set[CanonicalNode]:
    """Integer inputs and masks of the model, and what is computed from these alone: routers may read them.

    A floating-point input that no weight multiplies and no norm reads counts as a mask.
    """
    found, masks = set[CanonicalNode](), set[CanonicalNode]()
    for node in canonical_nodes(flow.graph):
        if node in flow.constant or not is_tensor(node):
            continue
        features = node.meta["val"].is_floating_point() or node.meta["val"].is_complex()
        if node.op == "placeholder":
            (masks if features else found).update(() if features and _is_stream(flow, node) else [node])
        elif all(s in found or s in masks for s in flow.activations(node)) and (op_name(node) in LAYOUT or not features):
            (masks if features else found).add(node)
    return found


def _is_stream(flow: Dataflow, value: CanonicalNode) -> bool:
    """True if an input of the graph contains features: a weight multiplies it, or a norm reads it."""
    pending, seen = [value], {value}
    while pending:
        for user in users_of(pending.pop()):
            if flow.is_linear(user) or op_name(user) in ALONG | OTHER_NORMS:
                return True
            if user not in seen and flow.unviewed(user) is value:
                seen.add(user)
                pending.append(user)
    return False


def _is_trigger(flow: Dataflow, node: CanonicalNode) -> bool:
    if node.op != "call_function" or node in flow.constant:
        return False
    return op_name(node) in CHOOSES or is_stacked(flow, node) or _selects_weights(flow, node)


def is_stacked(flow: Dataflow, node: CanonicalNode) -> bool:
    """True if a node multiplies activations by a stack of matrices, one for each expert."""
    name = op_name(node)
    others = ("conv", "index", "scatter", "scaled_dot_product")
    if is_pointwise(node) or name in LAYOUT | ALONG | OTHER_NORMS | LOOKS_UP or name.startswith(others):
        return False
    return bool(flow.activations(node) and any(flow.weights(stack) for stack in _stacks(flow, node)))


def _stacks(flow: Dataflow, node: CanonicalNode) -> list[CanonicalNode]:
    return [source for source in inputs_of(node) if source in flow.constant and len(shape_of(source)) > 2]


def _selects_weights(flow: Dataflow, node: CanonicalNode) -> bool:
    """True if a node selects matrices by indices that depend on the input, or rows (one-row experts) by selected indices."""
    table = inputs_of(node)[0] if inputs_of(node) else None
    if op_name(node) not in LOOKS_UP or table not in flow.constant or not flow.weights(table):
        return False
    rows = len(shape_of(table)) == 2 and _is_selected(flow, inputs_of(node)[-1]) and _is_multiplied(node)
    return len(shape_of(table)) > 2 or rows


def _is_multiplied(node: CanonicalNode) -> bool:
    """True if a value is a factor of a product; selected biases are only terms of sums."""
    users = [user for user in users_of(node) if op_name(user) in LAYOUT]
    return any(op_name(user) in MIXES | {"mul"} for user in users_of(node)) or any(map(_is_multiplied, users))


def _is_selected(flow: Dataflow, indices: CanonicalNode) -> bool:
    """True if indices are computed from the output of an op that selects (`topk`, `argmax`, ...)."""
    pending, seen = [indices], {indices}
    while pending and len(seen) < MAX_ACTIVATION_OPS:
        node = pending.pop()
        if op_name(node) in CHOOSES:
            return True
        fresh = [source for source in flow.activations(node) if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _around(flow: Dataflow, trigger: CanonicalNode, extra_inputs: Collection[CanonicalNode]) -> Iterator[Mixture]:
    """The regions that contain a trigger, narrowest first, all with the same input."""
    x: CanonicalNode | None = None
    for y, distance in _cuts(flow, trigger):
        if x is not None and _is_residual(flow, x, y):
            return
        region = _back(flow, y, distance + SLACK, x, extra_inputs)
        if region is None:
            continue
        if flow.fragment and adds_stream(flow, region.x, y):
            return  # elsewhere `returns_to_stream` is false
        x = region.x
        yield region


def _cuts(flow: Dataflow, start: CanonicalNode) -> Iterator[tuple[CanonicalNode, int]]:
    """The first values, in order, that all paths from `start` pass through, each with the number of nodes visited so far."""
    frontier, seen, cuts, walked = [(flow.order[start], start)], {start}, 0, 0
    while frontier and walked < WALK and cuts < CUTS:
        _, node = heapq.heappop(frontier)
        if not frontier and node is not start and is_tensor(node):
            cuts += 1
            yield node, walked
        walked += 1
        for user in users_of(node):
            if user not in seen and user.op == "call_function" and not is_assertion(user) and _has_value(user):
                seen.add(user)
                heapq.heappush(frontier, (flow.order[user], user))


def _has_value(node: CanonicalNode) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, list, tuple))


def _back(
    flow: Dataflow, y: CanonicalNode, budget: int, wanted: CanonicalNode | None, extra_inputs: Collection[CanonicalNode] = ()
) -> Mixture | None:
    """The region that ends in `y`, or None: back until everything is computed from one value (`wanted`, if not None).

    Values in `extra_inputs` may be read too. `budget` bounds the number of nodes inside.
    """
    y = flow.unviewed(y)
    inside, extra = set[CanonicalNode](), set[CanonicalNode]()
    pending: dict[CanonicalNode, None] = {y: None}
    while pending and len(inside) <= budget:
        at = max(pending, key=flow.order.__getitem__)
        if len(pending) == 1 and at is not y and (wanted is None or at is wanted) and _fits(flow, at, y, inside):
            return _mixture(flow, at, y, inside, extra)
        del pending[at]
        inside.add(at)
        if not flow.activations(at):
            return None  # an input of the model, e.g. an attention mask
        for source in flow.activations(at):
            if source in extra_inputs:
                extra.add(source)
                continue
            root = flow.unviewed(source)
            while source is not root:
                inside.add(source)
                source = inputs_of(source)[0]
            pending[root] = None
    return None


def _mixture(
    flow: Dataflow, x: CanonicalNode, y: CanonicalNode, inside: set[CanonicalNode], extra: Iterable[CanonicalNode] = ()
) -> Mixture:
    ordered = tuple(sorted((node for node in inside if flow.unviewed(node) is not x), key=flow.order.__getitem__))
    products = _products(flow, ordered)
    stacked = tuple(node for node in products if not flow.is_linear(node))
    before = set(takewhile(lambda node: op_name(node) not in CHOOSES, ordered))
    experts = stacked or tuple(node for node in products if node not in before)
    return Mixture(x, y, ordered, products, experts, extra_inputs=frozenset(extra))


def _fits(flow: Dataflow, x: CanonicalNode, y: CanonicalNode, inside: set[CanonicalNode]) -> bool:
    """True if the nodes between `x` and `y` are a mixture of experts; whether it is local is not tested here."""
    before, after = shape_of(x), shape_of(y)
    if len(before) < 2 or len(after) < 2 or math.prod(before) != math.prod(after) or before[-1] != after[-1]:
        return False
    if not _chooses(flow, inside):
        return False
    mixture = _mixture(flow, x, y, inside)
    if len(mixture.experts) < 2 or not returns_to_stream(flow, x, y):
        return False
    return spans_blocks(flow, x, y, mixture.inside, mixture.ups) is None


def _chooses(flow: Dataflow, nodes: Collection[CanonicalNode]) -> bool:
    """True if some of `nodes` select experts: by an op that selects, or by a weight for each matrix of a stack."""
    stacks = {shape_of(source)[0] for node in nodes if is_stacked(flow, node) for source in _stacks(flow, node)}
    stacks |= {shape_of(inputs_of(node)[0])[0] for node in nodes if _selects_weights(flow, node)}
    weights = [node for node in nodes if op_name(node) in WEIGHS]
    return any(op_name(n) in CHOOSES for n in nodes) or any(shape_of(n)[-1:] == (stack,) for n in weights for stack in stacks)


def _products(flow: Dataflow, nodes: Iterable[CanonicalNode]) -> tuple[CanonicalNode, ...]:
    """The products with weights among `nodes`, in graph order."""
    found = [node for node in nodes if flow.is_linear(node) or is_stacked(flow, node) or _selects_weights(flow, node)]
    return tuple(sorted(found, key=flow.order.__getitem__))


def _is_residual(flow: Dataflow, x: CanonicalNode, y: CanonicalNode) -> bool:
    """True if `y` is the residual sum after a region that reads `x`: the region ends before it."""
    return op_name(flow.unviewed(y)) in ("add", "sub") and not returns_to_stream(flow, x, y)
