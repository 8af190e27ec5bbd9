"""The fused updates in Triton's interpreter: bit for bit in fp32, unbiased where rows are rounded, other rows unchanged."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from memrewrite.kernels.triton_plans import use

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, of the interpreter's NaN and inf
]

FP8 = torch.float8_e4m3fn
ADAGRAD: dict[str, Any] = {"lr": 0.3, "eps": 1e-8, "weight_decay": 0.1}
SLICED = {"rows": 2, "block": 16, "pieces": 1, "warps": 1}
ADAM: dict[str, Any] = {**ADAGRAD, "beta1": 0.9, "beta2": 0.99, "step": 3}


@pytest.fixture
def update():
    pytest.importorskip("triton")
    return importlib.import_module("memrewrite.kernels.triton_update")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Elements of scratch memory that no kernel writes are NaN, or a number that no table has."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _plain=plain, **kwargs: poison(_plain(*args, **kwargs)))


@pytest.fixture(params=[2, 128], ids=["short segments", "long segments"])
def length(request, update, monkeypatch):
    monkeypatch.setattr(importlib.import_module("memrewrite.kernels.triton_segments"), "LENGTH", request.param)


def root_of(x: Tensor) -> Tensor:
    """The correctly rounded square root; torch's fp32 root on the CPU is sometimes off by one bit."""
    return x.double().sqrt().float()


class Case:
    """A table with its state, and lookups whose gradient sums are exact in fp32, in any order."""

    def __init__(self, n=12, d=16, dtype=torch.float32, state=torch.float32, lookups=((5, 7), (3, 2)), seed=0):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(n, d, generator=g)
        self.scale = rows.abs().amax(1) / 448 if dtype == FP8 else None
        self.values = (rows / self.scale[:, None]).to(FP8) if self.scale is not None else rows.to(dtype)
        self.average, self.square = torch.randn(n, d, generator=g).to(state), torch.rand(n, generator=g)
        kind = torch.bfloat16 if dtype == FP8 else dtype
        self.grads = [torch.randint(-8, 9, (t, d), generator=g).to(kind) for t, _ in lookups]
        self.indices = [torch.randint(0, n - 3, size, generator=g) for size in lookups]  # the last three stay untouched
        self.indices[0][:, 0] = 4  # hot
        self.weights = [torch.randint(-4, 5, size, generator=g).to(kind) for size in lookups]

    def rows(self) -> Tensor:
        """The table as fp32."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale[:, None]

    def run(self, update, rule: str, seed=1, **options) -> list[Tensor]:
        lookups = self.grads, self.indices, self.weights
        if rule == "adagrad":
            update.adagrad_(self.values, self.scale, self.square, *lookups, **{**ADAGRAD, **options}, seed=seed)
        else:
            update.adam_(self.values, self.scale, self.average, self.square, *lookups, **{**ADAM, **options}, seed=seed)
        return [self.rows(), self.average.float(), self.square]

    def gradient(self) -> Tensor:
        total = torch.zeros(self.average.shape)
        for g, i, w in zip(self.grads, self.indices, self.weights, strict=True):
            for t in range(i.shape[0]):
                total.index_add_(0, i[t].long(), w[t, :, None].float() * g[t].float())
        return total

    def expected(self, rule: str, lr: float, eps: float, weight_decay: float, beta1=0.0, beta2=0.0, step=0) -> list[Tensor]:
        """The formulas in fp32, one operation after another."""
        read = torch.cat([i.flatten() for i in self.indices]).unique().long()
        g, p, m, v = self.gradient()[read], self.rows()[read], self.average.float()[read], self.square[read]
        power = (g * g).sum(1) / g.shape[1]
        if rule == "adagrad":
            v = v + power
            push, root = g, root_of(v) + eps
        else:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * power
            push, root = m / (1 - beta1**step), root_of(v / (1 - beta2**step)) + eps
        p = p * (1 - lr * weight_decay) - lr * push / root[:, None]
        return [
            old.index_copy(0, read, new)
            for old, new in zip((self.rows(), self.average.float(), self.square), (p, m, v), strict=True)
        ]


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize("lookups", [((5, 7), (3, 2)), ((4, 3),)], ids=["two lookups", "one"])
def test_fp32_is_its_formula_bit_for_bit(update, length, rule, lookups):
    case = Case(lookups=lookups)
    want = case.expected(rule, **(ADAGRAD if rule == "adagrad" else ADAM))
    got = case.run(update, rule)
    for new, right in zip(got, want, strict=True):
        assert torch.equal(new, right)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_rows_of_more_reads_than_a_short_segment_but_not_than_one_here_have_no_sums(update, monkeypatch, rule):
    """With little scratch memory, segments are longer than LENGTH: rows between both are summed by their own program."""
    segments = importlib.import_module("memrewrite.kernels.triton_segments")
    monkeypatch.setattr(segments, "LENGTH", 2)
    monkeypatch.setattr(segments, "SCRATCH", 1)
    case = Case(lookups=((5, 7), (3, 2)))
    want = case.expected(rule, **(ADAGRAD if rule == "adagrad" else ADAM))
    cut = segments.segment(case.indices, case.weights, *case.values.shape)
    begins = cut.sums & 0xFFFFFFFF
    assert ((cut.starts.diff() > 2) & (begins.diff() == 0)).any()
    for new, right in zip(case.run(update, rule), want, strict=True):
        assert torch.equal(new, right)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize("d", [1, 20, 576, 1000, 1536, 4100])
def test_fp32_any_width(update, rule, d):
    case = Case(d=d)
    case.indices = [i.to(torch.int32 if d % 3 else torch.int64) for i in case.indices]
    case.weights = [w * 0.3 for w in case.weights]
    want = case.expected(rule, **(ADAGRAD if rule == "adagrad" else ADAM))
    for new, right in zip(case.run(update, rule), want, strict=True):
        torch.testing.assert_close(new, right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize(("dtype", "spacing"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (FP8, 2**-3)], ids=str)
def test_rounded_rows_are_neighbors_of_the_formula(update, length, rule, dtype, spacing):
    case = Case(d=40, dtype=dtype, state=torch.bfloat16)
    before = case.values.clone()
    want = case.expected(rule, **(ADAGRAD if rule == "adagrad" else ADAM))
    got = case.run(update, rule)
    assert ((got[0] - want[0]).abs() <= want[0].abs() * spacing * 1.01 + want[0].abs().amax(1, keepdim=True) * 2**-17).all()
    assert ((got[1] - want[1]).abs() <= want[1].abs() * 2**-7 * 1.01).all()
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(case.values[-3:].view(torch.uint8), before[-3:].view(torch.uint8))
    if case.scale is not None:
        torch.testing.assert_close(case.scale, want[0].abs().amax(1) / 448, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_rounding_is_unbiased(update, dtype):
    """16384 elements with the same move: their mean is the move, their values the two neighbours."""
    n, d = 16, 1024
    lookup = [torch.ones(n, d).to(torch.bfloat16)], [torch.arange(n)[:, None]], [torch.ones(n, 1, dtype=torch.bfloat16)]
    scale = torch.ones(n) if dtype == FP8 else None
    values = torch.full((n, d), 1.0).to(dtype)
    average, square = torch.full((n, d), 1.0, dtype=torch.bfloat16), torch.zeros(n)
    if dtype == FP8:
        values[:, 0] = 448.0  # the scale stays near 1
    grads = [g.to(torch.float16) for g in lookup[0]] if dtype == torch.float16 else lookup[0]
    rates = {"lr": 0.00123, "eps": 0.0, "weight_decay": 0.0, "beta1": 0.5, "beta2": 0.5, "step": 1}
    average.fill_(0.3007)
    update.adam_(values, scale, average, square, grads, *lookup[1:], **rates, seed=5)
    moment = 0.5 * torch.tensor(0.3007).bfloat16().double() + 0.5
    want = 1.0 - 0.00123 * 2 * moment
    got = (values.float() * (1 if scale is None else scale[:, None]))[:, 1:].double()
    for found, right in ((got, want), (average.double(), moment)):
        levels = found.unique()
        assert len(levels) == 2
        assert levels[0] <= right <= levels[1]
        error = (levels[1] - levels[0]) / 2 / found.numel() ** 0.5
        assert (found.mean() - right).abs() <= 4.5 * error


def test_the_result_depends_only_on_the_seed(update, monkeypatch):
    def run(seed, **changes):
        case = Case(d=40, dtype=torch.bfloat16, state=torch.bfloat16)
        for name, value in changes.items():
            monkeypatch.setattr(update, name, value)
        return case.run(update, "adam", seed=seed)

    first = run(7)
    with use("update", SLICED):
        sliced = run(7)
    for again in (run(7), run(7, PER_PROGRAM=3), sliced):  # other programs
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (8, 7 + 2**40):
        changed = run(other)
        assert not torch.equal(first[0], changed[0])
        assert not torch.equal(first[1], changed[1])


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("plan", [SLICED, {**SLICED, "pieces": 2}, {**SLICED, "pieces": 3}], ids=["3", "2", "1"])
def test_slices_and_blocks_do_not_change_a_row(update, length, rule, dtype, plan):
    """40 columns in one block; in three slices of a block, two slices, the last with one block, and one of three blocks."""
    whole = Case(d=40, dtype=dtype).run(update, rule)
    with use("update", plan):
        parts = Case(d=40, dtype=dtype).run(update, rule)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)
def test_weights_in_fp32_are_not_rounded(update, length, dtype):
    """Weights that bf16 and fp16 cannot hold: the second moment is that of the unrounded weights."""
    case = Case(d=40, dtype=dtype)
    case.weights = [w.float() + 2**-12 for w in case.weights]
    want = case.expected("adagrad", **ADAGRAD)[2]
    torch.testing.assert_close(case.run(update, "adagrad")[2], want, rtol=1e-6, atol=0)


def test_fp32_rows_with_bf16_gradients(update):
    case = Case()
    case.grads = [g.bfloat16() for g in case.grads]  # small integers: the sums stay exact
    want = case.expected("adam", **ADAM)
    for new, right in zip(case.run(update, "adam"), want, strict=True):
        assert torch.equal(new, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("moments", [False, True])
def test_default_plans(update, dtype, moments):
    """A program fits on a multiprocessor, its blocks cover the row, and few lanes are idle."""
    idle = {576: 0.25, 768: 0, 1000: 0.03, 1024: 0, 1536: 0, 2048: 0, 4096: 0, 8192: 0, 100000: 0.1}
    for width, most in {**idle, 1: 1, 20: 1, 300: 1, 4100: 0.34}.items():
        how = update.plan(width, dtype, moments, torch.bfloat16)
        assert how.warps * 32 * how.registers <= 65536
        assert (how.slices - 1) * how.block * how.pieces < width <= how.slices * how.block * how.pieces
        assert 1 - width / (how.slices * how.block * how.pieces) <= most
        assert how.slices == 1 or width > 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_weight_affects_only_its_row(update, dtype, bad):
    case = Case(dtype=dtype)
    case.indices[1][1, 1] = 2
    case.weights[1][1, 1] = bad
    case.grads[1][1] = 1
    others = torch.arange(12) != 2
    after = case.run(update, "adagrad")[0]
    assert after[2].isnan().all()
    assert after[others].isfinite().all()


def test_every_e4m3_code_round_trips(update):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    codes[0, 0x7F] = codes[0, 0xFF] = 0  # NaN
    scale, total = torch.ones(1), torch.zeros(1)
    values = codes.clone().view(FP8)
    ones = [torch.ones(1, 256)], [torch.zeros(1, 1, dtype=torch.int64)], [torch.ones(1, 1)]
    update.adagrad_(values, scale, total, *ones, lr=0.0, eps=1e-8, weight_decay=0.0, seed=3)
    assert torch.equal(values.view(torch.uint8), codes)
    assert scale.item() == 1.0
    update.adagrad_(values, scale, total, *ones, lr=0.0, eps=1e-8, weight_decay=0.0, seed=3)
    assert torch.equal(values.view(torch.uint8), codes)


def test_a_row_of_zeros_has_scale_one(update):
    values, scale, total = torch.zeros(1, 20).to(FP8), torch.full((1,), 3.0), torch.zeros(1)
    zeros = [torch.zeros(1, 20)], [torch.zeros(1, 1, dtype=torch.int64)], [torch.ones(1, 1)]
    update.adagrad_(values, scale, total, *zeros, lr=0.1, eps=1e-8, weight_decay=0.0, seed=3)
    assert scale.item() == 1.0
    assert not values.float().any()


def test_a_strided_table_is_refused(update):
    case = Case()
    case.values = case.values.T.contiguous().T
    with pytest.raises(ValueError, match="values is not contiguous"):
        case.run(update, "adagrad")
