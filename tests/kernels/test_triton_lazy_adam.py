"""Adam with a second moment per element in Triton's interpreter: its formula in float64; how values and states are rounded."""

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

FP32, BF16, FP16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
RATES: dict[str, Any] = {"lr": 0.3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
BLOCK = 128  # columns that share a scale of an 8-bit state
STEP = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10, FP8: 2**-3}  # largest distance of neighbours, relative
SLICED = {"rows": 2, "block": 128, "pieces": 1, "warps": 1}


@pytest.fixture
def update():
    pytest.importorskip("triton")
    return importlib.import_module("memrewrite.kernels.triton_lazy_adam")


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


def blocks(rows: Tensor) -> Tensor:
    """[N, D] -> [N, ceil(D/128), 128], padded with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def each(scale: Tensor, width: int) -> Tensor:
    """The scale of each column: [N, blocks] -> [N, D]."""
    return scale.repeat_interleave(BLOCK, 1)[:, :width]


def narrow(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A state of this dtype, and its scales."""
    if dtype != FP8:
        return rows.to(dtype), None
    top = blocks(rows).abs().amax(2)
    scale = torch.where(top == 0, 1.0, top / 448)
    return (rows / each(scale, rows.shape[1])).to(FP8), scale


class Case:
    """A table with its states, and lookups of it; the last three rows are not read."""

    def __init__(self, n=8, d=16, dtype=FP32, state=FP32, lookups=((5, 7), (3, 2)), seed=0):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(n, d, generator=g)
        self.scale = rows.abs().amax(1) / 448 if dtype == FP8 else None
        self.values = (rows / self.scale[:, None]).to(FP8) if self.scale is not None else rows.to(dtype)
        self.mean, self.mean_scale = narrow(torch.randn(n, d, generator=g), state)
        self.second, self.second_scale = narrow(torch.rand(n, d, generator=g), state)
        kind = BF16 if dtype == FP8 else dtype
        self.grads = [torch.randn(t, d, generator=g).to(kind) for t, _ in lookups]
        self.indices = [torch.randint(0, max(1, n - 3), size, generator=g) for size in lookups]
        self.indices[0][:, 0] = min(4, n - 1)  # hot
        self.weights = [torch.randn(size, generator=g) for size in lookups]

    @property
    def tables(self) -> list[Tensor | None]:
        return [self.values, self.scale, self.mean, self.mean_scale, self.second, self.second_scale]

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, first and second moment in float64."""
        d = self.values.shape[1]
        values = self.values.double() * (1 if self.scale is None else self.scale[:, None].double())
        mean, second = (
            state.double() * (1 if scale is None else each(scale, d).double())
            for state, scale in ((self.mean, self.mean_scale), (self.second, self.second_scale))
        )
        return values, mean, second if self.second_scale is None else second.square()

    def run(self, update, seed=1, **options) -> Case:
        update.lazy_adam_(*self.tables, self.grads, self.indices, self.weights, **{**RATES, **options}, seed=seed)
        return self

    def read(self) -> Tensor:
        return torch.cat([i.flatten() for i in self.indices]).unique().long()

    def expected(self, lr, beta1, beta2, eps, weight_decay, step) -> list[Tensor]:
        """The formula in float64: values, first moment, second moment."""
        old = self.wide()
        g = torch.zeros_like(old[0])
        for grad, index, weight in zip(self.grads, self.indices, self.weights, strict=True):
            for j in range(index.shape[1]):
                g.index_add_(0, index[:, j].long(), weight[:, j, None].double() * grad.double())
        mean, second = beta1 * old[1] + (1 - beta1) * g, beta2 * old[2] + (1 - beta2) * g * g
        move = mean / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        new = old[0] * (1 - lr * weight_decay) - lr * move, mean, second
        read = self.read()
        return [before.index_copy(0, read, after[read]) for before, after in zip(old, new, strict=True)]


def assert_neighbours(got: Tensor, want: Tensor, dtype: torch.dtype, size: Tensor | float = 0.0) -> None:
    """`got` is `want` rounded up or down to `dtype`; `size`: the largest value that shares its scale with an element."""
    smallest = size * 2.0**-9 / 448 if dtype == FP8 else 0.0
    room = 1e-5 * (size + want.abs().amax(1, keepdim=True))  # fp32 arithmetic: terms of other magnitudes cancel
    assert ((got - want).abs() <= torch.maximum(want.abs() * STEP[dtype] * 1.01, torch.as_tensor(smallest)) + room).all()


@pytest.mark.parametrize("lookups", [((5, 7), (3, 2)), ((4, 3),)], ids=["two lookups", "one"])
@pytest.mark.parametrize("d", [1, 63, 127, 128, 129, 200, 576, 1024, 1100])
def test_fp32_is_its_formula(update, length, lookups, d):
    case = Case(d=d, lookups=lookups)
    want, before = case.expected(**RATES), case.wide()
    for got, right, old in zip(case.run(update).wide(), want, before, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-6, atol=4e-6)
        assert torch.equal(got[-3:], old[-3:])


@pytest.mark.parametrize("state", [FP32, BF16, FP8], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP8], ids=str)
@pytest.mark.parametrize("d", [63, 129, 576])
def test_values_and_states_are_neighbours_of_the_formula(update, dtype, state, d):
    case = Case(d=d, dtype=dtype, state=state)
    want, before = case.expected(**RATES), [None if t is None else t.clone() for t in case.tables]
    values, mean, second = case.run(update).wide()
    assert_neighbours(values, want[0], dtype, want[0].abs().amax(1, keepdim=True) if dtype == FP8 else 0.0)
    largest = [each(blocks(right).abs().amax(2), d) if state == FP8 else 0.0 for right in (want[1], want[2].sqrt())]
    assert_neighbours(mean, want[1], state, largest[0])
    if state == FP8:
        assert_neighbours(second.sqrt(), want[2].sqrt(), state, largest[1])
    else:
        assert_neighbours(second, want[2], state)
    for old, new in zip(before, case.tables, strict=True):
        assert old is None or torch.equal(old[-3:].view(torch.uint8), new[-3:].view(torch.uint8))
    read = case.read()
    if dtype == FP8:
        torch.testing.assert_close(case.scale[read].double(), want[0].abs().amax(1)[read] / 448, rtol=1e-5, atol=0)
    if state == FP8:
        for scale, right in ((case.mean_scale, want[1]), (case.second_scale, want[2].sqrt())):
            torch.testing.assert_close(scale[read].double(), blocks(right).abs().amax(2)[read] / 448, rtol=1e-5, atol=0)


@pytest.mark.parametrize("state", [BF16, FP8], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP8], ids=str)
def test_rounding_is_unbiased(update, dtype, state):
    """8192 elements with the same step: the mean of each table is that of the formula, its elements two neighbours."""
    n, d = 2, 8192
    case = Case(n=n, d=d, dtype=dtype, state=state, lookups=((n, 1),))
    case.indices, case.weights = [torch.arange(n)[:, None]], [torch.ones(n, 1)]
    case.grads = [torch.ones_like(case.grads[0])]
    case.values.copy_(torch.ones(n, d))
    case.mean, case.mean_scale = narrow(torch.full((n, d), 0.3007), state)
    case.second, case.second_scale = narrow(torch.full((n, d), 0.0404), state)
    if case.scale is not None:
        case.scale.fill_(1)
        case.values[:, 0] = 448.0  # the scale stays near 1
    if state == FP8:  # an element of each block that is large: the others are not the block's largest
        case.mean[:, ::BLOCK], case.second[:, ::BLOCK] = 448.0, 448.0
        case.mean_scale.fill_(0.01)
        case.second_scale.fill_(0.01)
        case.mean[:, 1::2], case.second[:, 1::2] = 30.0, 30.0
    rates = {"lr": 0.00123, "beta1": 0.7, "beta2": 0.8, "eps": 0.0, "weight_decay": 0.0, "step": 1}
    want = case.expected(**rates)
    with use("lazy_adam", {**SLICED, "block": d}):
        case.run(update, seed=5, **rates)
    tables = [(case.values, case.scale, want[0]), (case.mean, case.mean_scale, want[1])]
    tables.append((case.second, case.second_scale, want[2].sqrt() if state == FP8 else want[2]))
    for table, scale, right in tables:
        codes = table.double()[:, 1::2]
        if scale is not None:
            right = right / (scale[:, None].double() if scale.dim() == 1 else each(scale, d).double())
        goal = right[:, 1::2]
        levels = codes.unique()
        assert len(levels) == 2
        assert levels[0] <= goal.min()
        assert goal.max() <= levels[1]
        deviation = (levels[1] - levels[0]) / 2 / codes.numel() ** 0.5
        assert (codes - goal).mean().abs() <= 4.5 * deviation


def test_a_positive_root_is_never_stored_as_zero(update):
    """Roots far below the smallest code of their block, and one that is 0."""
    case = Case(d=300, state=FP8, lookups=((5, 1),))
    case.indices, case.weights = [torch.arange(5)[:, None]], [torch.ones(5, 1)]
    case.second.copy_(torch.zeros(8, 300))
    case.grads[0].fill_(1e-12)
    case.grads[0][:, ::BLOCK], case.grads[0][:, 2] = 1.0, 0.0
    case.run(update, beta2=0.0, step=1)
    codes = case.second.float()[:5]
    assert (codes[:, 1::2] == 2.0**-9).all()
    assert (codes[:, 2] == 0).all()
    assert (codes[:, ::BLOCK] > 400).all()


@pytest.mark.parametrize("state", [BF16, FP8], ids=str)
def test_a_block_of_zeros_has_scale_one(update, state):
    case = Case(d=300, dtype=FP8, state=state)
    for table in (case.values, case.mean, case.second, *case.grads):
        table.copy_(torch.zeros(table.shape))
    case.run(update)
    for table in case.tables:
        if table is not None and table.dtype == FP32:
            assert (table[case.read()] == 1).all()
        elif table is not None:
            assert not table.float().any()


@pytest.mark.parametrize("state", [FP32, FP8], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP8], ids=str)
@pytest.mark.parametrize("plan", [{}, {"pieces": 2}, {"pieces": 3}, {"block": 256}], ids=str)
def test_slices_and_blocks_do_not_change_a_row(update, length, dtype, state, plan):
    """300 columns in one program of 512, and in others: in three slices of a block, in two slices, in one of three blocks."""
    with use("lazy_adam", {**SLICED, "block": 512}):
        whole = Case(d=300, dtype=dtype, state=state).run(update)
    with use("lazy_adam", {**SLICED, **plan}):
        parts = Case(d=300, dtype=dtype, state=state).run(update)
    for a, b in zip(whole.tables, parts.tables, strict=True):
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_result_depends_only_on_the_seed(update, monkeypatch):
    def run(seed, **changes):
        for name, value in changes.items():
            monkeypatch.setattr(update, name, value)
        return Case(d=40, dtype=BF16, state=BF16).run(update, seed=seed).wide()

    first = run(7)
    for again in (run(7), run(7, PER_PROGRAM=3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (8, 7 + 2**40):
        assert not any(torch.equal(a, b) for a, b in zip(first, run(other), strict=True))


def test_the_three_tables_have_random_bits_of_their_own(update):
    """The same number is rounded in all three: the choices are independent."""
    n, d = 5, 1024
    case = Case(d=d, dtype=BF16, state=BF16, lookups=((n, 1),))
    case.indices, case.weights, case.grads = [torch.arange(n)[:, None]], [torch.ones(n, 1)], [torch.zeros(n, d).bfloat16()]
    for table in (case.values, case.mean, case.second):
        table.fill_(1.0)
    case.run(update, lr=2.0**-9, weight_decay=1.0, beta1=1 - 2**-9, beta2=1 - 2**-9, eps=float("inf"), step=1)
    up = [table[:n].double() == 1.0 for table in (case.values, case.mean, case.second)]
    for table in up:
        assert 0.45 < table.double().mean() < 0.55
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert 0.45 < (up[one] == up[two]).double().mean() < 0.55


@pytest.mark.parametrize("state", [FP32, BF16, FP8], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_weight_affects_only_its_row(update, state, bad):
    case = Case(dtype=BF16, state=state)
    case.indices[1][1, 1] = 2
    case.weights[1][1, 1] = bad
    others = torch.arange(8) != 2
    values, mean, _ = case.run(update).wide()
    assert values[2].isnan().all()
    assert not mean[2].isfinite().any()
    assert all(table[others].isfinite().all() for table in case.wide())


@pytest.mark.parametrize("state", [FP32, BF16, FP8], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP8], ids=str)
def test_default_plans(update, dtype, state):
    """A program fits on a multiprocessor, its blocks cover the row, few lanes are idle, and no block of scales is cut."""
    idle = {576: 0.25, 768: 0, 1000: 0.03, 1024: 0, 1536: 0, 2048: 0, 4096: 0, 8192: 0, 100000: 0.1}
    for width, most in {**idle, 1: 1, 20: 1, 127: 1, 128: 0, 129: 1, 300: 1, 4100: 0.34}.items():
        how = update.plan(width, dtype, state, BF16)
        assert how.warps * 32 * how.registers <= 65536
        assert (how.slices - 1) * how.block * how.pieces < width <= how.slices * how.block * how.pieces
        assert 1 - width / (how.slices * how.block * how.pieces) <= most
        assert how.block % BLOCK == 0 or how.block >= width
        assert how.slices == 1 or width > 4096 or dtype != FP8


@pytest.mark.parametrize("name", ["values", "mean", "second", "mean_scale"])
def test_a_strided_table_is_refused(update, name):
    case = Case(state=FP8, d=300)
    setattr(case, name, getattr(case, name).T.contiguous().T)
    with pytest.raises(ValueError, match="is not contiguous"):
        case.run(update)
