"""The *locality* check: if one token of a selected MLP's input changes, only that token's output changes. Tried on values.

Flow: which elements of input and output make up one token, from the graph: the layout ops between the recorded layout and the
one that the matrices read, applied to numbered elements → the extracted MLP runs on random tokens of the recorded shape →
`token_perturbation`, with outputs compared bit by bit. MLPs of equal graphs and shapes are tried once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.errors import ModelError
from memrewrite.passes.graphs.dataflow import nodes_between
from memrewrite.passes.graphs.evaluate import evaluate
from memrewrite.passes.graphs.nodes import CanonicalNode, RecordedNode, inputs_of
from memrewrite.passes.graphs.shapes import SAMPLE, shape_of, sizes_of
from memrewrite.passes.locate.located_sites import SiteCall
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.locate.token_perturbation import Call, Tokens, run_repeatable, trial
from memrewrite.passes.locate.token_probe import mixes
from memrewrite.passes.models.process_state import SEED
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.rewrite.original_mlp import extract
from memrewrite.passes.verify.evidence import BeforeEdit, checked, skipped
from memrewrite.report import Check

# How many rounding errors other tokens may move by in a mixture of experts: its rows are multiplied in groups that change.
ROUTED = 64


NOT_TOKENWISE = (
    "a layer sees one token at a time, so it cannot take the place of what mixes tokens: leave this MLP out of `where`; that "
    "it was located is a defect of memrewrite: please report the model"
)


@dataclass(frozen=True)
class Outcome:
    """What is wrong with one MLP or "", how far other tokens moved, and whether all inputs give the same output."""

    wrong: str
    moved: float = 0.0
    constant: bool = False


def locality(evidence: BeforeEdit) -> Check:
    """Check that a token's output of every selected MLP depends on that token, and on no other.

    Raises `ModelError` where no MLP gets a token from the example inputs.
    """
    if evidence.on_meta:
        return skipped("locality", "the model is on meta: there are no values to change")
    tried: set[Any] = set()
    idle: list[str] = []  # MLPs that get no token from these inputs
    constant, moved, sites = 0, 0.0, [s.site.path for s in evidence.plan.substitutions]
    for path in sites:
        for found in evidence.locations.found[path]:
            if isinstance(found.region, Mixture) and not mixes(found.recorded, found.region):
                tried.add(path)
                continue  # its choice of experts may depend on other tokens: on how full the experts are
            if 0 in sizes_of(found.bound.x.meta["val"], SAMPLE):
                idle.append(path)
                continue
            call = extract(evidence.model, found)
            key = _key(call, found)
            if key in tried:
                continue
            tried.add(key)
            outcome = _outcome(call, found)
            if outcome.wrong:
                return checked("locality", False, outcome.moved, f"in the MLP {path!r} {outcome.wrong}", NOT_TOKENWISE)
            constant, moved = constant + outcome.constant, max(moved, outcome.moved)
    if idle and not tried:
        hint = "give inputs with a batch and a length of at least 1"
        raise ModelError("the MLPs get no token from the example inputs: nothing can be verified", where=idle[0], hint=hint)
    exactly = "keeps every bit" if not moved else f"moves by {moved:.0e} of its size at most, rows being regrouped by routing"
    sentence = f"one token changed, every other {exactly}: {len(sites)} MLPs, {len(tried)} of them distinct"
    sentence += f"; {len(idle)} get no token from these inputs" if idle else ""
    return checked("locality", True, moved, sentence + (f"; {constant} give the same for every input" if constant else ""))


def _outcome(call: nn.Module, found: SiteCall) -> Outcome:
    into, out = _tokens_in(found), _tokens_out(found)
    if len(into.places) != len(out.places):
        return Outcome(f"{len(into.places)} tokens go in and {len(out.places)} come out")
    value = found.bound.x.meta["val"]
    generator = torch.Generator().manual_seed(SEED)
    shape = sizes_of(value, SAMPLE)
    x, other = (torch.randn(shape, generator=generator).to(value.device, value.dtype) for _ in range(2))
    allowed = ROUTED * torch.finfo(value.dtype).eps if isinstance(found.region, Mixture) else 0.0
    return outcome_of(call, x, other, into, out, allowed)


def outcome_of(call: Call, x: Tensor, other: Tensor, into: Tokens, out: Tokens, allowed: float) -> Outcome:
    """A trial of `call` with tokens of `x` replaced by those of `other`; see `trial` for the other arguments."""
    before = run_repeatable(call, x)
    seen = trial(call, x, other, before, into, out, allowed)
    if seen.leak:
        return Outcome(seen.leak, seen.others)
    if seen.still and not torch.equal(before, run_repeatable(call, other)):
        return Outcome(f"{seen.still} tokens give the same output when they are changed", seen.others)
    return Outcome("", seen.others, bool(seen.still))


# ------------------------------------------------------------------------------------------------- tokens and layouts


def _tokens_in(found: SiteCall) -> Tokens:
    """The tokens of the MLP's input: its features are the last axis of what the first matrix reads."""
    region, flow = found.region, found.recorded.flow
    reads = [up.all_input_nodes[0] for up in region.ups if flow.unviewed(up.all_input_nodes[0]) is region.x]
    return _tokens(region.x, reads[0] if reads else region.x, _twin(found.recorded, found.bound.x))


def _tokens_out(found: SiteCall) -> Tokens:
    """The tokens of the MLP's output: its features are the last axis of what the last matrix returns."""
    down = found.region.down
    return _tokens(down, down, _twin(found.recorded, found.bound.y))


def _tokens(value: fx.Node, read: fx.Node, recorded: fx.Node) -> Tokens:
    """The places in `recorded` of each token of `read`, both views of `value`."""
    shape = shape_of(value, SAMPLE)
    numbered = torch.arange(math.prod(shape)).reshape(shape)
    by_token = _viewed(numbered, value, read)  # [..., features]
    order = _viewed(numbered, value, recorded).flatten()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return Tokens(place[by_token.reshape(-1, by_token.shape[-1])], by_token.shape[0] if by_token.ndim > 2 else 1)


def _viewed(numbered: Tensor, value: fx.Node, view: fx.Node) -> Tensor:
    """The layout ops that lead from `value` to `view`, applied to a tensor of `value`'s shape."""
    moved: Tensor = evaluate(nodes_between(value, view), {value: numbered})[view]
    return moved


def _twin(recorded: RecordedGraph, node: RecordedNode) -> CanonicalNode:
    """The canonical node of a recorded one, or that of its input if `canonicalize` dropped it."""
    while node not in recorded.twin:
        node = inputs_of(node)[0]
    return recorded.twin[node]


def _key(call: fx.GraphModule, found: SiteCall) -> Any:
    """Equal for two MLPs that differ only in the values of their weights."""
    number = {node: i for i, node in enumerate(call.graph.nodes)}
    numbered: Any = lambda node: f"%{number[node]}"  # noqa: E731
    ops = tuple(f"{n.target} {fx.map_arg(n.args, numbered)} {fx.map_arg(n.kwargs, numbered)}" for n in call.graph.nodes)
    tensors = tuple((t.shape, t.dtype, t.device) for t in call.state_dict().values())
    value = found.bound.x.meta["val"]
    return ops, tensors, sizes_of(value, SAMPLE), str(value.dtype)
