"""Loads the native library for torch: the functions of `cpu/exports.cpp`, which run on torch's threads; and their structs."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels import native_library

log = logging.getLogger("memrewrite.kernels")

# The types and structs of `cpu/kernels.h`.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
READS = Struct("5q")
PART = Struct("7q")
FLOATS = Struct("2q")
_OUTSIDE, _NO_MEMORY = 1, 2


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


def check(op: str, result: int, found: ctypes.c_int64 | None, size: int, what: str = "a table of {} slots") -> None:
    """Raise what a kernel reports to the operator `op`: IndexError, with none or a part of the outputs written; MemoryError."""
    if result == _OUTSIDE and found is not None:
        raise IndexError(f"{op}: index {found.value} is out of range for {what.format(size)}")
    if result == _NO_MEMORY:
        raise MemoryError(f"{op}: the native kernel has no memory for the reads of a lookup")


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def floats(tensor: Tensor | None) -> bytes:
    """The struct `Floats` of a contiguous tensor; without a tensor its pointer is null."""
    return FLOATS.pack(0, 0) if tensor is None else FLOATS.pack(tensor.data_ptr(), TYPES[tensor.dtype])


class Reads:
    """The struct `Reads`, and the memory that it points to. Gradients of several dtypes, and float64, become float32."""

    def __init__(self, grads: list[Tensor], indices: list[Tensor], weights: list[Tensor], slots: int) -> None:
        same = all(grad.dtype == grads[0].dtype for grad in grads)
        dtype = grads[0].dtype if same and grads[0].dtype in TYPES else torch.float32
        self.slots = slots
        self.tensors = [
            (dense(grad.to(dtype)), dense(index), dense(weight if weight.dtype in TYPES else weight.float()))
            for grad, index, weight in zip(grads, indices, weights, strict=True)
        ]
        self.parts = ctypes.create_string_buffer(
            b"".join(
                PART.pack(
                    grad.data_ptr(),
                    index.data_ptr(),
                    index.dtype == torch.int64,
                    weight.data_ptr(),
                    TYPES[weight.dtype],
                    *index.shape,
                )
                for grad, index, weight in self.tensors
            )
        )
        address = ctypes.addressof(self.parts)
        self.packed = READS.pack(address, len(self.tensors), TYPES[dtype], slots, grads[0].shape[1])
