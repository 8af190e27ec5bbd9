"""`lazy_adam_` on the CPU: every dtype of table and state compared with the reference in float64, and its 8-bit states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from closeness import assert_norm_close, relative_error
from test_contract import everything_new_is_poisoned  # noqa: F401 (scratch memory is NaN)
from torch import Tensor

from memrewrite.kernels import native_backend, ops, reference, rounding, torch_backend
from memrewrite.kernels.rounding import FP8, block_scale, blocks_of, by_column, row_scale

TABLES = [torch.float32, torch.bfloat16, torch.float16, FP8]
STATES = [torch.float32, torch.bfloat16, FP8]
WIDTHS = (1, 63, 127, 128, 129, 200, 576)
NUMBERS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
RELATIVE = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, FP8: 2.0**-3}  # distance of neighbours
Reads = tuple[list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture(params=[torch_backend, native_backend], ids=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param is native_backend:
        request.getfixturevalue("native_kernels")
    module: ModuleType = request.param
    return str(module.NAME)


@dataclass
class Run:
    """A table and its state as they are stored, and as fp32 numbers."""

    values: Tensor
    scale: Tensor | None
    exp_avg: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor | None

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        values, mean, square = self.values.float(), self.exp_avg.float(), self.exp_avg_sq.float()
        if self.scale is not None:
            values = values * self.scale.unsqueeze(-1)
        if self.exp_avg_scale is not None and self.exp_avg_sq_scale is not None:
            mean = mean * by_column(self.exp_avg_scale, mean.shape[1])
            square = (square * by_column(self.exp_avg_sq_scale, mean.shape[1])).square()
        return values, mean, square

    def stored(self) -> list[Tensor]:
        return [x for x in vars(self).values() if x is not None]

    def clone(self) -> Run:
        return replace(self, **{name: None if x is None else x.clone() for name, x in vars(self).items()})

    def step(self, reads: Reads, backend: str, seed: int = 5, **numbers: Any) -> Run:
        ops.lazy_adam_(*vars(self).values(), *reads, **{**NUMBERS, **numbers}, seed=seed, backend=backend)
        return self


def start(n: int, d: int, table: torch.dtype, state: torch.dtype, seed: int = 0) -> Run:
    g = torch.Generator().manual_seed(seed)
    values, mean, root = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g) / 8, torch.rand(n, d, generator=g)
    scale = row_scale(values) if table == FP8 else None
    values = (values if scale is None else values / scale.unsqueeze(-1)).to(table)
    if state != FP8:
        return Run(values, scale, mean.to(state), None, root.square().to(state), None)
    scales = block_scale(mean), block_scale(root)
    codes = [(x / by_column(s, d)).to(FP8) for x, s in zip((mean, root), scales, strict=True)]
    return Run(values, scale, codes[0], scales[0], codes[1], scales[1])


def zeros(n: int, d: int, state: torch.dtype) -> Run:
    scales = [torch.ones(n, blocks_of(d)) if state == FP8 else None for _ in range(2)]
    return Run(torch.zeros(n, d), None, torch.zeros(n, d).to(state), scales[0], torch.zeros(n, d).to(state), scales[1])


def reads_of(n: int, d: int, lookups: int = 2, t: int = 9, k: int = 7, seed: int = 3) -> Reads:
    """Row 1 is hot, and some tokens have weights of zero."""
    g = torch.Generator().manual_seed(seed)
    indices = [torch.randint(0, n, (t, k), generator=g).to((torch.int32, torch.int64)[i % 2]) for i in range(lookups)]
    weights = [torch.randn(t, k, generator=g) for _ in range(lookups)]
    for index, weight in zip(indices, weights, strict=True):
        index[:, 0] = min(1, n - 1)
        weight[:2] = 0.0
    return [torch.randn(t, d, generator=g) for _ in range(lookups)], indices, weights


def touched_by(reads: Reads, n: int) -> Tensor:
    touched = torch.zeros(n, dtype=torch.bool)
    touched[torch.cat([index.flatten() for index in reads[1]]).long()] = True
    return touched


def spacing(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """The distance of the two numbers of a type between which `x` is, at most."""
    smallest = {FP8: 2.0**-9, torch.float16: 2.0**-24}.get(dtype, 0.0)
    return torch.maximum(x.abs() * RELATIVE[dtype], torch.tensor(smallest) * (1.0 if scale is None else scale))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_dtype_against_float64(backend, state, d):
    """Values, m and v are within one rounding of their type. Rows that were not read keep their bits."""
    n, reads = 40, reads_of(40, d)
    gradient = reference.table_gradient(*[[x.double() if x.is_floating_point() else x for x in part] for part in reads], n)
    touched = touched_by(reads, n)
    for table in TABLES:
        before = start(n, d, table, state)
        after = before.clone().step(reads, backend)
        exact = [x.double() for x in before.wide()]
        wants = reference.lazy_adam(tuple(exact), gradient, touched, **NUMBERS)
        for one, other in zip(before.stored(), after.stored(), strict=True):
            assert torch.equal(one[~touched].view(torch.uint8), other[~touched].view(torch.uint8))
        columns = [None if s is None else by_column(s, d) for s in (after.exp_avg_scale, after.exp_avg_sq_scale)]
        rows = None if after.scale is None else after.scale.unsqueeze(-1)
        values, mean, square = after.wide()
        if state == FP8:
            square, wants = square.sqrt(), (*wants[:2], wants[2].sqrt())
        parts = ((values, wants[0], table, rows), (mean, wants[1], state, columns[0]), (square, wants[2], state, columns[1]))
        for got, want, dtype, scale in parts:
            if dtype == torch.float32:
                assert_norm_close(got, want, 40)
                continue
            allowed = spacing(want, dtype, scale) * 1.01 + want.abs().amax(-1, keepdim=True) * 2.0**-20
            assert ((got - want).abs()[touched] <= allowed[touched]).all()


@pytest.mark.parametrize("state", STATES, ids=str)
def test_exact_sums_give_the_same_bits(backend, state):
    """Small integers, halves and fp32 tables: the table is the reference's bit for bit, whatever the rounding of the state."""
    g = torch.Generator().manual_seed(1)
    n, d = 20, 130
    integers = lambda *shape: torch.randint(-4, 5, shape, generator=g).float()  # noqa: E731
    reads: Reads = ([integers(6, d)], [torch.randint(0, n, (6, 3), generator=g)], [integers(6, 3)])
    run = zeros(n, d, state)
    run.values.copy_(integers(n, d))
    numbers = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 2.0**-20, "weight_decay": 0.0, "step": 2}
    touched = touched_by(reads, n)
    want = reference.lazy_adam(run.wide(), reference.table_gradient(*reads, n), touched, **numbers)
    run.step(reads, backend, **numbers)
    assert torch.equal(run.values, want[0])


@pytest.mark.parametrize("state", STATES, ids=str)
def test_lookups_and_micro_batches_are_one_gradient(backend, state):
    """Several lookups give what one lookup of all their tokens gives; a second run gives the same bits, another seed others."""
    reads = reads_of(40, 200, lookups=3)
    joined: Reads = tuple([torch.cat([x.long() if not x.is_floating_point() else x for x in part])] for part in reads)  # type: ignore[assignment]
    runs = [
        start(40, 200, torch.bfloat16, state).step(one, backend, seed) for one, seed in ((reads, 5), (joined, 5), (reads, 6))
    ]
    for one, other in zip(runs[0].stored(), runs[1].stored(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert not torch.equal(runs[0].values, runs[2].values)
    if state != torch.float32:
        assert not torch.equal(runs[0].exp_avg.view(torch.uint8), runs[2].exp_avg.view(torch.uint8))


@pytest.mark.parametrize("state", STATES, ids=str)
def test_tensors_that_are_not_contiguous(backend, state):
    reads, plain = reads_of(40, 130), start(40, 130, torch.float32, state)
    columns = plain.clone()
    for name, x in vars(columns).items():
        if x is not None:
            bits = x.view(torch.uint8) if x.itemsize == 1 else x
            setattr(columns, name, bits.T.contiguous().T.view(x.dtype) if x.dim() == 2 else bits.repeat_interleave(2)[::2])
    assert not columns.values.is_contiguous()
    for one, other in zip(plain.step(reads, backend).stored(), columns.step(reads, backend).stored(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("d", [1, 129, 576])
def test_native_is_torch_to_rounding(d):
    runs = [start(40, d, torch.float32, torch.float32) for _ in range(2)]
    for run, name in zip(runs, ("native", "torch"), strict=True):
        for step in range(1, 6):
            run.step(reads_of(40, d, seed=step), name, step=step)
    for one, other in zip(runs[0].stored(), runs[1].stored(), strict=True):
        assert relative_error(one, other) <= 2e-6


def every_row(gradient: Tensor, n: int) -> Reads:
    """All rows have the same gradient: each of the n rows is a repetition of the experiment."""
    return [gradient.repeat(n, 1)], [torch.arange(n).unsqueeze(1)], [torch.ones(n, 1)]


@pytest.mark.parametrize("state", STATES[1:], ids=str)
def test_rounded_states_are_unbiased_over_many_steps(backend, state):
    """256 repetitions of 100 steps: the mean of m is fp32's; so is v in bf16. In 8 bits v is a little above."""
    n, d, g = 256, 130, torch.Generator().manual_seed(0)
    size = torch.logspace(-2, 0, d)
    rounded, exact = zeros(n, d, state), zeros(1, d, torch.float32)
    numbers = {"betas": (0.9, 0.98), "weight_decay": 0.0}
    for step in range(1, 101):
        gradient = torch.randn(1, d, generator=g) * size
        rounded.step(every_row(gradient, n), backend, seed=step, step=step, **numbers)
        exact.step(every_row(gradient, 1), "torch", step=step, **numbers)
    (_, mean, square), (_, want, wanted) = rounded.wide(), exact.wide()
    error = 6 * mean.std(0) / n**0.5 + 1e-6
    assert ((mean.mean(0) - want[0]).abs() <= error).all()
    ratio = square.mean(0) / wanted[0]
    if state == FP8:
        assert 0.99 < ratio.mean() < 1.08
        assert (ratio < 1.25).all()
    else:
        assert ((ratio - 1).abs() <= 6 * square.std(0) / n**0.5 / wanted[0] + 1e-6).all()


def test_a_root_that_underflows_in_8_bits_does_not_blow_up(backend):
    """One entry has gradients 10^7 times larger than the others of its block, whose roots are below the smallest code."""
    n, d, g = 16, 128, torch.Generator().manual_seed(0)
    run = zeros(n, d, FP8)
    for step in range(1, 60):
        gradient = torch.randn(1, d, generator=g) * 1e-7
        gradient[0, 0] = float(torch.randn((), generator=g))
        before = run.values.clone()
        run.step(every_row(gradient, n), backend, seed=step, step=step, weight_decay=0.0)
        assert (run.values - before).abs().max() <= 5 * NUMBERS["lr"]
        assert (run.exp_avg_sq.view(torch.uint8)[:, 1:] >= 1).all()  # never zero
    never = zeros(2, d, FP8)
    never.step(every_row(torch.zeros(1, d), 2), backend)
    assert not never.exp_avg_sq.view(torch.uint8).any()
    assert torch.equal(never.exp_avg_sq_scale, torch.ones(2, 1))


def test_poison_stays_in_its_row(backend):
    for state in STATES:
        reads = reads_of(40, 200)
        reads[2][0][4, 3] = float("nan")
        run = start(40, 200, torch.float32, state).step(reads, backend)
        slot = int(reads[1][0][4, 3])
        for x in run.wide():
            assert x.isnan().any(-1).nonzero().flatten().tolist() == [slot]


def test_wrong_arguments_change_nothing(backend):
    reads, run = reads_of(40, 200), start(40, 200, torch.float32, FP8)
    before = run.clone()
    wrongs: list[tuple[str, dict[str, Any]]] = [
        ("exp_avg must be float32, bfloat16 or float8_e4m3fn", {"exp_avg": torch.zeros(40, 200, dtype=torch.float16)}),
        ("must have one dtype", {"exp_avg": torch.zeros(40, 200), "exp_avg_scale": None}),
        ("needs exp_avg_sq_scale", {"exp_avg_sq_scale": None}),
        ("exp_avg_scale is", {"exp_avg_scale": torch.ones(40, 1)}),
        ("exp_avg_sq is", {"exp_avg_sq": torch.zeros(40, 199).to(FP8)}),
        ("exp_avg_scale must be float32", {"exp_avg_scale": torch.ones(40, 2).double()}),
        ("its own memory", {"exp_avg_scale": torch.ones(1, 2).expand(40, 2)}),
    ]
    for match, change in wrongs:
        with pytest.raises((TypeError, ValueError), match=match):
            replace(run, **change).step(reads, backend)
    for match, numbers in (
        ("steps count from 1", {"step": 0}),
        ("a beta is in", {"betas": (0.9, 1.0)}),
        ("lr=inf", {"lr": 1e999}),
    ):
        with pytest.raises(ValueError, match=match):
            run.step(reads, backend, **numbers)
    reads[1][1][2, 2] = 40
    with pytest.raises(IndexError, match=r"^lazy_adam_: index 40 is out of range"):
        run.step(reads, backend)
    for one, other in zip(before.stored(), run.stored(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_backend_without_it_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(torch_backend, "lazy_adam_")
    with pytest.raises(ValueError, match="torch cannot: it has no kernel for lazy_adam_"):
        start(40, 20, torch.float32, torch.float32).step(reads_of(40, 20), "torch")


def test_opcheck():
    """In bf16: `opcheck` itself has no 8-bit floats."""
    run, reads = start(10, 130, torch.bfloat16, torch.bfloat16), reads_of(10, 130)
    torch.library.opcheck(torch.ops.memrewrite.lazy_adam_, (*vars(run).values(), *reads, 0.1, 0.9, 0.99, 1e-8, 0.0, 1, 0))


# ----------------------------------------------------------------------------------------------------------- the rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_stochastic_rounding_has_the_exact_probabilities(dtype):
    """Both neighbours only, with the probabilities of the fraction: of normal, subnormal, negative and the largest numbers."""
    lowest = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14, FP8: 2.0**-6}[dtype]
    step = lowest * RELATIVE[dtype]
    largest = torch.finfo(dtype).max
    starts = torch.tensor([1.0, -3.0, lowest, lowest - step, -3 * step, step, 0.0, largest * (1 - RELATIVE[dtype])])
    starts = starts.to(dtype).float()
    size = torch.maximum(2.0 ** starts.abs().clamp(min=lowest).log2().floor() * RELATIVE[dtype], torch.tensor(step))
    fractions = torch.tensor([0.0, 2.0**-6, 0.25, 0.5, 0.9])
    signs = torch.where(starts < 0, -1.0, 1.0)
    exact = (starts + signs * size * fractions.unsqueeze(-1)).double()  # [fractions, starts]
    count = 20000
    got = rounding.stored(exact.float().repeat(count, 1, 1), dtype, torch.Generator().manual_seed(0)).double()
    up = got == (starts + signs * size).double()
    assert (up | (got == starts.double())).all()
    error = up.double().mean(0) - fractions.double().unsqueeze(-1)
    bound = 5 * (fractions * (1 - fractions) / count).sqrt().double().unsqueeze(-1)
    assert (error.abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_stochastic_rounding_keeps_every_number_of_the_type_and_what_is_not_finite(dtype):
    codes = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int64).to(torch.uint8 if dtype == FP8 else torch.int16)
    numbers = codes.view(dtype)
    got = rounding.stored(numbers.float(), dtype, torch.Generator().manual_seed(0))
    nan = numbers.isnan()
    assert torch.equal(got[~nan].view(codes.dtype), codes[~nan])  # also the sign of zero, and infinities
    payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert rounding.stored(torch.cat([numbers[nan].float(), payloads]), dtype, torch.Generator()).isnan().all()
    infinite = rounding.stored(torch.tensor([float("inf"), float("-inf")]), dtype, torch.Generator())
    assert infinite.isnan().all() if dtype == FP8 else infinite.float().tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (7, 128)], ids=str)
def test_stochastic_rounding_of_any_shape(shape):
    x = torch.randn(*shape[::-1]).T
    for dtype in (torch.bfloat16, torch.float16, FP8):
        got = rounding.stored(x, dtype, torch.Generator().manual_seed(0))
        assert got.shape == x.shape
        assert ((got.float() - x).abs() <= x.abs() * RELATIVE[dtype] + 2.0**-9).all()
