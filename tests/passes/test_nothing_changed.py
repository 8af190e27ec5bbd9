"""`apply` changes what its plan states and nothing else; a failed one, `inspect`, `explain` and `plan` change nothing.

Models whose code counts, writes, draws random numbers, registers and raises are compared with a deep snapshot.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import MemrewriteError, ModelError, VerificationError
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.verify.evidence import checked
from tests.snapshot import Snapshot

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
EDITED = ("model._modules#keys", "model._modules['memory']", "model._modules['blocks']._modules['0']._modules['mlp']")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Two blocks; `odd` is called between them, on the residual stream."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.blocks, self.odd, self.head = nn.ModuleList([Block(), Block()]), odd, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = x + self.odd(x)
        return self.head(self.blocks[1](x))


class Odd(nn.Module):
    """Does `act` in every forward."""

    def __init__(self, act: Callable[[Odd, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.act = (act,)
        self.linear, self.calls, self.seen, self.names = nn.Linear(8, 8), 0, {"sizes": [0]}, {"a"}
        self.array, self.noise, self.plain = np.zeros(2), torch.Generator().manual_seed(1), torch.zeros(2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.late: Tensor | None = None
        self.linear.weight.grad = torch.ones(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act[0](self, x)
        return self.linear(x) if out is None else out


def counts(m: Odd, x: Tensor) -> None:
    m.calls += 1
    m.seen["sizes"].append(m.calls)
    m.seen[str(m.calls)] = m.calls
    m.names.add(str(m.calls))


def writes(m: Odd, x: Tensor) -> None:
    with torch.no_grad():
        m.linear.weight.mul_(1.5)
        m.linear.bias.data = m.linear.bias.data + 1


def buffers(m: Odd, x: Tensor) -> None:
    m.count += 1
    m.array += 1


def plain_tensors(m: Odd, x: Tensor) -> None:
    m.plain.add_(1)


def depends_on_calls(m: Odd, x: Tensor) -> Tensor:
    m.calls += 1
    return m.linear(x) * m.calls


def caches(m: Odd, x: Tensor) -> Tensor:
    if m.late is None:
        m.late = torch.arange(8.0)
    return m.linear(x) * m.late


def keeps_its_input(m: Odd, x: Tensor) -> None:
    m.late = x


def registers(m: Odd, x: Tensor) -> None:
    m.register_buffer(f"late_{m.calls}", torch.ones(1))
    m.register_forward_hook(lambda *a: None)
    m.linear.weight.register_hook(lambda grad: grad)


def replaces_a_child(m: Odd, x: Tensor) -> None:
    m.linear = nn.Linear(8, 8)


def deletes(m: Odd, x: Tensor) -> None:
    if hasattr(m, "plain"):
        del m.plain


def draws(m: Odd, x: Tensor) -> Tensor:
    return m.linear(x) * (1 + random.random() + np.random.rand()) + torch.rand(8) + torch.rand(8, generator=m.noise)


def switches(m: Odd, x: Tensor) -> None:
    m.linear.train(not m.linear.training)
    torch.set_default_dtype(torch.float64 if torch.get_default_dtype() == torch.float32 else torch.float32)
    torch.set_default_dtype(torch.float32)


def backward_inside(m: Odd, x: Tensor) -> None:
    with torch.enable_grad():
        m.linear(x.detach()).sum().backward()


def changes_its_class(m: Odd, x: Tensor) -> None:
    m.__class__ = Again if type(m) is Odd else Odd


class Again(Odd):
    pass


ACTS = [counts, writes, buffers, plain_tensors, depends_on_calls, caches, keeps_its_input, registers, replaces_a_child]
ACTS += [deletes, draws, switches, backward_inside, changes_its_class]


class Scripted(nn.Module):
    __annotations__ = {"calls": int, "sizes": list[int]}

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.sizes = nn.Linear(8, 8), 0, [1]
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(self.calls)
        self.count += 1
        return self.linear(x)


class Slotted(nn.Module):
    __slots__ = ("calls",)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Guarded(nn.Module):
    """Notes every assignment, and has a property instead of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if "notes" in self.__dict__:
            self.notes.append(name)
        super().__setattr__(name, value)

    @property
    def calls(self) -> int:
        return len(self.notes)

    @calls.setter
    def calls(self, value: int) -> None:
        self.notes.append("set")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Counter:
    """A hook with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def with_hooks() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(Counter())
    linear.register_forward_pre_hook(Counter())
    linear.register_state_dict_pre_hook(Counter())
    linear.register_state_dict_post_hook(Counter())
    return linear


def in_train_mode(module: nn.Module) -> nn.Module:
    module.train()
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(Scripted()),
    "traced": lambda: torch.jit.trace(nn.Linear(8, 8), X),
    "slots": Slotted,
    "own __setattr__": Guarded,
    "hooks": with_hooks,
    "batch norm": lambda: in_train_mode(nn.BatchNorm1d(3)),
    "spectral norm": lambda: in_train_mode(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
    "old spectral norm": lambda: in_train_mode(nn.utils.spectral_norm(nn.Linear(8, 8))),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "dropout": lambda: in_train_mode(nn.Dropout()),
    "compiled": lambda: torch.compile(nn.Linear(8, 8), backend="eager", fullgraph=True),
    "shared": lambda: nn.Sequential(*[nn.Linear(8, 8)] * 2),
}
MODULES |= {act.__name__: lambda act=act: Odd(act) for act in ACTS}


def recipe(placement: str = "replace", **changes: Any) -> dict[str, Any]:
    rule = {"where": {"layers": [0]}, "with": "memory_plus", "pool": "p", "options": {"heads": 2, "topk": 4}}
    return {"memrewrite": 1, "pools": {"p": {"keys": 8}}, "replace": [{**rule, "placement": placement}], **changes}


def model_with(odd: nn.Module, mixed: bool = True) -> Model:
    torch.manual_seed(1)
    model = Model(odd)
    if mixed:
        model.blocks[1].eval()
    return model


def unexpected(before: Snapshot) -> list[str]:
    """What a successful `apply` changed in a model, without the edit of the plan."""
    return [difference for difference in before.differences() if not difference.startswith(EDITED)]


# ----------------------------------------------------------------------------------------------------- nothing fails


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_only_the_planned_edit_changes(name: str, placement: str) -> None:
    model = model_with(MODULES[name]())
    before = Snapshot(model)
    report = memrewrite.apply(model, recipe(placement), X)
    assert report.ok
    assert unexpected(before) == []
    assert model.memory.training
    assert model.blocks[0].mlp.training


@pytest.mark.parametrize("name", MODULES)
def test_looking_changes_nothing(name: str) -> None:
    model = model_with(MODULES[name]())
    before = Snapshot(model)
    memrewrite.inspect(model, X)
    memrewrite.explain(model, "blocks.0.mlp", X)
    memrewrite.plan(model, recipe(), X)
    assert before.differences() == []


def test_a_rewritten_graph_leaves_the_model_as_it_was() -> None:
    model = model_with(Odd(lambda m, x: None))
    before = Snapshot(model)
    assert memrewrite.apply(model, recipe(), X, emit="graph").ok
    assert before.differences() == []


def test_an_exported_program_does_not_change() -> None:
    program = torch.export.export(model_with(Odd(buffers)), (X,))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    assert memrewrite.apply(program, recipe()).ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())
    assert program.state_dict.keys() == before.keys()


# -------------------------------------------------------------------------------------------------- something fails

STAGES = [
    "rewrite.look.capture",
    "rewrite.look.locate",
    "pipeline.select",
    "pipeline.refuse_too_large",
    "pipeline.trace_hosts",
    "pipeline.rewrite_module",
    "pipeline.Report",
    "pipeline.refuse_failed",
    "pipeline.set_record",
    "pipeline.RewriteRecord",
    "verify.verified_rewrite.fingerprints",
    "verify.verified_rewrite.before_editing",
    "verify.verified_rewrite.substitute",
    "verify.verified_rewrite.set_scales",
    "verify.verified_rewrite.AfterEdit",
    "verify.verified_rewrite.verify",
    "verify.verify.null",
    "verify.verify.reached",
    "verify.verify.locality",
    "verify.verify.untouched",
    "verify.verify.warm_up",
    "verify.null_check.place",
    "verify.null_check._rewind",
    "verify.null_train_check.differing",
    "verify.checks.run",
    "verify.checks.compare",
    "verify.checks.recapture",
    "verify.gradient_flow.run",
    "verify.gradient_flow._random_sum",
    "verify.layer_locality._wrong",
    "rewrite.edit_module.place",
    "rewrite.edit_module.build_all",
    "rewrite.build_layers.generator_of",
    "capture.capture.warm_up",
    "capture.capture.run",
    "capture.capture.export_program",
    "capture.torch_export._refuse_nested_weights",
]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True], ids=["instead", "afterwards"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_of_a_stage(stage: str, late: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(Odd(lambda m, x: (counts(m, x), buffers(m, x), writes(m, x))[0]))
    before = Snapshot(model)
    module, _, name = stage.rpartition(".")
    owner = importlib.import_module(f"memrewrite.passes.{module}")
    original = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if late:
            original(*args, **kwargs)
        raise error("injected")

    monkeypatch.setattr(owner, name, broken)
    try:
        memrewrite.apply(model, recipe(), X)
    except (error, MemrewriteError):
        assert before.differences() == []
    else:
        assert error is RuntimeError  # torch's refusal of one export: the model is captured in another way
        assert stage == "capture.torch_export._refuse_nested_weights"
        assert unexpected(before) == []


@pytest.mark.parametrize("check", ["untouched", "frame", "sharing", "tokenwise", "gradient", "identity", "coverage"])
def test_a_failed_check(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.passes.verify import verify

    def failed(_: Any) -> Any:
        return checked(check, False, 0, "injected")

    monkeypatch.setattr(verify, "CHECKS", [failed if each.__name__ == check else each for each in verify.CHECKS])
    model = model_with(Odd(counts))
    before = Snapshot(model)
    with pytest.raises(VerificationError):
        memrewrite.apply(model, recipe(), X)
    assert before.differences() == []


class Raises(nn.Module):
    """Raises in its n-th call; counts in a list of the test's, which no guard restores."""

    def __init__(self, calls: list[int], at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.note = lambda: calls.append(1) or len(calls)
        self.at, self.error, self.half = at, error, 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.half += 1
        self.count += 1
        if self.note() == self.at:
            raise self.error("injected")
        self.half += 1
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_forward_that_raises_in_its_nth_call(error: type[BaseException]) -> None:
    calls, at = [1], 0
    while len(calls) > at - 1:  # the last apply raised, or had more forwards to come
        calls, at = [], at + 1
        model = model_with(Raises(calls, at, error))
        before = Snapshot(model)
        try:
            memrewrite.apply(model, recipe(), X)
        except (KeyboardInterrupt, MemrewriteError):  # and no other
            assert before.differences() == []
        else:
            assert unexpected(before) == []
    assert at > 10


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isfinite().all()):
            raise RuntimeError("half-way")
        return x


def test_a_scripted_child_that_raises_leaves_no_hook() -> None:
    model = model_with(torch.jit.script(Half()))
    before = Snapshot(model)
    for look in (lambda: memrewrite.inspect(model, X), lambda: memrewrite.apply(model, recipe(), X)):
        with pytest.raises(ModelError, match="half-way"):
            look()
        assert before.differences() == []


class Refuses(nn.Linear):
    """Refuses hooks with keyword arguments, as classes of other libraries may."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")


def test_a_hook_that_cannot_be_registered_leaves_no_other() -> None:
    model = model_with(Refuses(8, 8))
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="no hooks here"), Recorder(model):
        pass
    assert before.differences() == []


def test_lazy_modules_are_refused() -> None:
    model = model_with(nn.LazyLinear(8))
    before = Snapshot(model)
    for look in (lambda: memrewrite.inspect(model, X), lambda: memrewrite.apply(model, recipe(), X)):
        with pytest.raises(ModelError, match=r"odd\.weight.*no shape"):
            look()
        assert before.differences() == []


# ---------------------------------------------------------------------------------------------------- compositions


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes long
@given(
    acts=st.lists(st.sampled_from(ACTS), min_size=1, max_size=5),
    at=st.integers(1, 30),
    error=st.sampled_from([ValueError, KeyboardInterrupt, SystemExit, None]),
)
def test_compositions(acts: list[Any], at: int, error: type[BaseException] | None) -> None:
    calls: list[int] = []

    def act(m: Odd, x: Tensor) -> Tensor | None:
        outs = [each(m, x) for each in acts]
        calls.append(1)
        if error is not None and len(calls) == at:
            raise error("injected")
        return next((out for out in outs if out is not None), None)

    model = model_with(Odd(act))
    before = Snapshot(model)
    try:
        memrewrite.apply(model, recipe(), X)
    except (KeyboardInterrupt, MemrewriteError):
        assert before.differences() == []
    else:
        assert unexpected(before) == []
