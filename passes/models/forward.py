"""One forward, and what it shows: reference outputs, how every module was called, what every repeated block was given.

The forward starts from a fixed seed and leaves the caller's inputs and random state alone, so that two can be compared.
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
