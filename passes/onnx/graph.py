"""An exported program as an ONNX graph, with the memory operators as nodes of the domain `memrewrite`.

Flow: drop the arguments that ONNX does not have (backend, gradient) → `torch.onnx.export` with our translations → add a
function of standard operators for each memory operator, so that any runtime can run its nodes; or inline these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch.export import ExportedProgram

from memrewrite.errors import ExportError, in_one_line
from memrewrite.kernels.onnx_functions import DOMAIN, NATIVE, functions
from memrewrite.passes.capture.torch_messages import quiet
from memrewrite.passes.models.exclusive import tracing_alone
from memrewrite.passes.onnx.attention import prepare_attention

if TYPE_CHECKING:
    import onnx_ir

Operators = Literal["both", "standard", "native"]
OPSET = 20  # of the standard operators: ONNX Runtime 1.17 reads it, the oldest runtime that the native library supports
IR_VERSION = 9  # of the file: the newest that ONNX Runtime 1.17 reads; no newer feature is used
SELECTION = "memory.{}.{}"  # names of a top-k's outputs: its number in the graph, and "scores" or "slots"


class TranslationError(ExportError):
    """`torch.onnx` cannot translate a program; perhaps it can with fewer dynamic axes."""


def onnx_graph(program: ExportedProgram, operators: Operators = "both") -> tuple[onnx_ir.Model, int]:
    """`program` in ONNX, and how many product-key top-ks it has; their outputs are named by `SELECTION`.

    `operators`: "both" adds a function for every memory operator, "native" only for those that the native library does not
    have, "standard" inlines the functions. Raises `TranslationError` with torch's reason if `torch.onnx` cannot translate the
    program.
    """
    model = _translated(program)
    model.ir_version = IR_VERSION
    selections = _name_selections(model)
    _attach_functions(model, without=NATIVE if operators == "native" else ())
    if operators == "standard":
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model)
        model.opset_imports.pop(DOMAIN, None)
    _remove_metadata(model)
    return model, selections


def _name_selections(model: onnx_ir.Model) -> int:
    """Name the outputs of every top-k by its number in the graph; returns the number of top-ks."""
    topks = [node for node in model.graph if node.op_type == "ProductKeyTopk" and node.domain == DOMAIN]
    for number, node in enumerate(topks):
        for value, what in zip(node.outputs, ("scores", "slots"), strict=True):
            value.name = SELECTION.format(number, what)
    return len(topks)


def _translated(program: ExportedProgram) -> onnx_ir.Model:
    """`program` translated by `torch.onnx`; its memory operators are nodes without functions."""
    try:
        from memrewrite.passes.onnx.translations import ARGUMENTS, TRANSLATIONS
    except ImportError as error:
        raise ExportError(f"writing ONNX needs more packages ({error})", hint="pip install 'memrewrite[onnx]'") from error
    for node in program.graph.nodes:
        if node.target in ARGUMENTS:
            _drop_arguments(node, ARGUMENTS[node.target])
    program = prepare_attention(program)
    try:
        with tracing_alone(), quiet(), _slices_paired_at_slices():
            translated = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=TRANSLATIONS
            )
    except Exception as error:  # torch raises many types, each with a page of advice
        hint = "memrewrite --debug shows torch's report"
        raise TranslationError(
            f"torch.onnx cannot translate the model: {in_one_line(_root_cause(error))}", hint=hint
        ) from error
    if translated is None:
        raise ExportError("torch.onnx returned no model")
    model: onnx_ir.Model = translated.model
    return model


@contextmanager
def _slices_paired_at_slices() -> Iterator[None]:
    """Inside, the optimizer of `torch.onnx` looks for pairs of `Slice` nodes at these nodes alone.

    Its rule for them begins at every node of the graph, whatever its type, and each time lists all nodes: in a model of 30
    blocks this takes longer than the rest of the optimizer. It can match nowhere else, so the result is the same.
    """
    from onnxscript.rewriter.rules.common import slice_split_rule as rule

    everywhere = rule.try_rewrite

    def at_slices(model: Any, graph: Any, node: onnx_ir.Node, **options: Any) -> Any:
        return everywhere(model, graph, node, **options) if node.op_type == "Slice" else None

    rule.try_rewrite = at_slices
    try:
        yield
    finally:
        rule.try_rewrite = everywhere


def _drop_arguments(node: fx.Node, count: int) -> None:
    """Keep the first `count` arguments of a memory operator; the others (backend, gradient) do not change its result."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    passed = dict(zip(names, node.args, strict=False)) | node.kwargs
    if passed.get("scale") is not None:
        raise ExportError("the graph reads a table of 8 bits", where=node.name, hint="export the module it was traced from")
    dtype, values = passed.get("dtype"), passed.get("values")
    if dtype is not None and values is not None and dtype != values.meta["val"].dtype:
        wanted, stored = (str(x).removeprefix("torch.") for x in (dtype, values.meta["val"].dtype))
        hint = "omit `dtype` and convert the result"
        raise ExportError(f"a lookup returns {wanted} from a table of {stored}: ONNX has none", where=node.name, hint=hint)
    node.args = tuple(passed[name] for name in names[:count] if name in passed)
    node.kwargs = {}


def _root_cause(error: BaseException) -> BaseException:
    """The innermost cause: the outer exceptions explain how to report a bug to torch."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _attach_functions(model: onnx_ir.Model, without: Sequence[str]) -> None:
    """Add a function for every memory operator that the graph calls, except for those in `without`."""
    import onnx_ir

    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for proto in functions(OPSET):
        if proto.name in called.difference(without):
            function = onnx_ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function


def _remove_metadata(model: onnx_ir.Model) -> None:
    """Remove the metadata that torch adds to every node and value, such as stack traces with paths of this machine."""
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
