"""`torch.export` of one module: the attempts, and why torch refuses."""

from __future__ import annotations

import copy
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import in_a_line
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.forward import Inputs

log = logging.getLogger("memrewrite")
PLAIN = (type(None), bool, int, float, str)  # besides tensors, what torch traces as an output


class Refused(Exception):  # noqa: N818 - a verdict, turned into an error that names the place
    """`torch.export` would not trace; the message is torch's own, shortened."""


def export_program(
    model: nn.Module, inputs: Inputs, dynamic: bool, recorder: Recorder | None = None, *, axes: int = 2
) -> tuple[ExportedProgram, str]:
    """`torch.export` of a module, and how it went: dynamic shapes where asked and possible, non-strict, then strict.

    Of every input the first `axes` axes may become dynamic. Raises `Refused` with torch's reasons.
    """
    model = _as_module(model)
    args, kwargs = copy.deepcopy(inputs)
    shapes = _auto_dims((args, kwargs), axes) if dynamic else None
    attempts = [(False, shapes), (True, shapes)] if shapes else []
    reasons = []
    for strict, dims in [*attempts, (False, None), (True, None)]:
        how = ("strict" if strict else "non-strict") + (", dynamic shapes" if dims else "")
        dropped: set[str] = set()
        seen = recorder if recorder and not strict else nullcontext()
        try:
            with torch.no_grad(), hushed(), seen, nullcontext() if strict else _known_outputs(model, dropped):
                dynamic_shapes = None if dims is None else _by_argument(model, dims)
                program = torch.export.export(model, args, kwargs, strict=strict, dynamic_shapes=dynamic_shapes)
            _refuse_bodies(program)
            return program, how + (f", outputs of kind {', '.join(sorted(dropped))} left aside" if dropped else "")
        except Exception as error:
            log.debug("torch.export %s refused %s", how, type(model).__name__, exc_info=True)
            reasons.append(f"{how}: {type(error).__name__}: {in_a_line(error)}")
    raise Refused("; ".join(reasons[-2:]))


def _refuse_bodies(program: ExportedProgram) -> None:
    """Raise `Refused` where weights are multiplied in graphs of their own, as under `torch.autocast`: it would hide MLPs."""
    held = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and any(n.name in held for n in node.all_input_nodes):
            raise Refused(f"`{node.target}` keeps a part of it in a graph of its own")


def _as_module(model: nn.Module) -> nn.Module:
    """A graph module as a module like any other: `torch.export` would interpret its nodes, past the modules it calls."""
    if not isinstance(model, fx.GraphModule):
        return model
    plain: nn.Module = nn.Module.__new__(type("Generated", (nn.Module,), {"forward": type(model).forward}))
    plain.__dict__ = model.__dict__  # one tree: what is edited in one is edited in the other
    return plain


@contextmanager
def _known_outputs(model: nn.Module, dropped: set[str]) -> Iterator[None]:
    """Have `model` return its tensors alone where it returns objects that torch cannot trace, such as caches.

    The tensors are the witness; what is left aside is named in `dropped`.
    """
    original, own = model.forward, "forward" in vars(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        strange = {type(leaf).__name__ for leaf in tree_leaves(out) if not isinstance(leaf, (torch.Tensor, *PLAIN))}
        dropped.update(strange)
        return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)) if strange else out

    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward


@contextmanager
def hushed() -> Iterator[None]:
    """A refused attempt is told in one line, not in torch's thousands: what it warns, logs and prints is dropped."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _auto_dims(inputs: Inputs, axes: int) -> Inputs:
    """The first axes, batch and sequence, left to torch: it makes them symbolic or says they are fixed."""

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: Dim.AUTO for axis in range(min(axes, leaf.ndim)) if leaf.shape[axis] > 1}

    shapes: Inputs = tree_map(dims, inputs)
    return shapes


def _by_argument(model: nn.Module, dims: Inputs) -> Any:
    """`dims` by the names of the forward's arguments."""
    import inspect

    positional = dict(inspect.signature(model.forward).bind_partial(*dims[0]).arguments)
    return {**positional, **dims[1]} or None
