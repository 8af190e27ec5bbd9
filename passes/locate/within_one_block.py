"""A proof that no site is too large: the matrices of one call of a site are in one block of a stack of blocks.

It reads module paths and the order of products, and no rule of dataflow, so that an error in those rules shows here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from memrewrite.passes.graphs.nodes import CanonicalNode
from memrewrite.passes.graphs.provenance import modules_of
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.regions.experts import Mixture
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.rejection import Rejection


class _Block(NamedTuple):
    """One call of a numbered module, such as `layers.3`: a module that runs twice in a forward is two blocks."""

    path: str
    call: str


def in_two_blocks(recorded: RecordedGraph, region: Region, types: Mapping[str, str]) -> Rejection | None:
    """Reject a region whose matrices are in two blocks of one stack, the second computed from the first.

    The blocks are numbered modules of one class in one container, at the first level where the matrices are in several. One
    of the two has at least two of the matrices: `Sequential(Linear, ReLU, Linear)` is an MLP, and no stack. Experts are
    numbered too, but none reads what another computes. `types` are the classes of the modules that run, by path.
    """
    matrices = region.ups if isinstance(region, Mixture) else (*region.ups, region.down)
    block_of = _blocks(recorded, matrices)
    size = Counter(block_of.values())
    sources: dict[CanonicalNode, frozenset[_Block]] = {}  # the blocks whose matrices a value is computed from
    for node in region.inside:
        before = frozenset().union(*(sources.get(source, frozenset()) for source in recorded.flow.activations(node)))
        mine = block_of.get(node)
        if mine is not None:
            for other in before - {mine}:
                if _are_alike(other, mine, types) and size[other] + size[mine] > 2:
                    reason = f"its matrices are in two blocks, `{other.path}` and `{mine.path}`"
                    return Rejection("one block", reason, node)
            before |= {mine}
        sources[node] = before
    return None


def _are_alike(one: _Block, other: _Block, types: Mapping[str, str]) -> bool:
    """True for modules of one class in one container."""
    containers = {block.path.rpartition(".")[0] for block in (one, other)}
    return len(containers) == 1 and types.get(one.path) == types.get(other.path)


def _blocks(recorded: RecordedGraph, matrices: tuple[CanonicalNode, ...]) -> dict[CanonicalNode, _Block]:
    """The block of each matrix in a numbered module, at the first level where there are several blocks; {} if there is none."""
    stacks = {node: _numbered(recorded, node) for node in matrices}
    for level in range(max(map(len, stacks.values()), default=0)):
        at = {node: stack[level] for node, stack in stacks.items() if len(stack) > level}
        if len(set(at.values())) > 1:
            return at
    return {}


def _numbered(recorded: RecordedGraph, node: CanonicalNode) -> list[_Block]:
    """The numbered modules around a node, outermost first; also those whose `forward` was called without `__call__`."""
    calls = [(recorded.paths[call], call) for call, _ in modules_of(node)]
    innermost = max((path for path, _ in calls), key=len, default="").split(".")
    prefixes = [".".join(innermost[: i + 1]) for i, part in enumerate(innermost) if part.isdigit()]
    return [_Block(path, next((call for at, call in calls if at == path), path)) for path in prefixes]
