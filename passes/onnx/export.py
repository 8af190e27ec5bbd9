"""`export_onnx`: a model as one ONNX file that any runtime can run, and that ONNX Runtime with the native library runs fast.

Flow: prepare the model → `torch.export` → translate the graph, name its values, describe it in metadata → write, check, rename.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from memrewrite.errors import ExportError
from memrewrite.frozen import Frozen
from memrewrite.passes.capture.torch_export import Refused, export_program
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.onnx.file import (
    Port,
    describe,
    inputs_of,
    memory_nodes,
    of_rewrite,
    output,
    outputs_of,
    weights_of,
    write,
)
from memrewrite.passes.onnx.graph import OPSET, Operators, onnx_graph
from memrewrite.passes.onnx.names import name_values
from memrewrite.passes.onnx.prepare import Float, Prepared, prepared

if TYPE_CHECKING:
    import onnx_ir

log = logging.getLogger("memrewrite")


class Exported(Frozen):
    """An exported file: its paths, its inputs and outputs, and the form of its memory operators."""

    path: str
    data: str | None  # the file of weights next to it
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Operators
    nodes: dict[str, int]  # number of nodes of each memory operator; empty if their functions were inlined
    dtype: str
    opset: int
    weights: int  # bytes


@exclusive
def export_onnx(
    model: nn.Module | ExportedProgram,
    path: str | Path,
    inputs: Any = None,
    *,
    op: Operators = "both",
    dtype: Float | None = None,
    with_past: bool = False,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
    step: Callable[[str], None] | None = None,
) -> Exported:
    """Write `model` as an ONNX file (opset 20, IR version 9).

    The graph is that of eval mode. The first two axes of every input (three with `with_past`) are dynamic if torch can export
    them so, and are named `batch`, `sequence`, or after their input. An axis is fixed if the model needs its length, or if it
    is 1 in the example inputs; then the log has a warning. Inputs and outputs are named as in the model's forward, nested ones
    by their path (`past_key_values.0.key`).

    Args:
        model: A module, rewritten or not, or an exported program. It is not changed.
        path: The file to write. Weights of more than 1 GiB go to a second file next to it, `path` + ".data",
            or with a unique part before ".data" if that name is in use.
        inputs: Example inputs: a tensor (the only argument), a tuple of positional arguments, a dict of keyword arguments, or
            `(args, kwargs)`. If None, the inputs of an exported or rewritten graph are used, or random ones are generated from
            the config of a Hugging Face model. With `with_past` they are always generated.
        op: "both" writes each memory operator as a node of the domain `memrewrite` with a function of standard operators,
            "standard" only the standard operators, "native" only the node, which needs the native library.
        dtype: Converts a copy of the model. If None, float32 and float16 models keep their type, and models of other types
            are converted to float32, with a warning in the log.
        with_past: Export one step of a causal language model, whose cache is an input and an output.
        overwrite: Replace an existing regular file, and delete its weights, after the new one was written and checked.
        notes: Entries to add to the file's metadata, under the prefix `memrewrite.`.
        step: Receives a short message before each stage.

    Returns:
        The paths, inputs, outputs, operators, data type and size of what was written.

    Raises:
        ExportError: The target exists or its directory does not, it cannot be written, inputs are missing, torch cannot export
            the model or translate it, its numbers cannot be converted, or it has no cache as `with_past` needs.
        ModelError: The model does not run on the example inputs, or none can be generated.
    """
    report, target = step or (lambda _: None), output(Path(path), overwrite=overwrite)
    with evaluating(model):
        ready = prepared(model, inputs, dtype, with_past=with_past)
        report("tracing the model")
        program = _traced(ready)
    if mutated := _mutated_buffers(program):
        log.warning("the model mutates its buffers %s: the file stores them as constants", ", ".join(mutated))
    report("translating it to ONNX")
    graph, selections = _translated(program, ready, op, with_past=with_past)
    form = {"op": op, "dtype": ready.dtype, "with_past": str(with_past).lower(), "selections": str(selections)}
    describe(graph, {**of_rewrite(model), **form, **(notes or {})})
    report("writing the file")
    exported = _summary(graph, target.path, write(graph, target), op, ready.dtype)
    _warn_of_fixed_axes(exported.inputs)
    return exported


def _traced(ready: Prepared) -> ExportedProgram:
    """A program that the following stages may edit; a model that is already a program is traced again."""
    if not tree_leaves(ready.inputs):
        raise ExportError("the model has no example inputs", hint="give `inputs`: a tuple, a dict, or (args, kwargs)")
    model = ready.model.module(check_guards=False) if isinstance(ready.model, ExportedProgram) else ready.model
    try:
        return export_program(model, ready.inputs, dynamic=True, axes=ready.axes).program
    except Refused as refusal:
        raise ExportError(f"torch.export refused the model: {refusal}", where=type(model).__name__) from refusal


def _mutated_buffers(program: ExportedProgram) -> list[str]:
    """Names of the buffers that an in-place op of the graph mutates."""
    buffers, found = program.graph_signature.inputs_to_buffers, set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, operand in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.add(buffers.get(getattr(operand, "name", "")))
    return sorted(name for name in found if name)


def _translated(program: ExportedProgram, ready: Prepared, op: Operators, *, with_past: bool) -> tuple[onnx_ir.Model, int]:
    """The ONNX graph of `program` with its final names, and its number of top-ks."""
    graph, selections = onnx_graph(program, op)
    name_values(graph, program, ready.lengths)
    if with_past:  # weights keep the names that they have in the model itself, inside the `DecoderStep`
        for value in [*graph.graph.initializers.values()]:
            value.name = str(value.name).removeprefix("model.")
    return graph, selections


def _summary(graph: onnx_ir.Model, target: Path, data: Path | None, op: Operators, dtype: str) -> Exported:
    return Exported(
        path=str(target),
        data=str(data) if data else None,
        inputs=inputs_of(graph),
        outputs=outputs_of(graph),
        operators=op,
        nodes=memory_nodes(graph),
        dtype=dtype,
        opset=OPSET,
        weights=weights_of(graph),
    )


def _warn_of_fixed_axes(inputs: tuple[Port, ...]) -> None:
    """Log a warning for inputs whose batch or sequence axis is fixed at 1, or that have no dynamic axis."""
    for port in inputs:
        if 1 in port.shape[:2]:
            log.warning("an axis of %s is fixed at 1, its length in the example: give a longer one", port.name)
        elif port.shape and all(isinstance(size, int) for size in port.shape):
            log.warning("every axis of %s is fixed at its length in the example: torch found none dynamic", port.name)
