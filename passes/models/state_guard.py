"""Forwards that leave no trace: what a module tree holds is put back, bit for bit, and so are the sources of random numbers.

Train-mode forwards write: batch norms count, steps are numbered, some models turn their own weights.
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
    """What a module tree held when this was made: every attribute and mode, every tensor, every bit.

    Buffers are copied at once: kernels of norms write to them unannounced. Everything else is copied when it is written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        held = _held(model)
        self.aliases = [(tensor, tensor.data) for tensor in held]  # `tensor.data = other` gives a tensor another storage
        self.copies = _Copies({s._cdata: s for s in (tensor.untyped_storage() for tensor in held)})
        for buffer in model.buffers():
            self.copies.keep(buffer)

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Forwards may run inside, of the tree as it is now; what they leave in it is put back."""
        attributes = [_kept_attributes(module) for module in self.model.modules()]
        try:
            with self.copies:
                yield
        finally:
            for put_back in attributes:
                put_back()
            for tensor, alias in self.aliases:
                if tensor.untyped_storage()._cdata != alias.untyped_storage()._cdata:
                    tensor.data = alias
            self.copies.put_back()


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[StateGuard]:
    """Every module in train mode, and whatever happens to attributes and modes inside, they are afterwards as they were."""
    attributes = [_kept_attributes(module) for module in model.modules()]
    kept = StateGuard(model)
    try:
        for module in model.modules():
            module.training = True
        yield kept
    finally:
        for put_back in attributes:
            put_back()


@contextmanager
def seeded() -> Iterator[None]:
    """Python's and NumPy's random numbers from a fixed seed, as `run` does with torch's; the caller's go on afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _held(model: nn.Module) -> list[Tensor]:
    """Every tensor the modules hold with values of its own: parameters, buffers, and attributes that are neither."""
    attributes = [leaf for module in model.modules() for value in vars(module).values() for leaf in _shallow(value)]
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in attributes if isinstance(leaf, Tensor))]
    return [tensor for tensor in dict.fromkeys(tensors) if not tensor.is_meta and tensor.layout == torch.strided]


def _shallow(value: Any) -> list[Any]:
    return tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else []


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, copies a watched storage before an op writes to it."""

    def __init__(self, watched: Mapping[int, UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.copies: dict[int, UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[number] if number < len(args) else kwargs.get(argument.name)
                    for leaf in tree_leaves(written):
                        self.keep(leaf)
        return func(*args, **kwargs)

    def keep(self, value: Any) -> None:
        """Copy a tensor's storage, when it is watched and was not copied yet."""
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta and value.layout == torch.strided:
            storage = value.untyped_storage()
            if storage._cdata in self.watched and storage._cdata not in self.copies:
                self.copies[storage._cdata] = storage.clone()

    def put_back(self) -> None:
        """Give every storage that was written to its bits again; others may lie in memory that only can be read."""
        for key, copy in self.copies.items():
            if not torch.equal(_bytes(self.watched[key]), _bytes(copy)):
                self.watched[key].copy_(copy)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _kept_attributes(module: nn.Module) -> Callable[[], None]:
    """How a module gets its attributes back, those in its dicts and lists too."""
    before = dict(vars(module))
    inside = [(value, value.copy()) for value in before.values() if isinstance(value, (dict, list, set))]

    def put_back() -> None:
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

    return put_back
