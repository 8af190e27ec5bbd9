"""References from a part of a model to its model and to other modules of it, which are found by name at every use.

Other libraries replace modules of a model: adapters, sharding and quantization put a module of theirs in the place of one of
ours. A reference by name reads what is registered there now; a reference to the object would read what is no longer trained.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn


class ModelReference:
    """A weak reference to the model that contains the object that refers to it.

    A copy of the model refers to the copy. A copy of a part alone refers to the same model: the part has no other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """The model, or None if it does not exist any more."""
        return self._model()

    def copied_in(self, memo: dict[int, Any]) -> bool:
        """True in a deepcopy of the model; False in one of a part that does not contain the model."""
        return id(self._model()) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        model = self._model()
        return self if model is None else ModelReference(memo.get(id(model), model))

    def __getstate__(self) -> dict[str, nn.Module | None]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, nn.Module | None]) -> None:
        self._model = _dead if state["model"] is None else weakref.ref(state["model"])  # type: ignore[assignment]


class ModuleAt:
    """The module that is registered at a path of a model at the time of the call.

    Args:
        model: The model, or the part of it at which the path begins. It is not kept alive.
        path: Names of attributes. The module at the first is kept alive, and used when the model does not exist any more: a
            part of a model can be used alone. Without names, the reference is to `model` itself, which is kept alive.
        within: The whole model: where this is copied, the reference is to the copy; elsewhere to the same module. Default:
            `model`. Where there are no names, always to the copy.

    Raises:
        AttributeError: There is no module at the path.
    """

    def __init__(self, model: nn.Module, *path: str, within: nn.Module | None = None) -> None:
        self._model, self._path = ModelReference(model), path
        self._within = ModelReference(within or model)
        self._first: nn.Module = _child(model, path[0]) if path else model
        self()  # raises

    def __call__(self) -> Any:
        """The module. Raises `AttributeError` if none is registered there now."""
        model = self._model()
        module = self._first if model is None or not self._path else _child(model, self._path[0])
        for name in self._path[1:]:
            module = _child(module, name)
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleAt:
        model = self._model()
        if self._path and model is not None and not self._within.copied_in(memo):
            return self
        copied = memo[id(self)] = object.__new__(ModuleAt)
        copied._path, copied._within = self._path, copy.deepcopy(self._within, memo)
        copied._model = self._model if model is None else ModelReference(copy.deepcopy(model, memo))
        copied._first = copy.deepcopy(self._first, memo)
        return copied


def _child(module: nn.Module, name: str) -> nn.Module:
    """The child of that name; of a module that forwards attributes to one that it wraps, a child of that.

    Registered children are not read as attributes, of which torch.export makes proxies.
    """
    child = module._modules.get(name)
    found: nn.Module = getattr(module, name) if child is None else child
    return found


def _dead() -> None:
    """What a weak reference returns when its object does not exist any more."""
