"""The tensors of a model: their bits, where they are stored, gradients and flags; and their restoration, bit for bit.

Flow: buffers and plain tensors are copied at once → while the mode is entered, the storage of a parameter or a gradient is
copied before an op mutates it → `restore` writes back what changed. A model is not in memory twice, unless it changes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.passes.models.tensors import sparse_parts

HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # dictionaries or None


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """The storage of a tensor's values.

    None for tensors on `meta`, of other layouts, without a shape yet, and of classes that dispatch their operators themselves.
    """
    dispatches = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_lazy(tensor) or dispatches or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.untyped_storage() if tensor.layout == torch.strided and not tensor.is_meta else None


def parts_of(tensor: Any) -> list[object]:
    """What a tensor refers to: its gradient, its hooks, and the tensors that it consists of, if it is no plain one."""
    found: list[object] = [getattr(tensor, name) for name in HOOKS]
    if tensor.is_leaf:
        found.append(tensor.grad)
    if is_traceable_wrapper_subclass(tensor):
        found += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return found
    return [*found, *sparse_parts(tensor)]


class TensorState(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors as they are at construction. While entered, it copies a parameter's storage before an op mutates it.

    All other storages are copied at once: kernels of norms mutate buffers although their op schemas do not declare it.
    A kernel that mutates a parameter without declaring it, or through a pointer, is not noticed.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = list(tensors)
        self.watched: dict[int, UntypedStorage] = {}
        self.copies: dict[int, UntypedStorage] = {}
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                self.watched[storage._cdata] = storage
        large = [t for p in tensors if isinstance(p, nn.Parameter) for t in (p, p.grad if p.is_leaf else None) if t is not None]
        copied_later = {storage._cdata for storage in map(storage_of, large) if storage is not None}
        for key in self.watched.keys() - copied_later:
            self.copies[key] = self.watched[key].clone()  # type: ignore[no-untyped-call]
        self._facts = [partial(_restore_facts, tensor, *_facts(tensor)) for tensor in tensors]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """The mode changes no result: compiled modules run under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op; what it mutates is copied first."""
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    mutated = args[number] if number < len(args) else kwargs.get(argument.name)
                    for leaf in tree_leaves(mutated):
                        self._keep(leaf)
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        storage = storage_of(value) if isinstance(value, Tensor) else None
        if storage is not None and storage._cdata in self.watched and storage._cdata not in self.copies:
            self.copies[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]

    def restorers(self) -> list[Callable[[], None]]:
        """Functions that restore the tensors: where they are stored and their flags, then every storage that has a copy."""
        return [*self._facts, *(partial(_restore_bits, self.watched[key], copy) for key, copy in self.copies.items())]

    def changed(self, tensor: Tensor) -> bool:
        """Whether the bits of a watched tensor are others than at construction."""
        storage = storage_of(tensor)
        copy = None if storage is None else self.copies.get(storage._cdata)
        return storage is not None and copy is not None and not torch.equal(_bytes(storage), _bytes(copy))

    def apart(self, outputs: Any) -> Any:
        """`outputs` with a copy of every tensor whose storage will be restored: it keeps the values that were returned."""

        def copied(leaf: Any) -> Any:
            storage = storage_of(leaf) if isinstance(leaf, Tensor) else None
            return leaf.clone() if storage is not None and storage._cdata in self.copies else leaf

        return tree_map(copied, outputs)


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    plain = storage_of(tensor) is not None
    grad = tensor.grad if tensor.is_leaf else None
    return tensor.data if plain else None, tensor.requires_grad, grad, [getattr(tensor, name) for name in HOOKS]


def _restore_facts(tensor: Tensor, data: Tensor | None, requires_grad: bool, grad: Tensor | None, hooks: list[Any]) -> None:
    if data is not None and _place(tensor) != _place(data):
        tensor.data = data
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad
    for name, before in zip(HOOKS, hooks, strict=True):
        if getattr(tensor, name) is not before:
            setattr(tensor, name, before)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which storage a tensor has: `tensor.data = other` and in-place changes of the shape change it."""
    storage = storage_of(tensor)
    return storage and storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _restore_bits(storage: UntypedStorage, copy: UntypedStorage) -> None:
    """Write a copy back where the bits changed; other storages may be in read-only memory."""
    if storage.nbytes() != copy.nbytes():
        storage.resize_(copy.nbytes())
    if not torch.equal(_bytes(storage), _bytes(copy)):
        storage.copy_(copy)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
