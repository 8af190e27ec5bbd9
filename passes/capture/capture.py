"""What the model computes, as graphs: a live module or a graph in, a `Capture` out.

Flow: one forward, in which models fill their caches → record a second one (reference outputs, how every module is called) →
`torch.export` of the whole model, non-strict, then strict → when torch refuses both, each block separately, and a trace of the
operators that ran for the blocks that torch refuses and for the code around them → an error that names the submodule and quotes
torch. The caller guards the model's state (`forward.evaluating`): what the first forward changes stays inside of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from memrewrite.errors import CaptureError, ModelError
from memrewrite.passes.capture.lowering import lower
from memrewrite.passes.capture.operator_trace import record
from memrewrite.passes.capture.segment import Capture, Segment, graph_segment, segment_of, with_names_of
from memrewrite.passes.capture.torch_export import BATCH_AND_SEQUENCE, Refused, export_program, log
from memrewrite.passes.models.block_stacks import outermost_lists
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.distance import distance
from memrewrite.passes.models.forward import Inputs, as_inputs, on_device_of, on_meta, run, warm_up
from memrewrite.passes.models.tensors import tensors_of


def capture(model: nn.Module | ExportedProgram, inputs: Any, *, dynamic: bool = False, as_module_tree: bool = False) -> Capture:
    """Capture `model` with example `inputs`.

    Args:
        model: a module on a device or on `meta`, an `fx.GraphModule`, or an `ExportedProgram`.
        inputs: a tuple, a dict, or `(args, kwargs)`; tensors may be on `meta`. None for the example inputs of a program.
        dynamic: make batch and sequence symbolic where torch can.
        as_module_tree: of an `fx.GraphModule`, ignore its graph and export it like any other module. Its MLPs may be in
            submodules that its graph only calls; then these submodules can be replaced. No effect on other models.

    Raises:
        ModelError: the model does not run on its inputs, or has lazy modules that did not run yet.
        CaptureError: torch cannot trace it.
    """
    if isinstance(model, ExportedProgram):
        return _given_graph(model.module(check_guards=False), inputs or _inputs_of(model), "an exported program, as given")
    if isinstance(model, fx.GraphModule) and not as_module_tree:
        return _given_graph(_without_guards(model) if _is_aten(model) else model, inputs, "a graph module, as given")
    _refuse_lazy(model)
    arguments, recorder = on_device_of(model, as_inputs(inputs)), Recorder(model)
    outputs = None
    if not on_meta(model):  # many forwards read values of tensors, which on meta works only while torch traces them
        warm_up(model, arguments)
        with recorder:
            outputs = run(model, arguments)
    try:
        axes, tracing = BATCH_AND_SEQUENCE if dynamic else 0, recorder if on_meta(model) else None
        program, how = export_program(model, arguments, axes, tracing)
        captured = Capture((segment_of("", program, arguments),), arguments, f"whole model, torch.export {how}")
    except Refused as refusal:
        captured = _block_by_block(model, arguments, recorder.block_inputs, str(refusal))
    return replace(captured, calls=recorder.calls, outputs=outputs, state=dict(tensors_of(model)))


def _refuse_lazy(model: nn.Module) -> None:
    """Raise `ModelError` for a model with lazy modules that did not run yet: the first forward replaces their tensors."""
    for name, tensor in tensors_of(model):
        if is_lazy(tensor):
            raise ModelError(
                f"{name!r} has no shape yet: its module is lazy",
                where=type(model).__name__,
                hint="run the model once on these inputs; lazy modules get their shapes in their first forward",
            )


def as_graph(captured: Capture) -> Capture:
    """The capture of the program of a whole-model capture of a live module; its weights are the module's.

    The outputs are the program's own, from one forward, and `distance` is how far they are from the module's. `captured` must
    be whole.
    """
    program = captured.segments[0].program
    graph = program.module(check_guards=False) if isinstance(program, ExportedProgram) else program
    given = _given_graph(graph, captured.inputs, captured.how)
    far = None if captured.outputs is None else distance(given.outputs, captured.outputs)
    return replace(given, distance=far)


def is_traced(model: nn.Module | ExportedProgram) -> bool:
    """True if a model is a graph already: of ATen operators, or of torch's own functions and modules."""
    return isinstance(model, (ExportedProgram, fx.GraphModule))


def _is_aten(module: fx.GraphModule) -> bool:
    """True if every node that is used is an operator with a known shape: such a graph needs no lowering."""
    calls = [n for n in module.graph.nodes if n.op.startswith("call_") and n.users]  # guards, which check inputs, are unused
    return all(node.op == "call_function" and "val" in node.meta for node in calls)


def _without_guards(module: fx.GraphModule) -> fx.GraphModule:
    """An ATen graph module without the guards by which `torch.export` checks the inputs: its calls of modules, all unused."""
    if not any(node.op == "call_module" for node in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _given_graph(module: nn.Module, inputs: Any, how: str) -> Capture:
    """The capture of a model that is a graph already."""
    arguments = on_device_of(module, as_inputs(inputs))
    outputs = run(module, arguments)
    is_lowered = not isinstance(module, fx.GraphModule) or _is_aten(module)
    segment = graph_segment(module, arguments) if is_lowered else lowered_segment(module, arguments)
    return Capture((segment,), arguments, how, outputs=outputs)


def _inputs_of(program: ExportedProgram) -> Inputs:
    example: Any = program.example_inputs
    return example if example is not None else ((), {})


# ------------------------------------------------------------------------------------------------- block by block


def _block_by_block(model: nn.Module, inputs: Inputs, block_inputs: Mapping[str, Inputs], refusal: str) -> Capture:
    """Capture each repeated block separately, with its inputs in the recorded forward; then the code around the blocks."""
    segments: list[Segment] = []
    refused: list[tuple[str, str]] = []  # path, reason
    for path, block in _blocks(model):
        if path in block_inputs:
            try:
                program = export_program(block, block_inputs[path]).program
                segments.append(with_names_of(model, segment_of(path, program, block_inputs[path])))
            except Refused as error:
                refused.append((path, str(error)))
    how = f"block by block ({len(segments)} blocks exported; whole model refused: {refusal})"
    if on_meta(model):  # nothing can run there
        _warn_or_raise(model, segments, refused, refusal)
    else:
        segments += [_recorded_segment(model, path, block_inputs[path], ()) for path, _ in refused]
        segments.append(_recorded_segment(model, "", inputs, tuple(segment.path for segment in segments)))
    if refused:
        what = "refused" if on_meta(model) else "recorded as they ran"
        how += f"; {len(refused)} blocks {what}: " + ", ".join(path for path, _ in refused) + f" ({refused[0][1]})"
    return Capture(tuple(segments), inputs, how)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for list_path, blocks in outermost_lists(model):
        for name, block in blocks.named_children():
            yield f"{list_path}.{name}" if list_path else name, block


def _warn_or_raise(model: nn.Module, segments: list[Segment], refused: list[tuple[str, str]], refusal: str) -> None:
    """Log the refused blocks of a model on `meta`. Raises `CaptureError` when torch exported no block."""
    if not segments:
        path, reason = refused[0] if refused else ("", refusal)
        raise CaptureError(
            f"torch.export refused the model ({refusal}) and every block of it ({reason})",
            where=path or type(model).__name__,
            hint="give the model on a device, with values, so that its operators can be recorded; or smaller inputs",
        )
    for path, reason in refused:
        log.warning("block %s could not be captured and stays unchanged: %s", path, reason)


# ------------------------------------------------------------------------------------------------- other segments


def recapture(model: nn.Module, segment: Segment) -> Segment:
    """Capture again, after an edit of the model, what a segment was captured from. Raises `CaptureError`."""
    if segment.own_segments is not None:
        return _recorded_segment(model, segment.path, segment.inputs, segment.own_segments)
    if segment.is_given:
        return lowered_segment(model, segment.inputs) if segment.values else graph_segment(model, segment.inputs)
    block = model.get_submodule(segment.path) if segment.path else model
    try:
        program = export_program(block, segment.inputs).program
    except Refused as refusal:
        raise CaptureError(f"torch.export refused the edited model: {refusal}", where=segment.path or None) from refusal
    return with_names_of(model, segment_of(segment.path, program, segment.inputs))


def _recorded_segment(model: nn.Module, path: str, inputs: Inputs, own_segments: tuple[str, ...]) -> Segment:
    """The operators that run in one forward of a block or the model; the graph is valid for these inputs only."""
    module = model.get_submodule(path) if path else model  # a ScriptModule has no `get_submodule`
    segment = graph_segment(record(module, inputs, own_segments), inputs)
    prefix = f"{path}." if path else ""
    weights = {node: prefix + name for node, name in segment.weights.items()}
    return with_names_of(model, replace(segment, path=path, weights=weights, own_segments=own_segments))


def lowered_segment(module: Any, inputs: Inputs) -> Segment:
    """The ATen graph of a graph module whose nodes are torch's own functions, methods and modules."""
    graph, weights, literals, values, written = lower(module, inputs)
    tensors = {node: attrgetter(name)(module) for node, name in weights.items()}
    return Segment("", graph, weights, literals, module, inputs, tensors, values, written)
