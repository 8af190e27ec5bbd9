"""`export_onnx`: a model as one ONNX file, which any runtime runs, and one that knows the native library runs fast.

Flow: the model prepared → `torch.export` → the ONNX graph, its names and what it says of itself → written, checked, renamed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from memrewrite.errors import ExportError
from memrewrite.frozen import Frozen
from memrewrite.passes.capture.torch_export import Refused, export_program
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.onnx.file import (
    Port,
    describe,
    inputs_of,
    memory_nodes,
    of_rewrite,
    outputs_of,
    refuse_existing,
    weights_of,
    write,
)
from memrewrite.passes.onnx.graph import OPSET, Operators, onnx_graph, selections
from memrewrite.passes.onnx.names import name_values
from memrewrite.passes.onnx.prepare import Float, Prepared, prepared

log = logging.getLogger("memrewrite")


class Exported(Frozen):
    """An exported file: where it lies, what it takes and gives, and how its memory operators are written."""

    path: str
    data: str | None  # the file of weights beside it
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Operators
    nodes: dict[str, int]  # of the memory operators; none where they are written out
    dtype: str
    opset: int
    weights: int  # bytes


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
    """Write `model` as ONNX to `path`, with weights of more than 1 GiB beside it in `path`.data.

    Of the example `inputs` (a tuple, a dict, or `(args, kwargs)`; left out, they are made from a Hugging Face config) the
    axes that torch finds dynamic are so in the file. `op`: "both" writes a memory operator as a node of the domain
    `memrewrite` with a function of standard operators, "standard" the latter alone, "native" the former alone. `dtype`
    converts a copy; left out, bfloat16 and float64 become float32, told in the log. `with_past`: a decoder's cache is an
    input and an output, and the example is made. `notes` go into the file's metadata. Raises `ExportError`; a file is
    replaced only with `overwrite`, and when the new one is whole.
    """
    say, target = step or (lambda _: None), Path(path)
    refuse_existing(target, overwrite=overwrite)
    with evaluating(model):
        ready = prepared(model, inputs, dtype, with_past=with_past)
        say("tracing the model")
        program = _traced(ready)
    if written := _written(program):
        log.warning("the model writes to its buffers %s as it runs: the file keeps them as they are", ", ".join(written))
    say("translating it to ONNX")
    graph = onnx_graph(program, op)
    name_values(graph, program, ready.lengths)
    if with_past:
        for value in [*graph.graph.initializers.values()]:
            value.name = str(value.name).removeprefix("model.")  # as they are called without the step around the model
    told = {"op": op, "dtype": ready.dtype, "with_past": str(with_past).lower(), "selections": str(selections(graph))}
    describe(graph, {**of_rewrite(model), **told, **(notes or {})})
    say("writing the file")
    data = write(graph, target)
    exported = Exported(
        path=str(target),
        data=str(data) if data else None,
        inputs=inputs_of(graph),
        outputs=outputs_of(graph),
        operators=op,
        nodes=memory_nodes(graph),
        dtype=ready.dtype,
        opset=OPSET,
        weights=weights_of(graph),
    )
    for port in exported.inputs:
        if 1 in port.shape[:2]:
            log.warning("an axis of %s is fixed at 1, its length in the example: give a longer one", port.name)
        elif port.shape and all(isinstance(size, int) for size in port.shape):
            log.warning("every axis of %s is fixed at its length in the example: torch found none dynamic", port.name)
    return exported


def _written(program: ExportedProgram) -> list[str]:
    """Buffers that an operator of the graph writes to."""
    buffers, found = program.graph_signature.inputs_to_buffers, set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, given in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.add(buffers.get(getattr(given, "name", "")))
    return sorted(name for name in found if name)


def _traced(ready: Prepared) -> ExportedProgram:
    """A graph of our own, which is edited on the way: a program that was given is traced again."""
    if not tree_leaves(ready.inputs):
        raise ExportError("the model has no example inputs", hint="give `inputs`: a tuple, a dict, or (args, kwargs)")
    model = ready.model.module(check_guards=False) if isinstance(ready.model, ExportedProgram) else ready.model
    try:
        return export_program(model, ready.inputs, dynamic=True, axes=ready.axes).program
    except Refused as refusal:
        raise ExportError(f"torch.export refused the model: {refusal}", where=type(model).__name__) from refusal
