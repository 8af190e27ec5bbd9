"""Formulas for torch's counter of floating-point operations: it sees an operator, not the matrix product inside.

The module of the counter imports Triton if it is installed; so the formulas are registered when a program imports the counter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memrewrite.kernels.product_keys import reads_keys

COUNTER = "torch.utils.flop_counter"


def forward_flops(queries: Tensor, keys: Tensor, *_: Any, **__: Any) -> int:
    """Operations of the scores in `product_keys`."""
    return 2 * queries.numel() * keys.shape[1]


def backward_flops(
    grad: Tensor, slots: Tensor, queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool, *_: Any, **__: Any
) -> int:
    """Operations of the matrix products in `product_keys_backward`; torch counts no lookups."""
    by_reading = reads_keys(keys.device.type, keys.shape[1], slots.shape[-1], keys.shape[2])
    return 0 if by_reading else (need_queries + need_keys) * forward_flops(queries, keys)


def dots_flops(values: Tensor, indices: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    """Operations of `sparse_dots`: per token, the product with a gathered matrix [K, D], which torch counts as a `bmm`."""
    return 2 * indices.numel() * x.shape[1]


def register_when_imported() -> None:
    """Register the formulas, now or when the counter is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Watch())


def _register(counter: ModuleType) -> None:
    memory = torch.ops.memrewrite
    counter.register_flop_formula(memory.product_keys, get_raw=True)(forward_flops)
    counter.register_flop_formula(memory.product_keys_backward, get_raw=True)(backward_flops)
    counter.register_flop_formula(memory.sparse_dots, get_raw=True)(dots_flops)


class _Watch(MetaPathFinder):
    """Finds the counter's module as any import does, once, and registers the formulas after it was executed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
