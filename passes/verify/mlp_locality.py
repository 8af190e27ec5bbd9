"""The *locality* check: one token of a selected MLP's input changed, only that token's output changes. Tried on values.

Flow: which numbers of the input and of the output make up one token, from the graph: the moves between the recorded layout
and the one the matrices read, done on numbered places → the lifted-out MLP runs on random tokens of the recorded shape → one
token at a time is changed, and the outputs are compared bit by bit. MLPs of equal graphs and shapes are tried once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.locate.token_probe import mixes
from memrewrite.passes.models.forward import SEED
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.rewrite.original_mlp import extract
from memrewrite.passes.verify.evidence import BeforeEdit, checked, skipped
from memrewrite.report import Check

TRIED = 8  # tokens changed in one MLP at most: the first, the last, and evenly between, at least one in every row if so many
UNKNOWN = 4  # stands for a size that depends on values, of which the graph tells nothing
ROUTED = 64  # roundings by which tokens may move in a mixture of experts: its rows are multiplied in groups that change


@dataclass(frozen=True)
class Tokens:
    """The places of a tensor, flattened, that make up each token: [tokens, features]. `rows`: the first axis of the tokens."""

    places: Tensor
    rows: int


def locality(evidence: BeforeEdit) -> Check:
    """Does a token's output of every selected MLP depend on that token, and on no other?"""
    if evidence.on_meta:
        return skipped("locality", "the model is on meta: there are no values to change")
    tried: set[Any] = set()
    constant, moved, sites = 0, 0.0, [s.site.path for s in evidence.plan.substitutions]
    for path in sites:
        for found in evidence.locations.found[path]:
            if isinstance(found.region, Mixture) and not mixes(found.recorded, found.region):
                tried.add(path)
                continue  # but for what its router chooses, which may depend on how full the experts are
            call = extract(evidence.model, found)
            alike = _alike(call, found)
            if alike in tried:
                continue
            tried.add(alike)
            seen = _try(call, found)
            if seen.wrong:
                return checked("locality", False, seen.moved, f"in the MLP {path!r} {seen.wrong}")
            constant, moved = constant + seen.constant, max(moved, seen.moved)
    exactly = "keeps every bit" if not moved else f"moves by {moved:.0e} of its size at most, rows being regrouped by routing"
    sentence = f"one token changed, every other {exactly}: {len(sites)} MLPs, {len(tried)} of them distinct"
    return checked("locality", True, moved, sentence + (f"; {constant} give the same for every input" if constant else ""))


@dataclass(frozen=True)
class Trial:
    """How one MLP behaved: what is wrong with it or "", how far other tokens moved, whether it gives always the same."""

    wrong: str
    moved: float = 0.0
    constant: bool = False


def _try(call: nn.Module, found: SiteCall) -> Trial:
    into, out = _tokens_in(found), _tokens_out(found)
    if len(into.places) != len(out.places):
        return Trial(f"{len(into.places)} tokens go in and {len(out.places)} come out")
    value = found.bound.x.meta["val"]
    generator = torch.Generator().manual_seed(SEED)
    x, other = (torch.randn(_shape(value), generator=generator).to(value.device, value.dtype) for _ in range(2))
    allowed = ROUTED * torch.finfo(value.dtype).eps if isinstance(found.region, Mixture) else 0.0
    return trial(call, x, other, into, out, allowed)


def trial(call: Callable[[Tensor], Tensor], x: Tensor, other: Tensor, into: Tokens, out: Tokens, allowed: float) -> Trial:
    """Give single tokens of `x` the values they have in `other`; others' outputs may move by `allowed` of their size."""
    before = _run(call, x)
    size, moved, still = before.float().abs().amax().clamp_min(1e-30), 0.0, 0
    for token in _chosen(into):
        changed = x.flatten().clone()
        changed[into.places[token]] = other.flatten()[into.places[token]]
        after = _run(call, changed.view_as(x))
        own = torch.zeros(len(out.places), dtype=torch.bool, device=x.device)
        own[token] = True
        differs = _differ(before, after).flatten()[out.places].any(1)
        still += not bool(differs[own])
        if differs[~own].any():
            by = (before.float() - after.float()).abs().flatten()[out.places][~own].nan_to_num(torch.inf)
            moved = max(moved, float(by.amax() / size))
            if moved > allowed:
                leak = f"a change of token {token} of {len(out.places)} changes {int(differs[~own].sum())} others"
                return Trial(leak, moved)
    if still and not torch.equal(before, _run(call, other)):
        return Trial(f"{still} tokens give the same output when they are changed", moved)
    return Trial("", moved, bool(still))


def _differ(one: Tensor, other: Tensor) -> Tensor:
    return ~((one == other) | ((one != one) & (other != other)))


def _run(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One call; what draws random numbers in eval mode too draws the same each time."""
    cuda = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(SEED)
        return call(x.clone())


def _chosen(tokens: Tokens) -> list[int]:
    last = len(tokens.places) - 1
    wanted = min(TRIED, max(3, tokens.rows))
    return sorted({round(i * last / (wanted - 1)) for i in range(wanted)})


# ------------------------------------------------------------------------------------------------- tokens and layouts


def _tokens_in(found: SiteCall) -> Tokens:
    """Of the value the MLP is given: its features are the last axis of what the first matrix reads."""
    region, flow = found.region, found.recorded.flow
    reads = [up.all_input_nodes[0] for up in region.ups if flow.unviewed(up.all_input_nodes[0]) is region.x]
    return _tokens(region.x, reads[0] if reads else region.x, _twin(found.recorded, found.bound.x))


def _tokens_out(found: SiteCall) -> Tokens:
    """Of the value the MLP returns: its features are the last axis of what the last matrix gives."""
    down = found.region.down
    return _tokens(down, down, _twin(found.recorded, found.bound.y))


def _tokens(value: fx.Node, read: fx.Node, held: fx.Node) -> Tokens:
    """The places in `held` of each token of `read`, both views of `value`."""
    shape = _shape(value.meta["val"])
    numbered = torch.arange(math.prod(shape)).reshape(shape)
    seen, kept = _viewed(numbered, value, read), _viewed(numbered, value, held).flatten()
    place = torch.empty_like(kept).scatter_(0, kept, torch.arange(len(kept)))
    return Tokens(place[seen.reshape(-1, seen.shape[-1])], seen.shape[0] if seen.ndim > 2 else 1)


def _viewed(numbered: Tensor, value: fx.Node, view: fx.Node) -> Tensor:
    """The moves and views that lead from `value` to `view`, done on a tensor of `value`'s shape."""
    steps: list[fx.Node] = []
    while view is not value:
        steps.append(view)
        view = view.all_input_nodes[0]
    for step in reversed(steps):
        at = step.all_input_nodes[0]
        given: dict[fx.Node, Any] = {n: _plain(n.meta["val"]) for n in step.all_input_nodes if n is not at} | {at: numbered}
        target: Any = step.target
        numbered = target(*fx.map_arg(step.args, given.__getitem__), **fx.map_arg(step.kwargs, given.__getitem__))
    return numbered


def _twin(recorded: RecordedGraph, node: fx.Node) -> fx.Node:
    """The canonical node of a recorded one; of its source, where `canonicalize` dropped it."""
    while node not in recorded.twin:
        node = node.all_input_nodes[0]
    twin: fx.Node = recorded.twin[node]
    return twin


def _shape(value: Any) -> list[int]:
    return [_plain(size) for size in value.shape]


def _plain(size: Any) -> int:
    """A size as in the example; one that is symbolic is not to be pinned down by being looked at."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is not None:
        return int(size.node.hint)
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, UNKNOWN)))


def _alike(call: fx.GraphModule, found: SiteCall) -> Any:
    """What two MLPs have in common that are equal but for the numbers in their weights."""
    number = {node: i for i, node in enumerate(call.graph.nodes)}
    numbered: Any = lambda node: f"%{number[node]}"  # noqa: E731
    ops = tuple(f"{n.target} {fx.map_arg(n.args, numbered)} {fx.map_arg(n.kwargs, numbered)}" for n in call.graph.nodes)
    held = tuple((t.shape, t.dtype, t.device) for t in call.state_dict().values())
    return ops, held, tuple(_shape(found.bound.x.meta["val"])), str(found.bound.x.meta["val"].dtype)
