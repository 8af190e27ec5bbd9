"""An exported program as an ONNX graph, the memory operators as nodes of their own domain.

Flow: what an operator is told beside its arguments is dropped → `torch.onnx.export` with our translations → a function of
standard operators for each operator, by which any runtime can run its nodes; or the nodes written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import fx
from torch.export import ExportedProgram

from memrewrite.errors import ExportError, in_one_line
from memrewrite.kernels.onnx_functions import DOMAIN, functions
from memrewrite.passes.capture.torch_export import quiet
from memrewrite.passes.onnx.attention import attention_spelled

if TYPE_CHECKING:
    import onnx_ir

Operators = Literal["both", "standard", "native"]
OPSET = 20  # of standard operators: ONNX Runtime 1.17 reads it, which is where the native library begins too
IR_VERSION = 9  # of the file: what that runtime reads; nothing newer is used
SELECTION = "memory.{}.{}"  # names of what a top-k chose: its place among them, and "scores" or "slots"


def onnx_graph(program: ExportedProgram, operators: Operators = "both") -> onnx_ir.Model:
    """`program` in ONNX. `operators`: "both" gives every memory operator its function, "native" leaves it to a library,
    "standard" writes it out. Raises `ExportError` with torch's reason.
    """
    model = _translated(program)
    model.ir_version = IR_VERSION
    chosen = [node for node in model.graph if node.op_type == "ProductKeyTopk" and node.domain == DOMAIN]
    for place, node in enumerate(chosen):
        for value, what in zip(node.outputs, ("scores", "slots"), strict=True):
            value.name = SELECTION.format(place, what)
    if operators != "native":
        _attach(model)
    if operators == "standard":
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model)
        model.opset_imports.pop(DOMAIN, None)
    _tidy(model)
    return model


def selections(model: onnx_ir.Model) -> int:
    """How many top-ks of product keys a graph of ours holds, whether written out or not."""
    names = {value.name for node in model.graph for value in node.outputs}
    return next(place for place in range(len(names) + 1) if SELECTION.format(place, "slots") not in names)


def _translated(program: ExportedProgram) -> onnx_ir.Model:
    try:
        from memrewrite.passes.onnx.translations import TAKEN, TRANSLATIONS
    except ImportError as error:
        raise ExportError(f"writing ONNX needs more packages ({error})", hint="pip install 'memrewrite[onnx]'") from error
    for node in program.graph.nodes:
        if node.target in TAKEN:
            _plain(node, TAKEN[node.target])
    program = attention_spelled(program)
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=TRANSLATIONS
            )
    except Exception as error:  # torch raises many kinds, each with a page of advice
        hint = "memrewrite --debug shows torch's report"
        raise ExportError(f"torch.onnx cannot translate the model: {in_one_line(_root_cause(error))}", hint=hint) from error
    if made is None:
        raise ExportError("torch.onnx returned no model")
    model: onnx_ir.Model = made.model
    return model


def _plain(node: fx.Node, taken: int) -> None:
    """Which backend runs an operator, and how its table learns, is no part of what it computes."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("scale") is not None:
        raise ExportError("the graph reads a table of 8 bits", where=node.name, hint="export the module it was traced from")
    node.args = tuple(given[name] for name in names[:taken] if name in given)
    node.kwargs = {}


def _root_cause(error: BaseException) -> BaseException:
    """The innermost cause: the message of torch's outer error is about how to report a bug to torch."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _attach(model: onnx_ir.Model) -> None:
    """A function for every memory operator that the graph calls."""
    import onnx_ir

    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for proto in functions(OPSET):
        if proto.name in called:
            function = onnx_ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function


def _tidy(model: onnx_ir.Model) -> None:
    """Drop what torch notes on every node and value, stack traces with the paths of this machine among it."""
    kept = "namespace"  # the module a node came from: viewers fold the graph by it
    for node in model.graph.all_nodes():
        for name in [name for name in node.metadata_props if name != kept]:
            del node.metadata_props[name]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
