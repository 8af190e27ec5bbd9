"""What code of a model changes is restored, bit for bit and by identity."""

from __future__ import annotations

import collections
import copy
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError
from memrewrite.passes.models import state_guard
from memrewrite.passes.models.forward import in_mode, run
from memrewrite.passes.models.process_state import seeded
from memrewrite.passes.models.state_guard import StateGuard
from tests.snapshot import Snapshot


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
        self.seen["a"].append(2)
        self.new = x
        return self.linear(self.norm(x))


def test_forwards_in_train_mode_change_nothing() -> None:
    model = Changes().eval()
    model.norm.train()
    before, bias, attributes = copy.deepcopy(model), model.linear.bias, dict(vars(model))
    with in_mode(model, training=True):
        assert model.training
        assert model.norm.training
        with StateGuard(model):
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
    model.weight.grad = torch.zeros(4, 4)
    with StateGuard(model) as guard:
        model(torch.randn(3, 4))
        assert not guard._tensors.copies


def test_seeded_restores_the_states_of_all_generators() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    samples = []
    for _ in range(2):
        with seeded():
            samples.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert samples[0] == samples[1]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


class Slots(nn.Module):
    __slots__ = ("count",)


class Own:
    """An object of the user's, with attributes and a slot."""

    def __init__(self) -> None:
        self.calls, self.inner = 0, [np.zeros(3)]


class Strange(nn.Module):
    """Attributes of all kinds, and a class whose methods change its state themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.weight.grad = torch.ones(3)
        self.note: list[Any] = []
        self.record, self.own, self.array = types.SimpleNamespace(calls=0), Own(), np.arange(4.0)
        self.queue, self.order = collections.deque([1, 2], maxlen=2), collections.OrderedDict(a=1, b=2)
        self.counts, self.names, self.raw = collections.Counter("aab"), {"x"}, bytearray(b"abc")
        self.noise, self.dice = torch.Generator().manual_seed(3), random.Random(3)
        self.old_noise, self.new_noise = np.random.RandomState(3), np.random.default_rng(3)
        self.hidden = (nn.Linear(2, 2), [nn.Linear(2, 2)])
        self.slots = Slots()
        self.slots.count = 0
        self.sparse = torch.eye(3).to_sparse()

    def __setattr__(self, name: str, value: Any) -> None:
        if "note" in self.__dict__:
            self.note.append(name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if "note" in self.__dict__:
            self.note.append(name)
        return super().__getattr__(name)


CHANGES = {
    "an attribute": lambda m: setattr(m, "array", 3),
    "an attribute is deleted": lambda m: delattr(m, "array"),
    "an attribute is replaced by an equal one": lambda m: setattr(m, "own", m.own),
    "all attributes": lambda m: m.__dict__.update(dict.fromkeys(["own", "array", "record"])),
    "a namespace": lambda m: setattr(m.record, "calls", 1),
    "an object": lambda m: m.own.__dict__.update(calls=3, other=4),
    "an array in an object": lambda m: m.own.inner[0].fill(7),
    "a class": lambda m: setattr(m.own, "__class__", type("Sub", (Own,), {})),
    "the class of a module": lambda m: setattr(m.slots, "__class__", type("Sub", (Slots,), {"__slots__": ()})),
    "a slot": lambda m: setattr(m.slots, "count", 5),
    "a slot is deleted": lambda m: delattr(m.slots, "count"),
    "an array": lambda m: m.array.fill(np.nan),
    "the shape of an array": lambda m: m.array.resize(9, refcheck=False),
    "a deque": lambda m: m.queue.append(3),
    "an order": lambda m: m.order.move_to_end("a"),
    "counts": lambda m: m.counts.update("aaa"),
    "a set": lambda m: m.names.clear(),
    "bytes": lambda m: m.raw.extend(b"d"),
    "a generator of torch": lambda m: torch.rand(3, generator=m.noise),
    "a generator of Python": lambda m: m.dice.random(),
    "an old generator of NumPy": lambda m: m.old_noise.rand(),
    "a new generator of NumPy": lambda m: m.new_noise.random(),
    "a module in a tuple": lambda m: m.hidden[0].weight.data.zero_(),
    "a module in a list": lambda m: m.hidden[1].append(m),
    "a new module": lambda m: m.add_module("late", nn.Linear(2, 2)),
    "a new buffer": lambda m: m.register_buffer("late", torch.ones(2)),
    "a parameter is replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(3))),
    "a parameter's dtype": lambda m: m.half(),
    "a parameter's shape": lambda m: setattr(m.weight, "data", torch.zeros(5)),
    "a parameter's bits": lambda m: m.weight.data.add_(1),
    "a parameter's attributes": lambda m: setattr(m.weight, "tag", 1),
    "an output of an op": lambda m: torch.add(m.weight.detach(), 1, out=m.weight.data),
    "elements of many parameters": lambda m: torch._foreach_add_([m.weight.data, m.hidden[0].weight.data], 1),
    "requires_grad": lambda m: m.requires_grad_(False),
    "a gradient": lambda m: m.weight.grad.mul_(3),
    "no gradient": lambda m: m.zero_grad(set_to_none=True),
    "a backward": lambda m: (m.weight.sum() + m.hidden[0].weight.sum()).backward(),
    "a tensor's hook": lambda m: m.weight.register_hook(lambda grad: grad * 2),
    "a hook after gradients": lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
    "a sparse tensor": lambda m: m.sparse._values().zero_(),
    "a forward hook": lambda m: m.register_forward_hook(lambda *a: None, always_call=True, with_kwargs=True),
    "a forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None, with_kwargs=True),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *a: None),
    "a state_dict hook": lambda m: m.register_state_dict_post_hook(lambda *a: None),
    "a load_state_dict hook": lambda m: m.register_load_state_dict_post_hook(lambda *a: None),
    "a global hook": lambda m: nn.modules.module.register_module_forward_hook(lambda *a: None),
    "a mode": lambda m: m.hidden[0].eval(),
    "gradients off": lambda m: torch._C._set_grad_enabled(False),
    "the default dtype": lambda m: torch.set_default_dtype(torch.float64),
    "autocast": lambda m: torch.set_autocast_enabled("cpu", True),
    "deterministic algorithms": lambda m: torch.use_deterministic_algorithms(True),
    "torch's random numbers": lambda m: torch.rand(2),
    "Python's random numbers": lambda m: random.random(),
    "NumPy's random numbers": lambda m: np.random.randn(),
    "recursion": lambda m: m.note.append(m.note),
}


def changed_and_raised(model: nn.Module, change: Any, error: BaseException) -> None:
    with StateGuard(model):
        change(model)
        raise error


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_change_is_undone(change: Any, error: type[BaseException] | None) -> None:
    model = Strange()
    before = Snapshot(model)
    if error is None:
        with StateGuard(model):
            change(model)
    else:
        with pytest.raises(error, match=r"^at once$"):
            changed_and_raised(model, change, error("at once"))
    assert before.differences() == []


def test_outputs_keep_the_values_that_were_returned() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return x, self.calls

    model = Counts()
    for _ in range(2):
        assert run(model, ((torch.ones(1),), {}))[1].tolist() == [1]
        assert model.calls.tolist() == [0]


def test_a_failed_restoration_hides_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def cannot() -> None:
        raise OSError("read-only")

    monkeypatch.setattr(state_guard, "restorers", lambda found: [cannot])
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="the user's"):
        changed_and_raised(model, lambda m: m.weight.data.zero_(), KeyError("the user's"))
    assert "read-only" in caplog.text
    assert model.weight.any()  # everything else is restored
    with pytest.raises(ModelError, match="could not be restored: OSError: read-only"), StateGuard(model):
        pass


def test_released_state_stays_and_random_numbers_do_not() -> None:
    model, state = nn.Linear(2, 2), torch.get_rng_state()
    with StateGuard(model) as guard:
        model.late = nn.Linear(2, 2)
        guard.release()
    assert "late" in model._modules
    assert torch.equal(torch.get_rng_state(), state)
