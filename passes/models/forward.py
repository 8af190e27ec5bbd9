"""Example inputs and one forward of a model with them.

Flow: example inputs as `(args, kwargs)` → moved to the model's device → one forward from a fixed seed, which changes neither
the caller's inputs nor the RNG state, so that the outputs of two forwards can be compared. An exception or `sys.exit` in a
forward becomes a `ModelError`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import MemrewriteError, ModelError, in_one_line
from memrewrite.passes.models.surroundings import callers_device

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
SEED = 0


def as_inputs(inputs: Any) -> Inputs:
    """`(args, kwargs)` from a tensor (one positional argument), a tuple, a list, a dict, or `(args, kwargs)`.

    Raises `ModelError` for anything else.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        pair = len(inputs) == 2 and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping)
        return (tuple(inputs[0]), dict(inputs[1])) if pair else (tuple(inputs), {})
    raise ModelError(f"the example inputs are a {type(inputs).__name__}", hint="give a tuple, a dict, or a pair (args, kwargs)")


def on_device_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with every tensor on the device of the model's first parameter (`meta` included), without autograd history.

    Raises `ModelError` for inputs that cannot be used for several forwards, and for a model with only a part on `meta`.
    """
    parameters = list(model.named_parameters())
    without = next((name for name, p in parameters if p.is_meta), None)
    having = next((name for name, p in parameters if not p.is_meta), None)
    if without is not None and having is not None:
        raise ModelError(
            f"a part of the model is on meta, without values: {without!r} is, {having!r} is not",
            hint="load all weights, or move the whole model to meta",
        )
    device = parameters[0][1].device if parameters else None
    usable: Inputs = tree_map(lambda leaf: _usable(leaf, device), inputs)
    return usable


def _usable(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Iterator):
        kind = type(leaf).__name__
        raise ModelError(f"an example input is a {kind}, which can be read only once", hint="give a list or a tensor")
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, FakeTensor) or (leaf.is_meta and device is not None and device.type != "meta"):
        raise ModelError("an example input has no values, and the model has", hint="give tensors with values as inputs")
    if leaf.is_inference():
        leaf = leaf.clone()  # a normal tensor
    leaf = leaf if leaf.is_leaf else leaf.detach().requires_grad_()
    return leaf if device is None else leaf.to(device)


def copied(inputs: Inputs) -> Inputs:
    """A deep copy: a forward may mutate its inputs. Raises `ModelError` for an object that cannot be copied."""
    try:
        return copy.deepcopy(inputs)
    except Exception as error:  # a class decides itself how it is copied
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in tree_leaves(inputs)))
        raise ModelError(
            f"the example inputs ({kinds}) cannot be copied: {in_one_line(error)}", hint="give tensors, numbers and strings"
        ) from error


def on_meta(model: nn.Module) -> bool:
    """True if a parameter is on `meta`: it has a shape and no values."""
    return any(p.is_meta for p in model.parameters())


@contextmanager
def evaluating(model: nn.Module | ExportedProgram) -> Iterator[None]:
    """Context manager: every module is in eval mode inside, and has its own mode again after it."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        if isinstance(model, nn.Module):
            for module in model.modules():
                module.training = modes.get(module, modes[model])  # a new layer gets the mode of the whole model


class _SharedRandomState:
    """torch's random state, which all threads of a process share, while several threads set it to a fixed seed.

    A thread that is alone restores what it found, at every level of nesting. Where forwards of two threads overlap, the last
    one to end restores the state before the first one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held only while states are read and written: no model runs under it
        self.levels: dict[int, int] = {}  # by thread
        self.first: dict[torch.Generator, Tensor] = {}  # the states before the first of the forwards that overlap

    def seed(self, generators: Iterable[torch.Generator]) -> dict[torch.Generator, Tensor]:
        """Seed `generators`; the states that they had."""
        with self.lock:
            found = {generator: generator.get_state() for generator in generators}
            self.first = {**found, **self.first} if self.levels else found
            self.levels[threading.get_ident()] = self.levels.get(threading.get_ident(), 0) + 1
            for generator in found:
                generator.manual_seed(SEED)
        return found

    def restore(self, found: Mapping[torch.Generator, Tensor]) -> None:
        """End what `seed` began and returned `found` for."""
        with self.lock:
            level = self.levels.pop(threading.get_ident()) - 1
            if level:
                self.levels[threading.get_ident()] = level
            elif not self.levels:
                found = self.first
            else:
                return
            for generator, state in found.items():
                generator.set_state(state)


_RANDOM = _SharedRandomState()


@contextmanager
def fixed_seed(devices: Iterable[torch.device]) -> Iterator[None]:
    """Context manager: the default generators of the CPU and of CUDA `devices` have a fixed seed; restored on exit.

    torch has one default generator for all threads. Random numbers that another thread takes from it meanwhile follow from
    this seed, and a seed that it sets meanwhile is lost.
    """
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    found = _RANDOM.seed([torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)])
    try:
        yield
    finally:
        _RANDOM.restore(found)


def run(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Any:
    """The outputs of one forward from a fixed seed, on copies of the inputs; the RNG state is restored afterwards.

    Raises `ModelError` when the forward raises an exception, or ends the program. The model ran on its inputs before.
    """
    hint = "memrewrite calls a forward several times with the same inputs: it must work, and do the same, each time"
    return _run(model, inputs, "a forward failed after others with the same inputs", hint, gradients)


def first_run(model: nn.Module, inputs: Inputs) -> Any:
    """`run` for the first time: raises `ModelError` when the model does not run on the inputs."""
    hint = "call the model with these inputs yourself; give inputs that fit as a tuple, a dict or (args, kwargs)"
    return _run(model, inputs, "the model does not run on its example inputs", hint, gradients=False)


def _run(model: nn.Module, inputs: Inputs, what: str, hint: str, gradients: bool) -> Any:
    args, kwargs = copied(inputs)
    devices = [parameter.device for parameter in model.parameters()]
    with torch.set_grad_enabled(gradients), fixed_seed(devices), callers_device():
        try:
            return model(*args, **kwargs)
        except MemrewriteError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{what}: {type(error).__name__}: {error}", where=f"{type(model).__name__}.forward", hint=hint
            ) from error
