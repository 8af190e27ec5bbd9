"""Code that asks a replaced module for its weights and attributes: shapes and dtypes are there, values are not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.errors import ModelError, VerificationError
from memrewrite.layers.replaced import ReplacedTensor, Replacement
from tests import tiny

READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a dtype": lambda up, x: x.to(up.weight.dtype),
    "a device": lambda up, x: x.to(up.weight.device),
    "a width": lambda up, x: x.reshape(*x.shape[:-1], up.in_features),
    "a shape": lambda up, x: x.reshape(-1, x.shape[1], up.weight.shape[1]),
    "a bias that may be None": lambda up, x: x if up.bias is not None else x / 0,
    "the class of a weight": lambda up, x: x if isinstance(up.weight, nn.Parameter) else x / 0,
    "an attribute that may be missing": lambda up, x: x / 0 if hasattr(up.weight, "quant_state") else x,
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda up: up.weight.mul_(1),
    "through data": lambda up: up.weight.data.clamp_(-100, 100),
    "a sum": lambda up: up.bias.add_(torch.zeros(1)),
}


def reading(make: Callable[[], Any], read: Callable[[Any, Tensor], Any]) -> Any:
    """A model whose blocks look at the first matrix of their MLP, which is replaced."""

    class Reads(type(make().blocks[0])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            at: Any = self.mlp if hasattr(self, "mlp") else self
            return super().forward(read(at.up, x))

    model = make()
    for block in model.blocks:
        block.__class__ = Reads
    return model


@pytest.mark.parametrize("make", [tiny.modular, tiny.loose])
@pytest.mark.parametrize("read", READS)
def test_a_model_that_reads_attributes_is_rewritten(make: Callable[[], Any], read: str) -> None:
    model = reading(make, READS[read])
    assert memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),)).ok
    plain = make()
    memrewrite.apply(plain, tiny.recipe(), (tiny.tokens(),))
    assert torch.equal(model(tiny.tokens()), plain(tiny.tokens()))
    assert set(model.state_dict()) == set(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("make", [tiny.modular, tiny.loose])
@pytest.mark.parametrize("write", WRITES)
def test_a_model_that_writes_to_weights_without_changing_them_is_rewritten(make: Callable[[], Any], write: str) -> None:
    def once(up: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            if id(up) not in done:  # in the first forward: a later one is recorded
                WRITES[write](up)
        done.add(id(up))
        return x

    done = set[int]()
    model = reading(make, once)
    assert memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),)).ok
    done.clear()
    assert model(tiny.tokens()).isfinite().all()


@pytest.mark.parametrize("make", [tiny.modular, tiny.loose])
@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize("mode", [True, False])
def test_code_that_scales_weights_from_outside_is_refused(make: Callable[[], Any], placement: str, mode: bool) -> None:
    def scaled(up: Any, x: Tensor) -> Tensor:
        if outer[0].training == mode:
            with torch.no_grad():
                up.weight.mul_(0.5)
        return x

    outer = [reading(make, scaled)]
    before = {name: value.clone() for name, value in outer[0].state_dict().items()}
    with pytest.raises(
        ModelError, match=f"in {'train' if mode else 'eval'} mode, code outside of the MLP .* changes its weights"
    ):
        memrewrite.apply(outer[0], tiny.recipe(placement), (tiny.tokens(),))
    assert all(torch.equal(value, before[name]) for name, value in outer[0].state_dict().items())


VALUES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a product": lambda up, x: x + F.linear(x, up.weight).mean(-1, keepdim=True),
    "a sum": lambda up, x: x + up.weight.mean(),
    "one value": lambda up, x: x * up.bias[0],
    "a decision": lambda up, x: x if up.weight.isfinite().all() else x / 0,
    "an index": lambda up, x: x[:, up.weight.argmax(0) * 0][:, : x.shape[1]],
    "into the stream": lambda up, x: x.clone().mul_(up.weight[0]),
}


@pytest.mark.parametrize("make", [tiny.modular, tiny.loose])
@pytest.mark.parametrize("read", VALUES)
def test_a_model_that_reads_values_is_refused_with_advice_that_works(make: Callable[[], Any], read: str) -> None:
    model = reading(make, VALUES[read])
    before = model(tiny.tokens())
    with pytest.raises(VerificationError, match="does not run: ModelError: the model's code reads values of") as refused:
        memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),))
    assert "placement: parallel" in str(refused.value.hint)
    assert torch.equal(model(tiny.tokens()), before)
    assert memrewrite.apply(model, tiny.recipe("parallel"), (tiny.tokens(),)).ok


def outlined(dtype: torch.dtype = torch.float32) -> Any:
    new: Any = Replacement()
    new.expose(tiny.MLP(4, 8).to(dtype))
    return new


def test_the_outline_is_not_registered() -> None:
    new = outlined()
    assert (list(new.state_dict()), list(new.parameters()), len(list(new.modules()))) == ([], [], 1)
    assert (new.up.weight.shape, new.up.weight.is_leaf, new.down.in_features) == ((8, 4), True, 8)
    with pytest.raises(ModelError, match=r"reads values of 'MLP.up.weight' outside of its module"):
        new.up(torch.ones(3, 4))


def test_the_outline_follows_conversions_copies_and_files() -> None:
    new = outlined().double()
    assert new.up.weight.dtype == torch.float64
    assert copy.deepcopy(new).half().up.weight.dtype == torch.float16
    assert new.up.weight.dtype == torch.float64
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded.up.weight, ReplacedTensor)
    assert "no values" in repr(loaded.down.bias)


def test_a_tensor_of_the_module_itself_follows_conversions() -> None:
    new: Any = Replacement()
    new.expose(nn.Linear(4, 8))
    assert new.half().weight.dtype == torch.float16


def test_own_attributes_come_first() -> None:
    class Own(Replacement):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(1, 1)

    new: Any = Own()
    new.expose(tiny.MLP(4, 8))
    assert (new.up.in_features, new.down.in_features) == (1, 8)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_and_exported_models_read_attributes(fullgraph: bool) -> None:
    model = reading(tiny.loose, READS["a dtype"])
    memrewrite.apply(model, tiny.recipe(), (tiny.tokens(),))
    want = model(tiny.tokens())
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=fullgraph)(tiny.tokens()), want)
    exported = torch.export.export(model, (tiny.tokens(),), strict=False)
    assert torch.equal(exported.module()(tiny.tokens()), want)
