"""How every module is called, recorded by hooks in one forward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.passes.models.block_stacks import outermost_lists
from memrewrite.passes.models.forward import Inputs


@dataclass(frozen=True)
class Call:
    """How a module was called once.

    `takes` is the position or the keyword of its only tensor, or of the only one beside numbers of tokens (None when it has
    none or several), `alone` says that it was given nothing else. `gives` are the shapes of what it returned; `returns`
    counts the items of a tuple, None for a tensor.
    """

    takes: int | str | None
    alone: bool
    gives: tuple[tuple[int, ...] | None, ...]
    returns: int | None


class Recorder:
    """While entered, notes how every module of a model is called, and the first inputs of repeated blocks and of `also`."""

    def __init__(self, model: nn.Module, also: Collection[str] = ()) -> None:
        self.model, self.also = model, frozenset(also)
        self.calls: dict[str, tuple[Call, ...]] = {}
        self.block_inputs: dict[str, Inputs] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self.calls.clear()  # a second forward is not added to a first that failed half way
        self.block_inputs.clear()
        lists = {path for path, _ in outermost_lists(self.model)}
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._handles.append(module.register_forward_hook(self._noting(path), with_kwargs=True))
            if path.rpartition(".")[0] in lists or path in self.also:
                self._handles.append(module.register_forward_pre_hook(self._keeping(path), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _noting(self, path: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.calls[path] = (*self.calls.get(path, ()), _call(args, kwargs, out))

        return note

    def _keeping(self, path: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in self.block_inputs:
                self.block_inputs[path] = tree_map(_kept, (args, kwargs))

        return keep


def _kept(leaf: Any) -> Any:
    """A tensor as it is now, for a block may write into its input. While tracing there are no values to keep."""
    return leaf.detach().clone() if type(leaf) in (torch.Tensor, nn.Parameter) and not leaf.is_meta else leaf


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call:
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    features = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    only = tensors if len(tensors) == 1 else features  # beside numbers of tokens
    takes = next((key for key, value in given if value is only[0]), None) if len(only) == 1 else None
    items = out if isinstance(out, (tuple, list)) else (out,)
    gives = tuple(tuple(t.shape) if isinstance(t, torch.Tensor) and not t.is_nested else None for t in items)
    return Call(takes, len(given) == 1, gives, None if isinstance(out, torch.Tensor) else len(items))
