"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of one run share, for exported files."""
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
def library() -> Path:
    """The native library for the CPU. It is compiled only if its sources or the compiler changed since an earlier run."""
    import native_builds

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return native_builds.native()


@pytest.fixture
def native_kernels(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend "native" uses the library that is built for tests."""
    from memrewrite.kernels import native_interface

    monkeypatch.setattr("memrewrite.kernels.native_library.built_library", lambda: library)
    native_interface.loaded.cache_clear()
    yield
    native_interface.loaded.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def no_native_kernels_by_default() -> Iterator[None]:
    """Whether this machine has a native library must not change a test: only `native_kernels` provides one to torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memrewrite.kernels.native_library.built_library", lambda: None)
        yield
