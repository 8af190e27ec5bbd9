"""No site is larger than one block: the regions that are found, and regions made too large by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Block, D, Gated, Stack, Up, ids
from mixtures import MIXTURES
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.passes.capture.capture import capture
from memrewrite.passes.graphs.nodes import CanonicalNode, canonical_nodes
from memrewrite.passes.locate import locate as locate_file
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.locate.recorded_graph import RecordedGraph
from memrewrite.passes.locate.sites import module_types
from memrewrite.passes.locate.within_one_block import in_two_blocks
from memrewrite.passes.regions import experts, region
from memrewrite.passes.regions.region import Region
from memrewrite.passes.regions.rejection import Rejection


class Dense(nn.Module):
    """A mixture in which every expert computes every token."""

    def __init__(self, experts: int, width: int = 24, first: str = "bsd,edf->bsef") -> None:
        super().__init__()
        self.first, self.router = first, nn.Linear(D, experts)
        self.up = nn.Parameter(torch.randn(experts, D, width) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, width, D) * 0.1)

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(torch.einsum(self.first, x, self.up))

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("bsef,efd->bsed", self.hidden(x), self.down)
        return (each * self.router(x).softmax(-1).unsqueeze(-1)).sum(-2)


class DenseGated(Dense):
    """Each expert is gated, by the halves of its own features."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts, 48)
        self.down = nn.Parameter(torch.randn(experts, 24, D) * 0.1)

    def hidden(self, x: Tensor) -> Tensor:
        gate, value = torch.einsum(self.first, x, self.up).chunk(2, -1)
        return F.silu(gate) * value


class DenseFirst(Dense):
    """The experts' axis is the first, as `bmm` wants it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        hidden = F.gelu(torch.einsum("td,edf->etf", flat, self.up))
        each = torch.bmm(hidden, self.down) * self.router(flat).softmax(-1).T.unsqueeze(-1)
        return each.sum(0).view(x.shape)


class DenseAtOnce(Dense):
    """The last einsum multiplies, weighs and sums."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsef,efd,bse->bsd", self.hidden(x), self.down, self.router(x).softmax(-1))


class DenseOfOne(Dense):
    """Every expert computes every token; of the outputs one is kept."""

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("bsef,efd->bsed", self.hidden(x), self.down)
        return (each * F.one_hot(self.router(x).argmax(-1), each.shape[-2]).unsqueeze(-1)).sum(-2)


class NoAttention(nn.Module):
    """A block of a norm and an MLP alone."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def built(make: Callable[[], nn.Module], depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Stack(make, depth).eval()


@pytest.mark.parametrize("block", [Block, NoAttention])
@pytest.mark.parametrize(
    ("mlp", "count"),
    [
        *((mlp, n) for mlp in (Dense, DenseGated) for n in (1, 2, 3, 4)),
        *((mlp, n) for mlp in (DenseFirst, DenseAtOnce, DenseOfOne) for n in (2, 3, 4)),
    ],
)
def test_a_dense_mixture_is_one_site_a_block(block: Any, count: int, mlp: Any) -> None:
    located = memrewrite.inspect(built(lambda: block(mlp(count)), 3), ids())
    assert [(site.path, site.pattern, site.d_hidden) for site in located.sites] == [
        (f"blocks.{i}.mlp", "moe", 24) for i in range(3)
    ]
    assert all(len(site.parameters) == 4 and site.bindings[0].kind == "module" for site in located.sites)


@pytest.mark.parametrize("mlp", [Dense, DenseGated, DenseAtOnce])
def test_one_dense_mixture_in_every_block_is_one_site(mlp: Any) -> None:
    torch.manual_seed(0)
    tied = mlp(2)
    located = memrewrite.inspect(built(lambda: NoAttention(tied), 3), ids())
    assert [(site.path, site.pattern, site.calls) for site in located.sites] == [("blocks.0.mlp", "moe", 3)]


@pytest.mark.parametrize("block", [Block, NoAttention])
@pytest.mark.parametrize("equation", ["bsd,cdf->cbsf", "bsd,cdf->bscf", "bsd,dcf->bscf", "bsd,cfd->bscf"])
def test_a_gate_and_its_value_in_one_parameter_are_no_experts(block: Any, equation: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = ["cdf".index(i) for i in equation.partition(",")[2].partition("-")[0]]
            self.both = nn.Parameter(torch.randn([(2, D, 48)[i] for i in shape]) * 0.1)
            self.down = nn.Linear(48, D)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = torch.einsum(equation, x, self.both).unbind(equation.partition(">")[2].index("c"))
            return self.down(F.silu(gate) * value)

    located = memrewrite.inspect(built(lambda: block(Pair())), ids())
    assert [(site.path, site.pattern, site.activation) for site in located.sites] == [
        (f"blocks.{i}.mlp", "gated_packed", "silu") for i in range(2)
    ]


def test_a_layer_in_place_of_two_experts() -> None:
    model = built(lambda: NoAttention(Dense(2)))
    rule = {"where": {"pattern": "moe"}, "with": "memory_plus", "pool": "w", "placement": "replace"}
    recipe = {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}
    report = memrewrite.apply(model, recipe, ids())
    assert report.ok
    assert not [name for name in model.state_dict() if ".up" in name or ".router" in name]


# -------------------------------------------------------------------------------------------- regions that are too large


def located(make: Callable[[], nn.Module], depth: int = 2) -> LocatedSites:
    return locate(capture(built(make, depth), ids()))


def joined(recorded: RecordedGraph, regions: Iterable[Region]) -> Region:
    """One region from the input of the first to the output of the last, with everything between."""
    first, *_, last = regions
    flow = recorded.flow
    inside, pending = {last.down}, [last.down]
    while pending:
        for source in flow.activations(pending.pop()):
            if source not in inside and flow.order[source] > flow.order[first.x]:
                inside.add(source)
                pending.append(source)
    ordered = tuple(sorted(inside, key=flow.order.__getitem__))
    ups = tuple(node for node in ordered if node is not last.down and (flow.is_linear(node) or experts.is_stacked(flow, node)))
    return Region(first.x, last.down, ordered, ups)


def answer(found: LocatedSites, *paths: str) -> Rejection | None:
    (recorded,) = found.recorded.values()
    wrong = joined(recorded, [found.found[path][0].region for path in paths])
    return in_two_blocks(recorded, wrong, module_types(recorded))


@pytest.mark.parametrize("mlp", [Up, Gated, lambda: Dense(2), lambda: Dense(4)])
@pytest.mark.parametrize("block", [Block, NoAttention])
def test_a_region_over_two_blocks_is_rejected(mlp: Any, block: Any) -> None:
    rejection = answer(located(lambda: block(mlp())), "blocks.0.mlp", "blocks.1.mlp")
    assert rejection is not None
    assert rejection.rule == "one block"
    assert "`blocks.0` and `blocks.1`" in rejection.reason


def test_blocks_of_stages_and_blocks_called_twice() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(NoAttention(Up()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    stages = located(Stage)
    assert answer(stages, "blocks.0.parts.0.mlp", "blocks.0.parts.1.mlp") is not None
    shared = NoAttention(Up())
    found = located(lambda: shared)
    (recorded,) = found.recorded.values()
    wrong = joined(recorded, [call.region for call in found.found["blocks.0.mlp"]])
    assert in_two_blocks(recorded, wrong, module_types(recorded)) is not None


@pytest.mark.parametrize("name", [*MIXTURES, *(name for name in FAMILIES if not FAMILIES[name].misses)][:40])
def test_what_is_found_is_in_one_block(name: str) -> None:
    found = located(MIXTURES[name]) if name in MIXTURES else locate(capture(FAMILIES[name].build(), FAMILIES[name].inputs()))
    assert found.sites
    for calls in found.found.values():
        for call in calls:
            assert in_two_blocks(call.recorded, call.region, module_types(call.recorded)) is None


def test_matrices_in_a_numbered_container_are_no_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self, d: int, out: int, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(d, out), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.linear(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)
            self.mlp = nn.Sequential(Layer(D, 48, F.gelu), Layer(48, D, lambda x: x))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    sites = memrewrite.inspect(Model().eval(), (torch.randn(2, 5, D),)).sites
    assert [(site.path, site.pattern) for site in sites] == [("mlp", "plain")]


def test_the_proof_does_not_depend_on_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule of dataflow switched off, a region over two blocks becomes a near miss and no site."""
    monkeypatch.setattr(region, "spans_blocks", lambda *_: None)

    def too_large(flow: Any, down: CanonicalNode) -> Region | Rejection:
        (recorded,) = found.recorded.values()
        last = next(node for node in reversed(canonical_nodes(flow.graph)) if flow.is_linear(node))
        calls = [call.region for calls in found.found.values() for call in calls]
        named = {node.name: node for node in canonical_nodes(flow.graph)}
        if down.name != calls[-1].down.name:
            return Rejection("residual", f"only {last.name} is tried", down, near_miss=False)
        wrong = joined(recorded, calls)
        same = lambda nodes: tuple(named[node.name] for node in nodes)  # noqa: E731
        ups = same(wrong.ups)
        return replace(wrong, x=named[wrong.x.name], down=down, inside=same(wrong.inside), ups=(ups[0], ups[-1]))

    model = built(lambda: NoAttention(Up()))
    before = capture(model, ids())
    found = locate(before)
    monkeypatch.setattr(locate_file, "attempt", too_large)
    again = locate(before)
    assert again.sites == ()
    assert [miss.rule for miss in again.located.near_misses] in (["one block"], ["arrangement"])
