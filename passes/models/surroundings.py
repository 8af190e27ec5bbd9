"""The torch settings of the caller's thread: which of them memrewrite's own work must not inherit.

Inside of `torch.inference_mode()` new tables could never be trained; under autocast a capture would see other dtypes than the
weights'; with a default device, tensors of our own would be created there. The model's own code keeps its default device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from memrewrite.errors import ModelError

CPU = torch.device("cpu")
_caller = threading.local()  # `device`: the default device of the thread's outermost call, where it is not the CPU


@contextmanager
def neutral_surroundings(model: nn.Module | None) -> Iterator[None]:
    """Context manager: inside, no inference mode and no autocast is on, and the default device is the CPU.

    Raises `ModelError` where there is no outside: in a fake tensor mode or a transform of `torch.func`, and for a model whose
    parameters are inference tensors or fake tensors.
    """
    _refuse_transforms()
    tensors = [] if model is None else _tensors(model)
    device = torch.get_default_device()
    before = getattr(_caller, "device", None)
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # not always: leaving it also enables gradients
            stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", *(t.device.type for t in tensors)} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device != CPU:
            _caller.device = device
            stack.callback(setattr, _caller, "device", before)
            stack.enter_context(CPU)
        yield


def callers_device() -> AbstractContextManager[Any]:
    """A context manager for the model's own code: inside, the default device is that of the caller of memrewrite."""
    device: torch.device | None = getattr(_caller, "device", None)
    return nullcontext() if device is None else device


def _refuse_transforms() -> None:
    within = None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        within = "a transform of torch.func (vmap, grad, ...)"
    elif detect_fake_mode() is not None:
        within = "a FakeTensorMode"
    if within is not None:
        raise ModelError(f"memrewrite was called inside of {within}, where tensors have no values", hint="call it outside")


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a model. Raises `ModelError` for one that cannot be trained or computed with."""
    if "_modules" not in vars(model):
        raise ModelError(
            f"{type(model).__name__} is not initialised", hint="its `__init__` must call `super().__init__()` first"
        )
    named = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if not is_lazy(t)]
    for name, tensor in named:
        if isinstance(tensor, FakeTensor):
            hint = 'create the model outside of the FakeTensorMode, or with `torch.device("meta")`'
            raise ModelError(f"the weight {name!r} is a fake tensor", hint=hint)
        if tensor.is_inference():
            hint = "create and load the model outside of `torch.inference_mode()`; `torch.no_grad()` has no such effect"
            raise ModelError(f"the weight {name!r} is an inference tensor, through which nothing can be trained", hint=hint)
    return [tensor for _, tensor in named]
