"""`torch.export` of one module: several attempts, and the reasons when torch refuses all of them.

Flow: non-strict and strict export with the dynamic axes that were requested, then with the first axis alone, then with static
shapes → the program of the first attempt that works, and how it was exported → otherwise `Refused` with the reason of each
attempt.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import in_one_line
from memrewrite.passes.capture.torch_messages import quiet
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.exclusive import tracing_alone
from memrewrite.passes.models.forward import Inputs, copied
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.models.surroundings import callers_device

log = logging.getLogger("memrewrite")
PLAIN = (type(None), bool, int, float, str)  # the leaves of an output that torch can trace, with tensors
BATCH_AND_SEQUENCE = 2  # axes of an input, the first ones, that are dynamic where a graph should fit other lengths
REASONS = 600  # characters of torch that one refusal quotes, shared by its attempts


class Refused(Exception):  # noqa: N818 - a result, which callers turn into an error with a place
    """`torch.export` refused a module. The message is one line: every attempt, with torch's own message, shortened."""


class ExportResult(NamedTuple):
    """A program and how it was exported: strict or not, with dynamic shapes or not, and which outputs it omits."""

    program: ExportedProgram
    how: str


def export_program(model: nn.Module, inputs: Inputs, axes: int = 0, recorder: Recorder | None = None) -> ExportResult:
    """Export `model` with `torch.export`; `inputs` are not modified.

    The first `axes` axes of every input become symbolic where torch can make them so. If torch refuses the model with them,
    the first axis alone does (the batch), then none. `recorder` is entered during each non-strict attempt. Raises `Refused`
    with the reasons of all attempts.
    """
    model = _as_plain_module(model)
    attempts = [(strict, symbolic) for symbolic in dict.fromkeys((axes, min(axes, 1), 0)) for strict in (False, True)]
    reasons: dict[str, list[str]] = {}  # the reason, and the attempts that failed with it
    for strict, symbolic in attempts:
        args, kwargs = copied(inputs)  # torch marks the tensors of an attempt, and refuses a static one with them
        how = ("strict" if strict else "non-strict") + _shapes(symbolic, axes)
        omitted: set[str] = set()
        outputs = nullcontext() if strict else _traceable_outputs(model, omitted)
        recording = recorder if recorder and not strict else nullcontext()
        try:
            with tracing_alone(), StateGuard(model), torch.no_grad(), quiet(), callers_device(), recording, outputs:
                dynamic_shapes = _by_argument(model, _auto_dims((args, kwargs), symbolic)) if symbolic else None
                program = torch.export.export(model, args, kwargs, strict=strict, dynamic_shapes=dynamic_shapes)
            _refuse_nested_weights(program)
        except (Exception, SystemExit) as error:  # the model's code may call `sys.exit`
            log.debug("torch.export %s refused %s", how, type(model).__name__, exc_info=True)
            reasons.setdefault(in_one_line(error, limit=REASONS // len(attempts)), []).append(how)
        else:
            how += f", outputs of class {', '.join(sorted(omitted))} omitted" if omitted else ""
            log.debug("torch.export %s captured %s", how, type(model).__name__)
            return ExportResult(program, how)
    raise Refused("; ".join(f"{' / '.join(failed)}: {reason}" for reason, failed in reasons.items()))


def _shapes(symbolic: int, requested: int) -> str:
    """Which axes an attempt makes dynamic, as users read it."""
    if not symbolic:
        return ""
    return ", dynamic shapes" if symbolic == requested else ", dynamic first axes"


def _refuse_nested_weights(program: ExportedProgram) -> None:
    """Raise `Refused` for weights that nested graphs use, as `torch.autocast` makes them: MLPs in there would not be found."""
    weights = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and any(n.name in weights for n in node.all_input_nodes):
            raise Refused(f"`{node.target}` keeps a part of the model in a nested graph")


def _as_plain_module(model: nn.Module) -> nn.Module:
    """A graph module as a module of another class, with the same state and forward.

    `torch.export` would interpret the nodes of a `GraphModule`, and not record the modules that they call.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    plain: nn.Module = nn.Module.__new__(type("Generated", (nn.Module,), {"forward": type(model).forward}))
    plain.__dict__ = model.__dict__  # one module tree: an edit of one is an edit of the other
    return plain


@contextmanager
def _traceable_outputs(model: nn.Module, omitted: set[str]) -> Iterator[None]:
    """Inside, `model` returns only the tensors of an output that contains objects which torch cannot trace, such as caches.

    The class names of these objects are added to `omitted`.
    """
    original, is_own = model.forward, "forward" in vars(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        unknown = {type(leaf).__name__ for leaf in tree_leaves(out) if not isinstance(leaf, (torch.Tensor, *PLAIN))}
        omitted.update(unknown)
        return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)) if unknown else out

    model.forward = forward
    try:
        yield
    finally:
        if is_own:
            model.forward = original
        else:
            del model.forward


def _auto_dims(inputs: Inputs, axes: int) -> Inputs:
    """`Dim.AUTO` for the first `axes` axes (batch, sequence) of every tensor: torch makes them symbolic where it can."""

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: Dim.AUTO for axis in range(min(axes, leaf.ndim)) if leaf.shape[axis] > 1}

    shapes: Inputs = tree_map(dims, inputs)
    return shapes


def _by_argument(model: nn.Module, dims: Inputs) -> Any:
    """`dims` by the names of the forward's arguments."""
    positional = dict(inspect.signature(model.forward).bind_partial(*dims[0]).arguments)
    return {**positional, **dims[1]} or None
