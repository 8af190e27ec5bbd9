"""Mixtures of experts in many forms: found whole, replaceable whole; and what only looks like one is rejected.

The expected sites follow from the modules below. Every form is compared with one reference, so that all are the same mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import VOCAB, Block, Stack, ids
from mixtures import CHOSEN, EXPERTS, MIXTURES, SAME, WIDTH, AllExperts, D, Drawn, Experts, RouterOutside
from torch import Tensor, fx, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.site import Site


def stack(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Stack(make).eval()


def recipe(placement: str) -> dict[str, Any]:
    rule = {"where": {"pattern": "moe"}, "with": "memory_plus", "pool": "w", "placement": placement}
    return {"memrewrite": 1, "pools": {"w": {"keys": 8}}, "replace": [rule | {"options": {"heads": 2, "topk": 4}}]}


@pytest.mark.parametrize("name", SAME)
def test_all_forms_compute_one_mixture(name: str) -> None:
    torch.manual_seed(0)
    reference = Experts()
    made = SAME[name]()
    made.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(made(x), reference(x))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_found_whole(name: str) -> None:
    model = stack(MIXTURES[name])
    sites = memrewrite.inspect(model, ids()).sites
    assert [(site.path, site.pattern) for site in sites] == [("blocks.0.mlp", "moe"), ("blocks.1.mlp", "moe")]
    wanted = {f"blocks.0.mlp.{parameter}" for parameter, _ in model.blocks[0].mlp.named_parameters()}
    assert set(sites[0].parameters) == wanted
    assert (sites[0].d_in, sites[0].d_model, sites[0].d_hidden) == (D, D, WIDTH)
    assert sites[0].bindings[0].kind == "module"


@pytest.mark.parametrize("name", ["batched", "masked", "looped"])
def test_the_activation_of_one_expert_is_named(name: str) -> None:
    site: Site = memrewrite.inspect(stack(MIXTURES[name]), ids()).sites[0]
    assert site.activation == "silu"


def test_a_mixture_costs_what_its_chosen_experts_cost() -> None:
    site = memrewrite.inspect(stack(MIXTURES["drawn"]), ids()).sites[0]
    one = D * 2 * WIDTH + WIDTH * D
    assert site.weights == EXPERTS * one + D * EXPERTS
    assert site.active == CHOSEN * one + D * EXPERTS
    assert site.cost().flops == 2 * site.active
    assert site.cost().bytes_read == 4 * site.active
    assert site.cost().parameters == site.weights


@pytest.mark.parametrize("name", MIXTURES)
def test_a_layer_parallel_to_a_mixture_changes_no_bit(name: str) -> None:
    model = stack(MIXTURES[name])
    before = model(*ids())
    report = memrewrite.apply(model, recipe("parallel"), ids())
    assert report.ok
    assert torch.equal(model(*ids()), before)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_replaced_whole(name: str) -> None:
    model = stack(MIXTURES[name])
    inner = {f"blocks.{i}.mlp.{p}" for i in range(2) for p, _ in model.blocks[0].mlp.named_parameters()}
    report = memrewrite.apply(model, recipe("replace"), ids())
    assert report.ok
    assert not inner & set(model.state_dict())
    model.train()
    model(*ids()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "memory" in name)


def test_a_dense_mlp_parallel_to_a_mixture_is_not_changed() -> None:
    model = stack(RouterOutside)
    before = model(*ids())
    sites = memrewrite.inspect(model, ids()).sites
    assert sorted({(site.pattern, site.bindings[0].kind) for site in sites}) == [("moe", "span"), ("plain", "module")]
    assert memrewrite.apply(model, recipe("parallel"), ids()).ok
    assert torch.equal(model(*ids()), before)


def test_a_replaced_mixture_whose_router_is_outside() -> None:
    model = stack(RouterOutside)
    assert memrewrite.apply(model, recipe("replace"), ids()).ok
    assert not any(".experts.up" in name for name in model.state_dict())


class Swapped(AllExperts):
    """A mixture whose rows are put back in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def test_what_mixes_tokens_is_no_mixture() -> None:
    sites = memrewrite.inspect(stack(lambda: Block(Swapped())), ids()).sites
    assert all(site.pattern != "moe" and site.calls == 1 for site in sites)  # an expert by itself may be an MLP of its tokens


def test_heads_with_matrices_of_their_own_are_no_experts() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(4, 8, 8) * 0.1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            heads = F.gelu(torch.einsum("bthd,hdf->bthf", x.unflatten(-1, (4, 8)), self.up))
            return torch.einsum("bthf,hfd->bthd", heads, self.down).flatten(-2)

    assert all(site.pattern != "moe" for site in memrewrite.inspect(stack(lambda: Block(Heads())), ids()).sites)


def test_a_mixture_is_found_in_graphs_that_torch_compile_and_fx_give() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)) or name.endswith("attention")

    model = stack(MIXTURES["modules"])
    traced = fx.GraphModule(model, Tracer().trace(model))
    assert [site.pattern for site in memrewrite.inspect(traced, ids()).sites] == ["moe", "moe"]
    backend = memrewrite.backend(then="eager")
    torch.compile(stack(MIXTURES["drawn"]), backend=backend)(*ids())
    assert [site.pattern for site in backend.located.sites] == ["moe", "moe"]


class SharedParallel(Block):
    """Routed experts and a shared one are two modules; the block adds up what they give."""

    def __init__(self) -> None:
        super().__init__(AllExperts())
        self.shared = nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + (self.mlp(h) + self.shared(h))


@pytest.mark.parametrize("placement", ["parallel", "replace"])
def test_a_shared_expert_that_the_block_adds_belongs_to_the_mixture(placement: str) -> None:
    model = stack(SharedParallel)
    before, names = model(*ids()), {name for name, _ in model.named_parameters() if "shared" in name or "mlp" in name}
    (first, _) = memrewrite.inspect(model, ids()).sites
    assert (first.path, first.pattern, first.bindings[0].kind) == ("blocks.0", "moe", "span")
    assert set(first.modules) == {"blocks.0.mlp", "blocks.0.shared"}
    assert memrewrite.apply(model, recipe(placement), ids()).ok
    if placement == "parallel":
        assert torch.equal(model(*ids()), before)
    else:
        assert not names & set(model.state_dict())


# --------------------------------------------------------------------------- what a router reads in addition to the input


class ByNumber(Block):
    """The experts of a token are looked up by its id; the router only computes their weights."""

    class Mlp(Drawn):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randint(0, EXPERTS, (VOCAB, CHOSEN)))

        def forward(self, x: Tensor, numbers: Tensor) -> Tensor:  # type: ignore[override]
            flat, chosen = x.reshape(-1, D), self.table[numbers.reshape(-1)]
            return self.routed(flat, self.router(flat).softmax(-1).gather(1, chosen), chosen).view(x.shape)

    def __init__(self) -> None:
        super().__init__(self.Mlp())

    def forward(self, x: Tensor, numbers: Tensor, memory: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x), numbers), None


class PassesOn(Block):
    """A router adds what the router before it computed."""

    class Mlp(Drawn):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.router = nn.Linear(D, 12), nn.Linear(12, EXPERTS)

        def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            flat = x.reshape(-1, D)
            state = self.narrow(flat) if before is None else self.narrow(flat) + 0.5 * before
            weights, chosen = self.router(F.gelu(state)).softmax(-1).topk(CHOSEN, -1)
            return self.routed(flat, weights, chosen).view(x.shape), state

    def __init__(self) -> None:
        super().__init__(self.Mlp())

    def forward(self, x: Tensor, numbers: Tensor, memory: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        x = x + self.attention(self.norm1(x))
        out, memory = self.mlp(self.norm2(x), memory)
        return x + out, memory


class PassesIds(nn.Module):
    """A model that passes to each block the token ids, and what the block before computed."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, numbers: Tensor) -> Tensor:
        x, memory = self.embed(numbers), None
        for block in self.blocks:
            x, memory = block(x, numbers, memory)
        return self.head(x)


@pytest.mark.parametrize("block", [ByNumber, PassesOn])
def test_extra_inputs_of_a_router_are_no_input_of_the_mixture(block: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    sites = memrewrite.inspect(PassesIds(block).eval(), ids()).sites
    assert [(site.path, site.pattern) for site in sites] == [("blocks.0.mlp", "moe"), ("blocks.1.mlp", "moe")]


def test_a_layer_parallel_to_a_mixture_that_reads_token_ids() -> None:
    torch.manual_seed(0)
    model = PassesIds(ByNumber).eval()
    before = model(*ids())
    assert memrewrite.apply(model, recipe("parallel"), ids()).ok
    assert torch.equal(model(*ids()), before)


class Rows(nn.Module):
    """Every expert is one row of each of two tables; the router's numbers are laid out so that tokens share them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 2 * 5)
        self.ins, self.outs = nn.Embedding(25, D), nn.Embedding(25, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        (first, second), (i, j) = self.router(flat).view(2, len(flat), 5).topk(2, -1)
        weights, best = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(3, -1)
        chosen = (i.unsqueeze(-1) * 5 + j.unsqueeze(-2)).flatten(-2).gather(-1, best)
        hidden = F.gelu(torch.einsum("td,tkd->tk", flat, self.ins(chosen))) * weights.softmax(-1)
        return torch.einsum("tk,tkd->td", hidden, self.outs(chosen)).view(x.shape)


def test_experts_of_one_row_each() -> None:
    model = stack(lambda: Block(Rows()))
    sites = memrewrite.inspect(model, ids()).sites
    assert [(site.path, site.pattern) for site in sites] == [("blocks.0.mlp", "moe"), ("blocks.1.mlp", "moe")]
    before = model(*ids())
    assert memrewrite.apply(model, recipe("parallel"), ids()).ok
    assert torch.equal(model(*ids()), before)
