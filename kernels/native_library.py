"""The path of the native library, and whether its file is intact: C++ kernels for the CPU, and CUDA kernels for ONNX Runtime.

`memrewrite build-op` compiles it; it is optional. Its name contains a hash of its sources, so that a library of older sources
is never used. Its file ends with its size and a hash of its content: the system's loader does not notice a file that was cut
short, and the process dies at the first missing page. The hash finds damage, not a file that somebody forged.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from functools import lru_cache
from pathlib import Path
from struct import Struct

FOLDERS = (Path(__file__).with_name("cpu"), Path(__file__).with_name("onnxruntime"))  # the sources
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")
ARCHITECTURES = (80, 90, 100)  # the last one also as PTX, for newer GPUs
BUILD_AGAIN = "build it again: memrewrite build-op --overwrite"

_MAGIC = b"memrewrite seal 1"
_SEAL = Struct(f"<{len(_MAGIC)}sQ32s")  # at the end of the file: magic, size and SHA-256 of what is before
_CHUNK = 2**20


def source_files() -> list[Path]:
    """Every file that the library is compiled from."""
    return sorted(path for folder in FOLDERS for path in folder.glob("*.*"))


def library_path(*, cuda: bool) -> Path:
    """The path of the library: in the user's cache, with a hash of its sources and flags in its name.

    Args:
        cuda: Of the library with CUDA kernels.
    """
    digest = hashlib.sha256(repr((platform.machine(), FLAGS, CUDA_FLAGS, ARCHITECTURES, _MAGIC)).encode())
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "memrewrite" / f"libmemrewrite-{digest.hexdigest()[:16]}-{'cuda' if cuda else 'cpu'}.so"


def built_library() -> Path | None:
    """The library of the current sources, or None if it is not built; the one with CUDA kernels is preferred."""
    return next((path for path in (library_path(cuda=True), library_path(cuda=False)) if path.is_file()), None)


def seal(path: Path) -> None:
    """Append the size and the hash of a library to its file, once."""
    size = path.stat().st_size
    digest = _hash(path, size)
    with path.open("ab") as file:
        file.write(_SEAL.pack(_MAGIC, size, digest))


def damage(path: Path) -> str | None:
    """Why the file is not a library as `build-op` wrote it, or None. It is read once per process, and again if it changed."""
    try:
        found = path.stat()
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return "it is not a file"
    return _damage(path, found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=16)
def _damage(path: Path, size: int, _version: tuple[int, ...]) -> str | None:
    content = size - _SEAL.size
    try:
        if content <= 0:
            return f"it has {size} bytes: it was cut short, or `memrewrite build-op` did not write it"
        with path.open("rb") as file:
            file.seek(content)
            magic, sealed, digest = _SEAL.unpack(file.read(_SEAL.size))
        if magic != _MAGIC:
            return "it was cut short or changed, or `memrewrite build-op` did not write it"
        if sealed != content or digest != _hash(path, content):
            return "it was changed since `memrewrite build-op` wrote it"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def _hash(path: Path, size: int) -> bytes:
    """SHA-256 of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, _CHUNK))):
            digest.update(part)
            size -= len(part)
    return digest.digest()
