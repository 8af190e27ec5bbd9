"""Writes ONNX files and their metadata. A file is replaced as a whole or not at all.

Flow of writing: into a temporary directory next to the target, large weights in a second file → checked by `onnx.checker` →
renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from memrewrite.atomic_write import prepare, replacing, side_file
from memrewrite.errors import ExportError, in_one_line
from memrewrite.frozen import Frozen
from memrewrite.kernels.onnx_functions import DOMAIN
from memrewrite.layers.pool import record_of
from memrewrite.output_target import Target
from memrewrite.plans import Plan

if TYPE_CHECKING:
    import onnx_ir

LARGE = 2**30  # bytes of weights; more go to a second file: a protobuf is limited to 2 GiB, and is in memory twice when loaded
PREFIX = "memrewrite."  # of our keys in a file's metadata


class Port(Frozen):
    """An input or output of a file: its name, element type and axes. A dynamic axis is a name, a fixed one its length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def describe(model: onnx_ir.Model, notes: Mapping[str, str]) -> None:
    """Write the producer, the versions of the packages that it used, and `notes` into the metadata of the file."""
    versions = {name: metadata.version(name) for name in ("memrewrite", "torch", "onnx", "onnxscript")}
    model.producer_name, model.producer_version = "memrewrite", versions["memrewrite"]
    model.metadata_props.update({PREFIX + key: value for key, value in {"versions": json.dumps(versions), **notes}.items()})


def of_rewrite(model: object) -> dict[str, str]:
    """The recipe and the plan's digest of a rewritten model, as a file's metadata hold them; of another, nothing."""
    record = record_of(model) if isinstance(model, nn.Module) else None
    if record is None:
        return {}
    recipe = {} if record.recipe is None else {"recipe": record.recipe}
    return {**recipe, "plan": Plan.model_validate_json(record.plan).digest()}


def output(path: Path, *, overwrite: bool) -> Target:
    """The file as an output. Raises `ExportError` if it exists and may not be replaced, or cannot be written."""
    target = Target(path, overwrite=overwrite, error=ExportError)
    prepare(target)
    return target


def weights_of(model: onnx_ir.Model) -> int:
    """Size of all initializers in bytes."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def write(model: onnx_ir.Model, target: Target) -> Path | None:
    """Write `model`, check it, and rename it to `target`; returns the file of weights, if there is one.

    The weights of a model that is replaced are deleted after it was replaced.

    Raises `ExportError` if `onnx.checker` refuses the file, or it cannot be written; everything is then unchanged.
    """
    import onnx_ir

    data = side_file(target.path) if weights_of(model) > LARGE else None
    with replacing(target) as draft:
        onnx_ir.save(model, draft, external_data=data.name if data else None)
        _check(draft, target.path)
    return data


def _check(draft: Path, target: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        hint = "please report it, with the model: the exported graph is not valid ONNX"
        what = f"onnx.checker refuses the file: {in_one_line(error, kind=False)}"
        raise ExportError(what, where=str(target), hint=hint) from error


def inputs_of(model: onnx_ir.Model) -> tuple[Port, ...]:
    """The inputs of a graph."""
    return tuple(port_of(value) for value in model.graph.inputs)


def outputs_of(model: onnx_ir.Model) -> tuple[Port, ...]:
    """The outputs of a graph."""
    return tuple(port_of(value) for value in model.graph.outputs)


def port_of(value: onnx_ir.Value) -> Port:
    """The name, element type and axes of an input or output; "?" is an unknown type or axis."""
    dims = () if value.shape is None else tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)
    dtype = "?" if value.dtype is None else value.dtype.name.lower()
    return Port(name=str(value.name), dtype=dtype, shape=dims)


def memory_nodes(model: onnx_ir.Model) -> dict[str, int]:
    """The number of nodes of each memory operator in a graph; empty if their functions were inlined."""
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
