"""Compiled libraries and programs that tests share. They are cached in `build/tests/` and reused by later runs.

The file name contains a hash of everything that a build depends on, so a changed source, flag or compiler causes a new build.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from memrewrite.kernels import native_library as kernels_library
from memrewrite.passes.onnx import native_library

CACHE = Path(__file__).parents[1] / "build" / "tests"


def built(target: Path, build: Callable[[Path], object]) -> Path:
    """`target`, created by `build(path)` unless it exists. If several processes need it, one builds and the others wait.

    `path` is in a temporary directory, which is deleted after the file was moved to `target`.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process is killed
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                draft = Path(folder, target.name)
                build(draft)
                draft.replace(target)
    return target


def cached(
    name: str, build: Callable[[Path], object], *, files: Iterable[Path], compilers: Iterable[str], flags: Iterable[str] = ()
) -> Path:
    """What `build(path)` writes, from the cache if it was built from the same files by the same compilers with these flags."""
    digest = hashlib.sha256(repr((platform.machine(), list(flags))).encode())
    for compiler in compilers:
        version = subprocess.check_output([compiler, "--version"])
        digest.update(f"{Path(compiler).resolve()}\0".encode() + version)
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    stem, _, suffix = name.partition(".")
    return built(CACHE / f"{stem}-{digest.hexdigest()[:16]}{suffix and '.'}{suffix}", build)


def native(*, cuda: bool = False, sanitize: bool = False) -> Path:
    """The native library, as `build_op` compiles it."""
    name = "cuda.so" if cuda else "sanitized.so" if sanitize else "cpu.so"
    compilers = [native_library.find_compiler(), *([native_library.find_nvcc() or "nvcc"] if cuda else [])]
    commands = [Path(native_library.__file__), Path(kernels_library.__file__)]
    files = [*commands, *kernels_library.source_files()]
    return cached(
        name,
        lambda path: native_library.build_op(path, cuda=cuda, sanitize=sanitize),
        files=files,
        compilers=compilers,
        flags=[name],
    )
