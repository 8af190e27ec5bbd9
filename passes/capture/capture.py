"""What the model computes, as graphs: live module or traced program in, `Capture` out.

Flow: record one forward (reference outputs, how every module is called) → `torch.export` of the whole model, non-strict,
then strict → block by block when neither works, and what `torch.export` refuses of these as a graph of what ran → an error
that names the submodule and quotes torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from memrewrite.errors import CaptureError
from memrewrite.passes.capture.lowering import lower
from memrewrite.passes.capture.operator_trace import record
from memrewrite.passes.capture.segment import Capture, Segment, graph_segment, of_the_model, segment_of
from memrewrite.passes.capture.torch_export import Refused, export_program, log
from memrewrite.passes.models.block_stacks import outermost_lists
from memrewrite.passes.models.call_recorder import Recorder
from memrewrite.passes.models.forward import Inputs, as_inputs, first_run, on_device_of, on_meta


def capture(model: nn.Module | ExportedProgram, inputs: Any, *, dynamic: bool = False, as_tree: bool = False) -> Capture:
    """Capture `model` with example `inputs` (a tuple, a dict, or `(args, kwargs)`); tensors may be on `meta`.

    `dynamic` lets torch make batch and sequence symbolic where it can. An `ExportedProgram` or `fx.GraphModule` is taken
    as it is; `as_tree` has a `GraphModule` traced like any module. Raises `ModelError` when the model does not run on its
    inputs, `CaptureError` when torch cannot trace it.
    """
    if isinstance(model, ExportedProgram):
        return _as_given(model.module(check_guards=False), inputs or _of_program(model), "an exported program, as given")
    if isinstance(model, fx.GraphModule) and not as_tree:
        given = _unguarded(model) if _in_aten(model) else model
        return _as_given(given, inputs, "a graph module, as given")
    arguments, recorder = on_device_of(model, as_inputs(inputs)), Recorder(model)
    outputs = None
    if not on_meta(model):  # many forwards look at values, and run on meta only while they are traced
        with recorder:
            outputs = first_run(model, arguments)
    try:
        program, how = export_program(model, arguments, dynamic, recorder if on_meta(model) else None)
        made = Capture((segment_of("", program, arguments),), arguments, f"whole model, torch.export {how}")
    except Refused as refusal:
        made = _block_by_block(model, arguments, recorder.block_inputs, str(refusal))
    return replace(made, calls=recorder.calls, outputs=outputs)


def as_graph(captured: Capture) -> Capture:
    """The capture of a live module as one whole graph, as the capture of that graph: its weights are the module's.

    The outputs are the graph's own, from one forward. `captured` must be whole.
    """
    program = captured.segments[0].program
    if isinstance(program, ExportedProgram):
        return _as_given(program.module(check_guards=False), captured.inputs, "an exported program, as given")
    return _as_given(program, captured.inputs, "a graph module, as given")


def is_traced(model: nn.Module | ExportedProgram) -> bool:
    """Whether a model is a graph already: of ATen operators, or of torch's own functions and modules."""
    return isinstance(model, (ExportedProgram, fx.GraphModule))


def _in_aten(module: fx.GraphModule) -> bool:
    """Whether a graph is one of operators, with shapes known, which needs no lowering."""
    calls = [n for n in module.graph.nodes if n.op.startswith("call_") and n.users]  # none reads what only checks the inputs
    return all(node.op == "call_function" and "val" in node.meta for node in calls)


def _unguarded(module: Any) -> fx.GraphModule:
    """A graph module without the calls of modules that nothing reads: guards, by which `export` checks its inputs."""
    if not any(node.op == "call_module" for node in module.graph.nodes):
        return module  # type: ignore[no-any-return]
    graph = copy.deepcopy(module.graph)
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _as_given(module: nn.Module, inputs: Any, how: str) -> Capture:
    """A model that is a graph already."""
    arguments = on_device_of(module, as_inputs(inputs))
    outputs = first_run(module, arguments)
    is_given = not isinstance(module, fx.GraphModule) or _in_aten(module)
    segment = graph_segment(module, arguments) if is_given else lowered_segment(module, arguments)
    return Capture((segment,), arguments, how, outputs=outputs)


# ------------------------------------------------------------------------------------------------- torch.export


def _block_by_block(model: nn.Module, inputs: Inputs, block_inputs: Mapping[str, Inputs], refusal: str) -> Capture:
    """Capture each repeated block by itself, with the inputs it had in the recorded forward; then what is around them."""
    segments, refused = [], []
    for list_path, blocks in outermost_lists(model):
        for name, block in blocks.named_children():
            path = f"{list_path}.{name}" if list_path else name
            if path not in block_inputs:
                continue
            try:
                program, _ = export_program(block, block_inputs[path], dynamic=False)
                segments.append(of_the_model(model, segment_of(path, program, block_inputs[path])))
            except Refused as error:
                refused.append((path, str(error)))
    exported = len(segments)
    if on_meta(model):  # nothing can run there
        if not segments:
            path, reason = refused[0] if refused else ("", refusal)
            raise CaptureError(
                f"torch.export refused the model ({refusal}) and every block of it ({reason})",
                where=path or type(model).__name__,
                hint="give the model on a device, with values, so that what runs can be recorded; or smaller inputs",
            )
        for path, reason in refused:
            log.warning("block %s could not be captured and is left as it is: %s", path, reason)
    else:
        segments += [_recorded_segment(model, path, block_inputs[path], ()) for path, _ in refused]
        segments.append(_recorded_segment(model, "", inputs, tuple(segment.path for segment in segments)))
    what = "refused" if on_meta(model) else "recorded as they ran"
    how = f"block by block ({exported} blocks exported; whole model refused: {refusal})"
    if refused:
        how += f"; {len(refused)} blocks {what}: " + ", ".join(path for path, _ in refused) + f" ({refused[0][1]})"
    return Capture(tuple(segments), inputs, how)


# ---------------------------------------------------------------------------------------- graphs and their weights


def recapture(model: nn.Module, segment: Segment) -> Segment:
    """Capture again what a segment was captured from, after the model was edited. Raises `CaptureError`."""
    if segment.own_segments is not None:
        return _recorded_segment(model, segment.path, segment.inputs, segment.own_segments)
    if isinstance(segment.program, fx.GraphModule):
        return lowered_segment(model, segment.inputs) if segment.values else graph_segment(model, segment.inputs)
    block = model.get_submodule(segment.path)
    try:
        program, _ = export_program(block, segment.inputs, dynamic=False)
    except Refused as refusal:
        raise CaptureError(f"torch.export refused the edited model: {refusal}", where=segment.path or None) from refusal
    return of_the_model(model, segment_of(segment.path, program, segment.inputs))


def _recorded_segment(model: nn.Module, path: str, inputs: Inputs, own_segments: tuple[str, ...]) -> Segment:
    """What runs in one forward of a block or the model; its graph holds for these inputs alone."""
    made = graph_segment(record(model.get_submodule(path), inputs, own_segments), inputs)
    prefix = f"{path}." if path else ""
    weights = {node: prefix + name for node, name in made.weights.items()}
    return of_the_model(model, replace(made, path=path, weights=weights, own_segments=own_segments))


def lowered_segment(module: Any, inputs: Inputs) -> Segment:
    """The ATen graph of a module whose graph is written in torch's own functions, methods and modules."""
    made = lower(module, inputs)
    tensors = {node: attrgetter(name)(module) for node, name in made.weights.items()}
    return Segment("", made.graph, made.weights, made.literals, module, inputs, tensors, made.values, made.written)


def _of_program(program: ExportedProgram) -> Inputs:
    example: Any = program.example_inputs
    return example if example is not None else ((), {})
