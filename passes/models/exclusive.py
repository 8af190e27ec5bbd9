"""One call of memrewrite at a time in a process, and no other thread inside the model that it works on.

Capturing and editing change what the whole process shares: torch's tracer patches `nn.Module`, a model's modes and forward are
replaced for a while, and default dtype and random state are set. So calls from several threads wait for each other. Other
models may run in other threads meanwhile.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from memrewrite.errors import ModelError
from memrewrite.passes.models.surroundings import neutral_surroundings

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()
_CALL = nn.Module._call_impl.__code__  # every call of a module runs it, also those of compiled and scripted modules
WAIT = "wait until the call in the other thread returns, and call again"


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator of functions that capture or edit models: calls from several threads run one after another.

    The argument named `model`, if it is a module, belongs to the caller's thread during the call: the function raises
    `ModelError` when it is running already, and a forward that another thread begins meanwhile raises `ModelError` there. The
    function runs outside of the caller's inference mode, autocast and default device (`neutral_surroundings`).
    """
    parameters = inspect.signature(function).parameters
    position = list(parameters).index("model") if "model" in parameters else len(parameters)
    needs_model = "model" in parameters and parameters["model"].default is inspect.Parameter.empty

    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        model = kwargs.get("model", args[position] if position < len(args) else None)
        if needs_model and not isinstance(model, (nn.Module, ExportedProgram)):
            kind = (
                "None" if model is None else f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            )
            raise ModelError(f"the model is {kind}, not an nn.Module", hint="give an nn.Module or an exported program")
        module = model if isinstance(model, nn.Module) else None
        with _LOCK, neutral_surroundings(module), _in_this_thread_only(module):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def untraced(*args: P.args, **kwargs: P.kwargs) -> R:
        compiling = "torch._dynamo" in sys.modules
        call = torch.compiler.disable(alone) if compiling else alone  # type: ignore[no-untyped-call]
        result: R = call(*args, **kwargs)
        return result

    return untraced


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Context manager around a trace by torch: `torch.compile` traces nothing in other threads, and waits.

    A tracer patches `nn.Module` for all threads. The lock is torch's own, under which it also calls backends, so it must not be
    held while a model runs: the backward of a compiled model waits for it in another thread.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True  # else compiled code of other threads refuses to run during any trace by fx
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before


@contextmanager
def _in_this_thread_only(model: nn.Module | None) -> Iterator[None]:
    if model is None:
        yield
        return
    if any(isinstance(hook, _Guard) and hook.owner is not None for hook in model._forward_pre_hooks.values()):
        raise ModelError("memrewrite is working on this model already", hint="call this after the other call has returned")
    guard = _Guard(threading.get_ident())
    scripted = isinstance(model, torch.jit.ScriptModule)  # has no hooks of Python
    handle = None if scripted else model.register_forward_pre_hook(guard, prepend=True)
    try:
        _refuse_running(model)  # after the hook: a forward that began before it is on its thread's stack
        yield
    finally:
        guard.owner = None
        if handle is not None:
            model._forward_pre_hooks.pop(handle.id, None)


class _Guard:
    """A forward pre-hook that refuses calls from other threads than the owner's. Copies of it refuse nothing."""

    def __init__(self, owner: int | None = None) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Raise `ModelError` in another thread than the owner's."""
        if torch.compiler.is_dynamo_compiling():  # dynamo traces hooks, and only in the owner's thread
            return
        if self.owner not in (None, threading.get_ident()):
            raise ModelError(
                "the model was called while memrewrite works on it in another thread",
                where=f"{type(module).__name__}.forward in thread {threading.current_thread().name!r}",
                hint=WAIT,
            )

    def __reduce__(self) -> Any:
        return _Guard, ()


def _refuse_running(model: nn.Module) -> None:
    """Raise `ModelError` if a forward of the model, or of a model that shares modules with it, is on a thread's stack."""
    modules, own = set(model.modules()), threading.get_ident()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code is _CALL:
                called = frame.f_locals.get("self")
                if ident == own and called in modules:
                    what = "memrewrite was called inside of a forward of this model"
                    raise ModelError(what, where=f"{type(called).__name__}.forward", hint="call it before or after the forward")
                if ident != own and isinstance(called, nn.Module) and not modules.isdisjoint(called.modules()):
                    what = "the model is running in another thread"
                    where = f"{type(called).__name__}.forward in thread {names.get(ident, ident)!r}"
                    raise ModelError(what, where=where, hint=WAIT)
            frame = frame.f_back
