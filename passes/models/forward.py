"""Example inputs and one forward of a model with them.

Flow: example inputs as `(args, kwargs)` → moved to the model's device → one forward from fixed seeds, which changes neither
the caller's inputs nor the model nor the RNG states, so that the outputs of two forwards can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import CaptureError, ModelError, in_one_line
from memrewrite.passes.models.process_state import seeded
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.models.surroundings import callers_device

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
    if leaf.is_nested:
        raise ModelError(
            "an example input is a nested tensor, whose rows differ in size", hint="give a padded tensor and a mask"
        )
    if leaf.is_inference():
        leaf = leaf.clone()  # a normal tensor
    leaf = leaf if leaf.is_leaf else leaf.detach().requires_grad_()
    return leaf if device is None else leaf.to(device)


def copied(inputs: Inputs) -> Inputs:
    """A deep copy: a forward may mutate its inputs. Raises `ModelError` for an object that cannot be copied."""
    try:
        return copy.deepcopy(inputs, {id(leaf): leaf.detach().clone() for leaf in tree_leaves(inputs) if _is_special(leaf)})
    except Exception as error:  # a class decides itself how it is copied
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in tree_leaves(inputs)))
        raise ModelError(
            f"the example inputs ({kinds}) cannot be copied: {in_one_line(error)}", hint="give tensors, numbers and strings"
        ) from error


def on_meta(model: nn.Module) -> bool:
    """True if a parameter is on `meta`: it has a shape and no values."""
    return any(p.is_meta for p in model.parameters())


def _is_special(leaf: Any) -> bool:
    """True for tensors that torch can clone, but not copy with `copy.deepcopy`."""
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided and not leaf.is_nested
    return isinstance(leaf, Tensor) and not plain


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


@contextmanager
def layer_in_eval_mode(layer: nn.Module) -> Iterator[None]:
    """Context manager: a memory layer is in eval mode inside. Nothing else is guarded: its forward changes no state."""
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run(
    model: nn.Module, inputs: Inputs, *, gradients: bool = False, at_end: Callable[[StateGuard], None] = lambda _: None
) -> Any:
    """The outputs of one forward from fixed seeds, on copies of the inputs. Model and generators are as before afterwards.

    `at_end` is called after the forward, before what it changed is restored. Raises `ModelError` where the model's code raises
    an error, or calls `sys.exit`.
    """
    args, kwargs = copied(inputs)
    with StateGuard(model) as state, seeded(), torch.set_grad_enabled(gradients), _users_code(model):
        outputs = state.apart(model(*args, **kwargs))
        at_end(state)
        return outputs


def warm_up(model: nn.Module, inputs: Inputs) -> None:
    """One forward whose changes to the model's state stay, up to the end of the guard around it.

    Some models fill caches or initialise themselves in their first forward. After it, every `run` starts from this state, and
    `torch.export` sees the code that runs from then on. Raises `ModelError`, as `run` does.
    """
    args, kwargs = copied(inputs)
    with seeded(), torch.no_grad(), _users_code(model):
        model(*args, **kwargs)


@contextmanager
def _users_code(model: nn.Module) -> Iterator[None]:
    try:
        with callers_device():
            yield
    except CaptureError:  # a tensor that a recorder inside of the forward cannot describe
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}",
            where=f"{type(model).__name__}.forward",
            hint="call the model with these inputs yourself, several times: each call must work; give inputs that fit",
        ) from error
