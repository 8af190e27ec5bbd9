"""Where the MLPs are: exactly those in the table of families are found, and every rejection has its reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import (
    AT,
    BATCH,
    BY_HAND,
    FAMILIES,
    HIDDEN,
    PRETRAINED,
    TOKENS,
    VOCAB,
    Attention,
    Block,
    D,
    Gated,
    Mlp,
    Packed,
    Stack,
    Tied,
    Up,
    halves,
    ids,
    plain,
    stack,
    states,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memrewrite.passes.canonicalize.canonicalize import canonicalize
from memrewrite.passes.capture.capture import capture
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.graphs.dataflow import Dataflow
from memrewrite.passes.graphs.provenance import clean, modules_of
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.models.block_stacks import BlockPosition, block_positions, outermost_lists
from memrewrite.site import Inspection, Site


def look(model: nn.Module, inputs: Any) -> Inspection:
    return locate(capture(model, inputs)).located


@cache
def family(name: str) -> tuple[nn.Module, Inspection]:
    """A family's model and what is found in it, once for all tests."""
    model = FAMILIES[name].build()
    return model, look(model, FAMILIES[name].inputs())


def facts(site: Site) -> tuple[Any, ...]:
    """What both a site and the table state; `#` distinguishes MLPs of one module, and is not part of the path."""
    path = site.path.partition("#")[0]
    return path, site.pattern, site.d_model, site.d_hidden, site.activation, site.calls, frozenset(site.parameters)


def planted(model: nn.Module, mlps: tuple[Mlp, ...]) -> Counter[Any]:
    return Counter((m.path, m.pattern, m.d_model, m.d_hidden, m.activation, m.calls, m.parameters(model)) for m in mlps)


# ----------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mlp_and_nothing_else_is_found(name: str) -> None:
    model, located = family(name)
    assert Counter(map(facts, located.sites)) == planted(model, FAMILIES[name].mlps)


LONE = ("tied", "two in one parameter")  # one matrix of two axes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_fits_the_parameters(name: str) -> None:
    """The table is checked as well: every matrix of an MLP is one of its widths by another."""
    model, _ = family(name)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for mlp in FAMILIES[name].mlps:
        matrices = [weights[n] for n in mlp.parameters(model) if weights[n].squeeze().ndim == 2]
        widths = {mlp.d_model, mlp.d_hidden, 2 * mlp.d_hidden if mlp.pattern == "gated_packed" else mlp.d_hidden}
        assert len(matrices) == (3 if mlp.pattern == "gated" else 1 if name in LONE else 2), mlp.path
        whole = [
            matrix for matrix in matrices if not (name.startswith("fused") and matrix is weights[f"{mlp.path}.fused.weight"])
        ]
        assert all(set(matrix.squeeze().shape) <= widths for matrix in whole), mlp.path


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.misses])
def test_near_misses_have_reason_and_place(name: str) -> None:
    _, located = family(name)
    missed = {miss.path: miss for miss in located.near_misses}
    for path, word in FAMILIES[name].misses.items():
        assert word in missed[path].reason
        assert missed[path].node
        assert ".py:" in missed[path].source


@pytest.mark.parametrize("name", PRETRAINED)
def test_sites_can_be_reached_in_the_module_tree(name: str) -> None:
    _, located = family(name)
    assert all(binding.kind != "none" for site in located.sites for binding in site.bindings)


def test_sites_and_near_misses_are_plain_data() -> None:
    _, located = family("bert, with its head")
    assert Inspection.model_validate_json(located.model_dump_json()) == located


def test_sizes_are_those_of_the_parameters() -> None:
    model, located = family("opt")
    first = located.sites[0]
    assert (first.weights, first.biases) == (2 * D * HIDDEN, D + HIDDEN)
    assert (first.dtype, first.device, first.d_in) == ("float32", "cpu", D)
    assert set(first.modules) == {"decoder.layers.0.fc1", "decoder.layers.0.fc2"}
    assert first.cost().parameters == sum(model.get_parameter(name).numel() for name in first.parameters)


# -------------------------------------------------------------------------------------------------------- what is none


class Between(Up):
    """An MLP with something between activation and last matrix."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(F.gelu(self.up(x))))


class TokenMatrix(Between):
    """A weight over the token axis inside."""

    def __init__(self) -> None:
        super().__init__(lambda h: self.mix(h.transpose(1, 2)).transpose(1, 2))
        self.mix = nn.Linear(TOKENS, TOKENS)


class Convolved(Between):
    """A convolution over three tokens inside."""

    def __init__(self) -> None:
        super().__init__(lambda h: self.conv(h.transpose(1, 2)).transpose(1, 2))
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)


class Leaky(nn.Module):
    """A block whose MLP's hidden value is used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Up()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.mlp.up(x))
        return x + self.mlp.down(hidden) + hidden[..., :D]


class NoResidual(nn.Module):
    """A projection: nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Up()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class OtherResidual(nn.Module):
    """The output is added to a value that the input was not taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.attention = Up(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attention(x))


class TwoInputs(Gated):
    """The gate reads another value than its partner, mixed from other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(self.attention(x))) * self.up(x))


class GatedAttention(Attention):
    """Attention whose output is gated by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(self.gate(x)))


class BoxHead(nn.Module):
    """Three matrices in a row, nothing added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class After(Block):
    """Attention, then `how(block, stream)`."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(Up())
        self.how, self.a, self.b, self.c = how, nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), nn.Linear(D, TOKENS)
        self.over = nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.how(self, x)


class Bare(nn.Module):
    """A block that is nothing but another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


NONE: dict[str, tuple[Callable[[], nn.Module], str]] = {  # block, a word of the reason
    "weights over tokens": (lambda: Block(TokenMatrix()), "along the token axis"),
    "running sum over tokens": (lambda: Block(Between(lambda h: h.cumsum(1))), "works across tokens"),
    "mean over tokens": (lambda: Block(Between(lambda h: h - h.mean(1, keepdim=True))), "works across tokens"),
    "softmax over tokens": (lambda: Block(Between(lambda h: h.softmax(1))), "works across tokens"),
    "softmax over everything": (lambda: Block(Between(lambda h: h / h.amax())), "works across tokens"),
    "convolution over tokens": (lambda: Block(Convolved()), "`conv1d` is not known to work token by token"),
    "tokens swapped": (lambda: Block(Between(lambda h: h.flip(1))), "`flip` reorders"),
    "tokens shifted": (lambda: Block(Between(lambda h: h.roll(1, 1))), "`roll` reorders"),
    "half of the tokens moved": (lambda: Block(Between(lambda h: torch.cat([h[:, 4:], h[:, :4]], 1))), "along the token axis"),
    "tokens as features": (lambda: Block(Between(lambda h: h.reshape(h.shape[0], HIDDEN, TOKENS).mT)), "tokens"),
    "one token for all": (lambda: Block(Between(lambda h: h + h[:, :1])), "along the token axis"),
    "inner value read outside": (Leaky, "also read outside"),
    "no residual": (NoResidual, "residual stream"),
    "another residual": (OtherResidual, "residual stream"),
    "tokens picked by number": (lambda: Block(Between(lambda h: h[:, torch.arange(TOKENS - 1, -1, -1)])), "`index` reorders"),
    "tokens padded": (lambda: Block(Between(lambda h: F.pad(h, (0, 0, 1, 0))[:, :TOKENS])), "`pad` reorders"),
    "features picked by each token": (
        lambda: Block(Between(lambda h: h[torch.arange(BATCH)[:, None, None], torch.arange(TOKENS)[:, None], h.argsort(-1)])),
        "`argsort`",
    ),
    "largest of the tokens": (lambda: Block(Between(lambda h: h * (h >= h.topk(2, 1).values[:, -1:]))), "works across tokens"),
    "one vector for all tokens": (lambda: After(lambda s, x: x + s.mlp(s.norm2(x.mean(1, keepdim=True)))), "residual stream"),
    "one token's vector for all": (lambda: After(lambda s, x: x + s.mlp(s.norm2(x[:, :1]))), "residual stream"),
    "one number for all tokens": (lambda: After(lambda s, x: x + s.attention(x) * s.mlp(x).mean()), "residual stream"),
    "another token's vector": (lambda: After(lambda s, x: x + s.mlp(s.norm2(x.flip(1)))), "residual stream"),
    "a gate of the stream": (lambda: After(lambda s, x: x * torch.sigmoid(s.mlp(x))), "residual stream"),
    "weights of tokens": (
        lambda: After(lambda s, x: x + s.attention.out(s.c(F.relu(s.attention.out(x))).softmax(-1) @ x)),
        "residual stream",
    ),
    "a gate over tokens": (
        lambda: After(lambda s, x: x + s.b((lambda h: h * (s.over @ h))(F.gelu(s.a(x))))),
        "along the token axis",
    ),
    "two inputs": (lambda: Block(TwoInputs()), "scaled_dot_product_attention"),
    "gated attention": (lambda: Block(GatedAttention()), "scaled_dot_product_attention"),
    "three matrices, no residual": (lambda: Bare(BoxHead()), "residual stream"),
    "three matrices, residual": (lambda: Block(BoxHead()), "residual stream"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_mlp_is_rejected_with_the_reason(name: str) -> None:
    make, why = NONE[name]
    located = look(Stack(make, depth=1).eval(), ids())
    assert located.sites == ()
    assert any(why in miss.reason and miss.node and miss.path.startswith("blocks.0") for miss in located.near_misses)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h,
        lambda h: h * 2 + 1,
        lambda h: F.layer_norm(h, (HIDDEN,)),
        lambda h: h.softmax(-1),
        lambda h: F.dropout(h, 0.5, False),
    ],
)
def test_two_matrices_without_a_nonlinearity_are_not_even_a_near_miss(middle: Callable[[Tensor], Tensor]) -> None:
    located = look(Stack(lambda: Block(Up(middle)), depth=1).eval(), ids())
    assert (located.sites, located.near_misses) == ((), ())


class Adapted(nn.Module):
    """A matrix and a low-rank change of it, each a module."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(d, out), nn.Linear(d, 4, bias=False), nn.Linear(4, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(F.dropout(x, 0.1, self.training)))


@pytest.mark.parametrize(("make", "names"), [(Up, ("up", "down")), (Gated, ("gate", "up", "down"))])
def test_low_rank_changes_belong_to_the_mlp(make: Callable[[], nn.Module], names: tuple[str, ...]) -> None:
    def adapted() -> nn.Module:
        mlp = make()
        for name in names:
            linear = mlp.get_submodule(name)
            setattr(mlp, name, Adapted(linear.in_features, linear.out_features))
        return Block(mlp)

    model = Stack(adapted, depth=1).eval()
    (site,) = look(model, ids()).sites
    assert (site.path, site.d_hidden) == ("blocks.0.mlp", HIDDEN)
    assert set(site.parameters) == {name for name, _ in model.named_parameters() if ".mlp." in name}


def test_a_factored_mlp_is_one() -> None:
    def factored() -> nn.Module:
        pairs = [(D, 8), (8, HIDDEN), (HIDDEN, 8), (8, D)]
        first, second, third, fourth = (nn.Linear(*pair) for pair in pairs)
        return Block(nn.Sequential(first, second, nn.GELU(), third, fourth))

    (site,) = look(Stack(factored, depth=1).eval(), ids()).sites
    assert (site.pattern, site.d_hidden, len(site.parameters)) == ("plain", HIDDEN, 8)


def test_an_mlp_on_a_reweighted_weight_is_one() -> None:
    model = Stack(lambda: Block(Up()), depth=1).eval()
    for linear in (model.blocks[0].mlp.up, model.blocks[0].mlp.down):
        nn.utils.parametrizations.weight_norm(linear)
    (site,) = look(model, ids()).sites
    assert (site.path, site.pattern, len(site.parameters)) == ("blocks.0.mlp", "plain", 6)


class TwoTowers(nn.Module):
    """Text and image; `join` combines the image's projection with the text."""

    def __init__(self, join: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.text, self.image, self.norm = nn.Embedding(VOCAB, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.project, self.block, self.join = Up(), Block(Up()), join

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.join(self, self.block(self.text(ids)), self.image(image))


@pytest.mark.parametrize(
    "join",
    [
        lambda s, text, image: torch.cat([s.project(image), text], 1),
        lambda s, text, image: text + s.project(s.norm(image)),
        lambda s, text, image: text.masked_scatter(text > 0, s.project(image)),
        lambda s, text, image: text.index_add(1, torch.arange(TOKENS), s.project(image)),
        lambda s, text, image: torch.stack([text, s.project(image)]).sum(0),
        lambda s, text, image: torch.lerp(text, s.project(image), 0.5),
    ],
    ids=["next to it", "added", "put in", "added by number", "stacked", "interpolated"],
)
def test_a_projection_of_one_stream_into_another_is_none(join: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    located = look(TwoTowers(join).eval(), (*ids(), states()))
    assert [site.path for site in located.sites] == ["block.mlp"]


def test_boxes_refined_from_the_stream_are_no_stream() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(Up()) for _ in range(2))
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4)) for _ in range(2))

        def forward(self, x: Tensor, box: Tensor) -> Tensor:
            for block, head in zip(self.blocks, self.heads, strict=True):
                x = block(x)
                box = torch.sigmoid(torch.logit(box.clamp(0.1, 0.9)) + head(x))
            return box

    located = look(Boxes().eval(), (states(), states(BATCH, TOKENS, 4)))
    assert [site.path for site in located.sites] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_pooler_after_the_blocks_is_none() -> None:
    class Pooled(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Block(Up()), depth=1)
            self.pooler = nn.Linear(D, D)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.pooler(self.blocks[0](self.embed(ids))[:, 0])))

    located = look(Pooled().eval(), ids())
    assert [site.path for site in located.sites] == ["blocks.0.mlp"]
    assert [miss.path for miss in located.near_misses] == ["head"]


# ---------------------------------------------------------------------------------------------- sharing, names, and cost


def test_one_module_in_two_blocks_is_one_site_called_twice() -> None:
    shared = Up()
    located = look(Stack(lambda: Block(shared)).eval(), ids())
    assert [(s.path, s.calls) for s in located.sites] == [("blocks.0.mlp", 2)]
    assert [binding.exit for binding in located.sites[0].bindings] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_two_modules_of_the_same_weights_are_one_site_with_two_bindings() -> None:
    model = Stack(lambda: Block(Up())).eval()
    first, second = (block.mlp for block in model.blocks)
    for one, other in ((first.up, second.up), (first.down, second.down)):
        other.weight, other.bias = one.weight, one.bias
    (site,) = look(model, ids()).sites
    assert site.calls == 2
    assert [binding.exit for binding in site.bindings] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_head_tied_to_the_embedding_changes_nothing() -> None:
    model = Stack(lambda: Block(Up())).eval()
    model.head.weight = model.embed.weight
    assert [site.path for site in look(model, ids()).sites] == ["blocks.0.mlp", "blocks.1.mlp"]


def renamed(before: Capture, word: Callable[[str], str]) -> Capture:
    """The same capture with every module, parameter, class and graph node under another name; numbers stay."""

    def path(name: str) -> str:
        return ".".join(part if part.isdigit() else word(part) for part in name.split(".") if part)

    (segment,) = before.segments
    for node in segment.graph.nodes:
        stack = modules_of(node)
        if stack:
            node.meta["nn_module_stack"] = {call: (path(clean(at)), "X") for call, at in stack}
    weights = {node: path(name) for node, name in segment.weights.items()}
    calls = {path(name): seen for name, seen in before.calls.items()}
    return replace(before, segments=(replace(segment, weights=weights),), calls=calls)


@pytest.mark.parametrize("name", ["llama", "bert", "albert", "swin", "mobilebert", "two in one module"])
def test_names_play_no_part(name: str) -> None:
    _, located = family(name)
    word = lambda part: f"q{sum(ord(c) * 31**i for i, c in enumerate(part)) % 10**9}"  # noqa: E731
    other = locate(renamed(capture(FAMILIES[name].build(), FAMILIES[name].inputs()), word)).located

    def outline(site: Site) -> tuple[Any, ...]:
        return site.pattern, site.d_model, site.d_hidden, site.activation, site.calls, site.block, site.bindings[0].kind

    assert list(map(outline, other.sites)) == list(map(outline, located.sites))
    moved = [".".join(p if p.isdigit() else word(p) for p in s.path.partition("#")[0].split(".")) for s in located.sites]
    assert [site.path.partition("#")[0] for site in other.sites] == moved


def test_steps_grow_with_the_depth_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Counter[int]()
    depth = 0
    for method in ("activations", "unviewed", "is_linear", "weights"):
        original = getattr(Dataflow, method)

        def counting(self: Dataflow, node: Any, original: Any = original) -> Any:
            steps[depth] += 1
            return original(self, node)

        monkeypatch.setattr(Dataflow, method, counting)
    for depth in (8, 16, 24):  # the first blocks cost less: there is nothing before them
        look(Stack(lambda: Block(Gated()), depth).eval(), ids())
    assert steps[24] - steps[16] == steps[16] - steps[8] > 0


# --------------------------------------------------------------------------------------------------------- activations


class PReLU(nn.PReLU):
    """An activation with a parameter."""


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", F.relu),
    "relu, as clamp": ("relu", lambda x: x.clamp(min=0)),
    "relu, as maximum": ("relu", lambda x: torch.maximum(x, torch.zeros_like(x))),
    "relu, as where": ("relu", lambda x: torch.where(x > 0, x, 0.0)),
    "gelu": ("gelu", F.gelu),
    "gelu, by erf": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu, by erf of a product": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))),
    "tanh gelu": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "tanh gelu, by a power": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "tanh gelu, factored": (
        "gelu_tanh",
        lambda x: x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * x * (1 + 0.044715 * x * x))),
    ),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": ("silu", F.silu),
    "silu, as a product": ("silu", lambda x: x * x.sigmoid()),
    "silu, as a quotient": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "silu, computed in doubles": ("silu", lambda x: F.silu(x.double()).to(x.dtype)),
    "squared relu": ("relu2", lambda x: F.relu(x).pow(2)),
    "squared relu, as a product": ("relu2", lambda x: F.relu(x) * F.relu(x)),
    "mish": ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    "softplus": ("softplus", lambda x: torch.log1p(torch.exp(x))),
    "tanh": ("tanh", torch.tanh),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "leaky relu": ("leaky_relu", F.leaky_relu),
    "elu": ("elu", F.elu),
    "selu": ("selu", F.selu),
    "relu6": ("relu6", lambda x: x.clamp(0, 6)),
    "hardswish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "softsign": ("softsign", lambda x: x / (1 + x.abs())),
    "square": ("square", lambda x: x * x),
    "none we know": ("?", lambda x: x + torch.sin(x) ** 2),
    "relu, scaled": ("?", lambda x: F.relu(x) * 1.5),
    "learned": ("?", PReLU()),
    "softmax after relu": ("?", lambda x: F.softmax(F.relu(x), -1)),
}
GATES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    name: ACTIVATIONS[name] for name in ("relu", "gelu, by erf", "quick gelu", "silu", "sigmoid", "tanh gelu, by a power")
} | {"bilinear": ("identity", lambda x: x)}


def _activations(makes: list[nn.Module]) -> list[str]:
    queue = iter(makes)
    located = look(Stack(lambda: Block(next(queue)), len(makes)).eval(), ids())
    assert len(located.sites) == len(makes), located.near_misses
    return [site.activation for site in located.sites]


@cache
def _plain_activations() -> dict[str, str]:
    """All forms in one model, captured once."""
    named = list(ACTIVATIONS.items())
    return dict(zip(ACTIVATIONS, _activations([Up(act) for _, (_, act) in named]), strict=True))


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_an_activation_is_recognized_by_its_values(form: str) -> None:
    assert _plain_activations()[form] == ACTIVATIONS[form][0]


def test_a_gates_activation_is_recognized_in_either_half() -> None:
    wanted = [name for name, _ in GATES.values()]
    assert _activations([Gated(act) for _, act in GATES.values()]) == wanted


def test_torchs_own_glu_is_a_packed_gate() -> None:
    class Glu(Packed):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.glu(self.both(x)))

    (site,) = look(Stack(lambda: Block(Glu(halves)), 1).eval(), ids()).sites
    assert (site.pattern, site.activation, site.d_hidden) == ("gated_packed", "sigmoid", HIDDEN)


def test_half_precision_does_not_blur_the_activation() -> None:
    model = Stack(lambda: Block(Up(ACTIVATIONS["gelu, by erf"][1])), 1).eval().bfloat16()
    (site,) = look(model, ids()).sites
    assert (site.activation, site.dtype) == ("gelu", "bfloat16")


# ------------------------------------------------------------------------------------------------------------- binding


class Inline(nn.Module):
    """A block that computes its MLP from its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention()
        self.w1, self.w2 = nn.Parameter(torch.randn(HIDDEN, D)), nn.Parameter(torch.randn(D, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + F.relu(self.norm(x) @ self.w1.T) @ self.w2.T


class FirstInline(Inline):
    """Only the last matrix has a module."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(HIDDEN, D)
        del self.w2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.relu(self.norm(x) @ self.w1.T))


class GivenTheSum(Block):
    """The MLP module receives the stream too, and adds it itself."""

    class Inner(Up):
        def forward(self, x: Tensor, stream: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + stream

    def __init__(self) -> None:
        super().__init__(self.Inner())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.mlp(self.norm2(x), x)


BINDINGS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], str, str]] = {
    "a module": (lambda: Block(Up()), "module", ("blocks.0.mlp",), "blocks.0.mlp", ""),
    "the widest module": (
        lambda: Block(Bare(nn.Sequential(Up(), nn.Dropout(0.1)))),
        "module",
        ("blocks.0.mlp",),
        "blocks.0.mlp",
        "",
    ),
    "parameters of one module": (lambda: Block(Tied()), "module", ("blocks.0.mlp",), "blocks.0.mlp", ""),
    "a span, the stream given": (GivenTheSum, "span", ("blocks.0.mlp.up",), "blocks.0.mlp.down", ""),
    "two entries": (
        lambda: Bare(ResidualGated()),
        "span",
        ("blocks.0.inner.gate", "blocks.0.inner.up"),
        "blocks.0.inner.down",
        "",
    ),
    "parameters of the block": (Inline, "graph", (), "blocks.0", "by its last matrix"),
    "the first matrix without a module": (FirstInline, "graph", (), "blocks.0", "by its first matrix"),
}


class ResidualGated(Gated):
    """A gated MLP that adds its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("name", BINDINGS)
def test_binding(name: str) -> None:
    make, kind, entries, exit_, why = BINDINGS[name]
    (site,) = look(Stack(make, 1).eval(), ids()).sites
    (binding,) = site.bindings
    assert (binding.kind, binding.entries, binding.exit) == (kind, entries, exit_)
    assert why in binding.why
    assert bool(binding.why) == (kind == "graph")
    assert binding.widths == ((HIDDEN,) * len(entries) if kind == "span" else ())


def test_a_module_called_past_its_call_is_still_the_path() -> None:
    class Past(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block.forward(x)
            return self.head(x)

    class Forwarded(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp.forward(self.norm1(x))

    located = look(Past(lambda: Forwarded(Up())).eval(), ids())
    assert [site.path for site in located.sites] == ["blocks.0.mlp", "blocks.1.mlp"]


# -------------------------------------------------------------------------------------------------- towers and their blocks


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", [("layers", 0, 2), ("layers", 1, 2)]),
        ("bart", [("encoder.layers", 0, 2), ("encoder.layers", 1, 2), ("decoder.layers", 0, 2), ("decoder.layers", 1, 2)]),
        ("swin", [("encoder.layers.*.blocks", i, 4) for i in range(4)]),
        ("funnel", [("encoder.blocks", 0, 2), ("encoder.blocks", 1, 2)]),
        ("mobilebert", [("encoder.layer", i, 2) for i in (0, 0, 0, 1, 1, 1)]),
        ("1×1 convolutions", [("", None, 0)]),
    ],
)
def test_blocks_are_counted_in_their_tower(name: str, wanted: list[tuple[str, int | None, int]]) -> None:
    _, located = family(name)
    assert [(s.tower, s.block, s.tower_blocks) for s in located.sites] == wanted


def test_blocks_without_an_mlp_count_too() -> None:
    queue = iter([Block(Up()), Bare(Attention()), Block(Up())])
    located = look(Stack(lambda: next(queue), 3).eval(), ids())
    assert [(s.block, s.tower_blocks) for s in located.sites] == [(0, 3), (2, 3)]


def test_stages_of_unlike_blocks_are_blocks_themselves() -> None:
    paths = ["stages.0.parts.0", "stages.0.parts.1", "stages.1.parts.0", "stages.1.parts.1"]
    same = block_positions(paths, dict.fromkeys(paths, "Layer"))
    unlike = block_positions(paths, {path: path[-1] for path in paths})
    assert [same[path] for path in paths] == [BlockPosition("stages.*.parts", i, 4) for i in range(4)]
    assert [unlike[path] for path in paths] == [BlockPosition("stages", i, 2) for i in (0, 0, 1, 1)]


def test_only_outermost_numbered_containers_are_stacks() -> None:
    model = Stack(lambda: Block(nn.Sequential(nn.Linear(D, D), nn.ReLU())))
    model.named = nn.Sequential()
    model.named.add_module("first", nn.Linear(D, D))
    assert [path for path, _ in outermost_lists(model)] == ["blocks"]


def test_the_recorded_graph_is_not_touched() -> None:
    made = capture(BY_HAND["einsum"].build(), ids())
    before = [(node.name, node.target, node.args) for node in made.segments[0].graph.nodes]
    locate(made)
    canonicalize(made.segments[0].graph, made.segments[0].weights, made.segments[0].literals)
    assert [(node.name, node.target, node.args) for node in made.segments[0].graph.nodes] == before


def test_an_exported_program_gives_the_same_sites() -> None:
    family = BY_HAND["packed interleaved"]
    model = family.build()
    live, traced = look(model, family.inputs()), look(torch.export.export(model, family.inputs()), None)
    assert [facts(site) for site in traced.sites] == [facts(site) for site in live.sites]


def test_decomposed_programs_give_the_same_mlps() -> None:
    """After `run_decompositions` a linear is a transposed weight, views and `addmm`."""
    model = BY_HAND["pre-norm"].build()
    program = torch.export.export(model, ids()).run_decompositions()
    assert [facts(site)[1:] for site in look(program, None).sites] == [facts(site)[1:] for site in look(model, ids()).sites]


@pytest.mark.parametrize("name", ["batched", "in parts", "by rows", "packed, beside each other", "two in one parameter"])
def test_dynamic_shapes_give_the_same_sites(name: str) -> None:
    """There sizes are values of the graph, and every slice is written out."""
    model, located = family(name)
    other = locate(capture(model, FAMILIES[name].inputs(), dynamic=True)).located
    assert "dynamic" in other.captured
    assert list(map(facts, other.sites)) == list(map(facts, located.sites))


def test_the_table_is_not_trivial() -> None:
    assert len(FAMILIES) >= 60
    assert stack(Block, Up)().embed.num_embeddings == VOCAB
    assert plain(AT)[1].path == "blocks.1.mlp"
