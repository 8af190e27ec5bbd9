"""`export`, `check` and `build-op` on the command line: exit codes, one JSON document, one clear error per bad input."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from memrewrite.cli.app import app
from memrewrite.passes.onnx import native_library
from memrewrite.passes.onnx import session as onnx_session
from memrewrite.passes.onnx.check import routes as onnx_routes

MODEL = f"""\
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from onnx_files import layers

def build():
    print("the user's own print")
    return layers()[0]

def inputs():
    return layers()[1]
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> Callable[..., Any]:
    """Runs the command line in a directory that contains model.py, as if the native library were built."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    for module in (onnx_routes, onnx_session):
        monkeypatch.setattr(module, "built_library", lambda: library)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_a_model_is_exported_and_checked_and_a_fault_in_the_file_is_found(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("export", "model.py", "-o", "model.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    exported = json.loads(done.stdout)["exported"]
    assert exported["nodes"] == {"ProductKeyTopk": 2, "SparseLookup": 2}
    assert exported["inputs"] == [{"name": "x", "dtype": "float", "shape": ["batch", "sequence", 16]}]

    done = run("check", "model.onnx")  # the file's metadata name its source, which is code
    assert done.exit_code == 2
    assert "--trust-code" in done.stderr
    assert "the user's own print" not in done.stderr
    done = run("check", "model.onnx", "--trust-code")
    assert done.exit_code == 0, done.stderr
    assert "native on CPUExecutionProvider: ProductKeyTopk native, SparseLookup native" in done.stdout
    assert "all of length 1" in done.stdout

    model = onnx.load("model.onnx")
    weight = next(w for w in model.graph.initializer if w.name == "layers.1.value_proj.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, "model.onnx")
    done = run("check", "model.onnx", "model.py", "--route", "standard")
    assert done.exit_code == 1
    assert "failed" in done.stdout
    assert "does not compute the same as the model" in done.stderr
    done = run("check", "model.onnx", "--json", "--trust-code")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert not document["ok"]
    assert [route["name"] for route in document["checked"]["routes"]] == ["standard", "native"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.onnx", "model.py"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [(("--static",), [2, 5, 16]), (("--dynamic", "none"), [2, 5, 16]), (("--dynamic", "batch"), ["batch", 5, 16])],
)
def test_fewer_dynamic_axes(run: Callable[..., Any], options: tuple[str, ...], shape: list[Any]) -> None:
    done = run("export", "model.py", "-o", "model.onnx", "--json", *options)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["exported"]["inputs"][0]["shape"] == shape


def test_a_program_that_computes_something_else_is_refused_unless_allowed(run: Callable[..., Any], tmp_path: Path) -> None:
    model = (
        (tmp_path / "model.py").read_text()
        + """
import torch

class Asks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = layers()[0]

    def forward(self, x):
        return self.inner(x) * (2 if torch.compiler.is_exporting() else 1)

def build():
    return Asks()
"""
    )
    (tmp_path / "model.py").write_text(model)
    done = run("export", "model.py", "-o", "model.onnx")
    assert done.exit_code == 2
    assert "--allow-inexact" in done.stderr
    assert not Path("model.onnx").exists()
    assert run("export", "model.py", "-o", "model.onnx", "--allow-inexact").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "model.py", "-o", "model.py"), "is an input of this command"),
        (("export", "model.py", "-o", "there.onnx"), "exists"),
        (("export", "model.py", "-o", "nowhere/model.onnx"), "cannot be written"),
        (("export", "model.py", "-o", "model.onnx", "--with-past"), "takes no 'input_ids'"),
        (("export", "model.py", "-o", "model.onnx", "--op", "fast"), "fast"),
        (("export", "model.py", "-o", "model.onnx", "--static", "--dynamic", "batch"), "cannot be combined"),
        (("check", "nothing.onnx"), "there is no file"),
        (("check", "there.onnx"), "cannot be read as ONNX"),
    ],
)
def test_bad_input_is_reported_and_no_file_is_left(
    run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there.onnx").write_text("not ONNX")
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.py", "there.onnx"]


def test_a_library_is_built_at_the_given_path(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one small source, since the `library` fixture compiles the real ones."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    monkeypatch.setattr(native_library.library, "FOLDERS", (tmp_path / "sources",))
    done = run("build-op", "--no-cuda", "-o", "ops.so", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"library": "ops.so"}
    assert ctypes.CDLL(str(tmp_path / "ops.so")).one() == 1
    done = run("build-op", "-o", "model.py")
    assert done.exit_code == 2
    assert "exists" in done.stderr


def test_a_missing_compiler_is_named(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("build-op", "-o", "ops.so")
    assert done.exit_code == 2
    assert "no-such-compiler" in done.stderr
