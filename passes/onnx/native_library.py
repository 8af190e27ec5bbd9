"""Compiles the native library: C++ kernels for torch and ONNX Runtime, and CUDA for the latter if its compiler is installed.

The sources are in `kernels/cpu/` and `kernels/onnxruntime/`. They are compiled in parallel and linked in a temporary directory,
sealed (its size and hash are appended) and moved to its path, where `kernels/native_library.py` finds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memrewrite.atomic_write import replacing
from memrewrite.errors import MemrewriteError, UserError
from memrewrite.kernels import native_library as library
from memrewrite.kernels.native_library import ARCHITECTURES, CUDA_FLAGS, FLAGS
from memrewrite.output_target import Target

NVCC_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")

_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O0")
_SHOWN_LINES = 12  # of a compiler's messages


def build_op(
    output: Path | None = None,
    *,
    cuda: bool | None = None,
    sanitize: bool = False,
    step: Callable[[str], None] | None = None,
) -> Path:
    """Compile the native library of the memory operators, a shared library for torch, and for ONNX Runtime 1.17 and newer.

    Args:
        output: The file to write, which is replaced if it exists; if None, `default_library()`.
        cuda: True adds CUDA kernels, for which nvcc is needed; None adds them if nvcc is found.
        sanitize: Add the address and undefined-behaviour sanitizers, for tests; CPU kernels only.
        step: Receives a message before compilation starts.

    Returns:
        The path of the library.

    Raises:
        UserError: No C++ compiler was found, or no nvcc with `cuda=True`; or `cuda` and `sanitize` are both True.
        MemrewriteError: A compiler or the linker failed.
    """
    if cuda and sanitize:
        raise UserError("a library with sanitizers has no CUDA kernels", hint="cuda=False")
    nvcc = None if cuda is False or sanitize else find_nvcc()
    if cuda and nvcc is None:
        hint = "install CUDA's toolkit, put its bin folder on PATH, or build for the CPU only"
        raise UserError(f"nvcc was found neither on PATH nor in {' or '.join(NVCC_PLACES)}", hint=hint)
    target = output or default_library(cuda=nvcc is not None)
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="memrewrite-") as folder:
        commands = _compile_commands(compiler, nvcc, Path(folder), sanitize=sanitize)
        if step:
            step(f"compiling {len(commands)} file{'s'[: len(commands) > 1]} for {'the CPU and CUDA' if nvcc else 'the CPU'}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands.values()))
        linked = Path(folder, target.name)
        _run([*_link(compiler, nvcc, sanitize=sanitize), *commands, "-o", str(linked)])
        library.seal(linked)
        _move(linked, target)
    return target


def _compile_commands(compiler: str, nvcc: str | None, folder: Path, *, sanitize: bool) -> dict[str, list[str]]:
    """Object file in `folder` → the command that compiles it."""
    head = [compiler, *FLAGS, *(_SANITIZE if sanitize else ()), *(["-DMEMREWRITE_CUDA"] if nvcc else [])]
    cuda_head = [str(nvcc), "-ccbin", compiler, *CUDA_FLAGS, *architecture_flags()]
    commands = {}
    for source in sources(cuda=nvcc is not None):
        target = str(folder / f"{source.name}.o")
        commands[target] = [*(cuda_head if source.suffix == ".cu" else head), "-c", str(source), "-o", target]
    return commands


def default_library(*, cuda: bool | None = None) -> Path:
    """The default path of the library, where torch and `onnx_session` search it.

    `cuda`: the library with CUDA kernels; None means True if nvcc is found.
    """
    return library.library_path(cuda=find_nvcc() is not None if cuda is None else cuda)


def sources(*, cuda: bool) -> list[Path]:
    """The source files to compile."""
    return [path for path in library.source_files() if path.suffix == ".cpp" or (cuda and path.suffix == ".cu")]


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else c++, g++ or clang++ on PATH. Raises `UserError` if there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    what = f"the C++ compiler {named!r} of $CXX was not found" if named else "no C++ compiler was found on PATH"
    raise UserError(what, hint="install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)")


def find_nvcc() -> str | None:
    """Path of nvcc, on PATH or in the directories of its installers; None if it is not there."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(NVCC_PLACES))


def architecture_flags() -> list[str]:
    """Options of nvcc: machine code for each architecture, and PTX for the newest."""
    flags = []
    for number in ARCHITECTURES:
        code = f"[sm_{number},compute_{number}]" if number == ARCHITECTURES[-1] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def _link(compiler: str, nvcc: str | None, *, sanitize: bool) -> list[str]:
    """The command that links the library, without its objects.

    CUDA's runtime is linked statically, so that the library loads on machines without CUDA. The library is never unloaded:
    its counters, and its scratch memory in the threads of ONNX Runtime, stay valid.
    """
    stay = "-z,nodelete" if sys.platform == "linux" else ""
    if nvcc:
        return [nvcc, "-shared", "-cudart", "static", "-ccbin", compiler, *(["-Xlinker", stay] if stay else [])]
    return [compiler, "-shared", *(_SANITIZE if sanitize else ()), *([f"-Wl,{stay}"] if stay else [])]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (a compiler found on PATH)
    if done.returncode == 0:
        return
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    shown = "\n".join(f"  {line}" for line in lines[:_SHOWN_LINES])
    what = f"{Path(command[0]).name} could not compile the operators:\n{shown}"
    raise MemrewriteError(what, where=" ".join(command), hint="g++ 9 or newer; CUDA 12.8 or newer; another compiler by $CXX")


def _move(made: Path, target: Path) -> None:
    """Copy the library next to the target, then rename it: a process that loads it gets the old or the new file."""
    output = Target(target, overwrite=True)
    with output.errors():
        target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as draft:
        shutil.copyfile(made, draft)
        draft.chmod(0o755)
