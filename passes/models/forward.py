"""One forward, and what it shows: reference outputs, how every module was called, what every repeated block was given.

The forward starts from a fixed seed and leaves the caller's inputs and random state alone, so that two can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import ModelError
from memrewrite.passes.models.block_stacks import outermost_lists

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
SEED = 0


@dataclass(frozen=True)
class Call:
    """How a module was called once.

    `takes` is the position or the keyword of its only tensor, or of the only one beside numbers of tokens (None when it has
    none or several), `alone` says that it was given nothing else. `gives` are the shapes of what it returned; `returns`
    counts the items of a tuple, None for a tensor.
    """

    takes: int | str | None
    alone: bool
    gives: tuple[tuple[int, ...] | None, ...]
    returns: int | None


def as_inputs(inputs: Any) -> Inputs:
    """Bring a tuple, a dict or `(args, kwargs)` to `(args, kwargs)`; a single tensor is one positional argument."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        pair = len(inputs) == 2 and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping)
        return (tuple(inputs[0]), dict(inputs[1])) if pair else (tuple(inputs), {})
    raise ModelError(f"the example inputs are a {type(inputs).__name__}", hint="give a tuple, a dict, or a pair (args, kwargs)")


def on_device_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Move the example tensors to where the model's parameters are (so a model on `meta` is traced on `meta`)."""
    device = next((p.device for p in model.parameters()), None)
    if device is None:
        return inputs
    moved: Inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return moved


def on_meta(model: nn.Module) -> bool:
    """Whether the model has shapes but no values."""
    return any(p.is_meta for p in model.parameters())


@contextmanager
def evaluating(model: nn.Module | ExportedProgram) -> Iterator[None]:
    """Eval mode while a model is traced and compared, every module's own mode back afterwards."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        if isinstance(model, nn.Module):
            for module in model.modules():
                module.training = modes.get(module, modes[model])  # a new layer goes with the whole


def run(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Any:
    """One forward from a fixed seed that leaves the caller's inputs and random state alone."""
    args, kwargs = copy.deepcopy(inputs)
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(SEED)
        return model(*args, **kwargs)


def first_run(model: nn.Module, inputs: Inputs) -> Any:
    """`run`, whose failure is the user's: the model and the inputs do not fit. Raises `ModelError`."""
    try:
        return run(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}",
            where=f"{type(model).__name__}.forward",
            hint="call the model with these inputs yourself; give inputs that fit as a tuple, a dict or (args, kwargs)",
        ) from error


class Recorder:
    """While entered, notes how every module of a model is called, and the first inputs of repeated blocks and of `also`."""

    def __init__(self, model: nn.Module, also: Collection[str] = ()) -> None:
        self.model, self.also = model, frozenset(also)
        self.calls: dict[str, tuple[Call, ...]] = {}
        self.block_inputs: dict[str, Inputs] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self.calls.clear()  # a second forward is not added to a first that failed half way
        self.block_inputs.clear()
        lists = {path for path, _ in outermost_lists(self.model)}
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._handles.append(module.register_forward_hook(self._noting(path), with_kwargs=True))
            if path.rpartition(".")[0] in lists or path in self.also:
                self._handles.append(module.register_forward_pre_hook(self._keeping(path), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _noting(self, path: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.calls[path] = (*self.calls.get(path, ()), _call(args, kwargs, out))

        return note

    def _keeping(self, path: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in self.block_inputs:
                self.block_inputs[path] = tree_map(_kept, (args, kwargs))

        return keep


def _kept(leaf: Any) -> Any:
    """A tensor as it is now, for a block may write into its input. While tracing there are no values to keep."""
    return leaf.detach().clone() if type(leaf) in (torch.Tensor, nn.Parameter) and not leaf.is_meta else leaf


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Call:
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    features = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    only = tensors if len(tensors) == 1 else features  # beside numbers of tokens
    takes = next((key for key, value in given if value is only[0]), None) if len(only) == 1 else None
    items = out if isinstance(out, (tuple, list)) else (out,)
    gives = tuple(tuple(t.shape) if isinstance(t, torch.Tensor) and not t.is_nested else None for t in items)
    return Call(takes, len(given) == 1, gives, None if isinstance(out, torch.Tensor) else len(items))
