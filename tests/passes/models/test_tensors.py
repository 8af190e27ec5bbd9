"""Parameters and buffers by name, tied ones included; their hashes."""

from __future__ import annotations

import torch
from torch import nn

from memrewrite.passes.models.fingerprints import differing, fingerprints
from memrewrite.passes.models.tensors import first_names, tensors_of


def tied() -> nn.Module:
    model = nn.Module()
    model.one, model.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.two.weight = model.one.weight
    model.register_buffer("a", torch.zeros(2), persistent=False)
    model.register_buffer("b", model.a)
    return model


def test_a_tied_tensor_has_all_its_names_and_one_first_name() -> None:
    model = tied()
    assert [name for name, _ in tensors_of(model)] == ["one.weight", "two.weight", "a", "b"]
    assert first_names(model) == {id(model.one.weight): "one.weight", id(model.a): "a"}
    assert fingerprints(model)["two.weight"] == fingerprints(model)["one.weight"]
    assert fingerprints(model)["b"].first == "a"


def test_a_hash_changes_with_bits_dtype_shape_and_requires_grad() -> None:
    model = nn.Linear(2, 2, bias=False)
    hashes = {fingerprints(model)["weight"].bits}
    for change in (
        lambda: model.weight.data.view(torch.int32).bitwise_xor_(1),
        lambda: setattr(model, "weight", nn.Parameter(model.weight.data.double())),
        lambda: setattr(model, "weight", nn.Parameter(model.weight.data.reshape(4))),
        lambda: model.weight.requires_grad_(False),
    ):
        change()
        hashes.add(fingerprints(model)["weight"].bits)
    assert len(hashes) == 5


def test_elements_that_differ() -> None:
    one = {"x": torch.tensor([1.0, torch.nan, 2.0]), "n": 3}
    assert differing(one, {"x": torch.tensor([1.0, torch.nan, 2.0]), "n": 4}) == 0
    assert differing(one, {"x": torch.tensor([1.0, 0.0, 3.0])}) == 2
    assert differing(one, {"x": torch.zeros(4)}) == 4
    assert differing(one, {}) == 1
