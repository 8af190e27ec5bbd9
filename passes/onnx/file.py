"""An ONNX file: what it says of itself, and how it is written, whole or not at all, and read.

Flow of writing: into a directory beside the target, weights apart when they are large → checked by `onnx.checker` → renamed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from memrewrite.errors import ExportError, in_a_line
from memrewrite.frozen import Frozen
from memrewrite.kernels.onnx_functions import DOMAIN
from memrewrite.layers.pool import record_of
from memrewrite.plans import Plan

if TYPE_CHECKING:
    import onnx
    import onnx_ir

LARGE = 2**30  # bytes of weights; more go to a file of their own: a protobuf ends at 2 GiB, and loading one takes it twice
PREFIX = "memrewrite."  # of the keys in a file's metadata


class Port(Frozen):
    """An input or output of a file: its name, element type and axes; a name stands for a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def describe(model: onnx_ir.Model, notes: Mapping[str, str]) -> None:
    """Write who made the file, with what, and `notes`, into its metadata."""
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


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` for a target that exists and may not be replaced, or whose directory is none."""
    where = str(target)
    if target.is_dir():
        raise ExportError(f"{where!r} is a directory", where=where, hint="give a file, such as model.onnx")
    if not target.absolute().parent.is_dir():
        raise ExportError(f"the directory of {where!r} does not exist", where=where, hint="make it, or give another file")
    for file in (target, data_of(target)):
        if file.exists() and not overwrite:
            raise ExportError(f"the file {str(file)!r} exists", where=where, hint="give a new name, or allow --overwrite")


def data_of(target: Path) -> Path:
    """The file of weights that lies beside a large model."""
    return target.with_name(target.name + ".data")


def weights_of(model: onnx_ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def write(model: onnx_ir.Model, target: Path) -> Path | None:
    """Write `model`, check it, and give it its name; returns the file of weights, if there is one.

    Raises `ExportError` when `onnx.checker` refuses the file; the target is then as it was.
    """
    import onnx_ir

    data = data_of(target) if weights_of(model) > LARGE else None
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
        draft = Path(folder) / target.name
        onnx_ir.save(model, draft, external_data=data.name if data else None)
        _check(draft, target)
        aside = Path(folder) / "old.data"
        if data_of(target).exists():
            data_of(target).rename(aside)  # of a model that is replaced, and gone with the folder
        try:
            if data:
                (Path(folder) / data.name).replace(data)
            draft.replace(target)
        except OSError:
            if aside.exists():
                aside.replace(data_of(target))
            raise
    return data


def _check(draft: Path, target: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        hint = "please report it, with the model: the exported graph is not valid ONNX"
        raise ExportError(f"onnx.checker refuses the file: {in_a_line(error)}", where=str(target), hint=hint) from error


def read_graph(path: Path) -> onnx.ModelProto:
    """A file without the weights beside it. Raises `ExportError` where there is none, it is damaged, or these are missing."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ExportError(f"reading ONNX needs onnx ({error})", hint="pip install 'memrewrite[onnx]'") from error
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {str(path)!r}", hint="memrewrite export MODEL -o model.onnx") from error
    except (DecodeError, OSError) as error:
        raise ExportError(f"the file cannot be read as ONNX: {error}", where=str(path), hint="export it again") from error
    kept = {entry.value for value in model.graph.initializer for entry in value.external_data if entry.key == "location"}
    for name in sorted(kept):
        if not (path.parent / name).is_file():
            hint = "a large model is two files: move and copy them together"
            raise ExportError(f"the file's weights are missing: {name!r} does not lie beside it", where=str(path), hint=hint)
    return model


def inputs_of(model: onnx_ir.Model) -> tuple[Port, ...]:
    """What a graph takes."""
    return tuple(_port(value) for value in model.graph.inputs)


def outputs_of(model: onnx_ir.Model) -> tuple[Port, ...]:
    """What a graph gives."""
    return tuple(_port(value) for value in model.graph.outputs)


def _port(value: onnx_ir.Value) -> Port:
    dims = () if value.shape is None else tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)
    dtype = "?" if value.dtype is None else value.dtype.name.lower()
    return Port(name=str(value.name), dtype=dtype, shape=dims)


def memory_nodes(model: onnx_ir.Model) -> dict[str, int]:
    """How many nodes of each memory operator a graph holds; written out, they are none."""
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
