"""Names in an exported file: inputs and outputs are named as in the model's forward, dynamic axes by what they count.

A nested input or output is named by its path, such as `past_key_values.0.key`. A dynamic axis, `s53` in torch, becomes `batch`
or `sequence`, or is named after its input. Two axes have the same name only if torch proved their lengths equal, because
runtimes plan memory by these names. One exception: the first axes of inputs that have equal lengths in the example are all
`batch`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path, tree_unflatten

from memrewrite.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir

SYMBOL = re.compile(r"\b[su]\d+\b")


def name_values(model: onnx_ir.Model, program: ExportedProgram, lengths: Mapping[int, str]) -> None:
    """Name the inputs, outputs and axes of `model`, in place; `lengths` maps an axis' length in the example to its name.

    Raises `ExportError` if the graph's inputs or outputs are not those of `program`.
    """
    inputs = _inputs(program)
    outputs: list[str] = []
    for name in _outputs(program):
        unused = f"output_{name}" if name.isdigit() or name in inputs else name or "output"
        outputs.append(unused if unused not in outputs else f"{unused}_{len(outputs)}")
    for what, values, names in (("inputs", model.graph.inputs, [*inputs]), ("outputs", model.graph.outputs, outputs)):
        if len(values) != len(names):
            found = ", ".join(str(value.name) for value in values)
            raise ExportError(f"the graph has the {what} {found}; the model's are {', '.join(names) or 'none'}")
    _separate_outputs(model)
    inner = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    for value in inner:
        if value.name in {*inputs, *outputs}:
            value.name = f"{value.name}.inner"
    for values, names in ((model.graph.inputs, [*inputs]), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    _name_axes(model, _axes(inputs, lengths))


def dotted(path: Sequence[Any]) -> str:
    """A path into nested inputs or outputs as a name: `present.0.key`."""
    parts = []
    for key in path:
        if isinstance(key, MappingKey):
            parts.append(str(key.key))
        elif isinstance(key, SequenceKey):
            parts.append(str(key.idx))
        else:
            parts.append(str(key.name if isinstance(key, GetAttrKey) else key))
    return ".".join(parts)


def argument_names(model: nn.Module | ExportedProgram, args: Sequence[Any]) -> list[str]:
    """Names of the forward's positional arguments, as `torch.export` gives them: those of `*args` are numbered."""
    if isinstance(model, ExportedProgram):
        return list(model.module_call_graph[0].signature.forward_arg_names or ())
    signature, names = inspect.signature(model.forward), list[str]()
    for name, value in signature.bind_partial(*args).arguments.items():
        is_variadic = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{number}" for number in range(len(value))] if is_variadic else [name]
    return names


def input_name(path: Sequence[Any], positional: Sequence[str]) -> str:
    """Name of a leaf of `(args, kwargs)` in the file: its path, which begins with 0 for args, or with 1 for kwargs."""
    kind, first, *rest = path
    return dotted([positional[first.idx] if kind.idx == 0 else first, *rest])


def _inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """Name → traced value of every tensor input, in order."""
    traced = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves, _ = tree_flatten_with_path(tree_unflatten(program.graph_signature.user_inputs, program.call_spec.in_spec))
    positional = argument_names(program, ())
    values = ((path, traced.get(leaf)) for path, leaf in leaves)
    return {input_name(path, positional): value for path, value in values if isinstance(value, Tensor)}


def _outputs(program: ExportedProgram) -> list[str]:
    """The path of every output that is a tensor, in order."""
    tensors = {node.name for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    leaves, _ = tree_flatten_with_path(tree_unflatten(program.graph_signature.user_outputs, program.call_spec.out_spec))
    return [dotted(path) for path, leaf in leaves if leaf in tensors]


def _separate_outputs(model: onnx_ir.Model) -> None:
    """Copy outputs that are also an input, a weight or another output: one value cannot have two names."""
    import onnx_ir

    seen = {id(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for index, value in enumerate(model.graph.outputs):
        if id(value) in seen:
            copy = onnx_ir.node("Identity", inputs=[value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            model.graph.append(copy)
            model.graph.outputs[index] = copy.outputs[0]
        seen.add(id(value))


def _axes(inputs: Mapping[str, Tensor], lengths: Mapping[int, str]) -> dict[str, str]:
    """Symbol → name, for every dynamic axis of the inputs."""
    names: dict[str, str] = {}
    batch = None
    for name, axis, symbol, length in _dynamic(inputs):
        if axis == 0 and batch is None:
            batch = length
        word = name.split("_")[0]
        candidates = [f"{name}_axis{axis}"]
        if axis == 1 and inputs[name].dim() <= 3:  # ids, masks, features; not images
            candidates = ["sequence", f"{word}_sequence", *candidates]
        unused = [label for label in candidates if label not in names.values()]
        shared = lengths.get(length) or ("batch" if axis == 0 and length == batch else None)
        names.setdefault(symbol, shared or unused[0])
    return names


def _dynamic(inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, int, str, int]]:
    """Every dynamic axis: name of the input, axis, symbol, and length in the example."""
    for name, value in inputs.items():
        sizes: list[Any] = list(value.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and SYMBOL.fullmatch(str(size.node.expr)):
                yield name, axis, str(size.node.expr), size.node.hint


def _name_axes(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    """Rename the symbols in the shape of every value."""
    import onnx_ir

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, onnx_ir.SymbolicDim) or dim.value is None:
            return dim
        text = " + ".join(sorted(SYMBOL.sub(lambda found: names.get(found[0], found[0]), dim.value).split(" + ")))
        return int(text) if text.isdigit() else onnx_ir.SymbolicDim(text)  # torch may prove late that an axis is fixed

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([renamed(dim) for dim in value.shape])
