"""Compiles the operators for ONNX Runtime: C++ for the CPU, CUDA as well where its compiler is.

The sources lie in `kernels/onnxruntime/`. Each is compiled by itself, all at once; the library is linked in a temporary
directory and moved into place. Its default name carries a hash of the sources, so no stale one is ever taken.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memrewrite.atomic_write import replacing
from memrewrite.errors import MemrewriteError, UserError
from memrewrite.kernels import onnx_functions

SOURCES = Path(onnx_functions.__file__).with_name("onnxruntime")
NVCC_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
ARCHITECTURES = (80, 90, 100)  # the last also as PTX, for GPUs to come

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra")
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O0")
_SHOWN_LINES = 12  # of what a compiler says

Step = Callable[[str], None]


def build_op(output: Path | None = None, *, cuda: bool | None = None, sanitize: bool = False, step: Step | None = None) -> Path:
    """Compile the library to `output`, or to `default_library()`, and return its path.

    `cuda`: with CUDA kernels, which need nvcc; None takes them in where nvcc is found. `sanitize`: with the address and
    undefined-behaviour sanitizers, CPU kernels only. `step` is told what is being compiled.
    Raises UserError where a compiler is missing, MemrewriteError where it fails.
    """
    nvcc = None if cuda is False or sanitize else find_nvcc()
    if cuda and sanitize:
        raise UserError("a library with sanitizers has no CUDA kernels", hint="cuda=False")
    if cuda and nvcc is None:
        hint = "install CUDA's toolkit, put its bin folder on PATH, or build for the CPU alone"
        raise UserError(f"nvcc was found neither on PATH nor in {' or '.join(NVCC_PLACES)}", hint=hint)
    target = output or default_library(cuda=nvcc is not None)
    compiler = find_compiler()
    flags = [*_FLAGS, *(_SANITIZE if sanitize else ()), *(["-DMEMREWRITE_CUDA"] if nvcc else [])]
    with tempfile.TemporaryDirectory(prefix="memrewrite-") as folder:
        commands, objects = [], []
        for source in sources(cuda=nvcc is not None):
            made = Path(folder, source.name + ".o")
            on_cuda = source.suffix == ".cu"
            cuda_head = [str(nvcc), "-ccbin", compiler, *_CUDA_FLAGS, *architecture_flags()]
            head = cuda_head if on_cuda else [compiler, *flags]
            commands.append([*head, "-c", str(source), "-o", str(made)])
            objects.append(str(made))
        if step:
            step(f"compiling {len(objects)} file{'s'[: len(objects) > 1]} for {'the CPU and CUDA' if nvcc else 'the CPU'}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        made = Path(folder, target.name)
        _run([*_link(compiler, nvcc, sanitize=sanitize), *objects, "-o", str(made)])
        _move(made, target)
    return target


def default_library(*, cuda: bool | None = None) -> Path:
    """Where the library lies unless told otherwise: in the user's cache, named after its sources.

    `cuda`: with CUDA kernels; None where nvcc is found.
    """
    with_cuda = find_nvcc() is not None if cuda is None else cuda
    digest = hashlib.sha256(repr((platform.machine(), _FLAGS, _CUDA_FLAGS, ARCHITECTURES)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "memrewrite" / f"libmemrewrite-{digest.hexdigest()[:16]}-{'cuda' if with_cuda else 'cpu'}.so"


def built_library() -> Path | None:
    """The library of these sources, if it was built: the one with CUDA kernels before the one without."""
    return next((path for path in (default_library(cuda=True), default_library(cuda=False)) if path.is_file()), None)


def sources(*, cuda: bool) -> list[Path]:
    """The files to compile."""
    return sorted([*SOURCES.glob("*.cpp"), *(SOURCES.glob("*.cu") if cuda else ())])


def find_compiler() -> str:
    """The C++ compiler: $CXX, else c++ or g++ or clang++ on PATH. Raises UserError where there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    what = f"the C++ compiler {named!r} of $CXX was not found" if named else "no C++ compiler was found on PATH"
    raise UserError(what, hint="install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)")


def find_nvcc() -> str | None:
    """CUDA's compiler, on PATH or where its installers put it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(NVCC_PLACES))


def architecture_flags() -> list[str]:
    """What nvcc compiles for: machine code for each architecture, PTX of the newest."""
    flags = []
    for number in ARCHITECTURES:
        code = f"[sm_{number},compute_{number}]" if number == ARCHITECTURES[-1] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def _link(compiler: str, nvcc: str | None, *, sanitize: bool) -> list[str]:
    """CUDA's runtime is linked in, so that the library loads where there is none. It is never unloaded: counters and
    scratch memory of the runtime's threads stay valid."""
    stay = "-z,nodelete" if sys.platform == "linux" else ""
    if nvcc:
        return [nvcc, "-shared", "-cudart", "static", "-ccbin", compiler, *(["-Xlinker", stay] if stay else [])]
    return [compiler, "-shared", *(_SANITIZE if sanitize else ()), *([f"-Wl,{stay}"] if stay else [])]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (a compiler that we looked up)
    if done.returncode == 0:
        return
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    said = "\n".join(f"  {line}" for line in lines[:_SHOWN_LINES])
    what = f"{Path(command[0]).name} could not compile the operators:\n{said}"
    raise MemrewriteError(what, where=" ".join(command), hint="g++ 9 or newer; CUDA 12.8 or newer; another compiler by $CXX")


def _move(made: Path, target: Path) -> None:
    """Copy the library next to the target, then rename it: a process that loads it gets the old or the new file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as (draft,):
        shutil.copyfile(made, draft)
        draft.chmod(0o755)
