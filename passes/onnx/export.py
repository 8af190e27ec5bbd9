"""`export_onnx`: a model as one ONNX file that any runtime can run, and that ONNX Runtime with the native library runs fast.

Flow: prepare the model → `torch.export`, compared with the model → translate the graph, with fewer dynamic axes where torch
cannot otherwise → name its values, describe it in metadata → write, check, rename.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from memrewrite.errors import ExportError
from memrewrite.frozen import Frozen
from memrewrite.passes.capture.torch_export import Refused, export_program
from memrewrite.passes.models.distance import distance, refuse_inexact
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating, on_meta, run
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
from memrewrite.passes.onnx.graph import OPSET, Operators, TranslationError, onnx_graph
from memrewrite.passes.onnx.names import name_values
from memrewrite.passes.onnx.prepare import Float, Prepared, prepared

if TYPE_CHECKING:
    import onnx_ir

log = logging.getLogger("memrewrite")

Dynamic = Literal["all", "batch", "none"]
AXES: dict[Dynamic, int] = {"all": 3, "batch": 1, "none": 0}  # axes of an input that may be dynamic, at most


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
    dynamic: Dynamic = "all",
    allow_inexact: bool = False,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
    step: Callable[[str], None] | None = None,
) -> Exported:
    """Write `model` as an ONNX file (opset 20, IR version 9).

    The graph is that of eval mode. The first two axes of every input (three with `with_past`) are dynamic if torch can export
    them so, and are named `batch`, `sequence`, or after their input. An axis is fixed if the model needs its length, or if it
    is 1 in the example inputs. If torch can export or translate the model only with fewer dynamic axes, the batch alone is
    dynamic, or none is. In each of these cases the log has a warning. Inputs and outputs are named as in the model's forward,
    nested ones by their path (`past_key_values.0.key`).

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
        dynamic: "batch" makes the first axis of every input dynamic alone, "none" fixes all lengths at those of the example.
        allow_inexact: Write the file even if the exported program's outputs on `inputs` differ from the model's by more than
            rounding: tracing may change what a model computes.
        overwrite: Replace an existing regular file, and delete its weights, after the new one was written and checked.
        notes: Entries to add to the file's metadata, under the prefix `memrewrite.`.
        step: Receives a short message before each stage.

    Returns:
        The paths, inputs, outputs, operators, data type and size of what was written.

    Raises:
        ExportError: The target exists or its directory does not, it cannot be written, inputs are missing, torch cannot export
            the model or translate it, its program computes something else, its numbers cannot be converted, or it has no cache
            as `with_past` needs.
        ModelError: The model does not run on the example inputs, or none can be generated.
    """
    if dynamic not in AXES:
        raise ExportError(f"`dynamic` is {dynamic!r}", hint="one of " + ", ".join(map(repr, AXES)))
    report, target = step or (lambda _: None), output(Path(path), overwrite=overwrite)
    with evaluating(model):
        ready = prepared(model, inputs, dtype, with_past=with_past)
        traced = _in_onnx(ready, op, min(ready.axes, AXES[dynamic]), allow_inexact, report)
    graph = traced.graph
    if traced.mutated:
        log.warning("the model mutates its buffers %s: the file stores them as constants", ", ".join(traced.mutated))
    if with_past:  # weights keep the names that they have in the model itself, inside the `DecoderStep`
        for value in [*graph.graph.initializers.values()]:
            value.name = str(value.name).removeprefix("model.")
    form = {"op": op, "dtype": ready.dtype, "with_past": str(with_past).lower(), "selections": str(traced.selections)}
    describe(graph, {**of_rewrite(model), **form, **(notes or {})})
    report("writing the file")
    exported = _summary(graph, target.path, write(graph, target), op, ready.dtype)
    _warn_of_fixed_axes(exported.inputs)
    return exported


class _Traced(NamedTuple):
    """A model's graph in ONNX with its final names, its number of top-ks, and the buffers that it mutates."""

    graph: onnx_ir.Model
    selections: int
    mutated: list[str]


def _in_onnx(ready: Prepared, op: Operators, axes: int, allow_inexact: bool, report: Callable[[str], None]) -> _Traced:
    """The model in ONNX with `axes` dynamic axes; where `torch.onnx` cannot translate it so, with the first alone, or none.

    A model that is already a program is traced again.
    """
    if not tree_leaves(ready.inputs):
        raise ExportError("the model has no example inputs", hint="give `inputs`: a tuple, a dict, or (args, kwargs)")
    model = ready.model.module(check_guards=False) if isinstance(ready.model, ExportedProgram) else ready.model
    where = type(model).__name__
    for symbolic in dict.fromkeys((axes, min(axes, 1), 0)):
        report("tracing the model")
        try:
            program = export_program(model, ready.inputs, symbolic).program  # which the following stages may edit
        except Refused as refusal:
            raise ExportError(f"torch.export refused the model: {refusal}", where=where) from refusal
        if not (allow_inexact or on_meta(model)):
            outputs = (run(one, ready.inputs) for one in (program.module(check_guards=False), model))
            refuse_inexact(distance(*outputs), ExportError, where)
        mutated = _mutated_buffers(program)
        report("translating it to ONNX")
        try:
            graph, selections = onnx_graph(program, op)
        except TranslationError as error:
            if not (symbolic and program.range_constraints):  # no axis is dynamic
                raise
            log.warning("with dynamic axes (%d of every input) %s; fewer are tried", symbolic, error.what)
        else:
            name_values(graph, program, ready.lengths)
            return _Traced(graph, selections, mutated)
    raise AssertionError  # the attempt without dynamic axes returns or raises


def _mutated_buffers(program: ExportedProgram) -> list[str]:
    """Names of the buffers that an in-place op of the graph mutates."""
    buffers, found = program.graph_signature.inputs_to_buffers, set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, operand in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.add(buffers.get(getattr(operand, "name", "")))
    return sorted(name for name in found if name)


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
