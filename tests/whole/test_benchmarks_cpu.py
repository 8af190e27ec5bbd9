"""The benchmarks on the CPU, and those of ONNX Runtime: they run completely, and wrong operators are not timed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memrewrite.errors import MemrewriteError

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
