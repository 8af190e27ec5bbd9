"""The benchmarks on the CPU, and those of ONNX Runtime: they run completely, and wrong operators are found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from memrewrite.errors import MemrewriteError

# ----------------------------------------------------------------------------------------------------- CPU benchmarks


def test_the_cpu_benchmark(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    sizes = {"keys": 8, "dim": 16, "heads": 2, "topk": 4, "rounds": 1, "repeat": 1}
    small = [f"--{name}={value}" for name, value in sizes.items()]
    lists = ["--tokens", "1", "9", "--dtype", "float32", "bfloat16", "--threads", "1", "2"]
    bench("lookup_cpu").main([*small, *lists, "--json", str(tmp_path / "cpu.json")])
    record = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert set(record) == {"benchmark", "sizes", "machine", "rows"}
    assert len(record["rows"]) == 2 * 2 * 2 * (6 + 6 + 2 + 3)
    assert all(("of_best" in row) == (row["who"] == "ours") for row in record["rows"])
    aimed = [row for row in record["rows"] if "target" in row]
    assert {(row["tokens"], row["contest"]) for row in aimed} == {(1, "lookup, forward"), (9, "lookup, forward"), (9, "topk")}
    assert all(row["met"] == (row["found"] <= float(row["target"].split()[1])) for row in aimed)
    assert "ours / best" in capsys.readouterr().out


def test_the_benchmark_of_the_phases_of_apply(bench: Any, tmp_path: Path, capsys: Any) -> None:
    model, recipe, out = tmp_path / "model.py", tmp_path / "recipe.yaml", tmp_path / "now.json"
    model.write_text(
        "import torch\nfrom tiny import modular\nbuild = modular\ndef inputs():\n    return (torch.arange(10).view(2, 5),)\n",
        encoding="utf-8",
    )
    shutil.copy(Path(tiny.__file__), tmp_path / "tiny.py")
    recipe.write_text(json.dumps(tiny.recipe("parallel")), encoding="utf-8")
    small = ["--model", str(model), "--recipe", str(recipe), "--folder", str(tmp_path), "--json", str(out)]
    bench("apply_phases").main(small)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {"loading the model", "check frame", "check gradient", "writing the weights"} <= set(record["phases"])
    assert record["peak_gib"] > 0
    earlier = {"phases": {"loading the model": {"seconds": 9.0, "cpu_seconds": 8.0}}, "peak_gib": 7.0}
    lines = bench("apply_phases").table(record, earlier)
    now = record["phases"]["loading the model"]
    assert f"| loading the model | 8.00 s | {now['cpu_seconds']:.2f} s | 9.00 s | {now['seconds']:.2f} s |" in lines
    assert lines[-1].startswith("| peak memory | 7.00 GiB |")
    assert "| check frame |" in capsys.readouterr().out


def test_the_benchmark_of_updates(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    sizes = {"keys": 8, "dim": 20, "heads": 2, "topk": 4, "tokens": 3, "rounds": 1}
    small = [f"--{name}={value}" for name, value in sizes.items()]
    bench("update_cpu").main([*small, "--json", str(tmp_path / "cpu.json")])
    rows = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [sum(row["table"] == dtype for row in rows) for dtype in ("float32", "bfloat16", "float8_e4m3fn")] == [7, 7, 5]
    found = {(row["table"], row["rule"]): row["bytes_per_slot"] for row in rows}
    assert found["float32", "dense AdamW"] == found["float32", "lazy Adam, float32"] == 12 * 20
    assert found["bfloat16", "lazy Adam, float8_e4m3fn"] == 4 * 20 + 8
    assert found["float8_e4m3fn", "row-wise Adagrad"] == 20 + 8
    assert "bytes a slot" in capsys.readouterr().out


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
    monkeypatch.setattr(bench("onnx_comparisons"), "bound", wrongly(bench("onnx_operators").bound, fault))
    assert bench("onnx_cpu").main(onnx_cpu(library, tmp_path)) == 1
    assert "SparseLookup by native: relative error" in capsys.readouterr().err


def test_the_onnx_cpu_benchmark_without_its_library_reports_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert bench("onnx_cpu").main(onnx_cpu(tmp_path / "none.so", tmp_path)) == 2
    assert "there is no library" in capsys.readouterr().err


# ------------------------------------------------------------------------ the section of the GPU benchmark, on the CPU


@pytest.fixture
def onnx_section(bench: Any, tmp_path: Path) -> Any:
    """Runs the section with a library; returns its record and its lines of the summary."""

    def run(library: Path, **options: Any) -> tuple[Any, list[Any]]:
        (section,) = bench("sections").chosen("onnx")
        record = bench("record").Record(tmp_path)
        rehearsal = bench("harness").Bench(rehearse=True, triton=False, library=library)
        vars(rehearsal).update(options)
        bench("section_process").measure(section, record, rehearsal)
        return record.read(), bench("report").all_results(record.read())

    return run


def test_the_onnx_section_rehearsed(onnx_section: Any, library: Path) -> None:
    contents, rows = onnx_section(library)
    assert contents.complete("onnx")
    checks = [row for row in rows if row.status == "ok"]
    assert len(checks) == 3 * 3 * (2 * 2 + 2)
    assert all(row.note.startswith("relative error") for row in checks)
    timed = [row for row in rows if row.status == "rehearsed"]
    assert len(checks) + len(timed) == len(rows)
    assert [row.case.split()[0] for row in timed] == 6 * ["SparseLookup", "ProductKeyTopk"]
    assert {how for row in timed for how in row.rivals.values()} == {"rehearsed"}
    assert all(row.ms is None and row.section == "onnx" for row in rows)


@pytest.mark.parametrize("fault", [lambda x: x * 1.1 if x.is_floating_point() else x, lambda x: x * torch.nan])
def test_the_times_of_a_wrong_operator_are_marked(
    bench: Any, monkeypatch: pytest.MonkeyPatch, library: Path, onnx_section: Any, fault: Any
) -> None:
    monkeypatch.setattr(bench("onnx_operators"), "bound", wrongly(bench("onnx_operators").bound, fault))
    contents, rows = onnx_section(library)
    wrong = [row for row in rows if row.status.startswith("WRONG: ")]
    assert "lookup: relative error" in wrong[0].status
    timed = [row for row in rows if row.case.startswith(("SparseLookup", "ProductKeyTopk"))]
    assert timed
    assert all(row.status.startswith("WRONG kernel: times are not comparable (lookup N=") for row in timed)
    assert not contents.complete("onnx")


def test_the_onnx_section_counts_the_native_calls(
    bench: Any, monkeypatch: pytest.MonkeyPatch, library: Path, onnx_section: Any
) -> None:
    files = bench("onnx_operators")
    monkeypatch.setattr(files.Operators, "counters", lambda _: dict.fromkeys(files.OPS, 0))
    _, rows = onnx_section(library)
    wrong = [row.status for row in rows if row.status.startswith("WRONG: ")]
    assert len(wrong) == len(rows) // 2  # each case gives its line, and then this one
    assert all(
        status.startswith("WRONG: the native kernels ran {'SparseLookup': 0, 'ProductKeyTopk': 0} times") for status in wrong
    )


def test_without_the_cuda_provider_the_onnx_section_is_not_run(monkeypatch: pytest.MonkeyPatch, onnx_section: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    _, (row,) = onnx_section(None, rehearse=False)
    assert row.case == "all cases"
    assert re.fullmatch(r"not run \(this onnxruntime .+ has no CUDAExecutionProvider: onnxruntime-gpu is needed\)", row.status)


def test_without_its_library_the_onnx_section_is_not_run(onnx_section: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    _, (row,) = onnx_section(tmp_path / "none.so")
    assert row.status.startswith("not run (")
    assert "there is no library" in row.status
