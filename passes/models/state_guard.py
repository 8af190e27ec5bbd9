"""Forwards without side effects: the state of a module tree and the RNG states are restored, bit for bit.

A forward in train mode may mutate state: batch norms update statistics, some models count steps or change their own weights.
Flow: copy buffers and remember attributes → during forwards, copy every storage before an op mutates it → restore all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memrewrite.passes.models.forward import SEED


class StateGuard:
    """The state of a module tree at construction: every attribute, mode and tensor.

    Buffers are copied at once: kernels of norms mutate them although their op schemas do not declare it. All other tensors are
    copied just before they are mutated.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensors = _tensors_in(model)
        self.aliases = [(tensor, tensor.data) for tensor in tensors]  # `tensor.data = other` gives a tensor another storage
        self.copies = _Copies({s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)})
        for buffer in model.buffers():
            self.copies.keep(buffer)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Context manager: forwards of the tree as it is now may run inside; their changes to its state are undone on exit."""
        restorers = [_attribute_restorer(module) for module in self.model.modules()]
        try:
            with self.copies:
                yield
        finally:
            for restore in restorers:
                restore()
            for tensor, alias in self.aliases:
                if tensor.untyped_storage()._cdata != alias.untyped_storage()._cdata:
                    tensor.data = alias
            self.copies.restore()


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[StateGuard]:
    """Context manager: every module is in train mode inside; all attributes and modes are restored on exit."""
    restorers = [_attribute_restorer(module) for module in model.modules()]
    guard = StateGuard(model)
    try:
        for module in model.modules():
            module.training = True
        yield guard
    finally:
        for restore in restorers:
            restore()


@contextmanager
def seeded() -> Iterator[None]:
    """Context manager: fixed seeds for Python's and NumPy's RNGs, as `run` does for torch's; restores both states on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _tensors_in(model: nn.Module) -> list[Tensor]:
    """Every strided tensor with values that the modules contain: parameters, buffers, and plain attributes."""
    attributes = [leaf for module in model.modules() for value in vars(module).values() for leaf in _shallow(value)]
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in attributes if isinstance(leaf, Tensor))]
    return [tensor for tensor in dict.fromkeys(tensors) if not tensor.is_meta and tensor.layout == torch.strided]


def _shallow(value: Any) -> list[Any]:
    return tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else []


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, copies a watched storage before an op mutates it."""

    def __init__(self, watched: Mapping[int, UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.copies: dict[int, UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    mutated = args[number] if number < len(args) else kwargs.get(argument.name)
                    for leaf in tree_leaves(mutated):
                        self.keep(leaf)
        return func(*args, **kwargs)

    def keep(self, value: Any) -> None:
        """Copy a tensor's storage if it is watched and was not copied before."""
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.layout == torch.strided:
            storage = value.untyped_storage()
            if storage._cdata in self.watched and storage._cdata not in self.copies:
                self.copies[storage._cdata] = storage.clone()

    def restore(self) -> None:
        """Write the copies back where the bits changed; other storages may be in read-only memory."""
        for key, copy in self.copies.items():
            if not torch.equal(_bytes(self.watched[key]), _bytes(copy)):
                self.watched[key].copy_(copy)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _attribute_restorer(module: nn.Module) -> Callable[[], None]:
    """A function that restores the module's attributes as they are now, and the content of its dicts, lists and sets."""
    before = dict(vars(module))
    inside = [(value, value.copy()) for value in before.values() if isinstance(value, (dict, list, set))]

    def restore() -> None:
        now = vars(module)
        for name in now.keys() - before.keys():
            del now[name]
        now.update(before)
        for value, copy in inside:
            if isinstance(value, list):
                value[:] = copy
            else:
                value.clear()
                value.update(copy)

    return restore
