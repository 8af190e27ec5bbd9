"""Disks of every size: each library that writes a part of an output reports a full disk its own way; the user sees one."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import memrewrite
from memrewrite.errors import CheckpointError, ExportError, UserError
from memrewrite.passes.onnx import file as onnx_file


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives an empty file system of a number of KiB, in place of the last one."""
    where = tmp_path / "disk"
    where.mkdir()

    def clear() -> None:
        if os.path.ismount(where):
            subprocess.run(["umount", "--lazy", str(where)], check=True)

    def mount(kib: int) -> Path:
        clear()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(where)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        return where

    yield mount
    clear()


def _graph() -> tuple[Any, Any]:
    model, inputs = tiny.modular(), {"ids": tiny.tokens()}
    return memrewrite.apply(model, tiny.recipe(), inputs, emit="graph").model, inputs


@pytest.fixture(params=["modular", "graph", "onnx, two files"])
def write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Writes one output to a path."""
    if request.param.startswith("onnx"):
        monkeypatch.setattr(onnx_file, "LARGE", 1000 if "two" in request.param else 2**30)
        model, inputs = tiny.rewritten("modular")
        return lambda path: memrewrite.export_onnx(model, path, inputs, overwrite=True)
    model = _graph()[0] if request.param == "graph" else tiny.rewritten(request.param)[0]
    return lambda path: memrewrite.save(model, path, overwrite=True)


def test_a_full_disk_at_any_size(write: Callable[[Path], object], disk: Callable[[int], Path]) -> None:
    """From 4 KiB upwards, until it fits."""
    sizes = [4, 24, 64, 16384]
    for number, kib in enumerate(sizes):
        folder = disk(kib)
        try:
            write(folder / "out")
        except UserError as error:
            seen = error
        else:
            assert number  # the first ones fail
            assert [p.name for p in folder.iterdir() if not p.name.startswith("out")] == []
            return
        assert isinstance(seen, CheckpointError | ExportError)
        assert "cannot be written: No space left on device" in seen.what
        assert seen.hint == "free space on this disk, or write to another one"
        assert not list(folder.iterdir())
    raise AssertionError("it never fits")


@pytest.mark.parametrize("kib", [1, 8])
def test_a_limit_of_file_sizes(write: Callable[[Path], object], kib: int, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024))
            write(tmp_path / "out")
            code = 3
        except UserError as error:
            code = 0 if "cannot be written: File too large" in error.what else 2
            print(error)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 or (code == 3 and kib > 1)  # every file of it is smaller
    assert code == 3 or not list(tmp_path.iterdir())
