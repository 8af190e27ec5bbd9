"""The file of the native library: damage of every kind is one of our errors, before the system's loader sees the file."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import memrewrite
from memrewrite.errors import ExportError
from memrewrite.kernels import native_interface, native_library, ops
from memrewrite.passes.onnx.session import CUDA, calls_of, unserved

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
LOOKUP = torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)


@pytest.fixture
def fresh() -> Iterator[None]:
    native_interface.loaded.cache_clear()
    yield
    native_interface.loaded.cache_clear()


def test_a_library_that_was_built_is_intact(library: Path) -> None:
    assert native_library.damage(library) is None
    assert native_library.damage(library.with_name("nothing.so")) == "it cannot be read (No such file or directory)"


def test_cut_short_anywhere(library: Path, tmp_path: Path) -> None:
    """At every 64th byte near both ends and at 1,000 places between, and byte by byte through the seal."""
    content, path = library.read_bytes(), tmp_path / "cut.so"
    size = len(content)
    places = {*range(0, 4096, 64), *range(size - 4096, size, 64), *range(size - 80, size)}
    places |= set(random.Random(0).sample(range(0, size, 64), min(1000, size // 64)))
    path.write_bytes(content)
    for place in sorted(places, reverse=True):
        os.truncate(path, place)
        assert native_library.damage(path) is not None, place
    path.write_bytes(content)
    assert native_library.damage(path) is None


def test_changed_and_extended(library: Path, tmp_path: Path) -> None:
    content, path = bytearray(library.read_bytes()), tmp_path / "changed.so"
    generator = random.Random(1)
    for place in [*generator.sample(range(len(content)), 60), *range(len(content) - 57, len(content))]:
        bit = 1 << generator.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        assert native_library.damage(path) is not None, place
        content[place] ^= bit
    for extended in (bytes(content) + b"\0", bytes(content) + bytes(content), b"\0" + bytes(content)):
        path.write_bytes(extended)
        assert native_library.damage(path) is not None
    path.write_bytes(content)
    assert native_library.damage(path) is None


def other_machine(content: bytes) -> bytes:
    """The library for another processor: a valid file with another number in its header, sealed."""
    return content[:18] + (0xF3).to_bytes(2, "little") + content[20:]  # RISC-V


def directory(path: Path, _: Path) -> None:
    path.mkdir()


def empty(path: Path, _: Path) -> None:
    path.touch()


def text(path: Path, _: Path) -> None:
    path.write_text("not a library " * 100)


def sealed_text(path: Path, library: Path) -> None:
    text(path, library)
    native_library.seal(path)


def half(path: Path, library: Path) -> None:
    path.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def riscv(path: Path, library: Path) -> None:
    path.write_bytes(other_machine(library.read_bytes()[: -native_library._SEAL.size]))
    native_library.seal(path)


BROKEN = [directory, empty, text, sealed_text, half, fifo, riscv]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("broken", BROKEN)
def test_torch_runs_without_it_and_warns_once(
    broken: Callable[[Path, Path], None],
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "lib.so"
    broken(path, library)
    monkeypatch.setattr("memrewrite.kernels.native_library.built_library", lambda: path)
    with caplog.at_level(logging.WARNING, "memrewrite.kernels"):
        for _ in range(3):
            assert ops.sparse_lookup(*LOOKUP).tolist() == [[1.0, 1.0]]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(path) in warning
    assert "memrewrite build-op --overwrite" in warning
    with pytest.raises(ValueError, match=r"native cannot: .*memrewrite build-op --overwrite"):
        ops.sparse_lookup(*LOOKUP, backend="native")


@pytest.mark.parametrize("broken", BROKEN)
def test_sessions_refuse_it(
    broken: Callable[[Path, Path], None], library: Path, tmp_path: Path, exported: Callable[..., object]
) -> None:
    path, file = tmp_path / "lib.so", exported("modular")
    broken(path, library)
    for op in ("auto", "native"):
        with pytest.raises(ExportError, match="native library") as caught:
            memrewrite.onnx_session(file.path, op=op, library=path)  # type: ignore[attr-defined]
        assert caught.value.where == str(path)
        assert caught.value.hint == "build it again: memrewrite build-op --overwrite"
    for call in (lambda: unserved(path, CUDA), lambda: calls_of(path, "SparseLookup")):
        with pytest.raises(ExportError, match="native library"):
            call()


LOAD = """
import sys
from pathlib import Path
from memrewrite.kernels import native_interface, native_library
native_library.built_library = lambda: Path(sys.argv[1])
print(native_interface.loaded()[1])
"""


def test_a_library_that_was_cut_short_does_not_end_the_process(library: Path, tmp_path: Path) -> None:
    path, size = tmp_path / "lib.so", library.stat().st_size
    for place in (64, 4096, size // 3, size - 8192, size - 1):
        path.write_bytes(library.read_bytes()[:place])
        done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "is damaged" in done.stdout


def test_a_library_is_read_again_only_if_it_changed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lib.so"
    shutil.copyfile(library, path)
    read, hash_of = list[Path](), native_library._hash
    monkeypatch.setattr(native_library, "_hash", lambda path, size: read.append(path) or hash_of(path, size))
    for _ in range(3):
        assert native_library.damage(path) is None
    assert len(read) == 1
    os.truncate(path, 100)
    assert native_library.damage(path) is not None
