"""Example inputs and one forward of a model with them.

Flow: example inputs as `(args, kwargs)` → moved to the model's device → one forward from fixed seeds, which changes neither
the caller's inputs nor the model nor the RNG states, so that the outputs of two forwards can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from memrewrite.errors import ModelError
from memrewrite.passes.models.process_state import seeded
from memrewrite.passes.models.state_guard import StateGuard

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


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
    """The inputs with every tensor on the device of the model's first parameter (`meta` included)."""
    device = next((p.device for p in model.parameters()), None)
    if device is None:
        return inputs
    moved: Inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return moved


def on_meta(model: nn.Module) -> bool:
    """True if a parameter is on `meta`: it has a shape and no values."""
    return any(p.is_meta for p in model.parameters())


@contextmanager
def in_mode(model: nn.Module | ExportedProgram, *, training: bool) -> Iterator[None]:
    """Context manager: every module is in train or eval mode inside. Afterwards the model is as it was on entry."""
    with StateGuard(model):
        for module in model.modules() if isinstance(model, nn.Module) else ():
            module.training = training
        yield


def evaluating(model: nn.Module | ExportedProgram) -> AbstractContextManager[None]:
    """Context manager: every module is in eval mode inside. Afterwards the model is as it was on entry."""
    return in_mode(model, training=False)


def run(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Any:
    """The outputs of one forward from fixed seeds, on copies of the inputs. Model and generators are as before afterwards.

    Raises `ModelError` where the model's code raises an error, or calls `sys.exit`.
    """
    args, kwargs = copy.deepcopy(inputs)
    with StateGuard(model) as state, seeded(), torch.set_grad_enabled(gradients), _users_code(model):
        return state.apart(model(*args, **kwargs))


def warm_up(model: nn.Module, inputs: Inputs) -> None:
    """One forward whose changes to the model's state stay, up to the end of the guard around it.

    Some models fill caches or initialise themselves in their first forward. After it, every `run` starts from this state, and
    `torch.export` sees the code that runs from then on. Raises `ModelError`, as `run` does.
    """
    args, kwargs = copy.deepcopy(inputs)
    with seeded(), torch.no_grad(), _users_code(model):
        model(*args, **kwargs)


@contextmanager
def _users_code(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}",
            where=f"{type(model).__name__}.forward",
            hint="call the model with these inputs yourself; give inputs that fit as a tuple, a dict or (args, kwargs)",
        ) from error
