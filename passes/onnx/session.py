"""`onnx_session`: an exported file in ONNX Runtime, on the provider that was asked for and with the kernels it says.

Flow: which memory operators the file holds → whether the native library serves this provider → a session, whose provider is
held against the wish.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memrewrite.errors import ExportError, in_a_line
from memrewrite.kernels.onnx_functions import DOMAIN
from memrewrite.passes.onnx.file import read_graph
from memrewrite.passes.onnx.native_library import built_library

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

Route = Literal["auto", "native", "standard"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Provider = str | tuple[str, Mapping[str, Any]]

log = logging.getLogger("memrewrite")


def onnx_session(
    path: str | Path,
    providers: Sequence[Provider] = (CPU,),
    *,
    op: Route = "auto",
    library: str | Path | None = None,
    options: SessionOptions | None = None,
) -> InferenceSession:
    """An `onnxruntime.InferenceSession` of `path`, whose first provider is the first of `providers`, or an error.

    `op`: "native" runs the memory operators by the kernels of `library` (left out: the one that `memrewrite build-op`
    built), "standard" by the functions in the file; "auto" takes the library where it is built and has kernels for the
    provider. Which it was is logged, and is `session.memory_kernels`: operator → "native" or "standard". `options` are
    registered with the library, so they serve one session. Raises `ExportError`: no such file, provider, library or
    function; a provider that does not come up.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"running ONNX needs onnxruntime ({error})", hint="pip install 'memrewrite[onnx-cpu]'") from error
    wanted = first_of(providers)
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        what = f"this onnxruntime has no {wanted}: it has {', '.join(available)}"
        hint = "for CUDA: pip uninstall onnxruntime, then pip install 'memrewrite[onnx-gpu]'; or request another provider"
        raise ExportError(what, where=str(path), hint=hint)
    used, has_functions = _memory_operators(Path(path))
    native = _library(library, wanted, op) if used and op != "standard" else None
    if used and native is None and not has_functions:
        hint = "memrewrite build-op, or export with --op both"
        raise ExportError("the file's memory operators have no functions: they need the library", where=str(path), hint=hint)
    settings = options or onnxruntime.SessionOptions()
    try:
        if native is not None:
            settings.register_custom_ops_library(os.fspath(native))
        session = onnxruntime.InferenceSession(os.fspath(path), settings, providers=list(providers))
    except Exception as error:  # onnxruntime has a class of exception for every kind of damage
        raise ExportError(
            f"onnxruntime cannot load the file: {in_a_line(error)}", where=str(path), hint="export it again"
        ) from error
    if session.get_providers()[0] != wanted:
        what = f"{wanted} did not come up: onnxruntime fell back to {session.get_providers()[0]}"
        raise ExportError(what, where=str(path), hint="look at onnxruntime's log above: a library of that provider is missing")
    session.memory_kernels = dict.fromkeys(used, "standard" if native is None else "native")
    for name, count in used.items():
        which = "its function of standard operators" if native is None else f"the native kernel of {native.name}"
        log.info("%s (%d nodes) runs on %s by %s", name, count, wanted, which)
    return session


def first_of(providers: Sequence[Provider]) -> str:
    """The name of the provider that is to run the file. Raises `ExportError` for none."""
    if not providers:
        raise ExportError("no execution provider was asked for", hint=f"providers=[{CPU!r}]")
    return providers[0] if isinstance(providers[0], str) else providers[0][0]


def calls_of(library: Path, operator: str, provider: str = CPU) -> int:
    """How often the native kernel of `operator` has run on `provider` in this process."""
    counter = _loaded(library).memrewrite_calls
    counter.restype, counter.argtypes = ctypes.c_int64, (ctypes.c_char_p, ctypes.c_char_p)
    return int(counter(operator.encode(), provider.encode()))


def _memory_operators(path: Path) -> tuple[dict[str, int], bool]:
    """The memory operators of a file, counted, and whether it holds functions for them."""
    model = read_graph(path)
    names = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    functions = {function.name for function in model.functions if function.domain == DOMAIN}
    return {name: names.count(name) for name in dict.fromkeys(names)}, set(names) <= functions


def unserved(library: Path | None, provider: str) -> str:
    """Why native kernels cannot run on `provider`, or "". Raises `ExportError` for a library that is none."""
    if library is None:
        return "the native library is not built (memrewrite build-op)"
    if not library.is_file():
        raise ExportError(f"there is no library {str(library)!r}", hint="memrewrite build-op")
    if provider == CUDA and not _loaded(library).memrewrite_has_cuda():
        return "the native library was built without CUDA kernels"
    return "" if provider in (CPU, CUDA) else f"the native library has no kernels for {provider}"


def _loaded(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(os.fspath(library.resolve()))
    except OSError as error:
        raise ExportError(f"the native library cannot be loaded: {error}", hint="memrewrite build-op") from error


def _library(given: str | Path | None, provider: str, op: Route) -> Path | None:
    """The library to register, or None where the functions serve better: they at least run on the provider."""
    library = built_library() if given is None else Path(given)
    why = unserved(library, provider)
    if not why and library is not None:
        return library.resolve()
    if op == "native":
        raise ExportError(why, hint='build it, with nvcc for CUDA; or op="standard"')
    log.warning("memory operators run by their functions of standard operators: %s", why)
    return None
