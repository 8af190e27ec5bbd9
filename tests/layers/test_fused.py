"""Fused updates: the rules compared with their reference, and training compared with training with a dense gradient."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from closeness import assert_norm_close, relative_error
from devices import DEVICES, graphed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llama, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.errors import UserError
from memrewrite.fused import RowwiseAdagrad, RowwiseAdam, fuse
from memrewrite.kernels import lookup_update, ops, reference, rounding
from memrewrite.kernels.pending import Pending, refuse_capture
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pool import Pool, PoolSpec

FP8 = torch.float8_e4m3fn
SIZES = [(1, 1, 1, 1), (63, 20, 60, 7), (1000, 20, 63, 7), (60, 576, 5, 128), (60, 1, 63, 7)]  # N, D, T, K
DEVICE = "cpu"  # of the models and batches; the fixture `device` sets it
NUMBERS = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Models and batches of the test are on this device; what needs CUDA has the marker `gpu`."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", request.param)
    return str(request.param)


def some_reads(n: int, d: int, t: int, k: int, lookups: int = 1, seed: int = 0) -> tuple[list[Tensor], ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        [torch.randn(t, d, generator=g) for _ in range(lookups)],
        [torch.randint(0, n, (t, k), generator=g) for _ in range(lookups)],
        [torch.randn(t, k, generator=g) for _ in range(lookups)],
    )


def touched_rows(n: int, indices: list[Tensor]) -> Tensor:
    touched = torch.zeros(n, dtype=torch.bool)
    touched[torch.cat([index.flatten() for index in indices]).long()] = True
    return touched


def dense_gradient(values: Tensor, reads: tuple[list[Tensor], ...]) -> Tensor:
    """The gradient from the operator's backward, summed over the lookups."""
    grads, indices, weights = (torch.cat(part) for part in reads)
    return torch.ops.memrewrite.sparse_lookup_backward(grads, values, indices, weights, True, False)[0]


# ------------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lookups", [1, 3])
def test_rules_are_their_reference_bit_for_bit_in_fp32(size, lookups):
    n, d, t, k = size
    values, total, square = torch.randn(n, d), torch.rand(n), torch.rand(n)
    mean = torch.randn(n, d)
    reads = some_reads(n, d, t, k, lookups)
    gradient, touched = dense_gradient(values, reads), touched_rows(n, reads[1])
    torch.testing.assert_close(gradient, reference.table_gradient(*reads, n), rtol=1e-4, atol=1e-4)
    want = reference.rowwise_adagrad(values, total, gradient, touched, **NUMBERS)
    got = (values.clone(), total.clone())
    ops.rowwise_adagrad_(got[0], None, got[1], *reads, **NUMBERS, seed=0)
    for one, right in zip(got, want, strict=True):
        assert torch.equal(one, right)
    numbers = {**NUMBERS, "betas": (0.9, 0.99), "step": 3}
    wanted = reference.rowwise_adam((values, mean, square), gradient, touched, **numbers)
    state = (values.clone(), mean.clone(), square.clone())
    ops.rowwise_adam_(state[0], None, state[1], state[2], *reads, **numbers, seed=0)
    for one, right in zip(state, wanted, strict=True):
        assert torch.equal(one, right)


def test_rules_work_in_pieces(monkeypatch):
    """Rows are updated a few at a time: the size of the chunks does not change the result."""
    values, total, reads = torch.randn(60, 20), torch.rand(60), some_reads(60, 20, 63, 7)
    whole, pieces = (values.clone(), total.clone()), (values.clone(), total.clone())
    ops.rowwise_adagrad_(whole[0], None, whole[1], *reads, **NUMBERS, seed=0)
    monkeypatch.setattr("memrewrite.kernels.torch_reads.CHUNK", 20 * 7)
    ops.rowwise_adagrad_(pieces[0], None, pieces[1], *reads, **NUMBERS, seed=0)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rules_in_few_bits_are_unbiased(dtype, index):
    """Averaged over seeds, a rounded update is the update in fp32; rows that were not read keep their bits."""
    n, d = 12, 20
    exact = torch.randn(n, d)
    scale = rounding.row_scale(exact) if dtype == FP8 else None
    start = (exact if scale is None else exact / scale[:, None]).to(dtype)
    known = start.float() if scale is None else start.float() * scale[:, None]
    reads = some_reads(n - 2, d, 5, 3)
    reads = (reads[0], [i.to(index) for i in reads[1]], reads[2])
    numbers = {**NUMBERS, "lr": 0.003}
    touched = touched_rows(n, reads[1])
    want, _ = reference.rowwise_adagrad(known, torch.ones(n), reference.table_gradient(*reads, n), touched, **numbers)
    rounds, mean = 400, torch.zeros(n, d)
    for seed in range(rounds):
        values, scales = start.clone(), None if scale is None else scale.clone()
        ops.rowwise_adagrad_(values, scales, torch.ones(n), *reads, **numbers, seed=seed)
        assert torch.equal(values[~touched].view(torch.uint8), start[~touched].view(torch.uint8))
        mean += (values.float() if scales is None else values.float() * scales[:, None]) / rounds
    spacing = known.abs().amax(-1, keepdim=True) * 2.0 ** (-3 if dtype == FP8 else -7 if dtype == torch.bfloat16 else -10)
    assert ((mean - want).abs() <= 4 * spacing / rounds**0.5).all()
    nearest = (want - known).abs() < spacing / 8
    assert nearest[touched].any()  # some updates are so small that rounding to nearest would lose them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_stochastic_rounding_chooses_a_neighbour(dtype):
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, generator=g) * 2.0 ** torch.randint(-12, 8, (2000,), generator=g)
    x = torch.cat([spread, torch.tensor([0.0, -0.0, 1.0, -448.0])]).clamp(-448, 448)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float() if dtype == FP8 else None
    got = rounding.stored(x, dtype, torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounding.stored(got, dtype, torch.Generator().manual_seed(1)).float(), got)  # representable: kept
    for value, rounded in zip(x.tolist(), got.tolist(), strict=True):
        if codes is not None:
            finite = codes[codes.isfinite()]
            below, above = finite[finite <= value].max(), finite[finite >= value].min()
        else:
            here = torch.tensor(value).to(dtype)
            lower = here if here.float() <= value else torch.nextafter(here, torch.tensor(float("-inf"), dtype=dtype))
            upper = here if here.float() >= value else torch.nextafter(here, torch.tensor(float("inf"), dtype=dtype))
            below, above = lower.float(), upper.float()
        assert rounded in (below.item(), above.item())


def test_stochastic_rounding_keeps_what_is_not_finite():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38])
    got = rounding.stored(x, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert got[:2].tolist() == [float("inf"), float("-inf")]
    assert got[2].isnan()
    assert rounding.stored(x[3:], FP8, torch.Generator().manual_seed(0)).float().item() == 448
    assert rounding.row_scale(torch.zeros(2, 3)).tolist() == [1, 1]


def test_the_scale_of_a_row_maps_its_largest_entry_to_the_largest_code():
    """A row's largest absolute entry is stored as 448, the largest e4m3 number, whatever its sign and size."""
    rows = torch.tensor([[1.0, -3.0, 2.0], [1e-3, 0.0, 5e-4], [-700.0, 20.0, 699.0]])
    scale = rounding.row_scale(rows)
    torch.testing.assert_close(scale, torch.tensor([3.0, 1e-3, 700.0]) / torch.finfo(FP8).max, rtol=1e-6, atol=0)
    stored = rounding.stored(rows / scale[:, None], FP8, torch.Generator().manual_seed(0)).float()
    assert stored.abs().amax(1).tolist() == [448.0] * 3
    assert torch.finfo(FP8).max == rounding.FP8_MAX


def test_rules_repeat_bit_for_bit():
    reads, start = some_reads(60, 20, 63, 7), torch.randn(60, 20).bfloat16()
    tables = [start.clone(), start.clone(), start.clone()]
    for table, seed in zip(tables, (1, 1, 2), strict=True):
        ops.rowwise_adagrad_(table, None, torch.zeros(60), *reads, **NUMBERS, seed=seed)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_rules_keep_poison_in_its_rows():
    values, total, reads = torch.randn(60, 20), torch.zeros(60), some_reads(60, 20, 5, 3)
    reads[2][0][2, 1] = float("nan")
    ops.rowwise_adagrad_(values, None, total, *reads, **NUMBERS, seed=0)
    assert values.isnan().any(-1).nonzero().flatten().tolist() == [int(reads[1][0][2, 1])]


def test_rules_refuse_before_anything_changes():
    values, total, reads = torch.randn(60, 20), torch.zeros(60), some_reads(60, 20, 5, 3, lookups=2)
    before = values.clone()
    reads[1][1][4, 2] = 60
    with pytest.raises(IndexError, match="index 60 is out of range"):
        ops.rowwise_adagrad_(values, None, total, *reads, **NUMBERS, seed=0)
    reads[1][1][4, 2] = 0
    for match, change in (
        ("scale", {"scale": torch.ones(60)}),
        ("total must be float32", {"total": torch.zeros(59)}),
        ("not torch.float64", {"values": values.double()}),
        ("grad", {"grads": [g[:, 1:] for g in reads[0]]}),
        ("pair up", {"grads": reads[0][:1]}),
        ("no backend 'cuda'", {"backend": "cuda"}),
        ("triton cannot: the tensors are not on a CUDA device", {"backend": "triton"}),
    ):
        given_ = {"values": values, "scale": None, "total": total, "grads": reads[0], "indices": reads[1], "weights": reads[2]}
        with pytest.raises((TypeError, ValueError), match=match):
            ops.rowwise_adagrad_(**{**given_, **change}, **NUMBERS, seed=0)
    with pytest.raises(ValueError, match="steps count from 1"):
        ops.rowwise_adam_(values, None, torch.zeros(60, 20), total, *reads, **NUMBERS, betas=(0.9, 0.9), step=0, seed=0)
    with pytest.raises(ValueError, match="exp_avg must be"):
        ops.rowwise_adam_(values, None, torch.zeros(60), total, *reads, **NUMBERS, betas=(0.9, 0.9), step=1, seed=0)
    assert torch.equal(values, before)
    assert not total.any()


def test_too_many_reads_for_one_update_are_refused(monkeypatch):
    """The limit counts the reads of all lookups together; one read less is accepted."""
    values, total, reads = torch.randn(60, 20), torch.zeros(60), some_reads(60, 20, 5, 3, lookups=2)
    before = values.clone()
    monkeypatch.setattr(lookup_update, "MOST_READS", 30)
    with pytest.raises(ValueError, match="30 or more reads"):
        ops.rowwise_adagrad_(values, None, total, *reads, **NUMBERS, seed=0)
    assert torch.equal(values, before)
    monkeypatch.setattr(lookup_update, "MOST_READS", 31)
    ops.rowwise_adagrad_(values, None, total, *reads, **NUMBERS, seed=0)
    assert not torch.equal(values, before)


def test_a_queue_keeps_copies():
    """The tensors of a compiled graph are overwritten after the call; the factors in the queue must not change."""
    queue = Pending()
    tensors = torch.randn(4, 3).T, torch.randint(0, 9, (3, 2)), torch.rand(3, 2)
    with queue.tried():
        queue.keep(*tensors)
        kept = queue.waiting[0]
        before = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        assert all(map(torch.equal, kept, before))
        assert kept.grad.is_contiguous()
    assert not queue.waiting


def test_rules_without_reads_do_nothing():
    values, total = torch.randn(6, 20), torch.zeros(6)
    before = values.clone()
    ops.rowwise_adagrad_(values, None, total, *some_reads(6, 20, 0, 3), **NUMBERS, seed=0)
    ops.rowwise_adagrad_(values, None, total, [], [], [], **NUMBERS, seed=0)
    assert torch.equal(values, before)


def test_opcheck_of_the_updates():
    reads = some_reads(60, 20, 5, 3, lookups=2)
    torch.library.opcheck(
        torch.ops.memrewrite.rowwise_adagrad_, (torch.randn(60, 20), None, torch.zeros(60), *reads, 0.1, 1e-8, 0.0, 0)
    )
    state = (torch.randn(60, 20).bfloat16(), None, torch.zeros(60, 20), torch.zeros(60))
    torch.library.opcheck(torch.ops.memrewrite.rowwise_adam_, (*state, *reads, 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 0))


# ---------------------------------------------------------------------------------------------------------- a whole model


class Shared(nn.Module):
    """Three Memory+ layers on one table, and a norm before each."""

    def __init__(self, gradient: str = "fused", dtype: str | None = None, layers: int = 3) -> None:
        super().__init__()
        self.pool = Pool(PoolSpec(keys=12, value_dim=16, gradient=gradient, dtype=dtype))
        options = MemoryPlusOptions(heads=2, topk=4)
        self.layers = nn.ModuleList(MemoryPlus(16, 16, options, self.pool) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(layers))
        self.pool.reset_parameters()
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            layer.reset_parameters(generator)
        self.recompute: bool | None = None
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            run = nn.Sequential(norm, layer)
            x = x + (run(x) if self.recompute is None else checkpoint(run, x, use_reentrant=self.recompute))
        return x


def batch(seed: int = 0, tokens: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=g).to(DEVICE)
    return x, (3 * x.flip(-1)).sin()


def loss_of(model: nn.Module, seed: int = 0, tokens: int = 24) -> Tensor:
    x, target = batch(seed, tokens)
    return (model(x.requires_grad_()) - target).square().mean()


def optimizer_of(model: nn.Module, lr: float = 1e-3, value_lr: float = 1e-2, rule=None) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=lr, value_lr=value_lr))
    if any(isinstance(m, Pool) and m.pending is not None for m in model.modules()):
        fuse(optimizer, model, rule or RowwiseAdagrad())
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, run=None) -> list[float]:
    losses = []
    for seed in steps:
        optimizer.zero_grad()
        loss = loss_of(run or model, seed % 8)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rule", [RowwiseAdagrad(), RowwiseAdam()], ids=lambda rule: type(rule).__name__)
def test_training_is_that_of_a_dense_gradient(rule, device):
    """Five steps; the dense model's table is updated by the reference, from the sum of its three layers' gradients."""
    fused, dense = Shared(), Shared("dense")
    optimizer = optimizer_of(fused, rule=rule)
    other = torch.optim.AdamW(memrewrite.param_groups(dense, lr=1e-3)[:1])
    table = dense.pool.values
    total, mean, square = (torch.zeros(size, device=device) for size in ((144,), (144, 16), (144,)))
    for step in range(1, 6):
        (got,) = train(fused, optimizer, range(step, step + 1))
        other.zero_grad()
        table.grad = None
        loss = loss_of(dense, step)
        loss.backward()
        other.step()
        assert got == pytest.approx(loss.item(), rel=1e-5)
        touched = table.grad.any(-1)
        with torch.no_grad():
            if isinstance(rule, RowwiseAdagrad):
                new, total = reference.rowwise_adagrad(table, total, table.grad, touched, 1e-2, rule.eps, 0.0)
            else:
                state = (table, mean, square)
                new, mean, square = reference.rowwise_adam(state, table.grad, touched, 1e-2, rule.betas, rule.eps, 0.0, step)
            table.copy_(new)
    torch.testing.assert_close(fused.pool.values, table, rtol=1e-4, atol=1e-5)
    assert fused.pool.values.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03), ("float8_e4m3fn", 0.1)])
def test_small_tables_reach_the_loss_of_dense_training(dtype, tolerance, device):
    """The largest table at CPU size: fused updates in few bits, compared with a dense fp32 gradient and the same rule."""
    fused, dense = Shared(dtype=dtype), Shared("dense")
    if dtype != "float32":  # the same start, as the narrow table holds it
        start = fused.pool.values.float()
        dense.pool.values.data.copy_(start if fused.pool.scale is None else start * fused.pool.scale[:, None])
    losses = train(fused, optimizer_of(fused, value_lr=0.1), range(120))
    other = torch.optim.AdamW(memrewrite.param_groups(dense, lr=1e-3)[:1])
    total, rights = torch.zeros(144, device=device), []
    for seed in range(120):
        other.zero_grad()
        dense.pool.values.grad = None
        loss = loss_of(dense, seed % 8)
        loss.backward()
        other.step()
        gradient = dense.pool.values.grad
        new, total = reference.rowwise_adagrad(dense.pool.values.data, total, gradient, gradient.any(-1), 0.1, 1e-8, 0.0)
        dense.pool.values.data.copy_(new)
        rights.append(loss.item())
    last, right = sum(losses[-8:]) / 8, sum(rights[-8:]) / 8
    assert right < 0.7 * sum(rights[:8]) / 8  # it learns
    assert last == pytest.approx(right, rel=tolerance)


def largest_allocation(run) -> int:
    """Bytes of the largest intermediate tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize(("gradient", "has_table"), [("fused", False), ("sparse", False), ("dense", True)])
def test_no_gradient_table_is_allocated(gradient, has_table):
    """Nothing as large as a tenth of the table is allocated, in forward, backward and step; with "dense" it is."""
    pool = Pool(PoolSpec(keys=200, value_dim=64, gradient=gradient))  # 10 MB
    pool.reset_parameters()
    optimizer = torch.optim.SGD([pool.values], lr=0.1)
    if gradient == "fused":
        fuse(optimizer, pool, RowwiseAdagrad())
    indices, weights = torch.randint(0, 40000, (8, 16)), torch.rand(8, 16, requires_grad=True)

    def run() -> None:
        pool(indices, weights).square().sum().backward()
        optimizer.step()

    assert (largest_allocation(run) >= pool.values.nbytes / 10) == has_table


def test_saved_for_the_backward_are_the_inputs():
    values, indices, weights = torch.randn(50, 8, requires_grad=True), torch.randint(0, 50, (6, 4)), torch.rand(6, 4)
    known, saved = {t.data_ptr() for t in (values, indices, weights)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.sparse_lookup(values, indices, weights.requires_grad_())
    assert saved
    assert set(saved) <= known


def test_rate_and_decay_are_read_from_the_parameter_group(monkeypatch):
    seen = []
    rule = RowwiseAdagrad()
    monkeypatch.setattr(RowwiseAdagrad, "step", lambda self, pool, state, reads, step, numbers: seen.append(numbers))
    model = Shared()
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3, value_lr=0.5, value_decay=0.25))
    fuse(optimizer, model, rule)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        scheduler.step()
    assert [numbers["lr"] for numbers in seen] == pytest.approx([0.5, 0.05])
    assert [numbers["weight_decay"] for numbers in seen] == [0.25, 0.25]
    assert seen[0]["seed"] != seen[1]["seed"]


def test_each_table_and_step_has_its_own_seed_and_a_second_run_the_same_ones(monkeypatch):
    seeds = []
    monkeypatch.setattr(RowwiseAdagrad, "step", lambda self, pool, state, reads, step, numbers: seeds.append(numbers["seed"]))
    for _ in range(2):
        pools = nn.ModuleList(Pool(PoolSpec(keys=3, value_dim=4, seed=seed, gradient="fused")) for seed in (0, 1))
        optimizer = torch.optim.SGD(pools.parameters(), lr=0.1)
        fuse(optimizer, pools, RowwiseAdagrad())
        for _ in range(2):
            for pool in pools:
                pool.reset_parameters()
                pool(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).sum().backward()
            optimizer.step()
    assert len(set(seeds[:4])) == 4
    assert seeds[:4] == seeds[4:]


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (FP8, torch.bfloat16)]
)
def test_adam_keeps_the_first_moment_in_bf16_except_for_tables_of_fp32(dtype, wanted):
    state = RowwiseAdam().fresh(torch.zeros(3, 2).to(dtype))
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {
        "exp_avg": (wanted, (3, 2)),
        "exp_avg_sq": (torch.float32, (3,)),
    }


def test_gradients_add_up_until_the_step(device):
    once, twice = Shared(), Shared()
    first, second = optimizer_of(once), optimizer_of(twice)
    ((loss_of(once, 1) + loss_of(once, 2)) / 2).backward()
    for seed in (1, 2):
        (loss_of(twice, seed) / 2).backward()
    before = twice.pool.values.detach().clone()
    assert torch.equal(twice.pool.values, before)
    first.step()
    second.step()
    assert not torch.equal(twice.pool.values, before)
    torch.testing.assert_close(once.pool.values, twice.pool.values)


def test_zero_grad_empties_the_queue(device):
    model = Shared()
    optimizer = optimizer_of(model)
    before = model.pool.values.detach().clone()
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.pool.values, before)
    assert model.layers[0].gate.weight.grad is None


def test_clipping_sees_only_the_other_parameters():
    model = Shared()
    optimizer = optimizer_of(model)
    loss_of(model).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    rest = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert rest.item() == pytest.approx(1e-3, rel=1e-3)
    assert norm > 1e-3
    before = model.pool.values.detach().clone()
    optimizer.step()
    assert not torch.equal(model.pool.values, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("rule", [RowwiseAdagrad(), RowwiseAdam()], ids=lambda rule: type(rule).__name__)
def test_resumes_bit_for_bit(dtype, rule, device):
    straight = Shared(dtype=dtype)
    optimizer = optimizer_of(straight, rule=rule)
    train(straight, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Shared(dtype=dtype)
    fresh = optimizer_of(resumed, rule=rule)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(resumed, fresh, range(3, 6))
    bits = [m.pool.values.detach().view(torch.uint8) for m in (straight, resumed)]
    assert torch.equal(*bits)
    for key, value in optimizer.state[straight.pool.values].items():
        assert torch.equal(value, fresh.state[resumed.pool.values][key])
        assert value.dtype == fresh.state[resumed.pool.values][key].dtype


def test_state_of_another_rule_is_refused():
    model = Shared(dtype="bfloat16")
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    other = Shared(dtype="bfloat16")
    late = torch.optim.AdamW(memrewrite.param_groups(other, lr=1e-3))
    late.load_state_dict(saved)  # before `fuse`: torch rounds the state to bf16
    fuse(late, other, RowwiseAdagrad())
    with pytest.raises(UserError, match=r"total torch\.bfloat16"):
        train(other, late, range(1))
    adam = Shared(dtype="bfloat16")
    wrong = optimizer_of(adam, rule=RowwiseAdam())
    wrong.load_state_dict(saved)
    with pytest.raises(UserError, match="not the state of RowwiseAdam"):
        train(adam, wrong, range(1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_update_once(reentrant, device):
    plain, recomputed = Shared(), Shared()
    recomputed.recompute = reentrant
    for model in (plain, recomputed):
        train(model, optimizer_of(model), range(3))
    assert torch.equal(plain.pool.values, recomputed.pool.values)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_compiled_training_is_the_eager_one_and_never_recompiles(dtype, device):
    torch._dynamo.reset()
    eager, model = Shared(dtype=dtype), Shared(dtype=dtype)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    first, second = optimizer_of(eager), optimizer_of(model)
    compiled_graphs = []
    for seed, length in enumerate((24, 5, 63)):
        for run, optimizer in ((eager, first), (compiled, second)):
            optimizer.zero_grad()
            loss_of(run, seed, length).backward()
            optimizer.step()
        compiled_graphs.append(counter.frame_count)
    assert compiled_graphs[0] == compiled_graphs[-1]
    got, want = (
        m.pool.values.float() if m.pool.scale is None else m.pool.values.float() * m.pool.scale[:, None] for m in (model, eager)
    )
    # in 8 bits another last bit of a gradient may choose the other neighbor, which is at most eps away
    assert relative_error(got, want) <= {"float32": 1e-5, "float8_e4m3fn": torch.finfo(FP8).eps}[dtype]


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_a_captured_layer_is_the_eager_one(device, gradient):
    """Scores, top-k, softmax and lookup in one CUDA graph: replayed on other inputs, it gives the bits of an eager call."""
    model = Shared(gradient)
    still, other = batch(0)[0], batch(1)[0]
    with torch.no_grad():
        replay = graphed(lambda: model(still), device)
        replay()
        still.copy_(other)
        got, want = replay().clone(), model(other)
    assert got.device.type == device
    assert torch.equal(got, want)


def test_a_captured_training_step_gives_the_eager_gradients(device):
    """Forward and backward with a dense gradient, in one CUDA graph."""
    model = Shared("dense")
    parameters = list(model.parameters())
    x, target = batch(0)
    fresh, wanted = batch(1)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad((model(x) - target).square().mean(), parameters)

    replay = graphed(run, device)
    x.copy_(fresh)
    target.copy_(wanted)
    got = [grad.clone() for grad in replay()]
    for one, right in zip(got, run(), strict=True):
        assert one.device.type == device
        torch.testing.assert_close(one, right)


def test_models_and_batches_of_a_test_are_on_its_device(monkeypatch):
    """On another device than the CPU (meta, which every machine has) no tensor of a model or a batch is on the CPU."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "meta")
    model = Shared("dense")
    loss = loss_of(model)
    loss.backward()
    found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), loss, *batch()]
    assert {x.device.type for x in found} == {"meta"}
    with pytest.raises(RuntimeError, match="device"):
        model(torch.randn(24, 16))


def test_the_queue_is_marked_unsafe_for_cuda_graphs():
    assert torch.Tag.cudagraph_unsafe in torch.ops.memrewrite.sparse_lookup_keep.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.memrewrite.sparse_lookup.default.tags


def test_autocast():
    model = Shared()
    optimizer = optimizer_of(model)
    before = model.pool.values.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.pool.values, before)
    assert model.pool.values.isfinite().all()


def test_without_an_optimizer_training_is_refused():
    model = Shared()
    with torch.no_grad():
        loss_of(model)
    with pytest.raises(RuntimeError, match=r"call memrewrite\.fuse\(optimizer, model\)"):
        loss_of(model).backward()
    with pytest.raises(ValueError, match="needs the queue"):
        ops.sparse_lookup(model.pool.values, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), gradient="fused")


def test_fuse_refuses():
    model = Shared()
    with pytest.raises(UserError, match="no pool of this model"):
        fuse(torch.optim.SGD(Shared("dense").parameters(), lr=1.0), Shared("dense"))
    with pytest.raises(UserError, match=r"no parameter pool\.values"):
        fuse(torch.optim.SGD(model.layers.parameters(), lr=1.0), model)
    with pytest.raises(UserError, match="maximizes"):
        fuse(torch.optim.SGD(model.parameters(), lr=1.0, maximize=True), model)
    double = Shared(dtype="float64")
    with pytest.raises(UserError, match="float64"):
        fuse(torch.optim.SGD(double.parameters(), lr=1.0), double)
    first = torch.optim.SGD(model.parameters(), lr=1.0)
    fuse(first, model)
    with pytest.raises(UserError, match="an optimizer \\(SGD\\) already updates pool"):
        fuse(torch.optim.SGD(model.parameters(), lr=1.0), model)


def test_a_deleted_optimizer_releases_the_pool():
    model = Shared()
    optimizer = optimizer_of(model)
    del optimizer
    with pytest.raises(RuntimeError, match="no optimizer uses it"):
        loss_of(model).backward()
    train(model, optimizer_of(model), range(1))


def test_wrapped_optimizers():
    accelerate = pytest.importorskip("accelerate")
    model = Shared()
    inner = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3))
    optimizer = accelerate.Accelerator(cpu=True).prepare(inner)
    fuse(optimizer, model)
    before = model.pool.values.detach().clone()
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=True)
    assert not model.pool.pending.waiting
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model.pool.values, before)


@pytest.mark.parametrize("ask", ["an input", "a weight", "backward to inputs"])
def test_gradients_of_other_inputs_do_not_update_the_table(ask):
    model = Shared()
    owner = optimizer_of(model)
    x, target = batch()
    loss = (model(x.requires_grad_()) - target).square().mean()
    if ask == "an input":
        assert torch.autograd.grad(loss, x)[0].any()
    elif ask == "a weight":
        assert torch.autograd.grad(loss, model.layers[0].gate.weight)[0].any()
    else:
        loss.backward(inputs=[x])
    assert not model.pool.pending.waiting
    (model(x) - target).square().mean().backward()
    assert len(model.pool.pending.waiting) == 3
    owner.zero_grad()


def test_second_derivatives_are_refused():
    model = Shared()
    owner = optimizer_of(model)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        loss_of(model).backward(create_graph=True)
    assert not model.pool.pending.waiting
    assert owner.state[model.pool.values] == {}


def test_a_table_that_was_replaced_is_refused():
    model = Shared()
    optimizer = optimizer_of(model)
    model.pool.values = nn.Parameter(model.pool.values.detach().clone())
    loss_of(model).backward()
    with pytest.raises(UserError, match=r"pool\.values was replaced by another parameter"):
        optimizer.step()
    assert model.pool.pending.waiting


def test_a_failed_step_keeps_the_gradients_of_pools_not_updated(monkeypatch):
    model = Shared()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    before, waiting = model.pool.values.detach().clone(), len(model.pool.pending.waiting)
    with monkeypatch.context() as broken:
        broken.setattr("memrewrite.kernels.torch_backend.adagrad_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    assert torch.equal(model.pool.values, before)
    assert len(model.pool.pending.waiting) == waiting
    assert optimizer.state[model.pool.values]["step"] == 1


def test_a_captured_update_is_refused(monkeypatch):
    on_a_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture(on_a_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be in a CUDA graph"):
        refuse_capture(on_a_gpu)


def test_tensors_of_two_devices_are_refused():
    values, indices, weights = torch.randn(6, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    with pytest.raises(ValueError, match="on one device, not on cpu and meta"):
        ops.sparse_lookup(values, indices, weights.to("meta"))
    with pytest.raises(ValueError, match="on one device"):
        lookup_update.adagrad(values, None, torch.zeros(6, device="meta"), *some_reads(6, 4, 2, 3), **NUMBERS, seed=0)
    with pytest.raises(ValueError, match="on one device"):
        ops.product_key_topk(values, values.to("meta"), 2)


def test_optimizers_that_prepare_a_state_in_their_constructor():
    model = Shared()
    optimizer = torch.optim.Adagrad(memrewrite.param_groups(model, lr=1e-3))
    fuse(optimizer, model, RowwiseAdagrad())
    train(model, optimizer, range(2))
    assert set(optimizer.state[model.pool.values]) == {"step", "total"}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8_e4m3fn"])
def test_the_default_rule_has_both_moments_of_each_element_in_bf16(dtype):
    model = Shared(dtype=dtype) if dtype else Shared()
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3))
    fuse(optimizer, model)
    train(model, optimizer, range(2))
    state = optimizer.state[model.pool.values]
    assert {name: t.dtype for name, t in state.items() if name != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), torch.bfloat16
    )
    assert state["exp_avg_sq"].shape == model.pool.values.shape


def test_states_are_matched_by_position_not_by_saved_number():
    model, other = Shared(dtype="bfloat16"), Shared(dtype="bfloat16")
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    shifted = {
        "state": {n + 100: state for n, state in saved["state"].items()},
        "param_groups": copy.deepcopy(saved["param_groups"]),
    }
    for group in shifted["param_groups"]:
        group["params"] = [n + 100 for n in group["params"]]
    fresh = optimizer_of(other)
    fresh.load_state_dict(shifted)
    total = fresh.state[other.pool.values]["total"]
    assert total.dtype == torch.float32
    assert torch.equal(total, optimizer.state[model.pool.values]["total"])


def test_copies_have_their_own_queues():
    model = Shared()
    optimizer_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.pool.pending.handle != model.pool.pending.handle
        train(other, optimizer_of(other), range(1))
        assert not model.pool.pending.waiting
        assert not torch.equal(other.pool.values, model.pool.values)


def test_an_exported_model_does_not_contain_the_queue(tmp_path):
    model = Shared(dtype="float8_e4m3fn")
    x, _ = batch()
    t = torch.export.Dim("t", min=2, max=256)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: t},))
        lookups = [node for node in program.graph.nodes if "sparse_lookup" in str(node.target)]
        assert len(lookups) == 3
        assert all({"fused", model.pool.pending.handle}.isdisjoint({*node.args, *node.kwargs.values()}) for node in lookups)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for length in (24, 5):
            torch.testing.assert_close(compiled(x[:length]), model(x[:length]))


def test_table_of_8_bits_needs_fused_updates():
    with pytest.raises(ValueError, match="can be trained only by fused updates"):
        PoolSpec(keys=4, value_dim=4, dtype="float8_e4m3fn")
    values = torch.zeros(4, 4).to(FP8).requires_grad_()
    with pytest.raises(ValueError, match='use gradient="fused"'):
        ops.sparse_lookup(values, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(4))


# ------------------------------------------------------------------------------------------------------- sparse gradients


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 24), st.integers(0, 12), st.integers(0, 9), st.integers(0, 1000))
def test_sparse_gradient_is_the_dense_one(n, d, t, k, seed):
    g = torch.Generator().manual_seed(seed)
    indices, grad = torch.randint(0, n, (t, k), generator=g), torch.randn(t, d, generator=g)
    found = []
    for gradient in ("dense", "sparse"):
        values = torch.randn(n, d, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weights = torch.randn(t, k, generator=torch.Generator().manual_seed(2), requires_grad=True)
        ops.sparse_lookup(values, indices, weights, gradient=gradient).backward(grad)
        found.append((values.grad, weights.grad))
    (dense, dense_w), (sparse, sparse_w) = found
    assert sparse.is_sparse
    assert sparse._nnz() == min(t * k, n)
    assert torch.equal(sparse.coalesce().to_dense(), dense)
    assert torch.equal(sparse_w, dense_w)
    rows = sparse._indices()[0]
    assert (rows.diff() >= 0).all()
    assert set(rows.tolist()) == set(indices.flatten().tolist())  # nothing else counts as touched


def test_sparse_gradients_train_with_sparse_adam(device):
    model = Shared("sparse")
    rest = [p for p in model.parameters() if p is not model.pool.values]
    optimizers = torch.optim.AdamW(rest, lr=1e-3), torch.optim.SparseAdam([model.pool.values], lr=5e-2)
    losses = []
    for seed in range(40):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, seed % 8)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_sparse_gradient_through_compile(device):
    torch._dynamo.reset()
    grads = []
    for run in (lambda m: m, lambda m: torch.compile(m, fullgraph=True)):
        model = Shared("sparse", layers=1)
        loss_of(run(model)).backward()
        grads.append(model.pool.values.grad.to_dense())
    torch.testing.assert_close(*grads)


def test_keys_can_learn_while_the_table_is_frozen():
    model = Shared()
    model.pool.values.requires_grad_(False)
    loss_of(model).backward()
    assert not model.pool.pending.waiting
    assert model.layers[0].product_keys.keys.grad.any()


# ------------------------------------------------------------------------------------------------------------------ 8 bits


def test_lookup_of_8_bits_and_its_weights_gradient():
    wide = torch.randn(60, 20)
    scale = rounding.row_scale(wide)
    values = (wide / scale[:, None]).to(FP8)
    exact = values.double() * scale.double()[:, None]
    indices = torch.randint(0, 60, (63, 7))
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.randn(63, 7).to(dtype).requires_grad_()
        out = ops.sparse_lookup(values, indices, weights, scale)
        grad = torch.randn(63, 20).to(dtype)
        (gw,) = torch.autograd.grad(out, weights, grad)
        assert out.dtype == gw.dtype == dtype
        want = reference.sparse_lookup(exact, indices, weights.detach().double())
        want_gw = torch.einsum("td,tkd->tk", grad.double(), exact[indices])
        assert_norm_close(out, want, terms=7)
        assert_norm_close(gw, want_gw, terms=20)


def test_pool_of_8_bits_has_the_papers_initialization():
    pool = Pool(PoolSpec(keys=40, value_dim=64, dtype="float8_e4m3fn", gradient="fused"))
    pool.reset_parameters()
    rows = pool.values.detach().float() * pool.scale[:, None]
    assert rows.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert pool.spec.cost().parameter_bytes == 1600 * (64 + 4)
    again = Pool(pool.spec)
    again.reset_parameters()
    assert torch.equal(again.values.view(torch.uint8), pool.values.view(torch.uint8))


# -------------------------------------------------------------------------------------------------------- rewritten models


@pytest.mark.parametrize("placement", ["replace", "parallel"])
@pytest.mark.parametrize(
    "entry",
    [{"gradient": "sparse"}, {"gradient": "fused"}, {"gradient": "fused", "dtype": "float8_e4m3fn"}],
    ids=lambda entry: "-".join(entry.values()),
)
def test_rewritten_model_is_checked_trained_saved_and_loaded(entry, placement, tmp_path):
    model, inputs = llama(), {"input_ids": tokens(), "use_cache": False}
    rule = {"where": {"layers": [0, 2]}, "with": "memory_plus", "pool": "shared", "placement": placement}
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": {"keys": 16, **entry}},
        "replace": [{**rule, "options": {"heads": 2, "topk": 4}}],
    }
    report = memrewrite.apply(model, recipe, inputs)
    assert {c.name: c.outcome for c in report.checks}["gradient"] == "passed"
    if entry["gradient"] == "fused":
        assert model.memory.shared.pending.taker is None
        optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3))
        fuse(optimizer, model)
        before = model.memory.shared.values.detach().view(torch.uint8).clone()
        for _ in range(2):  # a parallel layer starts at zero: its table is trained from the second step on
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(model.memory.shared.values.detach().view(torch.uint8), before)
    memrewrite.save(model, tmp_path / "saved")
    loaded = memrewrite.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.memory.shared.spec == model.memory.shared.spec


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def trainer(steps: int) -> Trainer:
        model, inputs = llama(), {"input_ids": tokens(), "use_cache": False}
        rule = {"where": {"layers": [0, 2]}, "with": "memory_plus", "pool": "shared", "options": {"heads": 2, "topk": 4}}
        pools = {"shared": {"keys": 16, "gradient": "fused", "dtype": "bfloat16"}}
        memrewrite.apply(model, {"memrewrite": 1, "pools": pools, "replace": [rule]}, inputs)
        optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=1e-3))
        fuse(optimizer, model)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [], "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, disable_tqdm=True, **options)
        data = [{"input_ids": row, "labels": row} for row in tokens(16)]
        return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))

    straight = trainer(4)
    start = straight.model.memory.shared.values.detach().clone()
    straight.train()
    table = straight.model.memory.shared.values
    assert not torch.equal(table, start)
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.model.memory.shared.values, table)


def test_gradient_check_detects_a_detached_table(monkeypatch):
    monkeypatch.setattr("memrewrite.kernels.pending.Pending.keep", lambda *_: None)
    model, inputs = llama(), {"input_ids": tokens(), "use_cache": False}
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": {"keys": 16, "gradient": "fused"}},
        "replace": [{"where": {"layers": [0]}, "with": "pkm", "pool": "shared", "options": {"topk": 4}}],
    }
    with pytest.raises(memrewrite.MemrewriteError, match=r"1 new parameters get none: .*values"):
        memrewrite.apply(model, recipe, inputs)


def test_recipe_refuses_8_bits_without_fused_updates():
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": {"keys": 16, "dtype": "float8_e4m3fn"}},
        "replace": [{"where": {"all": True}, "with": "pkm", "pool": "shared"}],
    }
    with pytest.raises(memrewrite.MemrewriteError, match="can be trained only by fused updates") as refused:
        memrewrite.plan(llama(), recipe, {"input_ids": tokens()})
    assert "gradient: fused" in str(refused.value)
