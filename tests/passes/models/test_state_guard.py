"""What a forward changes in a model is restored, bit for bit."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from torch import Tensor, nn

from memrewrite.passes.models.state_guard import StateGuard, in_train_mode, seeded


class Changes(nn.Module):
    """A forward that changes parameters, buffers, plain tensors, attributes and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.plain, self.steps, self.seen = torch.zeros(2), 0, {"a": [1]}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(2)
            self.linear.bias.data = torch.ones(4)
        self.plain[0] = torch.nan
        self.steps += 1
        self.seen["b"] = [x]
        self.new = x
        return self.linear(self.norm(x))


def test_forwards_in_train_mode_change_nothing() -> None:
    model = Changes().eval()
    model.norm.train()
    before, bias, attributes = copy.deepcopy(model), model.linear.bias, dict(vars(model))
    with in_train_mode(model) as guard:
        assert model.training
        with guard.forwards():
            model(torch.randn(3, 4))
            assert model.steps == 1
        assert model.steps == 0
    assert model.linear.bias is bias
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.plain, torch.zeros(2))
    assert model.seen == {"a": [1]}
    assert vars(model).keys() == attributes.keys()
    assert (model.training, model.norm.training) == (False, True)


def test_weights_are_copied_only_when_they_are_mutated() -> None:
    model = nn.Linear(4, 4)
    guard = StateGuard(model)
    with guard.forwards():
        model(torch.randn(3, 4))
    assert not guard.copies.copies


def test_seeded_restores_the_states_of_python_and_numpy() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    samples = []
    for _ in range(2):
        with seeded():
            samples.append((random.random(), np.random.rand()))
    assert samples[0] == samples[1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
