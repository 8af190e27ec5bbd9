"""Python objects that are reachable from a model: modules, containers, instances of the user's classes; and their restoration.

Flow: `reachable` walks attributes, slots and elements, from the model's root and the global hooks of all modules → `restorers`
keeps a shallow copy of each object that was found → calling them restores class, attributes and elements by identity.

Not reached: variables of functions (closures, globals), attributes of classes, iterators, and objects of the standard library,
of torch and of NumPy other than those in `_restorer`.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from memrewrite.passes.models.process_state import Restorer
from memrewrite.passes.models.tensor_state import parts_of

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType})
CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
RECORDS = (types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList)
FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "functorch", "numpy", "memrewrite"})  # not descended into
MISSING = object()
Answer = TypeVar("Answer")


def reachable(roots: Iterable[object]) -> list[object]:
    """Every object with a state of its own that can be reached from `roots`, each once; tensors are among them."""
    found: list[object] = []
    seen: set[int] = set()
    pending = [*roots, *_global_hooks()]
    while pending:
        value = pending.pop()
        if type(value) not in ATOMS and id(value) not in seen:
            seen.add(id(value))
            found.append(value)
            pending.extend(_children(value))
    return found


def restorers(objects: Iterable[object]) -> list[Restorer]:
    """Functions that restore the objects as they are now."""
    return [restore for value in objects for restore in _restorers(value)]


def _by_class(answer: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """`answer` with a memory: a model has thousands of objects, of few classes."""
    return lru_cache(maxsize=1024)(answer)


def _global_hooks() -> list[object]:
    """The dictionaries of the hooks that torch calls for every module."""
    module = torch.nn.modules.module
    return [value for name, value in vars(module).items() if name.startswith("_global_") and isinstance(value, dict)]


def _children(value: Any) -> Iterator[object]:
    if isinstance(value, dict):
        yield from dict.values(value)
    elif isinstance(value, CONTAINERS):
        yield from value
    elif isinstance(value, Tensor):
        yield from parts_of(value)
    if _has_attributes(type(value)):
        yield from vars_of(value).values()
        yield from (found for _, found in _slot_values(value))
    if isinstance(value, torch.jit.ScriptModule):
        yield from value._modules.values()
        yield from _script_attributes(value).values()


@_by_class
def _has_attributes(kind: Any) -> bool:
    """Whether instances have attributes to restore: modules, tensors, and classes that are not `FOREIGN`."""
    if issubclass(kind, (nn.Module, Tensor, *RECORDS)):
        return True
    return not issubclass(kind, (type, types.ModuleType)) and kind.__module__.partition(".")[0] not in FOREIGN


def vars_of(value: object) -> dict[str, Any]:
    """The attributes of an instance, whatever its class makes of `__getattribute__`; {} where it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


@_by_class
def _slots(kind: Any) -> tuple[Any, ...]:
    classes = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(v for names in classes for v in names.values() if isinstance(v, types.MemberDescriptorType))


def _slot_values(value: Any) -> list[tuple[Any, object]]:
    """The slots of an instance and what they have; `MISSING` for an empty one."""
    return [(slot, _slot_value(value, slot)) for slot in _slots(type(value))]


def _slot_value(value: object, slot: Any) -> object:
    try:
        return slot.__get__(value)
    except AttributeError:
        return MISSING


# ------------------------------------------------------------------------------------------------------- restoration


def _restorers(value: Any) -> list[Restorer]:
    found: list[Restorer] = []
    if _has_attributes(type(value)):
        attributes = vars_of(value)
        found.append(partial(_restore_attributes, value, type(value), attributes, dict(attributes)))
        found += [partial(_restore_slot, value, slot, before) for slot, before in _slot_values(value)]
    if isinstance(value, torch.jit.ScriptModule):
        found.append(partial(_restore_script, value, _script_attributes(value)))
    inside = _restorer(value)
    return [*found, inside] if inside else found


def _restorer(value: Any) -> Restorer | None:
    """A function that restores the elements of a container, or the state of a generator of random numbers."""
    if isinstance(value, dict):
        kind = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict  # not the class's own methods
        return partial(_restore_dict, value, kind, list(kind.items(value)))
    if isinstance(value, (list, collections.deque)):
        return partial(_restore_sequence, value, list(value))
    if isinstance(value, set):
        return partial(_restore_set, value, set(value))
    if isinstance(value, bytearray):
        return partial(value.__setitem__, slice(None), bytes(value))
    if isinstance(value, np.ndarray):
        return partial(_restore_array, value, value.copy())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _restore_attributes(value: object, kind: type, now: dict[str, Any], before: dict[str, Any]) -> None:
    if type(value) is not kind:
        object.__setattr__(value, "__class__", kind)
    if not _same(now.items(), before.items()):
        now.clear()
        now.update(before)
    if vars_of(value) is not now:  # a forward replaced `__dict__` itself
        object.__setattr__(value, "__dict__", now)


def _restore_slot(value: object, slot: Any, before: object) -> None:
    if before is not MISSING:
        slot.__set__(value, before)
    elif _slot_value(value, slot) is not MISSING:
        slot.__delete__(value)


def _restore_dict(value: Any, kind: Any, before: list[tuple[Any, Any]]) -> None:
    if not _same(kind.items(value), before):
        kind.clear(value)
        for key, item in before:
            kind.__setitem__(value, key, item)


def _restore_sequence(value: Any, before: list[Any]) -> None:
    kind: Any = list if isinstance(value, list) else collections.deque
    if len(value) != len(before) or any(a is not b for a, b in zip(kind.__iter__(value), before, strict=True)):
        kind.clear(value)
        kind.extend(value, before)


def _restore_set(value: Any, before: set[Any]) -> None:
    if set.__ne__(value, before):
        set.clear(value)
        set.update(value, before)


def _restore_array(value: Any, before: Any) -> None:
    if value.shape != before.shape:
        value.resize(before.shape, refcheck=False)
    if value.tobytes() != before.tobytes():
        value[...] = before


def _same(now: Iterable[tuple[Any, Any]], before: Iterable[tuple[Any, Any]]) -> bool:
    """Whether two dictionaries have the same keys in the same order, and the same objects as values."""
    one, other = list(now), list(before)
    return len(one) == len(other) and all(a is c and b is d for (a, b), (c, d) in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------------- TorchScript


def _script_attributes(module: Any) -> dict[str, Any]:
    """The attributes of a ScriptModule, which TorchScript stores. Lists and dictionaries are copies."""
    attributes = vars_of(module)
    core: Any = attributes.get("_c")  # a traced module has another that it calls
    names = [] if core is None else [*attributes["_concrete_type"].get_attributes(), "training"]
    return {name: core.getattr(name) for name in names if core.hasattr(name)}


def _restore_script(module: Any, before: dict[str, Any]) -> None:
    now = _script_attributes(module)
    for name, value in before.items():
        if not _equal(now[name], value):
            vars_of(module)["_c"].setattr(name, value)


def _equal(one: Any, other: Any) -> bool:
    """Equal values of TorchScript; tensors and objects by identity."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one is other or (type(one) in ATOMS and one == other))
