"""Changes of a module tree that can be undone until they are committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from memrewrite.errors import SelectError
from memrewrite.layers.replaced import Replacement
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.rewrite.hooks import ZeroStub


class UndoLog:
    """How to undo the changes of a module tree, newest last; `revert` restores the tree, bit for bit."""

    def __init__(self, hosts: Mapping[str, GraphHost] | None = None, stub: type[ZeroStub] = ZeroStub) -> None:
        self.hosts = hosts or {}  # the modules whose forward becomes a graph, by path
        self.stub = stub  # what replaces the first modules of a replaced MLP
        self.layers: dict[str, nn.Module] = {}  # by site path
        self._undo: list[Callable[[], object]] = []

    def done(self, undo: Callable[[], object]) -> None:
        """Add a function that undoes the last change."""
        self._undo.append(undo)

    def revert(self) -> None:
        """Undo every change, newest first."""
        while self._undo:
            self._undo.pop()()

    def commit(self) -> None:
        """Keep the changes: drops the undo log, and with it the last references to the replaced modules."""
        self._undo.clear()


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Raises `SelectError` when the model has none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SelectError(
            f"the model has no module {path!r}",
            where=str(error),
            hint="the plan was made for another model: plan again",
        ) from error


def hooked(handle: Any, edit: UndoLog) -> None:
    """Add the removal of a hook to the log."""
    edit.done(handle.remove)


def swap(model: nn.Module, old: nn.Module, new: nn.Module, edit: UndoLog) -> None:
    """Put `new` in the place of `old` under every name: one module may be registered several times."""
    if isinstance(new, Replacement):
        new.expose(old)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
                edit.done(lambda parent=parent, name=name: setattr(parent, name, old))  # type: ignore[misc]
