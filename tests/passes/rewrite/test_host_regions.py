"""MLPs in a module that becomes a graph are those of the model by what they compute; where they are not, the error says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import SelectError
from tests import tiny

D, EXPERTS, HIDDEN = tiny.WIDTH, 4, 24


def bare(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes) * 0.2)


class Bare(nn.Module):
    """Post-norm attention and a mixture of bare parameters; subclasses differ in how the experts are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(D), nn.LayerNorm(D), tiny.Attention(D)
        self.router, self.up, self.down = bare(EXPERTS, D), bare(EXPERTS, D, HIDDEN), bare(EXPERTS, HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(self.sum_of(x))

    def sum_of(self, x: Tensor) -> Tensor:
        """The residual stream and the experts."""
        return self.onto(x, torch.zeros_like(x)) + x

    def onto(self, x: Tensor, out: Tensor) -> Tensor:
        """The experts' outputs for x, added to `out`."""
        scores = F.linear(x, self.router).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, weights)
        for e in range(EXPERTS):
            out = out + gates[..., e : e + 1] * (F.gelu(x @ self.up[e]) @ self.down[e])
        return out


class Onto(Bare):
    """Every expert is added to the residual stream, one after the other."""

    def sum_of(self, x: Tensor) -> Tensor:
        return self.onto(x, x)


class Inner(Bare):
    """The module of the mixture returns the residual sum: the module is larger than the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Summed()
        del self.router, self.up, self.down

    def sum_of(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Summed(Bare):
    def __init__(self) -> None:
        super().__init__()
        del self.norm1, self.norm2, self.attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.onto(x, torch.zeros_like(x))


class Before(Summed):
    def forward(self, x: Tensor) -> Tensor:
        return self.onto(x, torch.zeros_like(x)).add(x, alpha=1)


class Normed(Summed):
    """The module norms its input, and its output is the sum with what was not normed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.onto(self.norm(x), torch.zeros_like(x))


def inner(kind: type[nn.Module]) -> type[nn.Module]:
    class Block(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.experts = kind()  # type: ignore[assignment]

    return Block


KINDS: dict[str, type[nn.Module]] = {
    "outside of the sum": Bare,
    "onto the stream": Onto,
    "in a module with the sum": Inner,
    "in a module with the sum, first": inner(Before),
    "in a module with norm and sum": inner(Normed),
}


def model_of(block: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return tiny.Tiny([block() for _ in range(2)]).eval()


@pytest.mark.parametrize("verify", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_sum_is_no_part_of_a_mixture(kind: str, verify: str) -> None:
    options = {} if verify == "on" else {"verify": "off"}
    model = model_of(KINDS[kind])
    before = model(tiny.tokens())
    memrewrite.apply(model, tiny.recipe("parallel", **options), (tiny.tokens(),))
    assert torch.equal(model(tiny.tokens()), before)
    assert torch.equal(model(tiny.tokens(3, 7)), model_of(KINDS[kind])(tiny.tokens(3, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_reaches_the_output_of_a_replaced_mixture(kind: str) -> None:
    """Layers that return zeros leave the stream: the output is that of a model whose experts return zeros."""
    model, without = model_of(KINDS[kind]), model_of(KINDS[kind])
    sites = memrewrite.inspect(model, (tiny.tokens(),)).sites
    rule = {"where": {"all": True}, "with": "none", "placement": "replace"}
    memrewrite.apply(model, {"memrewrite": 1, "replace": [rule], "verify": "off"}, (tiny.tokens(),))
    found = {"outside of the sum": EXPERTS, "onto the stream": len(sites) // 2}.get(kind, EXPERTS)
    with torch.no_grad():
        for name, p in without.named_parameters():
            if name.endswith("down"):
                p[:found].zero_()
    torch.testing.assert_close(model(tiny.tokens()), without(tiny.tokens()))


# ------------------------------------------------------------------------------------------ not as in the model's graph


class Plain(nn.Module):
    """An MLP of bare parameters; subclasses compute something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.norm1 = nn.LayerNorm(D), tiny.Attention(D), nn.LayerNorm(D)
        self.up, self.down, self.shift = bare(D, HIDDEN), bare(HIDDEN, D), bare(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.out(x, F.gelu(self.inner(self.norm(x) @ self.up)))

    def inner(self, hidden: Tensor) -> Tensor:
        return hidden

    def out(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + hidden @ self.down


class Skipped(Plain):
    def out(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x if self.training else super().out(x, hidden)


class Mixed(Plain):
    def inner(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(1, keepdim=True) if self.training else hidden


class Shifted(Plain):
    def inner(self, hidden: Tensor) -> Tensor:
        return hidden + self.shift if self.training else hidden


class Scaled(Plain):
    def inner(self, hidden: Tensor) -> Tensor:
        return hidden * 2 if self.training else hidden


class Linear(Plain):
    def out(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + ((self.norm(x) @ self.up if self.training else hidden) @ self.down)


DIFFERS: dict[type[nn.Module], str] = {
    Skipped: r"is not found: it does not read blocks\.0\.up, blocks\.0\.down",
    Mixed: r"is not found: token by token: .*mean.*, at 'mean.*test_host_regions\.py:\d+",
    Shifted: r"is not found: an MLP is found with blocks\.0\.shift",
    Scaled: r"is another one than in the model's graph\s+at: on the same input, its output is .* away.*test_host_regions",
    Linear: r"is not found: matrix, nonlinearity, matrix: ",
}


@pytest.mark.parametrize("verify", ["on", "off"])
@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("block", DIFFERS, ids=lambda block: block.__name__)
def test_what_differs_in_train_mode_is_named(block: type[nn.Module], placement: str, verify: str) -> None:
    model, options = model_of(block), {} if verify == "on" else {"verify": "off"}
    with pytest.raises(SelectError, match=r"in the graph of 'blocks\.0' in train mode .*") as refused:
        memrewrite.apply(model, tiny.recipe(placement, **options), (tiny.tokens(),))
    with pytest.raises(AssertionError, match=DIFFERS[block]):
        raise AssertionError(str(refused.value))
    assert "--emit graph" in str(refused.value.hint)
    report = memrewrite.apply(model, tiny.recipe(placement), (tiny.tokens(),), emit="graph")
    assert report.ok


class Noisy(Plain):
    def inner(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.2, self.training)


class Random(Plain):
    def out(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + F.rrelu(hidden, 0.1, 0.4, self.training) @ self.down


class Jitter(Bare):
    """Its router is noisy in train mode, as in Switch Transformers."""

    def onto(self, x: Tensor, out: Tensor) -> Tensor:
        return super().onto(x * (1 + 0.1 * torch.rand_like(x)) if self.training else x, out)


@pytest.mark.parametrize("block", [Plain, Noisy, Random, Jitter])
def test_noise_of_train_mode_is_no_difference(block: type[nn.Module]) -> None:
    model = model_of(block)
    assert memrewrite.apply(model, tiny.recipe("parallel"), (tiny.tokens(),)).ok


@pytest.mark.parametrize("verify", ["on", "off"])
def test_experts_of_one_stack_are_told_apart_by_their_output(verify: str) -> None:
    """They have the same weights by name; a layer is placed at the one that was selected."""
    model, options = model_of(Onto), {} if verify == "on" else {"verify": "off"}
    paths = [site.path for site in memrewrite.inspect(model, (tiny.tokens(),)).sites]
    for number, path in enumerate(paths[: len(paths) // 2]):
        model, without = model_of(Onto), model_of(Onto)
        rule = {"where": {"regex": f"^{path}$"}, "with": "none", "placement": "replace"}
        memrewrite.apply(model, {"memrewrite": 1, "replace": [rule], **options}, (tiny.tokens(),))
        with torch.no_grad():
            without.blocks[0].down[number].zero_()
        torch.testing.assert_close(model(tiny.tokens()), without(tiny.tokens()))
