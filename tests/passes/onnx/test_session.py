"""Sessions: the kernels that they report, the requested provider or an error, files that cannot be run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import tiny
from onnx_files import File, arrays, difference

import memrewrite
from memrewrite.errors import ExportError
from memrewrite.passes.onnx import session as module
from memrewrite.passes.onnx.session import CPU, CUDA, calls_of

NEAR = 1e-4
MakeFile = Callable[..., File]


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "built_library", lambda: None)


def test_native_kernels_run_every_memory_operator_and_are_reported(
    library: Path, caplog: pytest.LogCaptureFixture, exported: MakeFile
) -> None:
    file = exported("modular")
    with caplog.at_level(logging.INFO, "memrewrite"):
        session = memrewrite.onnx_session(file.path, op="native", library=library)
    assert session.memory_kernels == {"ProductKeyTopk": "native", "SparseLookup": "native"}
    assert "SparseLookup (3 nodes) runs on CPUExecutionProvider by the native kernel" in caplog.text
    before = calls_of(library, "SparseLookup"), calls_of(library, "ProductKeyTopk")
    found = session.run(None, arrays(file.inputs))[0]
    assert (calls_of(library, "SparseLookup"), calls_of(library, "ProductKeyTopk")) == (before[0] + 3, before[1] + 3)
    assert difference(found, tiny.values_of(file.model, file.inputs)) < NEAR


def test_standard_operators_run_if_requested(library: Path, exported: MakeFile) -> None:
    file = exported("modular")
    session = memrewrite.onnx_session(file.path, op="standard", library=library)
    assert set(session.memory_kernels.values()) == {"standard"}
    before = calls_of(library, "SparseLookup")
    assert difference(session.run(None, arrays(file.inputs))[0], tiny.values_of(file.model, file.inputs)) < NEAR
    assert calls_of(library, "SparseLookup") == before


@pytest.mark.usefixtures("unbuilt")
def test_without_a_library_the_functions_run_with_a_warning(caplog: pytest.LogCaptureFixture, exported: MakeFile) -> None:
    with caplog.at_level(logging.WARNING, "memrewrite"):
        session = memrewrite.onnx_session(exported("modular").path)
    assert set(session.memory_kernels.values()) == {"standard"}
    assert "memrewrite build-op" in caplog.text


@pytest.mark.usefixtures("unbuilt")
def test_missing_native_kernels_are_an_error(exported: MakeFile) -> None:
    with pytest.raises(ExportError, match="not built"):
        memrewrite.onnx_session(exported("modular").path, op="native")
    with pytest.raises(ExportError, match="they need the library"):
        memrewrite.onnx_session(exported("modular", op="native").path)


def test_a_file_without_functions_runs_with_the_library(library: Path, exported: MakeFile) -> None:
    file = exported("modular", op="native")
    session = memrewrite.onnx_session(file.path, library=library)
    assert difference(session.run(None, arrays(file.inputs))[0], tiny.values_of(file.model, file.inputs)) < NEAR


def test_several_sessions_with_session_options(library: Path, exported: MakeFile) -> None:
    for _ in range(2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = memrewrite.onnx_session(exported("modular").path, library=library, options=options)
        assert session.get_session_options().intra_op_num_threads == 1


def test_a_file_without_memory_operators_needs_nothing(exported: MakeFile) -> None:
    assert memrewrite.onnx_session(exported("modular", op="standard").path, op="native").memory_kernels == {}


# ------------------------------------------------------------------------------------------------------------ providers


def test_an_unknown_provider_is_an_error(exported: MakeFile) -> None:
    with pytest.raises(ExportError, match="has no NonsenseExecutionProvider"):
        memrewrite.onnx_session(exported("modular").path, providers=["NonsenseExecutionProvider", CPU])


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, exported: MakeFile) -> None:
    """onnxruntime itself logs a warning and runs on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ExportError, match="did not start: onnxruntime fell back to CPUExecutionProvider"):
        memrewrite.onnx_session(exported("modular").path, providers=[(CUDA, {"device_id": 0})], op="standard")


def test_a_library_without_cuda_kernels_is_refused_on_cuda(
    library: Path, monkeypatch: pytest.MonkeyPatch, exported: MakeFile
) -> None:
    """Otherwise the nodes would run on the CPU, with copies before and after."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(ExportError, match="without CUDA kernels"):
        memrewrite.onnx_session(exported("modular").path, providers=[CUDA], op="native", library=library)


# --------------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file_is_refused(share: float, library: Path, tmp_path: Path, exported: MakeFile) -> None:
    complete = exported("modular").path.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(complete[: int(len(complete) * share)])
    with pytest.raises(ExportError, match="cannot"):
        memrewrite.onnx_session(tmp_path / "cut.onnx", library=library)


def test_missing_weights_are_an_error(library: Path, tmp_path: Path, exported: MakeFile) -> None:
    model = onnx.load(exported("modular").path)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"'model\.onnx\.data' is not next to it"):
        memrewrite.onnx_session(tmp_path / "model.onnx", library=library)


def test_a_missing_file_or_library_is_an_error(tmp_path: Path, exported: MakeFile) -> None:
    with pytest.raises(ExportError, match="there is no file"):
        memrewrite.onnx_session(tmp_path / "nothing.onnx")
    with pytest.raises(ExportError, match="there is no library"):
        memrewrite.onnx_session(exported("modular").path, library=tmp_path / "nothing.so")
