"""The rule `LazyAdam`: training compared with `torch.optim.AdamW` on the dense gradient, and rows that catch up."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from closeness import relative_error
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import UserError
from memrewrite.fused import LazyAdam, RowwiseAdam, fuse
from memrewrite.kernels import ops
from memrewrite.layers.value_table import ValueTable

FP8 = torch.float8_e4m3fn
STATES = ["float32", "bfloat16", "float8_e4m3fn"]
N, D, T, K = 50, 12, 6, 3


class TwoReads(nn.Module):
    """Two lookups of one table with weights that are trained too; the rows are those of `batch`."""

    def __init__(self, gradient: str = "fused", dtype: torch.dtype = torch.float32, rows: int = N) -> None:
        super().__init__()
        self.table = ValueTable(rows, D, gradient=gradient, dtype=dtype)
        self.mix = nn.Linear(D, 2 * K, dtype=dtype if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            self.table.values.copy_(torch.randn(rows, D, generator=torch.Generator().manual_seed(0)))
            for p in self.mix.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        first, second = self.mix(x.to(self.mix.weight.dtype)).chunk(2, -1)
        y = self.table(slots[0], first).to(first.dtype)
        return y + self.table(slots[1], second + y[:, :K]).to(first.dtype)


def batch(step: int, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, slots and targets: a few rows are read often, most of them rarely, the last ten never."""
    g = torch.Generator().manual_seed(step)
    slots = torch.where(torch.rand(2, T, K, generator=g) < 0.7, 5, rows - 10)
    slots = (torch.rand(2, T, K, generator=g) * slots).long()
    return torch.randn(T, D, generator=g), slots, torch.randn(T, D, generator=g)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, slots, target = batch(step)
    y = model(x, slots)
    return (y - target.to(y.dtype)).square().mean()


def optimizer_of(model: TwoReads, rule: LazyAdam | None) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.table.values], "lr": 3e-2, "weight_decay": 0.2},
        {"params": list(model.mix.parameters()), "lr": 1e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    if rule is not None:
        fuse(optimizer, model, rule)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, run: nn.Module | None = None) -> list[float]:
    """The rate of every step is another: warm-up, then decay."""
    losses = []
    for step in steps:
        for group, peak in zip(optimizer.param_groups, (3e-2, 1e-2), strict=True):
            group["lr"] = peak * min((step + 1) / 5, 1 - step / 60)
        optimizer.zero_grad()
        loss = loss_of(model if run is None else run, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CATCH_UP = LazyAdam(betas=(0.9, 0.99), catch_up=True)


def test_caught_up_training_is_adamw_on_the_dense_gradient():
    """40 steps, rows read rarely or never, a schedule, decay: as close to AdamW in float64 as AdamW in fp32 is."""
    lazy, dense, exact = TwoReads(), TwoReads("dense"), TwoReads("dense", torch.float64)
    runs = [(lazy, optimizer_of(lazy, CATCH_UP)), (dense, optimizer_of(dense, None)), (exact, optimizer_of(exact, None))]
    losses = [train(model, optimizer, range(40)) for model, optimizer in runs]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    stale = runs[0][1].state[lazy.table.values]["row_step"]
    assert (stale < 30).sum() >= 10
    never = lazy.table.values[-10:].clone()
    tables = [model.state_dict()["table.values"] for model, _ in runs]  # brings all rows up to date
    assert (stale == 40).all()
    assert not torch.equal(never, lazy.table.values[-10:])  # decayed
    assert relative_error(tables[0], tables[2]) <= max(2 * relative_error(tables[1], tables[2]), 1e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[model.table.values][name] for model, optimizer in runs]
        assert relative_error(moments[0], moments[2]) <= 2e-6


def test_without_catching_up_it_is_another_rule():
    lazy, exact = TwoReads(), TwoReads("dense", torch.float64)
    train(lazy, optimizer_of(lazy, LazyAdam(betas=(0.9, 0.99))), range(40))
    train(exact, optimizer_of(exact, None), range(40))
    assert relative_error(lazy.table.values, exact.table.values) > 1e-3


def test_a_rate_of_the_last_step_and_a_long_absence(monkeypatch):
    """The history grows; momentum that has died out is not applied any more, decay is."""
    monkeypatch.setattr("memrewrite.lazy_adam.HISTORY", 2)
    rule = LazyAdam(betas=(0.9, 0.99), catch_up=True)
    lazy, exact = ValueTable(3, D, gradient="fused"), ValueTable(3, D, dtype=torch.float64)
    for table in (lazy, exact):
        table.values.data.copy_(torch.arange(3.0 * D).view(3, D))
    optimizers = [torch.optim.AdamW([t.values], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1) for t in (lazy, exact)]
    fuse(optimizers[0], lazy, rule)
    for step in range(500):
        slot = torch.tensor([[0 if step == 0 else 1]])  # row 0 is read once
        for table, optimizer in zip((lazy, exact), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + step % 7)
            optimizer.zero_grad()
            table(slot, torch.ones(1, 1, dtype=table.values.dtype)).sin().sum().backward()
            optimizer.step()
    memrewrite.catch_up(lazy)
    assert relative_error(lazy.values[0], exact.values[0]) <= 1e-6
    assert relative_error(lazy.values, exact.values) <= 1e-6


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999), (0.5, 0.3)], ids=str)
def test_every_row_read_at_every_step_is_adamw(betas):
    """Nothing is ever missed: the lazy rule without catching up is AdamW."""
    rule = LazyAdam(betas=betas)
    tables = ValueTable(7, D, gradient="fused"), ValueTable(7, D)
    for table in tables:
        table.values.data.copy_(torch.randn(7, D, generator=torch.Generator().manual_seed(0)))
    optimizers = [torch.optim.AdamW([t.values], lr=0.01, betas=betas, weight_decay=0.1) for t in tables]
    fuse(optimizers[0], tables[0], rule)
    for step in range(30):
        weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            table(torch.arange(7).repeat(5, 1), weights).square().sum().backward()
            optimizer.step()
    assert relative_error(tables[0].values, tables[1].values) <= 1e-6


def test_evaluation_reads_rows_that_are_up_to_date():
    lazy, exact = TwoReads(), TwoReads("dense", torch.float64)
    optimizer = optimizer_of(lazy, CATCH_UP)
    train(lazy, optimizer, range(20))
    train(exact, optimizer_of(exact, None), range(20))
    slots = torch.arange(2 * T * K).view(2, T, K)  # also rows that were not read for long
    x = batch(99)[0]
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert relative_error(lazy.eval()(x, slots), exact.eval()(x, slots)) <= 1e-5
    assert (optimizer.state[lazy.table.values]["row_step"][: 2 * T * K] == 20).all()


def test_a_table_of_bf16_catches_up_to_its_rounding():
    lazy, exact = TwoReads(dtype=torch.bfloat16), TwoReads("dense", torch.float64)
    exact.table.values.data.copy_(lazy.table.values)
    before = lazy.table.values.clone()
    train(lazy, optimizer_of(lazy, CATCH_UP), range(40))
    train(exact, optimizer_of(exact, None), range(40))
    memrewrite.catch_up(lazy)
    assert relative_error(exact.table.values, before) > 0.2
    assert relative_error(lazy.table.values, exact.table.values) <= 0.02
    assert (
        relative_error(lazy.table.values[-10:], exact.table.values[-10:]) <= 0.5 * torch.finfo(torch.bfloat16).eps
    )  # one rounding


@pytest.mark.parametrize("rule", [CATCH_UP, *(LazyAdam(states=states) for states in STATES)], ids=str)
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_resumes_bit_for_bit(rule, first):
    straight = TwoReads(dtype=torch.bfloat16)
    optimizer = optimizer_of(straight, rule)
    train(straight, optimizer, range(10))
    file = io.BytesIO()
    parts = {"model": straight.state_dict, "optimizer": optimizer.state_dict}
    torch.save({name: parts[name]() for name in sorted(parts, key=lambda name: name != first)}, file)
    losses = train(straight, optimizer, range(10, 20))
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = TwoReads(dtype=torch.bfloat16)
    fresh = optimizer_of(resumed, rule)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert train(resumed, fresh, range(10, 20)) == losses
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    for key, value in optimizer.state[straight.table.values].items():
        other = fresh.state[resumed.table.values][key]
        assert value.dtype == other.dtype
        assert torch.equal(bits(value), bits(other))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.itemsize == 1 else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("states", STATES)
def test_the_state_has_the_bytes_that_the_guide_states(dtype, states):
    state = LazyAdam(states=states).fresh(torch.zeros(4, 200).to(dtype))
    wanted = {"float32": 8 * 200, "bfloat16": 4 * 200, "float8_e4m3fn": 2 * 200 + 8 * 2}[states]
    assert sum(t.nbytes for t in state.values()) == 4 * wanted
    assert {t.dtype for name, t in state.items() if "scale" not in name} == {getattr(torch, states)}


def test_the_state_of_another_rule_is_refused():
    for rule, other in ((RowwiseAdam(), LazyAdam()), (LazyAdam(), CATCH_UP), (LazyAdam(states="bfloat16"), LazyAdam())):
        model = TwoReads()
        optimizer = optimizer_of(model, rule)
        train(model, optimizer, range(1))
        wrong = TwoReads()
        late = optimizer_of(wrong, other)
        late.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = wrong.table.values.clone()
        with pytest.raises(UserError, match="not the state of LazyAdam"):
            train(wrong, late, range(1))
        assert torch.equal(before, wrong.table.values)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"states": "float16"}, "no states='float16'"),
        ({"states": "bfloat16", "catch_up": True}, "needs states in float32"),
        ({"betas": (0.9, 0.5), "catch_up": True}, "β1² < β2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        LazyAdam(**options)


def test_tables_that_do_not_fit_are_refused_and_nothing_is_attached():
    model = TwoReads(dtype=torch.float16)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"no table of torch\.float16, as table\.values"):
        fuse(optimizer, model, CATCH_UP)
    assert not model.table._forward_pre_hooks
    fuse(optimizer, model, LazyAdam())


def test_a_decay_that_leaves_nothing_is_refused_and_nothing_changes():
    model = TwoReads()
    optimizer = optimizer_of(model, CATCH_UP)
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())["state"][0], model.state_dict()["table.values"].clone()
    optimizer.param_groups[0].update(lr=2.0, weight_decay=0.5)
    loss_of(model, 3).backward()
    memrewrite.catch_up(model)
    with pytest.raises(UserError, match="leaves nothing of a row"):
        optimizer.step()
    assert torch.equal(before[1], model.table.values)
    for name, value in optimizer.state[model.table.values].items():
        assert torch.equal(value, before[0][name])


def test_rows_read_around_the_hook_are_refused():
    model = TwoReads()
    optimizer = optimizer_of(model, CATCH_UP)
    train(model, optimizer, range(3))
    slots, table = torch.tensor([[N - 1]]), model.table
    ops.sparse_lookup(table.values, slots, torch.ones(1, 1), gradient="fused", pending=table.pending).sum().backward()
    with pytest.raises(UserError, match="without the hook"):
        optimizer.step()


@pytest.mark.parametrize("full", [False, True])
def test_compiled_and_exported_forwards_are_refused(full):
    torch._dynamo.reset()
    model = TwoReads()
    train(model, optimizer_of(model, CATCH_UP), range(2))
    with pytest.raises((UserError, torch._dynamo.exc.Unsupported), match="cannot be in a compiled or exported graph"):
        loss_of(torch.compile(model, fullgraph=full, backend="eager"), 2)
    with pytest.raises(UserError, match="cannot be in a compiled or exported graph"):
        torch.export.export(model, batch(0)[:2])
    fresh = TwoReads("dense")
    fresh.load_state_dict(model.state_dict())
    torch.export.export(fresh, batch(0)[:2])


def test_copies_of_a_model_have_their_own_rows():
    model = TwoReads()
    optimizer = optimizer_of(model, CATCH_UP)
    train(model, optimizer, range(10))
    memrewrite.catch_up(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = other.table.values.clone()
        x, slots, _ = batch(50)
        assert torch.equal(other(x, slots), model(x, slots))
        memrewrite.catch_up(other)
        assert torch.equal(before, other.table.values)
    assert model.table.values is optimizer.param_groups[0]["params"][0]


def test_rows_are_right_after_the_optimizer_was_deleted():
    kept, deleted = TwoReads(), TwoReads()
    optimizer, other = optimizer_of(kept, CATCH_UP), optimizer_of(deleted, CATCH_UP)
    for model, run in ((kept, optimizer), (deleted, other)):
        train(model, run, range(1))
    del run, other
    assert torch.equal(deleted.state_dict()["table.values"], kept.state_dict()["table.values"])
    second = optimizer_of(deleted, CATCH_UP)
    assert len(deleted.table._forward_pre_hooks) == 1
    train(deleted, second, range(1, 3))
    assert deleted.table.values.isfinite().all()
