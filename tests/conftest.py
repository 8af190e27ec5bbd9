"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for files created once per run, for all its processes: libraries, exported files."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "shared").mkdir(exist_ok=True)
    return base / "shared"


@pytest.fixture(scope="session")
def exported(folder: Path) -> Callable[..., object]:
    """`onnx_files.exported` into that folder."""
    from functools import partial

    import onnx_files

    return partial(onnx_files.exported, folder)


@pytest.fixture(scope="session")
def library(folder: Path) -> Path:
    """The native kernels for the CPU, compiled once in a run."""
    from native_models import built

    from memrewrite.passes.onnx.native_library import build_op

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return built(folder, "native.so", lambda path: build_op(path, cuda=False))
