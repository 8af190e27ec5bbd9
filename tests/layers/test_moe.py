"""Mixtures of experts against loops over tokens and experts in float64; routing, load, the auxiliary loss, and arithmetic."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memrewrite.errors import ModelError, UserError
from memrewrite.layers.activations import ACTIVATIONS
from memrewrite.layers.dense import Dense, DenseOptions
from memrewrite.layers.moe import Moe, MoeOptions, aux_loss
from memrewrite.layers.routing import by_tokens, capacity_of

D, D_OUT = 7, 5
SMALL: dict[str, Any] = {"experts": 4, "d_hidden": 11, "gated": True, "activation": "silu", "bias": True}


def layer_of(d_out: int = D_OUT, dtype: torch.dtype = torch.float64, **options: Any) -> Moe:
    layer = Moe(D, d_out, MoeOptions(**{**SMALL, **options}), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    layer.reset_parameters(generator)
    for parameter in layer.parameters():  # biases too
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return layer


def expert(layer: Moe, e: int, x: Tensor) -> Tensor:
    """One expert's MLP on one token."""

    def linear(name: str, x: Tensor) -> Tensor:
        one = getattr(layer, name)
        return x @ one.weight[e] + (0 if one.bias is None else one.bias[e])

    act = ACTIVATIONS[str(layer.options.activation)]
    hidden = act(linear("gate", x)) * linear("up", x) if layer.options.gated else act(linear("up", x))
    return linear("down", hidden)


def assigned(layer: Moe, p: Tensor) -> list[tuple[int, int]]:
    """(token, expert) by the definitions: expert choice in training, else each token's best."""
    tokens, experts = p.shape
    if layer.training and layer.options.routing == "expert_choice":
        capacity = math.ceil(layer.options.capacity_factor * tokens / experts)
        return [(int(t), e) for e in range(experts) for t in p[:, e].argsort(descending=True, stable=True)[:capacity]]
    return [(t, int(e)) for t in range(tokens) for e in p[t].argsort(descending=True, stable=True)[: layer.options.topk]]


def right(layer: Moe, x: Tensor) -> Tensor:
    p = (x @ layer.router.weight.T).softmax(-1)
    rows = [torch.zeros(layer.d_out, dtype=x.dtype) for _ in x]
    for t, e in assigned(layer, p):
        rows[t] = rows[t] + p[t, e] * expert(layer, e, x[t])
    return torch.stack(rows) if rows else x.new_zeros(0, layer.d_out)


# --- the definition ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    tokens=st.integers(0, 19),
    training=st.booleans(),
    experts=st.integers(2, 7),
    topk=st.integers(1, 3),
    routing=st.sampled_from(["expert_choice", "token_choice"]),
    factor=st.sampled_from([0.5, 1, 1.25, 2]),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_it_is_the_definition(tokens, training, experts, topk, routing, factor, gated, bias):
    factor = 1.0 if routing == "token_choice" else factor
    options = {"experts": experts, "topk": min(topk, experts), "routing": routing, "capacity_factor": factor}
    layer = layer_of(**options, gated=gated, bias=bias, activation="silu" if gated else "gelu").train(training)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    got, want = layer(x), right(layer, x)
    torch.testing.assert_close(got, want)
    if tokens:
        probe, leaves = torch.randn_like(want), [x, *layer.parameters()]
        found = (torch.autograd.grad(out, leaves, probe, materialize_grads=True) for out in (got, want))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_one_expert_of_a_mixture_is_a_dense_layer():
    layer = layer_of().eval()
    dense = Dense(D, D_OUT, DenseOptions(**{k: v for k, v in SMALL.items() if k != "experts"}), dtype=torch.float64)
    x = torch.randn(1, D, dtype=torch.float64)
    p, e = (x @ layer.router.weight.T).softmax(-1).max(-1)
    for name in ("gate", "up", "down"):
        getattr(dense, name).weight.data = getattr(layer, name).weight[e.item()].T
        getattr(dense, name).bias.data = getattr(layer, name).bias[e.item()]
    torch.testing.assert_close(layer(x), p * dense(x))


@pytest.mark.parametrize("chosen", [[[0]], [[1]] * 30, [[0], [1], [2]] * 5, [[2, 0]] * 4 + [[1, 2]], []], ids=str)
def test_blocks_hold_every_assignment_once_and_one_expert_each(chosen):
    experts, k = 3, len(chosen[0]) if chosen else 1
    blocks = by_tokens(torch.tensor(chosen, dtype=torch.long).reshape(-1, k), experts)
    flat = [e for row in chosen for e in row]
    places = list(zip(*(part.tolist() for part in blocks.places), strict=True))
    assert len(set(places)) == len(flat)
    assert all(row < blocks.size for _, row in places)
    assert [blocks.experts[block].item() for block, _ in places] == flat
    assert len(blocks.experts) <= min(len(flat), 2 * experts)
    assert blocks.load.tolist() == [flat.count(e) for e in range(experts)]


@pytest.mark.parametrize(("tokens", "experts", "factor"), [(0, 4, 1.0), (1, 4, 1.0), (10, 3, 0.3), (64, 16, 1.25), (9, 3, 1.1)])
def test_capacity(tokens, experts, factor):
    assert capacity_of(tokens, experts, factor) == math.ceil(round(factor * tokens / experts, 9))


def test_in_training_every_expert_takes_equally_many_tokens_whatever_the_router_says():
    layer = layer_of().train()
    layer.router.weight.data[1:] = -layer.router.weight.data[:1]  # one expert and its opposites
    x = torch.randn(16, D, dtype=torch.float64)
    assert len(assigned(layer, (x @ layer.router.weight.T).softmax(-1))) == 16
    torch.testing.assert_close(layer(x), right(layer, x))


def test_a_token_reads_its_own_experts_only():
    """One token's experts are multiplied, no others: NaN elsewhere has no effect."""
    layer = layer_of(topk=2).eval()
    x = torch.randn(1, D, dtype=torch.float64)
    chosen = (x @ layer.router.weight.T).topk(2).indices[0].tolist()
    want = layer(x)
    for e in set(range(4)) - set(chosen):
        for linear in (layer.gate, layer.up, layer.down):
            linear.weight.data[e] = float("nan")
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_training_repeats_bit_for_bit(routing):
    layer, x = layer_of(routing=routing, dtype=torch.float32).train(), torch.randn(50, D, requires_grad=True)
    runs = [(out := layer(x), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", [Moe, Dense])
def test_the_start_keeps_the_variance_and_can_be_scaled(kind):
    options = {k: v for k, v in SMALL.items() if kind is Moe or k != "experts"}
    layer = kind(64, 48, kind.Options(**{**options, "d_hidden": 256}))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    for linear, fan_in in ((layer.gate, 64), (layer.up, 64), (layer.down, 256)):
        assert linear.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert not linear.bias.any()
    layer.down.bias.data += 1
    x = torch.randn(9, 64)
    before = layer(x)
    layer.scale_output(0.25)
    torch.testing.assert_close(layer(x), before / 4)


# --- load and auxiliary loss ---------------------------------------------------------------------------------------------


def test_load_counts_the_assignments_of_the_last_training_forward():
    layer = layer_of(routing="token_choice", topk=2)
    assert layer.load is None
    x = torch.randn(30, D, dtype=torch.float64)
    layer.train()(x)
    chosen = (x @ layer.router.weight.T).topk(2).indices
    assert layer.load.tolist() == [int((chosen == e).sum()) for e in range(4)]
    layer.eval()(x[:3])
    assert layer.load.sum() == 60
    assert layer_of().train()(x) is not None
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.load is None
        assert torch.equal(twin(x), layer.eval()(x))


def test_the_auxiliary_loss_is_that_of_the_papers():
    layers = torch.nn.ModuleList([layer_of(routing="token_choice", topk=k) for k in (1, 2)]).train()
    inputs = [torch.randn(30, D, dtype=torch.float64) for _ in layers]
    want = torch.zeros((), dtype=torch.float64)
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
        logits = x @ layer.router.weight.T
        f = torch.stack([(logits.topk(layer.topk).indices == e).sum() / (30 * layer.topk) for e in range(4)])
        want = want + 0.3 * 4 * (f * logits.softmax(-1).mean(0)).sum() + 0.5 * logits.exp().sum(-1).log().square().mean()
    got = aux_loss(layers, balance=0.3, z=0.5)
    torch.testing.assert_close(got, want)
    routers = [layer.router.weight for layer in layers]
    torch.testing.assert_close(torch.autograd.grad(got, routers), torch.autograd.grad(want, routers))


def test_the_balance_loss_of_an_even_load_is_one_and_descent_evens_the_load():
    layer = layer_of(routing="token_choice").train()
    x = torch.randn(400, D, dtype=torch.float64)
    x[:, 0] = 3  # one direction that all tokens share sends most of them to one expert
    layer.router.weight.data[:, 0] = torch.tensor([2.0, 0, 0, 0])
    layer(x)
    assert aux_loss(layer, balance=1, z=0) > 3
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.05)
    for _ in range(100):
        layer(x)
        optimizer.zero_grad()
        aux_loss(layer, balance=1, z=0).backward()
        optimizer.step()
    assert aux_loss(layer, balance=1, z=0).item() == pytest.approx(1, abs=0.1)
    assert layer.load.max() < 200


def test_without_a_forward_or_a_mixture_there_is_no_auxiliary_loss():
    with pytest.raises(ModelError, match="has not run in train mode"):
        aux_loss(layer_of(routing="token_choice"))
    for model in (layer_of(), torch.nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="no mixture of experts with token choice"):
            aux_loss(model)
    layer = layer_of(routing="token_choice").train()
    layer(torch.randn(0, D, dtype=torch.float64))
    assert aux_loss(layer).item() == 0


def test_compiled_training_keeps_the_statistics():
    torch._dynamo.reset()
    layer, x = layer_of(routing="token_choice").train(), torch.randn(9, D, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one in (compiled, plain):
        (one(x).sum() + aux_loss(one)).backward()
    assert torch.equal(layer.load, plain.load)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# --- cost and what is refused --------------------------------------------------------------------------------------------


def test_arithmetic_of_a_batch():
    """In expert choice exactly the dense model's, and the router's; where tokens choose, at most twice."""
    tokens = 64
    layer = layer_of(dtype=torch.float32, bias=False)
    cost = Moe.cost(D, D_OUT, layer.options, None, 4, zero_output=False)
    flops = {}
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            layer.train(training)(torch.randn(tokens, D))
        flops[training] = counter.get_total_flops()
    assert flops[True] == tokens * cost.flops
    assert tokens * cost.flops <= flops[False] <= 2 * (tokens + 4) * cost.flops
    assert cost.parameters == sum(p.numel() for p in layer.parameters())
    one = Moe.cost(D, D_OUT, MoeOptions(**{**SMALL, "experts": 8}), None, 4, zero_output=False)
    two = Moe.cost(D, D_OUT, MoeOptions(**{**SMALL, "experts": 8, "topk": 2}), None, 4, zero_output=False)
    mlp = Dense.cost(D, D_OUT, DenseOptions(**{k: v for k, v in SMALL.items() if k != "experts"}), None, 4, zero_output=False)
    assert (two.parameters, two.flops - one.flops, two.bytes_read - one.bytes_read) == (
        one.parameters,
        mlp.flops,
        mlp.bytes_read,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 5}, "`topk: 5` is more than 4 experts"),
        ({"routing": "token_choice", "capacity_factor": 2.0}, "`capacity_factor` is for expert choice"),
        ({"capacity_factor": 4.5}, "more than 4 experts"),
        ({"width": 2.0}, "both give the hidden width"),
    ],
)
def test_check_refuses(options, words):
    with pytest.raises(UserError, match=words) as caught:
        Moe.check(D, D_OUT, MoeOptions(**{**SMALL, **options}), None)
    assert caught.value.hint


@pytest.mark.parametrize("missing", ["d_hidden", "gated", "activation", "bias"])
@pytest.mark.parametrize("kind", [Moe, Dense])
def test_options_that_are_not_complete_cannot_be_built(kind, missing):
    options = kind.Options(**{k: v for k, v in SMALL.items() if k not in (missing, "experts")})
    kind.check(D, D_OUT, options, None)
    for action in (lambda: kind(D, D_OUT, options), lambda: kind.cost(D, D_OUT, options, None, 4, zero_output=False)):
        with pytest.raises(UserError, match=f"`{missing}` is not set"):
            action()
