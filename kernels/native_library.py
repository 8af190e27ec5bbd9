"""The path of the native library: C++ kernels for the CPU, and CUDA kernels for ONNX Runtime. It is optional.

`memrewrite build-op` compiles it. Its name contains a hash of its sources, so that a library of older sources is never used.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

FOLDERS = (Path(__file__).with_name("cpu"), Path(__file__).with_name("onnxruntime"))  # the sources
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")
ARCHITECTURES = (80, 90, 100)  # the last one also as PTX, for newer GPUs


def source_files() -> list[Path]:
    """Every file that the library is compiled from."""
    return sorted(path for folder in FOLDERS for path in folder.glob("*.*"))


def library_path(*, cuda: bool) -> Path:
    """The path of the library: in the user's cache, with a hash of its sources and flags in its name.

    Args:
        cuda: Of the library with CUDA kernels.
    """
    digest = hashlib.sha256(repr((platform.machine(), FLAGS, CUDA_FLAGS, ARCHITECTURES)).encode())
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "memrewrite" / f"libmemrewrite-{digest.hexdigest()[:16]}-{'cuda' if cuda else 'cpu'}.so"


def built_library() -> Path | None:
    """The library of the current sources, or None if it is not built; the one with CUDA kernels is preferred."""
    return next((path for path in (library_path(cuda=True), library_path(cuda=False)) if path.is_file()), None)
