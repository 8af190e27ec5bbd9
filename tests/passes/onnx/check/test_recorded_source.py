"""`check FILE` without MODEL: the path in the file's metadata may lead to data in sane places, and to code only with trust."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_files
import pytest
import tiny

import memrewrite
from memrewrite.errors import ExportError, MemrewriteError
from memrewrite.passes.onnx.check.check import check_onnx
from memrewrite.passes.onnx.check.routes import read_file

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.fixture
def file(tmp_path: Path, exported: Callable[..., onnx_files.File], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a file with these metadata into `out/`, next to code and directories; the working directory is `work/`."""
    for name in ("out", "work", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(CODE)
    memrewrite.save(tiny.rewritten("llama")[0], tmp_path / "out" / "saved")
    for name in ("work", "elsewhere"):
        memrewrite.save(tiny.rewritten("llama")[0], tmp_path / name / "saved")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere" / "saved")
    monkeypatch.chdir(tmp_path / "work")
    model = onnx.load(exported("llama").path)

    def write(**notes: str) -> Path:
        for key, value in notes.items():
            for entry in [entry for entry in model.metadata_props if entry.key == f"memrewrite.{key}"]:
                model.metadata_props.remove(entry)
            model.metadata_props.add(key=f"memrewrite.{key}", value=value)
        onnx.save(model, tmp_path / "out" / "model.onnx")
        return tmp_path / "out" / "model.onnx"

    return write


HOSTILE = [
    ("model.py", "may be code and was not run"),
    ("./model.py", "may be code and was not run"),
    ("../work/model.py", "may be code and was not run"),
    ("model.py:build", "does not exist"),
    ("os:system", "does not exist"),
    ("{folder}/elsewhere/saved", "neither next to it nor in the working directory"),
    ("{folder}/out/saved", "neither next to it nor in the working directory"),  # absolute
    ("../elsewhere/saved", "neither next to it nor in the working directory"),
    ("..", "neither next to it nor in the working directory"),
    ("link", "neither next to it nor in the working directory"),
    ("~", "does not exist"),
    ("a\0b", "does not exist"),
    ("a" * 100_000, "does not exist"),
    ("nothing", "does not exist"),
]


@pytest.mark.parametrize(("source", "message"), HOSTILE, ids=[text[:30].replace("\0", "0") for text, _ in HOSTILE])
def test_a_recorded_path_runs_nothing_and_leads_nowhere_else(
    source: str, message: str, file: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        check_onnx(file(source=source.format(folder=tmp_path)))
    assert "memrewrite check FILE MODEL" in str(caught.value.hint)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("source", ["saved", "./saved/", "../work/saved"])
def test_a_recorded_directory_of_data_is_loaded(source: str, file: Callable[..., Path]) -> None:
    checked = check_onnx(file(source=source), routes=["standard"])
    assert checked.draws


def test_with_trust_the_recorded_code_runs(file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(MemrewriteError, match=r"build"):
        check_onnx(file(source="model.py"), trust_code=True)
    assert (tmp_path / "out" / "ran").exists()


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"selections": "-1"}, "'selections' is '-1'"),
        ({"selections": "9" * 5_000}, "'selections' is"),
        ({"selections": "\u0663"}, "'selections' is"),
        ({"selections": ""}, "'selections' is"),
        ({"selections": "1000"}, "the file has no value 'memory.1"),
        ({"with_past": "True"}, "'with_past' is"),
        ({"dtype": "float32\n"}, "'dtype' is"),
        ({"dtype": "x" * 10_000}, "'dtype' is"),
    ],
)
def test_damaged_metadata_are_refused(notes: dict[str, str], message: str, file: Callable[..., Path]) -> None:
    model, inputs = onnx_files.model_of("llama")
    with pytest.raises(ExportError, match=message):
        check_onnx(file(**notes), model, inputs, routes=["standard"])


AXES = {
    "times": (["batch", "sequence * 99999999999"], "too large to compare"),
    "power": (["batch", " * ".join(["sequence"] * 60)], "too large to compare"),
    "digits": (["batch", "9" * 5_000], ""),  # no axis: its length in the example is kept
    "long": (["batch", "sequence + " * 50_000 + "1"], ""),
}


@pytest.mark.parametrize("name", AXES)
def test_axes_of_any_length_allocate_nothing(name: str, file: Callable[..., Path]) -> None:
    axes, refusal = AXES[name]
    path = file()
    edited = onnx.load(path)
    for dim, text in zip(edited.graph.input[1].type.tensor_type.shape.dim, axes, strict=True):
        dim.dim_param = text
    onnx.save(edited, path)
    model, inputs = onnx_files.model_of("llama")
    with pytest.raises(ExportError, match=refusal) if refusal else contextlib.nullcontext():
        check_onnx(path, model, inputs, routes=["standard"])


@pytest.mark.parametrize("change", ["sequence", "none", "type"])
def test_an_input_that_is_no_tensor_is_refused(change: str, file: Callable[..., Path]) -> None:
    path = file()
    edited: Any = onnx.load(path)
    kind = edited.graph.input[0].type
    if change == "sequence":
        kind.sequence_type.elem_type.tensor_type.elem_type = 1
    elif change == "none":
        kind.Clear()
    else:
        kind.tensor_type.elem_type = 999
    path.write_bytes(edited.SerializeToString())
    with pytest.raises(ExportError, match="is no tensor"):
        read_file(path)
