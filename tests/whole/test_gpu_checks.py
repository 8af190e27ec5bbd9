"""The checks of the GPU benchmark find wrong kernels, cover every plan that is timed, and its rivals are right."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrewrite.kernels import reference, torch_backend

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
FP8 = torch.float8_e4m3fn


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of the benchmark by name; `sys.path` is restored afterwards."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def bench_with(modules: Any, **kernels: Any) -> Any:
    """A rehearsal whose kernels are those of torch, with some replaced."""
    bench = modules("harness").Bench(rehearse=True, triton=False)
    functions = {name: getattr(torch_backend, name) for name in dir(torch_backend) if not name.startswith("_")}
    bench.kernels = SimpleNamespace(**{**functions, **kernels})
    return bench


# ------------------------------------------------------------------------------------------------------- wrong kernels


def next_row(scores1: Tensor, scores2: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Off by one in the plan for many rows: the last row gets the result of the one before it."""
    scores, slots = torch_backend.topk(scores1, scores2, k, softmax)
    if scores.shape[0] > 1024:
        scores[-1], slots[-1] = scores[-2].clone(), slots[-2].clone()
    return scores, slots


def next_slot(scores1: Tensor, scores2: Tensor, k: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """The right scores, and in one row of many a slot beside the right one."""
    scores, slots = torch_backend.topk(scores1, scores2, k, softmax)
    if scores.shape[0] > 1024:
        slots[700, 0] = slots[700, 0] ^ 1
    return scores, slots


@pytest.mark.parametrize(("wrong", "said"), [(None, ""), (next_row, "scores: not"), (next_slot, "sums of the slots: not")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fault_of_the_top_k_in_many_rows_is_found(modules, wrong, said, dtype, monkeypatch):
    topk = modules("correctness_topk")
    monkeypatch.setattr(topk, "CHUNK", 1 << 16)  # several chunks of rows, and not all sums
    bench = bench_with(modules) if wrong is None else bench_with(modules, topk=wrong)
    check = topk.topk(bench, (1025, 96, 96, 8, dtype))
    if wrong is None:
        assert modules("correctness").finished(check) < 1e-5
        return
    with pytest.raises(modules("harness").Stop, match=said):
        modules("correctness").finished(check)


def test_the_largest_sums_by_halves_are_those_of_all_sums(modules, monkeypatch):
    topk = modules("correctness_topk")
    one, two = (torch.randn(6, n).bfloat16().double() for n in (40, 30))
    every = topk.largest(one, two, 7)
    monkeypatch.setattr(topk, "CHUNK", 1)
    halves = topk.largest(one, two, 7)
    assert torch.equal(every[0], halves[0])
    assert torch.equal(every[2], halves[2])
    assert torch.equal(every[1][every[2]], halves[1][halves[2]])
    sums = (one[:, :, None] + two[:, None]).flatten(1)
    assert torch.equal(every[0], sums.sort(-1, descending=True).values[:, :7])
    assert topk.largest(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64), 2)[2].tolist() == [
        [False, False]
    ]


def rounded(function: Any, at: int) -> Any:
    """`function` whose weights are rounded to bf16."""

    def wrong(*args: Any) -> Any:
        narrow = args[at].bfloat16().to(args[at].dtype)
        return function(*args[:at], narrow, *args[at + 1 :])

    return wrong


@pytest.mark.parametrize(("name", "at", "said"), [("forward", 2, "forward"), ("backward", 3, "values"), ("rows", 2, "row")])
def test_a_rounded_weight_is_found(modules, name, at, said):
    correctness = modules("correctness")
    size = correctness.Lookup(40, 20, 7, 4, torch.bfloat16, weights=torch.float32)
    assert correctness.finished(correctness.lookup(bench_with(modules), size)) < 4e-3
    right = getattr(torch_backend, name)
    wrong = bench_with(modules, **{name: rounded(right, at)})
    if name == "backward":  # its gradients go to the values, whose dtype hides one rounding: fp32 values show it
        size = dataclasses.replace(size, dtype=torch.float32, weights=None)
    with pytest.raises(modules("harness").Stop, match=said):
        correctness.finished(correctness.lookup(wrong, size))


def rounded_update(values: Tensor, scale: Any, total: Tensor, grads: Any, indices: Any, weights: Any, **numbers: Any) -> None:
    """Adagrad with weights rounded to bf16."""
    torch_backend.adagrad_(values, scale, total, grads, indices, [w.bfloat16().to(w.dtype) for w in weights], **numbers)


def test_a_rounded_weight_of_an_update_is_found(modules):
    correctness, updates = modules("correctness"), modules("correctness_update").updates
    case = {"rule": "adagrad", "dim": 20, "dtypes": (torch.bfloat16, torch.bfloat16, torch.float32)}
    assert correctness.finished(updates(bench_with(modules), **case)) < 1e-2
    with pytest.raises(modules("harness").Stop, match="total"):
        correctness.finished(updates(bench_with(modules, adagrad_=rounded_update), **case))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_wrong_moment_of_an_element_is_found(modules, name, moments):
    """Some columns of a state of lazy Adam are left as they were."""
    correctness, updates = modules("correctness"), modules("correctness_update").updates
    case = {"rule": "lazy_adam", "dim": 200, "dtypes": (torch.float32,) * 3, "kind": moments}
    assert correctness.finished(updates(bench_with(modules), **case)) < 0.08
    place, bits = {"exp_avg": 2, "exp_avg_sq": 4}[name], modules("correctness_large").bits_of

    def wrong(*tables: Any, **numbers: Any) -> None:
        old = tables[place].clone()
        torch_backend.lazy_adam_(*tables, **numbers)
        bits(tables[place])[:, ::8] = bits(old)[:, ::8]

    with pytest.raises(modules("harness").Stop, match=f"{name}: relative error"):
        correctness.finished(updates(bench_with(modules, lazy_adam_=wrong), **case))


def overflowing(function: Any, at: int) -> Any:
    """`function` as if slot times width overflowed in 32 bits: the last rows are taken from the front of the table."""

    def wrong(*args: Any, **numbers: Any) -> Any:
        lists = isinstance(args[at], list)
        indices = [index - 50 for index in (args[at] if lists else [args[at]])]
        return function(*args[:at], indices if lists else indices[0], *args[at + 1 :], **numbers)

    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize(
    ("name", "at"),
    [("forward", 1), ("backward", 2), ("rows", 1), ("adagrad_", 4), ("adam_", 5), ("lazy_adam_", 7)],
    ids=str,
)
def test_a_32_bit_overflow_is_found(modules, name, at, dtype):
    large, finished = modules("correctness_large").large_table, modules("correctness").finished
    assert finished(large(bench_with(modules), dtype)) < 0.08
    wrong = bench_with(modules, **{name: overflowing(getattr(torch_backend, name), at)})
    with pytest.raises(modules("harness").Stop):
        finished(large(wrong, dtype))


@pytest.mark.parametrize("fault", [None, "slot", "weight", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_faults_of_the_operator_from_queries_are_found(modules, monkeypatch, fault, dtype):
    keys, right = modules("correctness_keys"), modules("correctness_keys").ops.product_keys

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weights, slots = right(*args, **options)
        if fault == "slot":
            slots = slots.clone()
            slots[1, 2, 0] = slots[1, 2, 1:].max() + 1
        if fault == "weight":
            weights = weights * 1.1
        if fault == "gradient":
            weights = weights + 0.1 * (weights - weights.detach())
        return weights, slots

    monkeypatch.setattr(keys, "ops", SimpleNamespace(product_keys=wrong))
    check = keys.product_keys(modules("harness").Bench(rehearse=True, triton=False), dtype)
    if fault is None:
        assert modules("correctness").finished(check) <= 2e-2
        return
    with pytest.raises(modules("harness").Stop, match={"slot": "slot|weights"}.get(fault, fault)):
        modules("correctness").finished(check)


def test_a_table_that_does_not_fit_is_reported(modules, monkeypatch):
    large, skip = modules("correctness_large"), modules("harness").Skip
    device = SimpleNamespace(rehearse=False, free=lambda: 36 << 30)
    assert large.slots_of(device, 1024, torch.bfloat16) * 1024 > 2**31
    assert large.slots_of(device, 1024, FP8) * 1024 > 2**32
    with pytest.raises(skip, match="need more"):
        large.slots_of(SimpleNamespace(rehearse=False, free=lambda: 1 << 30), 1024, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------ what is covered


@pytest.fixture(params=[(1024, 576), pytest.param((1024, 2048, 4096, 576, 768, 1536), marks=pytest.mark.slow)], ids=str)
def real(request: Any, modules: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `Bench` with widths of the device, on the CPU, whose Triton kernels are recorded and not launched."""
    dims, odd = ([d for d in request.param if (d % 1024 == 0) == power] for power in (True, False))
    correctness, lookup = modules("correctness"), modules("lookup")
    bench = modules("harness").Bench(rehearse=True, triton=True)
    bench.sizes = dataclasses.replace(modules("harness").Sizes(), dims=(*dims,), tokens=70, topk_rows=1030)
    bench.rehearse, bench.sync = False, lambda: None
    monkeypatch.setattr(type(bench), "free", lambda _: 1 << 40)
    monkeypatch.setattr(lookup, "odd_widths", lambda _: (*odd,))
    monkeypatch.setattr(lookup, "hot_keys", lambda *_: 16)
    monkeypatch.setattr(modules("steps"), "hot_keys", lambda *_: 16)
    monkeypatch.setattr(correctness, "TOKENS", 70)
    for module in (correctness, modules("correctness_update")):
        monkeypatch.setattr(module, "SLOTS", 64)
    return bench


def test_the_checks_launch_every_plan_that_is_timed(modules, real):
    correctness = modules("correctness")
    names = {name for name, _ in correctness.timed_launches(real)}
    assert {"lookup_forward", "add_chunks", "segment_gradients", "half_kernel", "pair_kernel"} <= names
    assert {"update_rows", "lazy_adam_rows"} <= names
    assert len(list(correctness.timed_is_checked(real))) == 1


@pytest.mark.parametrize("only", ["lookup N=1 ", "adam "])
def test_a_plan_that_is_timed_but_not_checked_is_found(modules, real, monkeypatch, only):
    correctness = modules("correctness")
    every = list(correctness.checks(real))
    monkeypatch.setattr(correctness, "checks", lambda _: [one for one in every if one[0].startswith(only)][:1])
    with pytest.raises(modules("harness").Stop, match="timed kernels are not checked"):
        list(correctness.timed_is_checked(real))


# --------------------------------------------------------------------------------------------------------------- rivals


def update_reads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    sizes = ((5, 7), (9, 3))
    return (
        [torch.randn(t, 20, generator=g).to(dtype) for t, _ in sizes],
        [torch.randint(0, 40, size, generator=g) for size in sizes],
        [torch.randn(*size, generator=g) for size in sizes],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_the_rival_of_the_update_is_right(modules, monkeypatch, rule, dtype):
    rival = modules("baseline_updates")
    monkeypatch.setattr(rival, "SLICE", 20 * 7)  # several slices
    reads = update_reads(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    wide, total, mean = torch.randn(60, 20), torch.rand(60), torch.randn(60, 20)
    scale = wide.abs().amax(-1) / 448 if dtype == FP8 else None
    values = (wide if scale is None else wide / scale[:, None]).to(dtype)
    start = values.float() if scale is None else values.float() * scale[:, None]
    touched = torch.zeros(60, dtype=torch.bool)
    touched[torch.cat([index.flatten() for index in reads[1]])] = True
    gradient = reference.table_gradient([g.float() for g in reads[0]], *reads[1:], 60)
    numbers = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.01}
    got, scales, square = values.clone(), None if scale is None else scale.clone(), total.clone()
    if rule == "adagrad":
        want, wanted = reference.rowwise_adagrad(start, total, gradient, touched, **numbers)
        rival.adagrad_(got, scales, square, *reads, **numbers, seed=0)
    else:
        first = mean.clone()
        want, moment, wanted = reference.rowwise_adam(
            (start, mean, total), gradient, touched, betas=(0.9, 0.99), step=3, **numbers
        )
        rival.adam_(got, scales, first, square, *reads, **numbers, beta1=0.9, beta2=0.99, step=3, seed=0)
        torch.testing.assert_close(first, moment)
    torch.testing.assert_close(square, wanted)
    assert torch.equal(got[~touched].view(torch.uint8), values[~touched].view(torch.uint8))
    new = got.float() if scales is None else got.float() * scales[:, None]
    rel = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, FP8: 2.0**-3}[dtype]
    torch.testing.assert_close(new, want, rtol=0, atol=rel * float(want.abs().max()))
    assert torch.equal(got.view(torch.uint8), values.view(torch.uint8)) is False


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_the_rival_of_lazy_adam_is_right(modules, monkeypatch, dtype, moments):
    """As the backend of torch does it, up to one step of what is rounded."""
    rival = modules("baseline_updates")
    monkeypatch.setattr(rival, "SLICE", 20 * 7)
    reads = update_reads(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    wide = torch.randn(60, 20)
    scale = wide.abs().amax(-1) / 448 if dtype == FP8 else None
    values = (wide if scale is None else wide / scale[:, None]).to(dtype)
    block = None if moments != FP8 else torch.rand(60, 1)
    tables = (values, scale, torch.randn(60, 20).to(moments), block, torch.rand(60, 20).to(moments), block)
    numbers = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99, "step": 3}
    got, want = ([None if t is None else t.clone() for t in tables] for _ in range(2))
    rival.lazy_adam_(*got, *reads, **numbers, seed=0)
    torch_backend.lazy_adam_(*want, *reads, **numbers, seed=1)
    touched = torch.zeros(60, dtype=torch.bool)
    touched[torch.cat([index.flatten() for index in reads[1]])] = True
    for before, one, two, factor in zip(tables[::2], got[::2], want[::2], (1, 3, 5), strict=True):
        assert torch.equal(one[~touched].view(torch.uint8), before[~touched].view(torch.uint8))
        assert not torch.equal(one.view(torch.uint8), before.view(torch.uint8))
        scales = [1.0 if each[factor] is None else each[factor].view(60, 1) for each in (got, want)]
        rel = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, FP8: 2.0**-3}[one.dtype]
        first, second = one.float() * scales[0], two.float() * scales[1]
        torch.testing.assert_close(first, second, rtol=0, atol=1.01 * rel * float(second.abs().max()))
    for one, two in zip(got[1::2], want[1::2], strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, rtol=1e-4)


def test_torch_adam_as_a_rival_updates_the_rows_that_were_read(modules, monkeypatch):
    """SparseAdam changes only these rows; both move them by the step of Adam's first update: the rate."""
    rivals, bench = modules("element_updates"), bench_with(modules)
    (grad, *_), (indices, *_), (weights, *_) = update_reads()
    values = torch.randn(60, 20)
    tables: list[Tensor] = []
    kept = SimpleNamespace(Parameter=lambda t: tables.append(nn.Parameter(t)) or tables[-1])
    monkeypatch.setattr(rivals, "nn", kept)
    for make in (rivals.dense_adam, rivals.sparse_adam):
        make(bench, values, grad, indices, weights)()
    read = torch.zeros(60, dtype=torch.bool)
    read[indices.flatten()] = True
    for table in tables:
        assert torch.equal(table[~read], values[~read])
        torch.testing.assert_close((table - values)[read].abs(), torch.full((int(read.sum()), 20), 1e-3), rtol=0.02, atol=0)


class Waits(torch.overrides.TorchFunctionMode):
    """Raises where the host would wait for a device: values as Python numbers, shapes that depend on values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in (
            "item",
            "tolist",
            "nonzero",
            "unique",
            "masked_select",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "cpu",
        ):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_the_rival_of_the_update_never_waits_for_the_device(modules):
    rival, numbers = modules("baseline_updates"), {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.01, "seed": 0}
    values, total = torch.randn(60, 20).bfloat16(), torch.rand(60)
    with Waits():
        rival.adagrad_(values, None, total, *update_reads(), **numbers)
        rival.adam_(values, None, torch.randn(60, 20), total, *update_reads(), **numbers, beta1=0.9, beta2=0.9, step=2)
        moments = [t for _ in range(2) for t in (torch.zeros(60, 20).to(FP8), torch.ones(60, 1))]
        rival.lazy_adam_(values, None, *moments, *update_reads(), **numbers, beta1=0.9, beta2=0.9, step=2)
    with Waits(), pytest.raises(AssertionError, match="waits"):
        torch_backend.adagrad_(values, None, total, *update_reads(), **numbers)


def test_the_gather_that_is_compiled_is_right(modules):
    values, indices, weights = torch.randn(9, 20), torch.randint(0, 9, (5, 6)), torch.randn(5, 6)
    torch.testing.assert_close(
        modules("baselines").gathered(values, indices, weights), reference.sparse_lookup(values, indices, weights)
    )


def test_the_command_for_a_gpu_machine_runs_every_file_with_tests_for_one(modules):
    root = FOLDER.parents[1]
    marked = [
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        if re.search(r"mark[.]gpu\b|^from devices", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(modules("gpu_tests").FILES) == sorted(marked)
