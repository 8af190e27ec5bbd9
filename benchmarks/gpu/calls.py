"""The forward of a backend with the operator's default dtype, and the launches of Triton kernels inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Launch = tuple[str, tuple[tuple[str, str], ...]]  # name of a kernel, and everything that selects its machine code


def forward(
    kernels: Any,
    values: Tensor,
    indices: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[T, D] in `dtype`; default: the dtype of the values, with `scale` (8-bit values) that of the weights."""
    dtype = dtype or (values.dtype if scale is None else weights.dtype)
    out: Tensor = kernels.forward(values, indices, weights, scale, dtype)
    return out


@contextmanager
def recorded(*, launch: bool = True) -> Iterator[set[Launch]]:
    """Context manager: the set of the package's kernels that are launched inside. With `launch=False`, no kernel runs.

    Two launches are equal if kernel, constants, options and the types of all arguments are: then the machine code is the same,
    except for what Triton derives from single numbers (divisibility by 16).
    """
    from triton.runtime.jit import KernelInterface

    seen: set[Launch] = set()
    plain = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Any:
        start = plain(kernel, grid)

        def run(*args: Any, **options: Any) -> Any:
            if kernel.fn.__module__.startswith("memrewrite."):
                named = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
                seen.add((kernel.fn.__name__, tuple(sorted((name, _kind(name, value)) for name, value in named.items()))))
            return start(*args, **options) if launch else None

        return run

    KernelInterface.__getitem__ = getitem
    try:
        yield seen
    finally:
        KernelInterface.__getitem__ = plain


def _kind(name: str, value: Any) -> str:
    """What of an argument selects the code: the dtype of a tensor, the value of a constant (in capitals) or an option."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if value is None or isinstance(value, (bool, str)) or name.upper() == name or name in OPTIONS:
        return str(value)
    return type(value).__name__


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def text(launch: Launch) -> str:
    """A launch in one line, for messages."""
    name, constants = launch
    return f"{name}({', '.join(f'{key}={value}' for key, value in constants)})"


def poison(tensor: Tensor) -> Tensor:
    """The tensor, filled with NaN; 8-bit floats too."""
    if tensor.itemsize == 1:
        tensor.view(torch.uint8).fill_(0x7F)
        return tensor
    return tensor.fill_(torch.nan)
