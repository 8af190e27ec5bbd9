"""The backend "native" beyond the contract: threads, processes, errors, rounding, and calls without torch's dispatcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from closeness import assert_norm_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from memrewrite.kernels import native_backend, native_interface, native_library, ops, reference, rounding
from memrewrite.kernels.direct import dispatch_adds_nothing

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def lookup(n: int, d: int, t: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d + t + k)
    values, weights = torch.randn(n, d, generator=g).to(dtype), torch.randn(t, k, generator=g)
    return values, torch.randint(0, n, (t, k), generator=g), weights


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(values: Tensor, indices: Tensor, weights: Tensor) -> list[Tensor]:
    """The results of every kernel, updates with stochastic rounding included."""
    n, d = values.shape
    grad = torch.randn(indices.shape[0], d, generator=torch.Generator().manual_seed(1)).to(values.dtype)
    reads = [grad], [indices], [weights]
    table, total, moment = values.clone(), torch.ones(n), torch.zeros(n, d, dtype=torch.bfloat16)
    native_backend.adagrad_(table, None, total, *reads, lr=0.1, eps=1e-8, weight_decay=0.1, seed=3)
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 2, "seed": 4}
    native_backend.adam_(table, None, moment, total, *reads, **numbers)
    lazy = []
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        scales = [torch.ones(n, rounding.blocks_of(d)) if dtype == torch.float8_e4m3fn else None for _ in range(2)]
        moments = [torch.zeros(n, d).to(dtype) for _ in range(2)]
        native_backend.lazy_adam_(table, None, moments[0], scales[0], moments[1], scales[1], *reads, **numbers)
        lazy += [moment.view(torch.uint8) for moment in moments] + [scale for scale in scales if scale is not None]
    scores = torch.randn(2, 300, 130, generator=torch.Generator().manual_seed(2))
    best, slots = native_backend.topk(scores[0], scores[1], 32, True)
    out = native_backend.forward(values, indices, weights, None, values.dtype)
    gradients = native_backend.backward(grad, values, indices, weights, None, True, True)
    rows = native_backend.rows(grad, indices, weights, n)
    return [
        table,
        total,
        moment,
        *lazy,
        best,
        slots,
        out,
        *gradients,
        *rows,
        *native_backend.topk_backward(best, slots, 130, 130),
    ]


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("hot", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None], hot: bool) -> None:
    for dtype in DTYPES:
        values, indices, weights = lookup(3000, 1100, 64, 100, dtype)
        if hot:
            indices[:, ::3] = 7
        results = []
        for count in (1, 2, 3, 4):
            threads(count)
            results.append(everything(values, indices, weights))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("native_kernels")
def test_weights_and_outputs_in_other_dtypes() -> None:
    for dtype in DTYPES:
        values, indices, weights = lookup(60, 70, 9, 7, dtype)
        for wanted in (*DTYPES, torch.float64):
            out = native_backend.forward(values, indices, weights, None, wanted)
            assert out.dtype == wanted
            right = reference.sparse_lookup(values.double(), indices, weights.double())
            assert_norm_close(out.to(torch.float32 if wanted == torch.float64 else wanted), right, 7)
            gv, gw = native_backend.backward(out, values, indices, weights, None, True, True)
            assert gv is not None
            assert gw is not None
            assert (gv.dtype, gw.dtype) == (dtype, torch.float32)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("bad", [60, -1, 2**31 - 1])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_an_index_outside_the_table_is_refused_and_nothing_changes(bad: int, index: torch.dtype) -> None:
    values, indices, weights = lookup(60, 20, 9, 7)
    indices = indices.to(index)
    indices[4, 3] = bad
    grad, before, total = torch.ones(9, 20), values.clone(), torch.ones(60)
    calls = [
        lambda: native_backend.forward(values, indices, weights, None, torch.float32),
        lambda: native_backend.backward(grad, values, indices, weights, None, True, False),
        lambda: native_backend.backward(grad, values, indices, weights, None, False, True),
        lambda: native_backend.rows(grad, indices, weights, 60),
        lambda: native_backend.adagrad_(
            values, None, total, [grad], [indices], [weights], lr=1.0, eps=0.0, weight_decay=0.0, seed=0
        ),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"index {bad} is out of range for a table of 60 slots"):
            call()
    assert torch.equal(values, before)
    with pytest.raises(IndexError, match="product_key_topk_backward: index 81 is out of range for 81 pairs of keys"):
        native_backend.topk_backward(torch.ones(2, 1), torch.tensor([[80], [81]]), 9, 9)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """4,096 rows of one value each: the mean is the fp32 value, of normal and of subnormal numbers, of both signs."""
    lowest = 2.0**-6 if dtype == torch.float8_e4m3fn else 2.0**-14
    steps = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float8_e4m3fn: 2.0**-3}
    starts = torch.tensor([1.0, -3.0, lowest, lowest / 2, -lowest / 2, 448.0, 1e-3, 0.25])
    values = starts.repeat(4096, 1).to(dtype)
    spacing = torch.maximum(values[0].float().abs() * steps[dtype], torch.tensor(lowest * steps[dtype])) / 2
    grad = spacing.mul(-0.3).unsqueeze(0) * starts.sign()
    scale = torch.ones(4096) if dtype == torch.float8_e4m3fn else None
    before = values.float()
    indices, huge = torch.arange(4096).unsqueeze(1), 2.0**40  # total and eps: the change is the gradient
    reads = [grad.repeat(4096, 1)], [indices], [torch.ones(4096, 1)]
    native_backend.adagrad_(values, scale, torch.zeros(4096), *reads, lr=huge, eps=huge, weight_decay=0.0, seed=11)
    after = values.float() if scale is None else values.float() * scale.unsqueeze(1)
    want = before[0] - grad[0]
    error = (after.mean(0) - want).abs() / spacing
    assert (error < 0.1).all(), error


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_rows_and_columns_are_rounded_independently(dtype: torch.dtype) -> None:
    """Every value lies half way between two numbers of the type: up or down, without correlation between neighbours."""
    rows, columns = 4096, 16
    steps = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float8_e4m3fn: 2.0**-3}
    starts = 2.0 ** torch.arange(columns).remainder(8)
    starts[-1] = 448.0  # the scale of an 8-bit row stays 1
    grad = starts * steps[dtype] / -2
    grad[-1] = 0.0
    values = starts.repeat(rows, 1).to(dtype)
    scale = torch.ones(rows) if dtype == torch.float8_e4m3fn else None
    reads = [grad.repeat(rows, 1)], [torch.arange(rows).unsqueeze(1)], [torch.ones(rows, 1)]
    numbers = {"lr": 2.0**40, "eps": 2.0**40, "weight_decay": 0.0, "seed": 5}  # the change is the gradient
    native_backend.adagrad_(values, scale, torch.zeros(rows), *reads, **numbers)
    up = (values.float() > starts)[:, :-1].float()
    signs = 2 * up - 1
    bound = 5.5 / rows**0.5  # of a mean of independent signs: exceeded with a probability below 1e-7
    assert (signs.mean(0).abs() < bound).all()
    between_columns = signs.T @ signs / rows
    assert (between_columns.triu(1).abs() < bound).all()
    for lag in (1, 2, 8, 64):
        between_rows = signs[lag:].T @ signs[:-lag] / (rows - lag)
        assert (between_rows.abs() < bound * 1.01).all()


@pytest.mark.usefixtures("native_kernels")
def test_python_threads_call_at_once() -> None:
    inputs = [lookup(500 + i, 300, 40, 30) for i in range(4)]
    rights = [everything(*one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: everything(*inputs[i % 4]), range(16)))
    for i, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result, rights[i % 4], strict=True))


class _Lookups(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return native_backend.forward(*lookup(900, 1024, 64, 30), None, torch.float32)


@pytest.mark.usefixtures("native_kernels")
def test_forked_workers_call_it(threads: Callable[[int], None]) -> None:
    threads(2)
    right = _Lookups()[0]  # starts torch's threads before the fork
    loaded = list(DataLoader(_Lookups(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert len(loaded) == 4
    assert all(torch.equal(one, right) for one in loaded)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from memrewrite.kernels import native_backend, native_library
native_library.built_library = lambda: Path(sys.argv[1])
values, indices, weights = torch.ones(2000, 512), torch.randint(0, 2000, (2000, 100)), torch.ones(2000, 100)
grad, peak = torch.ones(2000, 512), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
native_backend.forward(values, indices[:1], weights[:1], None, torch.float32)
before = peak()
native_backend.forward(values, indices, weights, None, torch.float32)
native_backend.backward(grad, values, indices, weights, None, True, True)
print((peak() - before) // 1024)
"""


def test_memory_does_not_grow_with_reads_times_width(library: Path) -> None:
    """[T, K, D] would take 390 MiB; the sorted reads take 24 bytes each."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(library)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60


# ---------------------------------------------------------------------------------------------------------------- the library


@pytest.mark.parametrize("content", ["nothing", "corrupt", "foreign", "foreign and sealed"])
def test_without_a_usable_library_torch_runs(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = None if content == "nothing" else tmp_path / "lib.so"
    if content == "corrupt" and path is not None:
        path.write_bytes(b"not a library")
    if content.startswith("foreign") and path is not None:
        subprocess.run(["g++", "-shared", "-x", "c", "/dev/null", "-o", str(path)], check=True)
    if content == "foreign and sealed" and path is not None:
        native_library.seal(path)
    monkeypatch.setattr("memrewrite.kernels.native_library.built_library", lambda: path)
    monkeypatch.setattr("memrewrite.kernels.backends._logged", set())
    native_interface.loaded.cache_clear()
    values, indices, weights = lookup(60, 20, 9, 7)
    with caplog.at_level("INFO", "memrewrite.kernels"):
        out = ops.sparse_lookup(values, indices, weights)
    native_interface.loaded.cache_clear()
    assert_norm_close(out, reference.sparse_lookup(values.double(), indices, weights.double()), 7)
    kind = "cannot be loaded" if content == "foreign and sealed" else "is damaged"
    reason = "it is not built: run `memrewrite build-op`" if path is None else f"{path} {kind} ("
    assert (
        f"on the backend 'torch' (triton cannot: the tensors are not on a CUDA device; native cannot: {reason}" in caplog.text
    )


# ------------------------------------------------------------------------------------------------- without torch's dispatcher


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def test_a_call_is_direct_only_if_dispatch_adds_nothing() -> None:
    values, indices, weights = lookup(60, 20, 9, 7)
    inputs = torch.nn.Parameter(values), indices, weights
    assert not dispatch_adds_nothing(*inputs)  # a gradient is recorded
    with torch.no_grad():
        assert dispatch_adds_nothing(*inputs, None)
        assert not dispatch_adds_nothing(values.to("meta"), indices, weights)
        assert not dispatch_adds_nothing(values.as_subclass(_Subclass), indices, weights)
        assert not dispatch_adds_nothing(values.to_sparse(), indices, weights)
        assert not dispatch_adds_nothing(torch.view_as_complex(torch.randn(9, 7, 2)).conj().imag)  # a lazy negation
        with torch.autocast("cpu"):
            assert not dispatch_adds_nothing(*inputs)
        with torch.autograd.profiler.profile():
            assert not dispatch_adds_nothing(*inputs)
        with torch.overrides.TorchFunctionMode():
            assert not dispatch_adds_nothing(*inputs)
        assert not torch.func.vmap(lambda x: torch.tensor(float(dispatch_adds_nothing(x))))(values).any()
        assert not dispatch_adds_nothing_while_traced(values)
    with torch.inference_mode():
        assert dispatch_adds_nothing(*inputs)
        assert dispatch_adds_nothing(values.clone(), indices, weights)
        assert ops.sparse_lookup(*inputs).is_inference()
    assert dispatch_adds_nothing(values, indices, weights)


def dispatch_adds_nothing_while_traced(values: Tensor) -> bool:
    found: list[bool] = []

    def function(x: Tensor) -> Tensor:
        found.append(dispatch_adds_nothing(x))
        return x + 1

    torch.jit.trace(function, values, check_trace=False)
    return found[0]


def test_a_mode_and_the_profiler_see_the_operator() -> None:
    inputs = lookup(60, 20, 9, 7)
    with torch.no_grad(), _Seen() as seen:
        ops.sparse_lookup(*inputs)
        ops.product_key_topk(inputs[0], inputs[0], 3)
        ops.product_keys(torch.randn(3, 2, 4), torch.randn(2, 5, 4), 2)
    assert [name for name in seen.names if "memrewrite" in name] == [
        "memrewrite.sparse_lookup.default",
        "memrewrite.product_key_topk.default",
        "memrewrite.product_keys.default",
    ]
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        ops.sparse_lookup(*inputs)
    assert any(event.name == "memrewrite::sparse_lookup" for event in profile.function_events)


@pytest.mark.usefixtures("native_kernels")
def test_direct_and_dispatched_calls_are_equal() -> None:
    values, indices, weights = lookup(60, 20, 9, 7)
    with torch.no_grad():
        dispatched = torch.ops.memrewrite.sparse_lookup(values, indices, weights)
        assert torch.equal(ops.sparse_lookup(values, indices, weights), dispatched)
        halves = torch.randn(3, 2, 4), torch.randn(2, 5, 4)
        for one, other in zip(ops.product_keys(*halves, 2), torch.ops.memrewrite.product_keys(*halves, 2), strict=True):
            assert torch.equal(one, other)
        for error, wrong in ((ValueError, (values, indices, weights[:3])), (TypeError, (values, indices.short(), weights))):
            for call in (ops.sparse_lookup, torch.ops.memrewrite.sparse_lookup):
                with pytest.raises(error):
                    call(*wrong)


# --------------------------------------------------------------------------------------------------------------- sanitizers


def test_fuzzed_under_sanitizers() -> None:
    import native_builds

    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    script = Path(__file__).with_name("native_backend_fuzz.py")
    command = [sys.executable, str(script), str(native_builds.native(sanitize=True)), "150", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
