"""What stays readable of a module that was replaced: its plain attributes, and the shape, dtype and device of its tensors.

Code around a module may ask for `block.mlp.down.weight.dtype`, or write to that weight. The outline of a replaced module
answers it: the same attributes and submodules, whose tensors have no values. It is not registered, saved, counted or trained.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memrewrite.errors import ModelError

PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, type(None))
aten = torch.ops.aten


class ReplacedTensor(Tensor):
    """The shape, dtype and device of a tensor that was replaced with its module. It has no values.

    To write to it has no effect. Every operator that reads values raises `ModelError`.
    """

    owner: str  # its name, for errors: the class of the replaced module and the tensor's name in it

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: str, is_param: bool) -> ReplacedTensor:
        """A new tensor without values."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: ReplacedTensor = make(ReplacedTensor, shape, dtype=dtype, device=device)
        made.owner, made._is_param = owner, is_param
        return made

    def applied(self, fn: Callable[[Tensor], Tensor]) -> ReplacedTensor:
        """As `nn.Module._apply` changes a tensor: `fn` may change the dtype and the device."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        return ReplacedTensor.of(tuple(self.shape), like.dtype, like.device, self.owner, self._is_param)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operator: on no values, or not at all."""
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and all(isinstance(value, ReplacedTensor) for value in written):
            return written[0]
        if func is aten.detach.default:
            return args[0].applied(lambda like: like)
        name = next(value.owner for value in given.values() if isinstance(value, ReplacedTensor))
        raise ModelError(
            f"the model's code reads values of {name!r} outside of its module, which was replaced ({func})",
            hint="add the layer to the MLP, whose weights then stay (`placement: parallel`), or leave this MLP out",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplacedTensor:
        copy: ReplacedTensor = memo.setdefault(id(self), self.applied(lambda like: like))
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ReplacedTensor.of, (tuple(self.shape), self.dtype, self.device, self.owner, self._is_param)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReplacedTensor({self.owner!r}, {tuple(self.shape)}, {self.dtype}, {self.device}, no values)"


INTERNAL = frozenset(vars(nn.Module()))  # names of attributes that every module has


class Replacement(nn.Module):
    """A module that can be put in the place of another one, whose outline it then has.

    An attribute of its own comes before one of the replaced module.
    """

    _outlines: tuple[nn.Module, ...] = ()  # in a tuple, so that they are not registered as children

    def expose(self, module: nn.Module) -> None:
        """Make the outline of `module`, which it replaces, readable as attributes of this module."""
        self._outlines = (*self._outlines, _outline(module, type(module).__name__, {}))
        self._show(self._outlines[-1])

    def _show(self, outline: nn.Module) -> None:
        shown = {name: value for name, value in vars(outline).items() if name not in INTERNAL} | outline._modules
        for name, value in shown.items():
            if not hasattr(self, name) or isinstance(vars(self).get(name), ReplacedTensor):
                vars(self)[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for outline in self._outlines:
            for module in outline.modules():
                tensors = {name: value for name, value in vars(module).items() if isinstance(value, ReplacedTensor)}
                vars(module).update({name: tensor.applied(fn) for name, tensor in tensors.items()})
            self._show(outline)
        return self


class Transparent(Replacement):
    """A replacement for a moment, while the replaced modules stay in memory: it has all their attributes, with values."""

    replaced: tuple[nn.Module, ...] = ()  # in a tuple, so that they are not registered as children

    def expose(self, module: nn.Module) -> None:
        """Make all attributes of `module`, which it replaces, readable as attributes of this module."""
        self.replaced = (*self.replaced, module)

    def __getattr__(self, name: str) -> Any:
        """An attribute of a replaced module: the code of some models reads the weights of its submodules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = next((module for module in self.replaced if hasattr(module, name)), None)
            if found is None:
                raise
        return getattr(found, name)


def _outline(module: nn.Module, name: str, done: dict[int, nn.Module]) -> nn.Module:
    """A module of the same class with the plain attributes and the submodules of `module`, and its tensors without values."""
    if id(module) in done:
        return done[id(module)]
    kind = nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module)
    made = done[id(module)] = kind.__new__(kind)
    nn.Module.__init__(made)
    vars(made).update({key: value for key, value in vars(module).items() if key not in INTERNAL and _is_plain(value)})
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            vars(made)[key] = None
        elif tensor.layout == torch.strided and not is_lazy(tensor):
            is_param = isinstance(tensor, nn.Parameter)
            vars(made)[key] = ReplacedTensor.of(tuple(tensor.shape), tensor.dtype, tensor.device, f"{name}.{key}", is_param)
    for key, child in module._modules.items():
        made._modules[key] = None if child is None else _outline(child, f"{name}.{key}", done)
    return made


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if type(value) in (tuple, list) else isinstance(value, PLAIN)  # type: ignore[call-overload]
