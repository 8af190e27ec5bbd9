"""Records by hooks how every module of a model is called in one forward.

Flow: hooks on every module → one forward → `calls` for each path (which argument is the tensor, output shapes), and the inputs
of the first call of each repeated block, with which the block can be exported separately.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.jit._script import RecursiveScriptModule
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.passes.models.block_stacks import outermost_lists
from memrewrite.passes.models.forward import Inputs


@dataclass(frozen=True)
class Call:
    """How a module was called once.

    `takes`: the position or keyword of its only tensor argument; integer tensors are not counted where there is also a
    floating-point or complex one. None when there is none or several. `alone`: it is the only argument. `gives`: the shapes of
    the outputs (None for what is no tensor). `returns`: the length of a returned tuple; None for a tensor.
    """

    takes: int | str | None
    alone: bool
    gives: tuple[tuple[int, ...] | None, ...]
    returns: int | None


class Recorder:
    """While entered, records every call of every module, and the first inputs of repeated blocks and of the paths `also`."""

    def __init__(self, model: nn.Module, also: Collection[str] = ()) -> None:
        self.model, self.also = model, frozenset(also)
        self.calls: dict[str, tuple[Call, ...]] = {}
        self.block_inputs: dict[str, Inputs] = {}

    def __enter__(self) -> Recorder:
        self.calls.clear()  # a second forward starts from nothing: the first may have failed half way
        self.block_inputs.clear()
        lists = {path for path, _ in outermost_lists(self.model)}
        with ExitStack() as hooks:  # removes them where one of them cannot be registered
            for path, module in hookable_modules(self.model):
                hooks.callback(module.register_forward_hook(self._call_hook(path), with_kwargs=True).remove)
                if path.rpartition(".")[0] in lists or path in self.also:
                    hooks.callback(module.register_forward_pre_hook(self._inputs_hook(path), with_kwargs=True).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _call_hook(self, path: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.calls[path] = (*self.calls.get(path, ()), _call(args, kwargs, out))

        return record

    def _inputs_hook(self, path: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in self.block_inputs:
                self.block_inputs[path] = tree_map(_copied, (args, kwargs))

        return record


def hookable_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by all of its paths, without those of TorchScript: they run outside of Python, and refuse hooks."""
    named = model.named_modules(remove_duplicate=False)
    return [(path, module) for path, module in named if not isinstance(module, RecursiveScriptModule)]


def _copied(leaf: Any) -> Any:
    """A copy of a tensor, because a block may mutate its input. Tensors without values (on `meta`, traced) stay as they are."""
    return leaf.detach().clone() if type(leaf) in (torch.Tensor, nn.Parameter) and not leaf.is_meta else leaf


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call:
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    features = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    only = tensors if len(tensors) == 1 else features  # integer tensors are token ids or positions
    takes = next((key for key, value in arguments if value is only[0]), None) if len(only) == 1 else None
    items = out if isinstance(out, (tuple, list)) else (out,)
    gives = tuple(tuple(t.shape) if isinstance(t, torch.Tensor) and not t.is_nested else None for t in items)
    return Call(takes, len(arguments) == 1, gives, None if isinstance(out, torch.Tensor) else len(items))
