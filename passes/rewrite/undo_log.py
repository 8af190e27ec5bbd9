"""Changes of a module tree that can be undone until they are committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from memrewrite.errors import SelectError
from memrewrite.passes.rewrite.graph_host import GraphHost


class UndoLog:
    """What was changed in a module tree, newest last; `revert` brings the old tree back, bit for bit."""

    def __init__(self, hosts: Mapping[str, GraphHost] | None = None) -> None:
        self.hosts = hosts or {}  # the modules that become graphs, by path
        self.layers: dict[str, nn.Module] = {}  # by site path
        self._undo: list[Callable[[], object]] = []

    def done(self, undo: Callable[[], object]) -> None:
        """Note how the last change is undone."""
        self._undo.append(undo)

    def revert(self) -> None:
        """Undo every change, newest first."""
        while self._undo:
            self._undo.pop()()

    def commit(self) -> None:
        """Keep the changes: the replaced modules are let go of, and their memory with them."""
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
    """Note the removal of a hook."""
    edit.done(handle.remove)


def swap(model: nn.Module, old: nn.Module, new: nn.Module, edit: UndoLog) -> None:
    """Put `new` wherever `old` hangs: one module may be reached by several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
                edit.done(lambda parent=parent, name=name: setattr(parent, name, old))  # type: ignore[misc]
