"""Names in an exported file: inputs and outputs as the model's forward calls them, dynamic axes by what they count.

A nested input or output is named by its path, as `past_key_values.0.key`. A dynamic axis, `s53` to torch, becomes `batch`,
`sequence`, or is named after its input. Axes stay apart where torch keeps them apart, for runtimes plan memory by their
names; only the first axes of inputs that were equally long are one batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path, tree_unflatten

from memrewrite.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir

SYMBOL = re.compile(r"\b[su]\d+\b")


def name_values(model: onnx_ir.Model, program: ExportedProgram, lengths: Mapping[int, str]) -> None:
    """Name inputs, outputs and axes of `model`, in place; `lengths` name axes by how long they were in the example.

    Raises `ExportError` when the graph's inputs or outputs are not those of `program`.
    """
    inputs = _inputs(program)
    outputs: list[str] = []
    for name in _outputs(program):
        free = f"output_{name}" if name.isdigit() or name in inputs else name or "output"
        outputs.append(free if free not in outputs else f"{free}_{len(outputs)}")
    for what, values, names in (("inputs", model.graph.inputs, [*inputs]), ("outputs", model.graph.outputs, outputs)):
        if len(values) != len(names):
            found = ", ".join(str(value.name) for value in values)
            raise ExportError(f"the graph has the {what} {found}; the model's are {', '.join(names) or 'none'}")
    _apart(model)
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


def _inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """Every input that is a tensor, as it was traced, by its name and in order."""
    traced = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves, _ = tree_flatten_with_path(tree_unflatten(program.graph_signature.user_inputs, program.call_spec.in_spec))
    names = program.module_call_graph[0].signature.forward_arg_names or []
    found = {}
    for (kind, first, *rest), leaf in leaves:  # a path begins with 0, positional, or 1, by keyword
        root = names[int(dotted([first]))] if dotted([kind]) == "0" else dotted([first])
        if isinstance(value := traced.get(leaf), Tensor):
            found[".".join(filter(None, [root, dotted(rest)]))] = value
    return found


def _outputs(program: ExportedProgram) -> list[str]:
    """The path of every output that is a tensor, in order."""
    tensors = {node.name for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    leaves, _ = tree_flatten_with_path(tree_unflatten(program.graph_signature.user_outputs, program.call_spec.out_spec))
    return [dotted(path) for path, leaf in leaves if leaf in tensors]


def _apart(model: onnx_ir.Model) -> None:
    """Give every output a value of its own: one that is an input, a weight or another output too cannot have two names."""
    import onnx_ir

    seen = {id(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for place, value in enumerate(model.graph.outputs):
        if id(value) in seen:
            copy = onnx_ir.node("Identity", inputs=[value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            model.graph.append(copy)
            model.graph.outputs[place] = copy.outputs[0]
        seen.add(id(value))


def _axes(inputs: Mapping[str, Tensor], lengths: Mapping[int, str]) -> dict[str, str]:
    """Symbol → name, for every dynamic axis of the inputs."""
    names: dict[str, str] = {}
    batch = None
    for name, axis, symbol, length in _dynamic(inputs):
        if axis == 0 and batch is None:
            batch = length
        word = name.split("_")[0]
        wanted = [f"{name}_axis{axis}"]
        if axis == 1 and inputs[name].dim() <= 3:  # ids, masks, features; not images
            wanted = ["sequence", f"{word}_sequence", *wanted]
        free = [label for label in wanted if label not in names.values()]
        shared = lengths.get(length) or ("batch" if axis == 0 and length == batch else None)
        names.setdefault(symbol, shared or free[0])
    return names


def _dynamic(inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, int, str, int]]:
    """Input, axis, symbol, and length in the example."""
    for name, value in inputs.items():
        sizes: list[Any] = list(value.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and SYMBOL.fullmatch(str(size.node.expr)):
                yield name, axis, str(size.node.expr), size.node.hint


def _name_axes(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    """Rename symbols in the shape of every value."""
    import onnx_ir

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, onnx_ir.SymbolicDim) or dim.value is None:
            return dim
        text = " + ".join(sorted(SYMBOL.sub(lambda found: names.get(found[0], found[0]), dim.value).split(" + ")))
        return int(text) if text.isdigit() else onnx_ir.SymbolicDim(text)  # torch may find out late that an axis is fixed

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([renamed(dim) for dim in value.shape])
