"""Loads the native library for torch: the functions of `cpu/exports.cpp`, which run on torch's threads."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from memrewrite.kernels import native_library

log = logging.getLogger("memrewrite.kernels")


@lru_cache(maxsize=1)
def loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none. A library that is there but cannot be used is also a warning, once."""
    path = native_library.built_library()
    if path is None:
        return None, "it is not built: run `memrewrite build-op`"
    found, reason = _opened(path)
    if reason is not None:
        log.warning("the native kernels are not used: %s", reason)
    return found, reason


def _opened(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    damage = native_library.damage(path)
    if damage is not None:
        return None, f"{path} is damaged ({damage}); {native_library.BUILD_AGAIN}"
    try:
        found = ctypes.CDLL(str(path))
        for name, arguments in _FUNCTIONS.items():
            function = found[name]
            function.argtypes, function.restype = arguments, ctypes.c_int64
            setattr(found, name, function)
        found.memrewrite_use_threads(_torch_threads())
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}); {native_library.BUILD_AGAIN}"
    return found, None


def _torch_threads() -> ctypes.c_void_p:
    """Address of the function of torch's stable C interface that runs a loop on torch's threads (torch 2.10 and later)."""
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(torch_library.torch_parallel_for, ctypes.c_void_p)


_BYTES, _POINTER, _NUMBER = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, list[Any]] = {
    "memrewrite_use_threads": [_POINTER],
    "memrewrite_lookup": [_BYTES, _POINTER],
    "memrewrite_lookup_dots": [_BYTES, _POINTER],
    "memrewrite_lookup_scatter": [_BYTES, _BYTES, _POINTER],
    "memrewrite_lookup_rows": [_BYTES, _POINTER, _BYTES, _NUMBER, _POINTER],
    "memrewrite_update": [_BYTES, _POINTER],
    "memrewrite_topk": [_NUMBER, *[_POINTER] * 4, *[_NUMBER] * 5],
    "memrewrite_topk_gradient": [_BYTES, _POINTER],
}


def library() -> ctypes.CDLL:
    """The library. Raises RuntimeError if there is none."""
    found, reason = loaded()
    if found is None:
        raise RuntimeError(f"native: {reason}")
    return found
