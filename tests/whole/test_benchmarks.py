"""The GPU benchmark, rehearsed on the CPU: it runs completely, wrong kernels end it, baselines are right; CPU benchmarks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_norm_close, most_reads

from memrewrite.errors import MemrewriteError
from memrewrite.kernels import reference, torch_backend

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
KERNELS = ["forward", "decode", "backward", "topk", "update"]
SECTIONS = ["correctness", "ceilings", *KERNELS, "training step", "memory size", "layer", "compile"]
interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of the benchmark by name; `sys.path` is restored afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


def command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(FOLDER), *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


# ----------------------------------------------------------------------------------------------------------- the command


def test_without_a_gpu_the_error_states_what_to_try(tmp_path: Path) -> None:
    done = command("--json", str(tmp_path / "gpu.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=interpreted)])
def test_rehearsal_runs_every_section_and_keeps_no_times(tmp_path: Path, kernels: str) -> None:
    done = command("--rehearse", "--json", str(tmp_path / "gpu.json"), TRITON_INTERPRET="1" if kernels == "triton" else "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"kernels of {kernels!r}" in done.stdout
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    keys = {"benchmark", "date", "rehearsal", "seconds", "device", "versions", "ceilings", "targets", "rows"}
    assert set(record) == keys
    assert record["rehearsal"] is True
    assert record["versions"]["torch"] == torch.__version__
    rows = record["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == SECTIONS
    line = {"section", "case", "status", "ms", "min_ms", "gbps", "of_floor", "rivals", "ratios", "targets", "note"}
    assert all(set(row) == line for row in rows)
    assert {row["status"] for row in rows} == {"ok", "rehearsed"}
    assert {row["section"] for row in rows if row["status"] == "ok"} == {"correctness"}
    assert all(row["ms"] is None and row["of_floor"] is None and not row["ratios"] for row in rows)
    table = done.stdout.split("\n\n")[-1].splitlines()
    assert {"section", "case", "target", "met"} <= set(table[0].split())
    assert {name for name in SECTIONS if any(row.startswith(name) for row in table)} == set(SECTIONS)
    if kernels == "triton":
        ran = [row["rivals"] for row in rows if row["section"] in ("forward", "decode") and "fp8" not in row["case"]]
        assert {rivals["triton"] for rivals in ran} == {"rehearsed"}  # the comparison kernels run too
        assert "triton, fp32 sums" in {name for row in rows for name, how in row["rivals"].items() if how == "rehearsed"}


def test_all_sections_together_take_at_most_450_seconds(bench: Any) -> None:
    assert [section.name for section in bench("run").sections()] == SECTIONS
    assert sum(section.seconds for section in bench("run").sections()) <= 450


# -------------------------------------------------------------------------------------------------------- wrong kernels


def off(function: Any, by: float = 0.01) -> Any:
    """`function` with its (first) result a little too large."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, tuple):
            return (None if out[0] is None else out[0] * (1 + by), *out[1:])
        return out * (1 + by)

    return wrong


def unwritten(function: Any) -> Any:
    """`function` that does not write its last row."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        found = torch.empty_like(out)
        found[:-1] = out[:-1]
        return found

    return wrong


def biased(function: Any) -> Any:
    """An update that rounds to nearest, so that small steps are lost."""

    def wrong(values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        wide = values.float()
        function(wide, *args, **kwargs)
        values.copy_(wide)

    return wrong


def unsteady(function: Any) -> Any:
    """`function` whose bits differ between calls, within the tolerance."""
    calls = iter(range(10**6))

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out * (1 + next(calls) * 1e-6)

    return wrong


def greedy(function: Any) -> Any:
    """An update that also changes rows that were not read."""

    def wrong(values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        before = values.clone()
        function(values, *args, **kwargs)
        values[(values == before).all(-1)] *= 2

    return wrong


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("forward", off, "forward: relative error"),
        ("forward", unwritten, "forward: relative error nan"),
        ("forward", unsteady, "not the same bits"),
        ("backward", off, "gradient of values"),
        ("rows", lambda f: lambda *a: (f(*a)[0], f(*a)[1] * 1.01), "row gradients"),
        ("adagrad_", biased, "the mean step is"),
        ("adagrad_", greedy, "a row that was not read was changed"),
        ("topk", off, "scores: not the same bits"),
        ("topk_backward", off, "gradient of the first half"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_ends_the_run(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, name: str, fault: Any, said: str
) -> None:
    gpu = bench("run")
    monkeypatch.setattr(gpu, "interpreted", lambda: False)  # the torch backend is faster here
    monkeypatch.setattr(torch_backend, name, fault(getattr(torch_backend, name)))
    few = tuple(section for section in gpu.sections() if section.name in ("correctness", "forward"))
    monkeypatch.setattr(gpu, "sections", lambda: few)
    assert gpu.main(["--rehearse", "--json", str(tmp_path / "gpu.json")]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    forward = [row["status"] for row in rows if row["section"] == "forward"]
    assert forward
    assert set(forward) == {"not run (a kernel is wrong)"}
    assert not torch.are_deterministic_algorithms_enabled()


def test_after_a_failed_case_the_others_still_run(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpu, harness = bench("run"), bench("harness")

    def broken(_: Any) -> Any:
        raise RuntimeError("the reason\nand more")

    def lacking(_: Any) -> Any:
        raise ModuleNotFoundError("no", name="pydantic")

    cases = [harness.Case("a", broken), harness.Case("b", lacking), harness.Case("c", lambda _: [harness.Result("s", "c")])]
    monkeypatch.setattr(gpu, "sections", lambda: (gpu.Section("s", 1, lambda _: cases),))
    results = gpu.measure(harness.Bench(rehearse=True, triton=False), print)
    assert [r.status for r in results] == ["FAILED: RuntimeError: the reason", "not run (pydantic is not installed)", "ok"]
    assert "RuntimeError: the reason" in capsys.readouterr().err


def test_cases_without_time_left_are_listed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, harness = bench("run"), bench("harness")

    def slow(_: Any) -> Any:
        time.sleep(0.2)
        return [harness.Result("one", "slow")]

    one = gpu.Section("one", 0.1, lambda _: [harness.Case("slow", slow), harness.Case("next", slow)])
    two = gpu.Section("two", 5, lambda _: [harness.Case("later", lambda _: [harness.Result("two", "later")])])
    monkeypatch.setattr(gpu, "sections", lambda: (one, two))
    monkeypatch.setattr(gpu, "warm", lambda _: None)
    results = gpu.measure(SimpleNamespace(rehearse=False, free=lambda: 0), lambda _: None)
    assert [(r.case, r.status) for r in results] == [("slow", "ok"), ("next", "not run (time)"), ("later", "ok")]
    assert "not run (time)" in bench("report").table(results)


# ------------------------------------------------------------------------------------------------------------- results


def test_floor_ratios_and_targets(bench: Any) -> None:
    harness = bench("harness")
    b = harness.Bench(rehearse=True, triton=False)
    b.rehearse, b.copy = False, 1e12
    times = {name: harness.Timing(ms, ms, 3) for name, ms in (("ours", 2.0), ("bag", 5.0), ("triton", 1.0))}
    times["fbgemm"] = "not installed"
    wanted = [harness.Target(of, least) for of, least in (("floor", 0.85), ("bag", 2), ("triton", 1), ("fbgemm", 1))]
    line = b.result("s", "c", times, moved=1_800_000_000, targets=wanted)
    assert (line.ms, line.gbps, line.of_floor) == (2.0, 900.0, 0.9)
    assert line.ratios == {"bag": 2.5, "triton": 0.5}
    assert line.rivals["fbgemm"] == "not installed"
    assert [met for _, met in line.targets] == [True, True, False, None]
    table = bench("report").table([line])
    for cell in ("90%", "bag 2.50×", "fbgemm: not installed", "≥ 85% of floor", "yes", "NO"):
        assert cell in table


def test_ours_must_run_and_a_baseline_may_fail(bench: Any) -> None:
    harness = bench("harness")
    b = harness.Bench(rehearse=True, triton=False)

    def fail() -> None:
        raise ValueError("too wide")

    times = b.race({"ours": lambda: None, "other": fail})
    assert isinstance(times["ours"], harness.Timing)
    assert times["other"] == "ValueError: too wide"
    with pytest.raises(ValueError, match="too wide"):
        b.race({"ours": fail})


def test_inputs_match_their_description(bench: Any) -> None:
    data, cpu = bench("data"), torch.device("cpu")
    zipf = data.slots_read("zipf", 100, 20, 1000, cpu)
    assert 0 <= int(zipf.min()) <= int(zipf.max()) < 1000
    assert zipf.flatten().bincount().max() > 10 * 2000 / 1000
    hot = data.slots_read("hot", 50, 4, 64, cpu, torch.int32)
    assert hot.dtype == torch.int32
    assert (hot == 32).any(1).all()
    values, scale = data.fp8_table(300, 20, cpu)
    assert values.float().isfinite().all()
    assert len(values.view(torch.uint8).unique()) == 254
    assert (scale > 0).all()
    table, weights = data.table(64, 8, torch.bfloat16, cpu), data.weights_like(hot, torch.bfloat16)
    rows = len(hot.unique())
    assert data.forward_bytes(table, hot, weights) == 200 * 16 + 200 * (4 + 2) + 50 * 16
    assert data.backward_bytes(table, hot, weights, dense=True) == (rows + 64 + 50) * 16 + 200 * (4 + 2 + 2)
    assert data.update_bytes(table, hot, weights, torch.zeros(64)) == 2 * rows * 20 + 50 * 16 + 200 * 6


def test_a_checkout_that_is_not_installed_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    bench("import_checkout").ensure()
    code = "import sys; sys.path[:0] = sys.argv[1:]; from memrewrite.kernels import compile_variants as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code, sys.path[0]], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(sys.path[0])


# ----------------------------------------------------------------------------------------------------------- baselines


def lookup_inputs(dtype: torch.dtype = torch.float32, dim: int = 20) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (5, 6), generator=g)
    return *(torch.randn(s, generator=g).to(dtype) for s in ((9, dim), (5, 6), (5, dim))), indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rival", [pytest.param("triton", marks=interpreted), "bag", "torch", "gradients of torch"])
def test_baselines_are_right(monkeypatch: pytest.MonkeyPatch, rival: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    baselines = importlib.import_module("baselines")
    values, weights, grad, indices = lookup_inputs(dtype)
    exact = values.double().requires_grad_(), weights.double().requires_grad_()
    want = reference.sparse_lookup(exact[0], indices, exact[1])
    want_gv, want_gw = torch.autograd.grad(want, exact, grad.double())
    most = most_reads(indices)  # these kernels may add up a row's gradient in its own dtype: one rounding per read
    name = rival.split()[-1]
    forward = getattr(baselines, f"{name}_forward")
    assert_norm_close(forward(values, indices, weights), want, terms=6)
    if rival == "triton":
        for sums in (None, torch.float32)[dtype != torch.float32 :]:  # the interpreter adds no bf16 atomically
            gv, gw = baselines.triton_backward(grad, values, indices, weights, sums)
            assert_norm_close(gv, want_gv, most, roundings=most + 1)
            assert_norm_close(gw, want_gw, terms=20)
    else:
        gv, gw = baselines.gradients(forward, grad, values, indices, weights)()
        assert_norm_close(gv, want_gv, most, roundings=most + 1)
        assert_norm_close(gw, want_gw, terms=20)


def test_the_baseline_of_the_topk_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    baselines = importlib.import_module("baselines")
    one, two = torch.randn(7, 20), torch.randn(7, 30)
    scores, slots = baselines.torch_topk(one, two, 5)
    want, wanted = reference.product_key_topk(one, two, 5)
    assert torch.equal(scores, want)
    assert torch.equal(slots, wanted)


# ----------------------------------------------------------------------------------------------------- CPU benchmarks


def test_the_cpu_benchmark(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    sizes = {"keys": 8, "dim": 16, "heads": 2, "topk": 4, "rounds": 1, "repeat": 1}
    small = [f"--{name}={value}" for name, value in sizes.items()]
    lists = ["--tokens", "1", "5", "--dtype", "float32", "bfloat16"]
    bench("lookup_cpu").main([*small, *lists, "--json", str(tmp_path / "cpu.json")])
    record = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert set(record) == {"benchmark", "sizes", "machine", "rows"}
    assert len(record["rows"]) == 2 * 2 * (5 + 5 + 2 + 2)
    assert all(("of_best" in row) == (row["who"] == "ours") for row in record["rows"])
    assert "ours / best" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- ONNX Runtime benchmarks


def onnx_cpu(library: Path, folder: Path, *more: str) -> list[str]:
    sizes = {
        "tokens": "1 5",
        "slots": "60",
        "reads": "7",
        "dim": "20",
        "heads": "2",
        "keys": "9 16",
        "topk": "4",
        "rounds": "1",
    }
    small = [word for name, values in sizes.items() for word in (f"--{name}", *values.split())]
    return [*small, "--threads", "1", "--library", str(library), "--json", str(folder / "cpu.json"), *more]


def test_the_onnx_cpu_benchmark(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, library: Path
) -> None:
    command = bench("onnx_cpu")
    half = {name: torch.randn(3, 9) for name in ("scores1", "scores2")}
    model = str(bench("onnx_operators").operator_file(tmp_path, "ProductKeyTopk", half, k=4, softmax=1))
    np.savez(tmp_path / "given.npz", **{name: x.numpy() for name, x in half.items()})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(command, "memory", lambda argv, who: command.main([*argv, "--memory-of", who]))
    for more in (["--dtype", "float32", "float16", "bfloat16"], ["--inputs", str(tmp_path / "given.npz")]):
        assert command.main([*onnx_cpu(library, tmp_path, "--model", model), *more]) == 0
        record = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
        assert set(record) == {"benchmark", "sizes", "machine", "rows", "extra_mb", "targets"}
        types = len(more) - 1 if "--dtype" in more else 1
        assert len(record["rows"]) == types * 2 * (1 + 2) + 1
        assert all(set(row["ratio"]) == {"native / function", "native / torch"} for row in record["rows"][:-1])
        assert set(record["rows"][-1]["ratio"]) == {"native / function"}
        assert [line["target"].split(" ≤ ")[0] for line in record["targets"]][:2] == ["native / torch", "native / function"]
    assert "given inputs; ProductKeyTopk: native" in capsys.readouterr().out


def test_model_inputs_that_cannot_be_sampled_must_be_given(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any, library: Path
) -> None:
    half = {name: torch.randn(3, 9) for name in ("scores1", "scores2")}
    model = bench("onnx_operators").operator_file(tmp_path, "ProductKeyTopk", half, k=6)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = bench("onnx_cpu")
    assert command.main([*onnx_cpu(library, tmp_path, "--model", str(model)), "--tokens", "5"]) == 2  # 5 scores, k = 6
    assert "--inputs FILE.npz" in capfd.readouterr().err
    dependent = SimpleNamespace(name="mask", shape=["batch", "past + sequence"], type="tensor(int64)")
    with pytest.raises(MemrewriteError, match="its axes depend on each other"):
        bench("onnx_comparisons").sampled(dependent, 4)


def wrongly(bound: Any, fault: Any) -> Any:
    """`bound` whose calls return wrong outputs."""

    def wrong(*args: Any) -> Any:
        call = bound(*args)
        return lambda: tuple(fault(x) for x in call())

    return wrong


@pytest.mark.parametrize("fault", [lambda x: x * 1.1 if x.is_floating_point() else x, lambda x: x * torch.nan])
def test_a_wrong_operator_is_not_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, library: Path, fault: Any
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    comparisons, files = bench("onnx_comparisons"), bench("onnx_operators")
    wrong = wrongly(files.bound, fault)
    monkeypatch.setattr(comparisons, "bound", wrong)
    assert bench("onnx_cpu").main(onnx_cpu(library, tmp_path)) == 1
    assert "SparseLookup by native: relative error" in capsys.readouterr().err
    monkeypatch.setattr(files, "bound", wrong)
    line = ["--rehearse", "--library", str(library), "--json", str(tmp_path / "cuda.json")]
    assert bench("onnx_cuda").main(line) == 1
    rows = json.loads((tmp_path / "cuda.json").read_text(encoding="utf-8"))["rows"]
    assert [row["status"].split(":")[0] for row in rows] == ["WRONG", "not run (a kernel is wrong)"]


def test_the_onnx_gpu_benchmark_rehearsed(bench: Any, tmp_path: Path, library: Path) -> None:
    line = ["--rehearse", "--library", str(library), "--json", str(tmp_path / "cuda.json")]
    assert bench("onnx_cuda").main(line) == 0
    record = json.loads((tmp_path / "cuda.json").read_text(encoding="utf-8"))
    assert record["benchmark"] == "onnx_cuda"
    rows = record["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["correctness", "ceilings", "SparseLookup", "ProductKeyTopk"]
    assert {row["status"] for row in rows if row["section"] != "correctness"} == {"rehearsed"}
    assert {how for row in rows for how in row["rivals"].values()} == {"rehearsed"}
    assert all(row["ms"] is None for row in rows)


def test_the_onnx_gpu_benchmark_counts_the_native_calls(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, library: Path
) -> None:
    files = bench("onnx_operators")
    monkeypatch.setattr(files.Operators, "counters", lambda _: dict.fromkeys(files.OPS, 0))
    line = ["--rehearse", "--library", str(library), "--json", str(tmp_path / "cuda.json")]
    assert bench("onnx_cuda").main(line) == 1
    assert "the native kernels ran {'SparseLookup': 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "said"), [(False, "no CUDA GPU"), (True, "has no CUDAExecutionProvider")], ids=["device", "provider"]
)
def test_without_cuda_the_onnx_gpu_benchmark_reports_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, there: bool, said: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert bench("onnx_cuda").main(["--json", str(tmp_path / "cuda.json")]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "try: " in printed
    assert not (tmp_path / "cuda.json").exists()


@pytest.mark.parametrize("name", ["onnx_cpu", "onnx_cuda"])
def test_an_onnx_benchmark_without_its_library_reports_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, name: str
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    lines = {"onnx_cpu": onnx_cpu(tmp_path / "none.so", tmp_path), "onnx_cuda": ["--rehearse", "--library", "none.so"]}
    assert bench(name).main(lines[name]) == 2
    assert "there is no library" in capsys.readouterr().err
