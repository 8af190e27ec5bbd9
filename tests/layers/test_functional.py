"""Whole layers as functions of input and parameters, under `torch.func`: the values of the same layers in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_layers import build, every_kind
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap

from memrewrite.kernels import ops, reference


def plain_lookup(values: Tensor, indices: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
    return reference.sparse_lookup(values, indices, weights)


def plain_keys(queries: Tensor, keys: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("thd,hnd->htn", queries, keys)
    best, slots = reference.product_key_topk(scores[::2], scores[1::2], k)
    return best.softmax(-1), slots


@every_kind
@pytest.mark.parametrize("qk_norm", [False, True])
def test_layers_under_every_transform(kind: Any, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [build(kind, 6, dtype=torch.float64, heads=2, key_dim=4, qk_norm=qk_norm) for _ in range(2)]
    model = models[0]
    state = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 6, dtype=torch.float64)
    tangents = {name: torch.randn_like(p) for name, p in state.items()}

    def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, state, (x,))

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return run(state, x).square().sum()

    stacked = stack_module_state(models)[0]
    pairs: list[Callable[[], Any]] = [
        lambda: jvp(run, (state, x), (tangents, x)),
        lambda: linearize(run, state, x)[1](tangents, x),
        lambda: jacfwd(run, 1)(state, x),
        lambda: jacrev(run, 1)(state, x),
        lambda: grad(loss)(state, x),
        lambda: vmap(grad(loss), in_dims=(None, 0))(state, x.unsqueeze(1)),
        lambda: vmap(run, in_dims=(0, None))(stacked, x),
        lambda: vmap(grad(loss), in_dims=(0, None))(stacked, x),
        lambda: jacfwd(jacrev(loss, 1), 1)(state, x),
        lambda: jvp(grad(loss), (state, x), (tangents, x)),
    ]
    got = [call() for call in pairs]
    monkeypatch.setattr(ops, "sparse_lookup", plain_lookup)
    monkeypatch.setattr(ops, "product_keys", plain_keys)
    for found, call in zip(got, pairs, strict=True):
        torch.testing.assert_close(found, call())
