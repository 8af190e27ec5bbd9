"""Clipping of dense, sparse and fused tables equals torch's on dense gradients; loss scaling includes fused tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import assert_norm_close, most_reads
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torch_clip

import memrewrite
from memrewrite.errors import UserError
from memrewrite.fused import fuse
from memrewrite.kernels import gradient_norm as norms
from memrewrite.kernels import reference
from memrewrite.kernels.gradient_norm import gradient_norm
from memrewrite.kernels.pending import Factors
from memrewrite.layers.value_table import ValueTable

GRADIENTS = ["dense", "sparse", "fused"]


class Tables(nn.Module):
    """Two linear layers, and two tables: one is read by two lookups with different K, the other by one."""

    def __init__(self, gradient: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 5)
        self.one = ValueTable(30, 7, gradient=gradient, dtype=dtype)
        self.two = ValueTable(11, 5, gradient=gradient, seed=1, dtype=dtype)
        for table in (self.one, self.two):
            table.reset_parameters()
        for p in (*self.first.parameters(), *self.second.parameters()):
            nn.init.normal_(p, generator=generator)
        self.reads = [torch.randint(0, 30, (13, 3), generator=generator), torch.randint(0, 30, (13, 5), generator=generator)]
        self.reads.append(torch.randint(0, 11, (13, 4), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        w = [self.first(x)[:, : r.shape[1]] for r in self.reads]
        y = self.one(self.reads[0], w[0]) + self.one(self.reads[1], w[1])
        return self.second(y) + self.two(self.reads[2], w[2])


def backward(model: nn.Module, size: float = 1.0, seed: int = 3) -> None:
    x = torch.randn(13, 7, generator=torch.Generator().manual_seed(seed))
    (size * model(x).square()).mean().backward()


def trained(model: Tables, lr: float = 1.0) -> torch.optim.Optimizer:
    """Plain SGD; for fused tables `Sum`, whose step adds the gradient itself: what a step changes is what was clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if model.one.pending is not None:
        fuse(optimizer, model, Sum())
    return optimizer


class Sum:
    """Plain SGD on the rows read."""

    value_lr_factor = 1.0

    def fresh(self, values: Tensor) -> dict[str, Tensor]:
        return {}

    def step(self, pool: Any, state: Any, reads: list[Factors], step: int, numbers: dict[str, Any]) -> None:
        grads, indices, weights = zip(*reads, strict=True)
        for g, i, w in zip(grads, indices, weights, strict=True):
            pool.values -= numbers["lr"] * reference.table_gradient([g], [i], [w], pool.values.shape[0])


def change(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What one step of SGD subtracts from each parameter: the gradient after clipping."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def expected(size: float, max_norm: float, value_max: float, **options: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The same by torch, on dense gradients: its clipping called once for each of the two sets."""
    model = Tables("dense")
    backward(model, size)
    rest = torch_clip([*model.first.parameters(), *model.second.parameters()], max_norm, **options)
    values = torch_clip([model.one.values, model.two.values], value_max, **options)
    return change(model, torch.optim.SGD(model.parameters(), lr=1.0)), rest, values


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limits", [(1.0, None), (0.3, 1e-3), (float("inf"), 0.1), (0.1, float("inf")), (1e6, 1e6)], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_clips_as_torch_does_on_dense_gradients(
    gradient: str, limits: tuple[float, float | None], foreach: bool | None
) -> None:
    model = Tables(gradient)
    optimizer = trained(model)
    backward(model, 9.0)
    found = memrewrite.clip_grad_norm_(model, *limits, foreach=foreach)
    wanted, rest, values = expected(9.0, limits[0], limits[0] if limits[1] is None else limits[1], foreach=foreach)
    torch.testing.assert_close(found.rest, rest)
    torch.testing.assert_close(found.values, values)
    for name, delta in change(model, optimizer).items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_dense_gradients_are_clipped_bit_for_bit_as_by_torch() -> None:
    ours, theirs = Tables("dense"), Tables("dense")
    for model in (ours, theirs):
        backward(model)
    found = memrewrite.clip_grad_norm_(ours, 0.1, 0.01)
    rest = torch_clip([*theirs.first.parameters(), *theirs.second.parameters()], 0.1)
    values = torch_clip([theirs.one.values, theirs.two.values], 0.01)
    assert torch.equal(found.rest, rest)
    assert torch.equal(found.values, values)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_micro_batches_are_summed_before_the_norm(gradient: str) -> None:
    """Two backwards whose gradients cancel nearly: the norm of the sum is far below the sum of the norms."""
    dense, model = Tables("dense"), Tables(gradient)
    optimizer = trained(model)
    for each in (dense, model):
        backward(each)
        backward(each, -0.75)
    wanted = torch.stack([dense.one.values.grad.norm(), dense.two.values.grad.norm()]).norm()
    torch.testing.assert_close(memrewrite.clip_grad_norm_(model, 1.0).values, wanted, rtol=1e-4, atol=1e-6)
    assert optimizer is not None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_norms_that_are_not_finite(gradient: str, bad: float) -> None:
    """As in torch: an error before any change if asked, else the gradients are scaled by 0 or NaN."""
    model = Tables(gradient)
    optimizer = trained(model)
    with torch.no_grad():
        model.second.bias.fill_(bad)
    backward(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        memrewrite.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    found = memrewrite.clip_grad_norm_(model, 1.0)
    assert not found.rest.isfinite()
    assert not found.values.isfinite()
    before = model.one.values.detach().clone()
    optimizer.step()
    assert model.one.values.isnan().any()
    read = torch.cat([r.flatten() for r in model.reads[:2]])
    untouched = torch.ones(30, dtype=torch.bool).index_fill(0, read, False)
    if gradient != "dense":
        assert torch.equal(model.one.values[untouched], before[untouched])


def test_an_error_changes_nothing() -> None:
    """The rest is finite and the tables are not: nothing is scaled."""
    model = Tables("fused")
    optimizer = trained(model)
    backward(model, 1e3)
    model.one.pending.waiting[0].grad[0, 0] = float("nan")
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    kept = [tuple(map(torch.clone, r)) for r in model.one.pending.waiting]
    with pytest.raises(RuntimeError, match="non-finite"):
        memrewrite.clip_grad_norm_(model, 1e-3, error_if_nonfinite=True)
    assert all(
        torch.equal(p.grad, g) for p, g in zip((p for p in model.parameters() if p.grad is not None), before, strict=True)
    )
    for r, old in zip(model.one.pending.waiting, kept, strict=True):
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(r, old, strict=True))
    assert optimizer is not None


def test_gradients_of_the_rest_may_be_sparse() -> None:
    """`nn.Embedding(sparse=True)`: rows that occur twice are summed before the norm. torch's clipping refuses these."""
    embedding = nn.Embedding(9, 4, sparse=True)
    dense = copy.deepcopy(embedding)
    dense.sparse = False
    ids = torch.tensor([1, 1, 8, 1])
    for each in (embedding, dense):
        each(ids).square().sum().backward()
    found, wanted = memrewrite.clip_grad_norm_(embedding, 0.1).rest, torch_clip(dense.parameters(), 0.1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense.weight.grad)


def test_without_gradients_norms_are_zero() -> None:
    assert memrewrite.clip_grad_norm_(Tables("fused"), 1.0) == (0.0, 0.0)


# --------------------------------------------------------------------------------------------------- the norm by itself


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 40),
    width=st.integers(1, 9),
    lookups=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    index=st.sampled_from([torch.int32, torch.int64]),
    columns=st.integers(1, 9),
)
def test_the_norm_is_that_of_the_dense_gradient(slots, width, lookups, dtype, index, columns) -> None:
    """Any number of lookups with any K, and any slices of the columns, compared with float64."""
    g = torch.Generator().manual_seed(slots)
    reads = [
        Factors(
            torch.randn(t, width, generator=g).to(dtype),
            torch.randint(0, slots, (t, k), generator=g).to(index),
            torch.randn(t, k, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        )
        for t, k in lookups
    ]
    wide = [[r[n] if n == 1 else r[n].double() for r in reads] for n in range(3)]
    right = reference.table_gradient(*wide, slots).norm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "LEAST", columns)
        got = gradient_norm(reads, slots)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_norm_close(got, right, terms=most_reads(*wide[1]) + slots * width)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tensor_is_as_large_as_the_table(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of rows take at most the memory of the factors; a table of 400 slots is read completely."""
    monkeypatch.setattr(norms, "LEAST", 1)
    sizes = []
    rows = norms._rows

    def recorded(*args: Any) -> Tensor:
        sizes.append(rows(*args)._values().numel())
        return rows(*args)

    monkeypatch.setattr(norms, "_rows", recorded)
    grad, indices = torch.randn(20, 64, device=device), torch.arange(400, device=device).view(20, 20)
    weights = torch.ones(20, 20, device=device)
    got = gradient_norm([Factors(grad, indices, weights)], 400)
    assert max(sizes) <= grad.numel()
    torch.testing.assert_close(got, 20**0.5 * grad.norm())


# ------------------------------------------------------------------------------------------------------- loss scaling


def scaled_step(model: Tables, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """One step with a scaled loss, clipped; whether it was taken."""
    before = model.one.values.detach().clone()
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(13, 7)).square().mean()).backward()
    memrewrite.unscale_(scaler, optimizer, model)
    memrewrite.clip_grad_norm_(model, 0.5)
    scaler.step(optimizer)
    scaler.update()
    return not torch.equal(model.one.values, before)


def test_a_scaled_loss_trains_as_one_that_is_not_scaled() -> None:
    scaled, plain = Tables("fused"), Tables("fused")
    for model, on in ((scaled, True), (plain, False)):
        assert scaled_step(model, trained(model), torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=on))
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["grad", "weights"])
def test_a_step_with_an_infinite_factor_is_skipped_and_the_scale_falls(bad: float, part: str) -> None:
    """Only a fused table's factor is not finite. After `zero_grad` the next step is taken."""
    model = Tables("fused")
    optimizer, scaler = trained(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(13, 7)).square().mean()).backward()
    getattr(model.two.pending.waiting[0], part)[1, 2] = bad
    memrewrite.unscale_(scaler, optimizer, model)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0
    assert scaled_step(model, optimizer, scaler)
    assert all(p.isfinite().all() for p in model.parameters())


def test_unscaling_refuses_what_a_scaler_cannot_see() -> None:
    table = ValueTable(4, 3, gradient="fused")
    table.reset_parameters()
    optimizer, scaler = torch.optim.SGD(table.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    fuse(optimizer, table)
    scaler.scale(table(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).sum()).backward()
    with pytest.raises(UserError, match="no parameter of the optimizer but fused tables"):
        memrewrite.unscale_(scaler, optimizer, table)


def test_unscaling_twice_is_torchs_error_and_scales_once() -> None:
    model = Tables("fused")
    optimizer, scaler = trained(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(13, 7)).square().mean()).backward()
    memrewrite.unscale_(scaler, optimizer, model)
    kept = model.one.pending.waiting[0].weights.clone()
    with pytest.raises(RuntimeError, match="already been called"):
        memrewrite.unscale_(scaler, optimizer, model)
    assert torch.equal(model.one.pending.waiting[0].weights, kept)
