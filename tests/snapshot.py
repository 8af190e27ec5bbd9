"""A deep snapshot of a model and of the process, written for tests: it shares no code with the product's own guard.

Every object that the model refers to is described by its identity, its class, and what it contains; every tensor by its bits.
"""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memrewrite.layers.replaced import ReplacedTensor

PLAIN = (type(None), bool, int, float, complex, str, bytes)


class Snapshot:
    """What a model is at construction; `differences` compares it with what the model is now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: list[Any] = []  # so that no id is used twice
        self.before = self._described()

    def differences(self) -> list[str]:
        """The places at which something changed, with what was there and what is there now; empty if nothing did."""
        now = self._described()
        places = dict.fromkeys([*self.before, *now])
        return [f"{p}: {self.before.get(p)!r} -> {now.get(p)!r}" for p in places if self.before.get(p) != now.get(p)]

    def _described(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen: set[int] = set()
        self._describe("model", self.model, found, seen)
        for name, value in vars(nn.modules.module).items():
            if name.startswith("_global"):
                self._describe(name, value, found, seen)
        found["torch.rng"] = torch.get_rng_state().tolist()
        found["python.rng"] = random.getstate()
        found["numpy.rng"] = str(np.random.get_state(legacy=False)), np.random.get_state()[1].tolist()
        found["torch.switches"] = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch._C._len_torch_dispatch_stack(),
        )
        return found

    def _describe(self, place: str, value: Any, found: dict[str, Any], seen: set[int]) -> None:
        self.kept.append(value)
        if isinstance(value, PLAIN):
            found[place] = (type(value), repr(value))  # NaN equals NaN
            return
        found[place] = (id(value), id(type(value)))
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, inside in _inside(value):
            self._describe(f"{place}{name}", inside, found, seen)


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Tensor):
        return [*_tensor(value), *_attributes(value)]
    if isinstance(value, dict):
        items = [(f"[{key!r}]", inside) for key, inside in value.items()]
        return [("#keys", repr([repr(k) for k in value])), *items, *_attributes(value)]
    if isinstance(value, (set, frozenset)):
        return [("#elements", repr(sorted(map(repr, value)))), *_attributes(value)]
    if isinstance(value, np.ndarray):
        return [("#array", f"{value.shape}{value.dtype}{value.tobytes()!r}")]
    if isinstance(value, torch.Generator):
        return [("#state", repr(value.get_state().tolist()))]
    if isinstance(value, random.Random):
        return [("#state", repr(value.getstate()))]
    if isinstance(value, np.random.RandomState):
        return [("#state", repr(value.get_state()[1].tolist()) + repr(value.get_state()[2:]))]
    if isinstance(value, np.random.Generator):
        return [("#state", repr(value.bit_generator.state))]
    if isinstance(value, torch.jit.RecursiveScriptModule):
        return [*_script(value), *_attributes(value)]
    if isinstance(value, bytearray):
        return [("#bytes", bytes(value))]
    is_sequence = isinstance(value, (list, tuple, collections.deque))
    return [*((f"[{number}]", inside) for number, inside in enumerate(value if is_sequence else ())), *_attributes(value)]


def _tensor(value: Tensor) -> list[tuple[str, Any]]:
    if torch.nn.parameter.is_lazy(value) or isinstance(value, ReplacedTensor):  # without values
        return []
    facts: list[tuple[str, Any]] = [("#type", f"{value.dtype}{value.shape}{value.layout}{value.device}{value.requires_grad}")]
    facts.append(("#hooks", repr({k: id(v) for k, v in (value._backward_hooks or {}).items()})))
    facts.append(("#post", repr({k: id(v) for k, v in (value._post_accumulate_grad_hooks or {}).items()})))
    if value.is_leaf:
        facts.append((".grad", value.grad))
    if value.layout == torch.strided and not value.is_meta:
        facts.append(("#place", f"{value.untyped_storage()._cdata} {value.storage_offset()} {value.stride()}"))
    if not value.is_meta:
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        facts.append(("#bits", dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
    return facts


def _script(value: Any) -> list[tuple[str, Any]]:
    names = [*value._concrete_type.get_attributes(), "training"]
    plain = [(f"._c.{name}", value._c.getattr(name)) for name in names]
    facts = [(name, inside if isinstance(inside, Tensor) else repr(inside)) for name, inside in plain]
    return [*facts, *((f".{name}", child) for name, child in value._modules.items())]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Instance attributes and slots, for modules and classes that are not built in."""
    kind = type(value)
    if kind.__module__.split(".")[0] in ("builtins", "numpy", "logging") or isinstance(value, type):
        return []
    if kind.__module__.split(".")[0] == "torch" and not isinstance(value, (nn.Module, Tensor)):
        return []
    own = _raw(value, "__dict__") or {}
    found = [*((f".{name}", inside) for name, inside in own.items()), ("#attributes", repr(list(own)))]
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        found += [(f".{name}", _raw(value, name)) for name in names if not name.startswith("__")]
    return found


def _raw(value: Any, name: str) -> Any:
    """An attribute, without the methods of the value's class; None where there is none."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return None
