"""`onnx_session`: an exported file in ONNX Runtime, on the requested provider and with the requested kernels.

Flow: read which memory operators the file has → decide whether the native library has kernels for the provider → create the
session, and check that it runs on that provider.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memrewrite.errors import ExportError, in_one_line
from memrewrite.kernels.native_library import BUILD_AGAIN, built_library, damage
from memrewrite.kernels.onnx_functions import DOMAIN, NATIVE
from memrewrite.passes.onnx.reading import read_graph

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

Kernels = Literal["auto", "native", "standard"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Provider = str | tuple[str, Mapping[str, Any]]

log = logging.getLogger("memrewrite")


def onnx_session(
    path: str | Path,
    providers: Sequence[Provider] = (CPU,),
    *,
    op: Kernels = "auto",
    library: str | Path | None = None,
    options: SessionOptions | None = None,
) -> InferenceSession:
    """Open an exported file in ONNX Runtime. Unlike `onnxruntime.InferenceSession`, it never falls back to another provider.

    Args:
        path: The ONNX file; a file of weights must be next to it.
        providers: Execution providers as for `onnxruntime.InferenceSession`; the session runs on the first one.
        op: Which kernels run the memory operators: "native" those of the native library, for the operators that it has,
            "standard" the functions of standard operators in the file. "auto" uses the library if it is built and has kernels
            for the provider.
        library: The native library; if None, the one that `memrewrite build-op` built.
        options: Session options. The library is registered with them, so use them for one session only.

    Returns:
        The session. Its `memory_kernels` maps each memory operator of the file to "native" or "standard"; the log has the same.

    Raises:
        ExportError: onnxruntime is not installed or has no such provider, the provider does not start, the file or the library
            is missing, damaged or cannot be loaded, the file has no functions and no library can run its operators, or it is
            not data alone: weights outside of its directory, nodes that run code, functions that call themselves.
    """
    provider = first_of(providers)
    _require_provider(provider, path)
    operators, has_functions = _memory_operators(Path(path))
    native = _library(library, provider, op) if operators and op != "standard" else None
    if operators and native is None and not has_functions:
        hint = "memrewrite build-op, or export with --op both"
        raise ExportError("the file's memory operators have no functions: they need the library", where=str(path), hint=hint)
    session = _opened(path, providers, native, options)
    session.memory_kernels = {}
    for name, count in operators.items():
        by_library = native is not None and name in NATIVE
        session.memory_kernels[name] = "native" if by_library else "standard"
        kernel = f"the native kernel of {native.name}" if native and by_library else "its function of standard operators"
        log.info("%s (%d nodes) runs on %s by %s", name, count, provider, kernel)
    return session


def _require_provider(provider: str, path: str | Path) -> None:
    """Raise `ExportError` if onnxruntime is not installed or has no such provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"running ONNX needs onnxruntime ({error})", hint="pip install 'memrewrite[onnx-cpu]'") from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        what = f"this onnxruntime has no {provider}: it has {', '.join(available)}"
        hint = "for CUDA: pip uninstall onnxruntime, then pip install 'memrewrite[onnx-gpu]'; or request another provider"
        raise ExportError(what, where=str(path), hint=hint)


def _opened(
    path: str | Path, providers: Sequence[Provider], native: Path | None, options: SessionOptions | None
) -> InferenceSession:
    """A session that runs on the first of `providers`. Raises `ExportError` if file, library or provider cannot be loaded."""
    import onnxruntime

    settings = options or onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked, whatever the file's name
    if native is not None:
        try:
            settings.register_custom_ops_library(os.fspath(native))
        except Exception as error:  # onnxruntime has a class of exception for every kind of damage
            what = f"onnxruntime cannot load the native library: {in_one_line(error, kind=False)}"
            raise ExportError(what, where=str(native), hint=BUILD_AGAIN) from error
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), settings, providers=list(providers))
    except Exception as error:  # onnxruntime has a class of exception for every kind of damage
        raise ExportError(
            f"onnxruntime cannot load the file: {in_one_line(error, kind=False)}", where=str(path), hint="export it again"
        ) from error
    used = session.get_providers()[0]
    if used != first_of(providers):
        what = f"{first_of(providers)} did not start: onnxruntime fell back to {used}"
        raise ExportError(what, where=str(path), hint="see onnxruntime's log above: a library of that provider is missing")
    return session


def first_of(providers: Sequence[Provider]) -> str:
    """The name of the provider that runs the file. Raises `ExportError` if `providers` is empty."""
    if not providers:
        raise ExportError("no execution provider was requested", hint=f"providers=[{CPU!r}]")
    return providers[0] if isinstance(providers[0], str) else providers[0][0]


def calls_of(library: Path, operator: str, provider: str = CPU) -> int:
    """How many times the native kernel of `operator` has run on `provider` in this process."""
    counter = _loaded(library).memrewrite_calls
    counter.restype, counter.argtypes = ctypes.c_int64, (ctypes.c_char_p, ctypes.c_char_p)
    return int(counter(operator.encode(), provider.encode()))


def _memory_operators(path: Path) -> tuple[dict[str, int], bool]:
    """The number of nodes of each memory operator in a file, and whether it contains functions for all of them."""
    model = read_graph(path)
    names = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    functions = {function.name for function in model.functions if function.domain == DOMAIN}
    return {name: names.count(name) for name in dict.fromkeys(names)}, set(names) <= functions


def unserved(library: Path | None, provider: str) -> str:
    """Why native kernels cannot run on `provider`, or "". Raises `ExportError` if it is missing or cannot be loaded."""
    if library is None:
        return "the native library is not built (memrewrite build-op)"
    if not library.exists():
        raise ExportError(f"there is no library {str(library)!r}", hint="memrewrite build-op")
    _require_intact(library)
    if provider == CUDA and not _loaded(library).memrewrite_has_cuda():
        return "the native library was built without CUDA kernels"
    return "" if provider in (CPU, CUDA) else f"the native library has no kernels for {provider}"


def _require_intact(library: Path) -> None:
    """Raise `ExportError` if the file is not as `build-op` wrote it: loading a file that was cut short ends the process."""
    why = damage(library)
    if why is not None:
        raise ExportError(f"the native library is damaged: {why}", where=str(library), hint=BUILD_AGAIN)


def _loaded(library: Path) -> ctypes.CDLL:
    _require_intact(library)
    try:
        return ctypes.CDLL(os.fspath(library.resolve()))
    except OSError as error:
        raise ExportError(f"the native library cannot be loaded: {error}", where=str(library), hint=BUILD_AGAIN) from error


def _library(given: str | Path | None, provider: str, op: Kernels) -> Path | None:
    """The library to register, or None if it has no kernels for the provider, so that the functions run."""
    library = built_library() if given is None else Path(given)
    why = unserved(library, provider)
    if not why and library is not None:
        return library.resolve()
    if op == "native":
        raise ExportError(why, hint='build it, with nvcc for CUDA; or op="standard"')
    log.warning("memory operators run as functions of standard operators: %s", why)
    return None
