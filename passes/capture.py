"""What the model computes, as graphs: live module or traced program in, `Capture` out.

Flow: record one forward (reference outputs, how every module is called) → `torch.export` of the whole model, non-strict,
then strict → block by block when neither works → an error that names the submodule and quotes torch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import CaptureError, ModelError
from memrewrite.passes.blocks import outermost_lists

log = logging.getLogger("memrewrite")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
SEED = 0  # dropout and other randomness of every recorded forward starts here, so that two forwards can be compared


@dataclass(frozen=True)
class Call:
    """How a module was called once: tensors given and returned, and whether the first positional argument is one."""

    tensors_in: int
    first_is_tensor: bool
    tensors_out: int
    returns_tensor: bool


@dataclass(frozen=True)
class Segment:
    """One captured graph: of the whole model (`path` is "") or of one block, whose parameters live under `path`."""

    path: str
    graph: fx.Graph
    weights: Mapping[str, str]  # graph node name -> parameter or buffer name, as the model knows it
    literals: Mapping[str, torch.Tensor]  # graph node name -> constant tensor
    program: ExportedProgram | fx.GraphModule
    inputs: Inputs  # what it was captured with


@dataclass(frozen=True)
class Capture:
    """What the model computes: graphs, the inputs they were made with, and one recorded forward. Frozen."""

    segments: tuple[Segment, ...]
    inputs: Inputs
    how: str
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)  # of the live modules, by path
    outputs: Any = None  # of the recorded forward; None for a traced program


def capture(model: nn.Module | ExportedProgram, inputs: Any, *, dynamic: bool = False) -> Capture:
    """Capture `model` with example `inputs` (a tuple, a dict, or `(args, kwargs)`); tensors may be on `meta`.

    `dynamic` lets torch make batch and sequence symbolic where it can. An `ExportedProgram` or `fx.GraphModule` is taken
    as it is. Raises `ModelError` when the model does not run on its inputs, `CaptureError` when torch cannot trace it.
    """
    if isinstance(model, ExportedProgram):
        return _as_given(model.module(check_guards=False), inputs or _of_program(model), "an exported program, as given")
    if isinstance(model, fx.GraphModule):
        return _as_given(model, inputs, "a graph module, as given")
    arguments = on_device_of(model, as_inputs(inputs))
    recording = record(model, arguments)
    try:
        program, how = _export(model, arguments, dynamic)
        whole = Capture((_segment("", program, arguments),), arguments, f"whole model, torch.export {how}")
    except _Refused as whole_refusal:
        whole = _block_by_block(model, arguments, recording, str(whole_refusal))
    return replace(whole, calls=recording.calls, outputs=recording.outputs)


def _as_given(module: nn.Module, inputs: Any, how: str) -> Capture:
    """A model that is a graph already."""
    arguments = on_device_of(module, as_inputs(inputs))
    outputs = _first_run(module, arguments)
    return Capture((_graph_segment(module, arguments),), arguments, how, outputs=outputs)


def as_inputs(inputs: Any) -> Inputs:
    """Bring a tuple, a dict or `(args, kwargs)` to `(args, kwargs)`; a single tensor is one positional argument."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        pair = len(inputs) == 2 and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping)
        return (tuple(inputs[0]), dict(inputs[1])) if pair else (tuple(inputs), {})
    raise ModelError(
        f"the example inputs are a {type(inputs).__name__}", hint="give a tuple, a dict, or a pair (args, kwargs)"
    )


def on_device_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Move the example tensors to where the model's parameters are (so a model on `meta` is traced on `meta`)."""
    device = next((p.device for p in model.parameters()), None)
    if device is None:
        return inputs
    moved: Inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return moved


# ------------------------------------------------------------------------------------------- one recorded forward


@dataclass
class Recording:
    """What one forward showed."""

    calls: dict[str, tuple[Call, ...]]
    outputs: Any
    block_inputs: dict[str, Inputs]


def run(model: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Any:
    """One forward from a fixed seed that leaves the caller's inputs and random state alone."""
    args, kwargs = copy.deepcopy(inputs)
    with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=_cuda_of(model)):
        torch.manual_seed(SEED)
        return model(*args, **kwargs)


def _first_run(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return run(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on its example inputs: {type(error).__name__}: {error}",
            where=f"{type(model).__name__}.forward",
            hint="call the model with these inputs yourself; give inputs that fit as a tuple, a dict or (args, kwargs)",
        ) from error


def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Run once, noting for every module how it was called, and for every repeated block its first inputs."""
    calls: dict[str, list[Call]] = {}
    blocks = {path for path, _ in outermost_lists(model)}
    block_inputs: dict[str, Inputs] = {}
    handles = []
    for path, module in model.named_modules(remove_duplicate=False):

        def note(_: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
            first = bool(args) and isinstance(args[0], torch.Tensor)
            calls.setdefault(path, []).append(
                Call(_tensors((args, kwargs)), first, _tensors(out), isinstance(out, torch.Tensor))
            )

        def keep(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            block_inputs.setdefault(path, (args, kwargs))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
        if path.rpartition(".")[0] in blocks:
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        outputs = _first_run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Recording({path: tuple(made) for path, made in calls.items()}, outputs, block_inputs)


def _tensors(tree: Any) -> int:
    return sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(tree))


def _cuda_of(model: nn.Module) -> list[int]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return sorted(d.index or 0 for d in devices)


# ------------------------------------------------------------------------------------------------- torch.export


class _Refused(Exception):  # noqa: N818 - a control-flow value between the functions of this file
    """`torch.export` would not trace; the message is torch's own, shortened."""


def _export(model: nn.Module, inputs: Inputs, dynamic: bool) -> tuple[ExportedProgram, str]:
    args, kwargs = copy.deepcopy(inputs)
    shapes = _auto_dims((args, kwargs)) if dynamic else None
    attempts = [(False, shapes), (True, shapes)] if shapes else []
    reasons = []
    for strict, dims in [*attempts, (False, None), (True, None)]:
        how = ("strict" if strict else "non-strict") + (", dynamic shapes" if dims else "")
        try:
            with torch.no_grad():
                dynamic_shapes = None if dims is None else _by_argument(model, args, kwargs, dims)
                return torch.export.export(
                    model, args, kwargs, strict=strict, dynamic_shapes=dynamic_shapes
                ), how
        except Exception as error:  # noqa: BLE001 - torch raises many kinds; each is quoted in the final error
            log.debug("torch.export %s refused %s", how, type(model).__name__, exc_info=True)
            reasons.append(f"{how}: {type(error).__name__}: {_first_lines(error)}")
    raise _Refused("; ".join(reasons[-2:]))


def _auto_dims(inputs: Inputs) -> Inputs:
    """Batch and sequence (the first two axes) left to torch: it makes them symbolic or says they are fixed."""

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return {axis: Dim.AUTO for axis in range(min(2, leaf.ndim)) if leaf.shape[axis] > 1}

    shapes: Inputs = tree_map(dims, inputs)
    return shapes


def _by_argument(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Inputs) -> Any:
    import inspect

    names = list(inspect.signature(model.forward).bind_partial(*args).arguments)
    positional = dict(zip(names, dims[0], strict=False))
    return {**positional, **dims[1]} if kwargs or positional else None


def _first_lines(error: Exception, limit: int = 300) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _block_by_block(model: nn.Module, inputs: Inputs, recording: Recording, refusal: str) -> Capture:
    """Capture each repeated block by itself, with the inputs it had in the recorded forward."""
    segments, refused = [], []
    for list_path, blocks in outermost_lists(model):
        for name, block in blocks.named_children():
            path = f"{list_path}.{name}" if list_path else name
            if path not in recording.block_inputs:
                continue
            try:
                program, _ = _export(block, recording.block_inputs[path], dynamic=False)
                segments.append(_segment(path, program, recording.block_inputs[path]))
            except _Refused as error:
                refused.append((path, str(error)))
    if not segments:
        path, reason = refused[0] if refused else ("", refusal)
        raise CaptureError(
            f"torch.export refused the model ({refusal}) and every block of it ({reason})",
            where=path or type(model).__name__,
            hint="make that submodule's forward free of Python decisions on tensor values, or give smaller inputs",
        )
    for path, reason in refused:
        log.warning("block %s could not be captured and is left as it is: %s", path, reason)
    how = f"block by block ({len(segments)} blocks; whole model refused: {refusal})"
    if refused:
        how += f"; {len(refused)} blocks refused: " + ", ".join(path for path, _ in refused)
    return Capture(tuple(segments), inputs, how)


# ---------------------------------------------------------------------------------------- graphs and their weights


def recapture(model: nn.Module, segment: Segment) -> Segment:
    """Capture again what a segment was captured from, after the model was edited. Raises `CaptureError`."""
    if isinstance(segment.program, fx.GraphModule):
        return _graph_segment(model, segment.inputs)
    block = model.get_submodule(segment.path)
    try:
        program, _ = _export(block, segment.inputs, dynamic=False)
    except _Refused as refusal:
        raise CaptureError(f"torch.export refused the edited model: {refusal}", where=segment.path or None) from refusal
    return _segment(segment.path, program, segment.inputs)


def _segment(path: str, program: ExportedProgram, inputs: Inputs) -> Segment:
    signature = program.graph_signature
    prefix = f"{path}." if path else ""
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {node: program.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    return Segment(path, program.graph, {node: prefix + name for node, name in held.items()}, constants, program, inputs)


def _graph_segment(module: nn.Module, inputs: Inputs) -> Segment:
    """The graph of an already traced module; its `get_attr` nodes are the weights."""
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"a graph module was expected, not {type(module).__name__}")
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    named = {n.name: str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    weights = {node: name for node, name in named.items() if name in held}
    literals = {node: attrgetter(name)(module) for node, name in named.items() if name not in held}
    tensors = {node: value for node, value in literals.items() if isinstance(value, torch.Tensor)}
    return Segment("", module.graph, weights, tensors, module, inputs)


def _of_program(program: ExportedProgram) -> Inputs:
    example: Any = program.example_inputs
    return example if example is not None else ((), {})
