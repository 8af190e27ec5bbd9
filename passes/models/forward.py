"""Example inputs and one forward of a model with them.

Flow: example inputs as `(args, kwargs)` → moved to the model's device → one forward from a fixed seed, which changes neither
the caller's inputs nor the RNG state, so that the outputs of two forwards can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from memrewrite.errors import ModelError

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


def run(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Any:
    """The outputs of one forward from a fixed seed, on copies of the inputs; the RNG state is restored afterwards."""
    args, kwargs = copy.deepcopy(inputs)
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(SEED)
        return model(*args, **kwargs)


def first_run(model: nn.Module, inputs: Inputs) -> Any:
    """`run` for the first time: raises `ModelError` when the model does not run on the inputs."""
    try:
        return run(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}",
            where=f"{type(model).__name__}.forward",
            hint="call the model with these inputs yourself; give inputs that fit as a tuple, a dict or (args, kwargs)",
        ) from error
