"""Derivatives of an operator: reverse mode, forward mode, and any nesting of them by `torch.func`.

`torch.library.register_autograd` has reverse mode only: a tangent is dropped, so forward mode returns zeros, and `torch.func`
refuses its functions. The kernel here is an `autograd.Function` with a `jvp`, at one level of `torch.func`: below it the
dispatcher goes to the next level, as for the operators of torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.utils import fill_defaults
from torch.autograd import Function, forward_ad


class Rules(NamedTuple):
    """How to differentiate an operator.

    Attributes:
        backward: From `ctx` and the gradients of the outputs (None for those without) to those of all inputs.
        context: From `ctx`, inputs and output: saves what `backward` needs.
        jvp: From inputs, outputs and the tangents of the inputs (None for those without) to the tangents of the outputs.
    """

    backward: Callable[..., Any]
    context: Callable[..., Any]
    jvp: Callable[..., Any]


def forward_mode() -> bool:
    """True within a level of forward mode or of `torch.func`: tensors may have tangents."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _may_have_tangents() -> bool:
    """The same while a graph is traced, too: traced code enters levels that `torch.autograd.forward_ad` does not know of."""
    return forward_mode() or torch._C._len_torch_dispatch_stack() > 0


def kernel(op: torch._ops.OpOverload, rules: Rules) -> Callable[..., Any]:
    """The implementation of `op` for the dispatch key "Autograd"."""

    def forward(*args: Any) -> Any:
        *given, (keys, records, has_tangents) = args
        if not torch._C._are_functorch_transforms_active():
            return _below(op, keys, given)
        with torch.set_grad_enabled(records), forward_ad._set_fwd_grad_enabled(has_tangents):  # autograd of the outer levels
            return _below(op, keys, given)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # a rule computes nothing for gradients and tangents that are not there
        *given, (_, records, _) = inputs
        if records:  # else there is no backward, and nothing to save or to refuse
            rules.context(ctx, tuple(given), output)
        if _may_have_tangents():
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.numbers = [None if isinstance(value, Tensor) else value for value in given]
            ctx.save_for_forward(*(value if isinstance(value, Tensor) else None for value in (*given, *outputs)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (*rules.backward(ctx, *grads), None)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        primals = [None if tensor is None else _without_tangent(tensor) for tensor in ctx.saved_tensors]
        count = len(ctx.numbers)
        inputs = [number if tensor is None else tensor for number, tensor in zip(ctx.numbers, primals[:count], strict=True)]
        outputs = primals[count:]
        with forward_ad._set_fwd_grad_enabled(True):  # torch disables it, and so the tangents of the outer levels
            found = rules.jvp(inputs, outputs, tangents[:-1])
        pushed = [
            torch.zeros_like(out) if tangent is None and out is not None and out.is_floating_point() else tangent
            for out, tangent in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True)
        ]
        return tuple(pushed) if isinstance(found, tuple) else pushed[0]

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    name = "".join(part.capitalize() for part in op._opname.split("_"))
    function = type(name, (Function,), {key: staticmethod(method) for key, method in methods.items()})
    # `Function.apply` itself would call `torch.func` again, which has already called this kernel.
    apply = super(Function, function).apply  # type: ignore[misc]

    def run(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        records = torch.is_grad_enabled()
        if not (_may_have_tangents() or (records and torch._C._any_requires_grad(*args))):
            return _below(op, keys, args)
        given, _ = fill_defaults(op._schema, args, {})  # type: ignore[no-untyped-call]
        call = (keys, records, torch._C._is_fwd_grad_enabled())
        if not torch._C._are_functorch_transforms_active():
            return apply(*given, call)
        with enable_single_level_autograd_function():
            return apply(*given, call)

    return run


def refusing_kernel(op: torch._ops.OpOverload, why: str) -> Callable[..., Any]:
    """The same for an operator that has no derivatives. It raises RuntimeError for tensors that record or have one."""

    def run(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        flat = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg]) if isinstance(tensor, Tensor)]
        if any(map(_has_tangent, flat)) or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            raise RuntimeError(f"{op._opname} has no derivative: {why}")
        return _below(op, keys, args)

    return run


def refuse(message: str) -> Callable[..., NoReturn]:
    """A rule that raises RuntimeError."""

    def raises(*_: Any) -> NoReturn:
        raise RuntimeError(message)

    return raises


def _without_tangent(tensor: Tensor) -> Tensor:
    return _unpacked(tensor)[0] if tensor.is_floating_point() else tensor


def _unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(tensor, level=0)  # type: ignore[no-untyped-call]
    return primal, tangent


def _has_tangent(tensor: Tensor) -> bool:
    return forward_mode() and tensor.is_floating_point() and _unpacked(tensor)[1] is not None


def _below(op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)
