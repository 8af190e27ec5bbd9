"""`peer` and `pkm` with the weights of PEER-pytorch and product-key-memory: equal outputs and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from PEER_pytorch import PEER
from product_key_memory import PKM
from torch import Tensor, nn

from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.peer import Peer
from memrewrite.layers.pkm import Pkm
from memrewrite.layers.pool import Pool, PoolSpec

SIZES = [(8, 1, 2, 2, 5), (24, 3, 5, 8, 7), (34, 2, 9, 12, 9)]  # d, heads, topk, width of a half key, keys per half


def built(kind: type[MemoryLayer], size: tuple[int, ...]) -> MemoryLayer:
    d, heads, topk, half, keys = size
    pool = Pool(PoolSpec(keys=keys, value_dim=d, input_dim=d if kind.reads_inputs else None, dtype="float64"))
    return kind(d, d, kind.Options(heads=heads, topk=topk, key_dim=2 * half, qk_norm=False), pool, dtype=torch.float64)


@torch.no_grad()
def given_the_keys(layer: MemoryLayer, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies queries and keys. Returns the pairs of our parameters and theirs."""
    heads, half = layer.product_keys.heads, layer.product_keys.half_dim
    query = theirs.to_queries if isinstance(theirs.to_queries, nn.Linear) else theirs.to_queries[0]
    layer.product_keys.query.weight.copy_(by_head(query.weight, heads, half))
    layer.product_keys.query.bias.zero_()
    layer.product_keys.keys.copy_(theirs.keys.transpose(1, 2))  # [h, n, 2, d] there
    return [(layer.product_keys.query.weight, query.weight), (layer.product_keys.keys, theirs.keys)]


def by_head(weight: Tensor, heads: int, half: int) -> Tensor:
    """Rows in the order (half, head, width) of a query projection there, in our order (head, half, width)."""
    return weight.view(2, heads, half, -1).transpose(0, 1).reshape(weight.shape)


def assert_equal_with_gradients(layer: MemoryLayer, theirs: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Outputs, and the gradients of the input and of the pairs of parameters."""
    x = torch.randn(2, 11, layer.d_model, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(x)
    got, want = layer(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(got, [x, *(mine for mine, _ in pairs)], probe)
    right = torch.autograd.grad(want, [x, *(other for _, other in pairs)], probe)
    heads, half = layer.product_keys.heads, layer.product_keys.half_dim
    for one, other, mine in zip(ours, right, [x, *(mine for mine, _ in pairs)], strict=True):
        if mine is layer.product_keys.query.weight:
            other = by_head(other, heads, half)
        if mine is layer.product_keys.keys:
            other = other.transpose(1, 2)
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_peer_is_the_peer_of_peer_pytorch(size):
    torch.manual_seed(0)
    d, heads, topk, half, keys = size
    sizes = {"heads": heads, "num_experts": keys**2, "num_experts_per_head": topk, "dim_key": half}
    theirs = PEER(d, **sizes, non_competing_scores=False).double()  # by default it has ReLU scores, and one expert a head
    layer = built(Peer, size)
    keys_of = given_the_keys(layer, theirs)
    tables = layer.pool.inputs.values, layer.pool.values
    with torch.no_grad():
        theirs.keys.mul_(20)  # its initial keys give nearly equal scores
        layer.product_keys.keys.mul_(20)
        for mine, other in zip(tables, (theirs.weight_down_embed, theirs.weight_up_embed), strict=True):
            mine.copy_(other.weight)
    pairs = [(tables[0], theirs.weight_down_embed.weight), (tables[1], theirs.weight_up_embed.weight)]
    assert_equal_with_gradients(layer, theirs, [*pairs, *keys_of])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pkm_is_the_pkm_of_product_key_memory(size):
    torch.manual_seed(0)
    d, heads, topk, half, keys = size
    theirs = PKM(d, heads=heads, num_keys=keys, topk=topk, dim_head=half).double()
    theirs.norm = nn.Identity()  # a LayerNorm of the queries, which cannot be switched off
    layer = built(Pkm, size)
    keys_of = given_the_keys(layer, theirs)
    with torch.no_grad():
        layer.pool.values.copy_(theirs.values.weight)
    assert_equal_with_gradients(layer, theirs, [(layer.pool.values, theirs.values.weight), *keys_of])
