"""Prepares a model for export, and for the comparison with an exported file: its data type, its inputs, its cache.

Flow: generate example inputs if there are none → convert numbers to a type that runtimes support, on a copy → wrap a decoder
as one step, if its cache is requested.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from memrewrite.errors import ExportError, ModelError
from memrewrite.layers.pool import record_of
from memrewrite.layers.value_table import Table
from memrewrite.passes.capture.capture import is_traced
from memrewrite.passes.models.example_inputs import example_inputs
from memrewrite.passes.models.forward import Inputs, as_inputs, on_device_of, run
from memrewrite.passes.onnx.decoder_step import LENGTHS, step_of

Float = Literal["float32", "float16"]
TABLES = (torch.float32, torch.float16, torch.bfloat16)  # types of the memory operators in ONNX
COMPUTED = (torch.float32, torch.float16)  # ONNX Runtime's CPU provider has no products or sums of bfloat16

log = logging.getLogger("memrewrite")


@dataclass(frozen=True)
class Prepared:
    """What is exported. `lengths` maps an axis' length in the example to its name.

    The first `axes` axes of every input may be dynamic.
    """

    model: nn.Module | ExportedProgram
    inputs: Inputs
    dtype: str  # of the model's numbers: "float32", "float16", or "float16 and float32"
    lengths: Mapping[int, str]
    axes: int


def prepared(
    model: nn.Module | ExportedProgram, inputs: Any = None, dtype: Float | None = None, *, with_past: bool = False
) -> Prepared:
    """`model` ready for export; the caller's model is not changed. Raises `ExportError` if it cannot be converted."""
    lengths: Mapping[int, str] = {}
    if with_past and is_traced(model):
        raise ExportError("a graph cannot be exported with its cache", hint="export the live module")
    arguments = ((), {}) if with_past else _arguments(model, inputs)
    model, arguments, chosen = _converted(model, arguments, dtype)
    if with_past:
        (model, arguments), lengths = step_of(model), LENGTHS
    if isinstance(model, nn.Module):
        arguments = on_device_of(model, arguments)
    return Prepared(model, arguments, chosen, lengths, axes=3 if with_past else 2)


def _arguments(model: nn.Module | ExportedProgram, inputs: Any) -> Inputs:
    """The inputs of the caller or of the graph; otherwise generated ones, with the mask that batches of texts need."""
    if inputs is not None:
        return as_inputs(inputs)
    if isinstance(model, ExportedProgram):
        args, kwargs = model.example_inputs or ((), {})
        return tuple(args), dict(kwargs)
    record = record_of(model) if isinstance(model, fx.GraphModule) else None
    if record is not None and record.inputs is not None:
        return as_inputs(record.inputs)
    args, kwargs = example_inputs(model)
    if "input_ids" in kwargs and "attention_mask" in inspect.signature(model.forward).parameters:
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    return args, kwargs


def _converted(
    model: nn.Module | ExportedProgram, inputs: Inputs, dtype: Float | None
) -> tuple[nn.Module | ExportedProgram, Inputs, str]:
    """The model and inputs converted to `dtype` as a copy, or unchanged if no conversion is needed; and the name of the dtype.

    A table of 8 or 64 bits is converted to the model's type, since the memory operators in ONNX have none of these.
    """
    tables = [table for table in model.modules() if isinstance(table, Table)] if isinstance(model, nn.Module) else []
    stored = {id(table.values) for table in tables} | {id(table.scale) for table in tables}
    own = {t.dtype for t in _tensors(model) if t.is_floating_point() and id(t) not in stored}
    target = getattr(torch, dtype) if dtype else torch.float32 if own - set(COMPUTED) else None
    narrow = any(table.values.dtype not in TABLES for table in tables)
    if (target is None or own <= {target}) and not narrow:
        return model, inputs, _named(own)
    if isinstance(model, ExportedProgram) or is_traced(model):
        types = " and ".join(sorted(str(d).removeprefix("torch.") for d in own))
        raise ExportError(
            f"the graph computes in {types}, and a graph's numbers cannot be converted",
            hint="convert the model before it is traced, or export the live module",
        )
    copied = copy.deepcopy(model)
    wanted = target or (min(own, key=str) if len(own) == 1 else torch.float32)
    for table in copied.modules():
        if isinstance(table, Table) and table.values.dtype not in TABLES:
            _convert_table(table, wanted)
    if target is not None:
        if dtype is None:
            log.warning("the model computes in %s, which runtimes do not support: it is exported as float32", _named(own))
        inputs = tree_map(lambda x: x.to(target) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
        _convert(copied, target, inputs)
        own = {target}
    return copied, inputs, _named(own)


def _tensors(model: nn.Module | ExportedProgram) -> list[Tensor]:
    """Parameters and persistent buffers. Non-persistent buffers are omitted: they are computed, and may have a wider type."""
    return list((model.state_dict if isinstance(model, ExportedProgram) else model.state_dict(keep_vars=True)).values())


def _convert(model: nn.Module, dtype: torch.dtype, inputs: Inputs) -> None:
    """Convert `model` to `dtype`, except its non-persistent fp32 buffers, such as the angles of rotary positions, which would
    represent other positions in half precision. If the model does not run with these buffers in fp32, they are converted too.
    """
    computed = [(module, name) for module in model.modules() for name in module._non_persistent_buffers_set]
    buffers = {key: buffer for key in computed if (buffer := key[0]._buffers[key[1]]) is not None}
    kept = {key: buffer for key, buffer in buffers.items() if buffer.dtype == torch.float32 and dtype.itemsize < 4}
    model.to(dtype)
    rounded = {key: key[0]._buffers[key[1]] for key in kept}
    for (module, name), buffer in kept.items():
        module._buffers[name] = buffer
    if not kept or not tree_leaves(inputs):
        return
    try:
        run(model, inputs)
    except ModelError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        why = error.__cause__
        log.warning("computed buffers are rounded to %s, since the model fails with fp32 ones: %s", _named({dtype}), why)
        for (module, name), buffer in rounded.items():
            module._buffers[name] = buffer


def _convert_table(table: Table, dtype: torch.dtype) -> None:
    """Convert a table of a type that no native kernel supports to `dtype`; rows of 8 bits are multiplied by their scales."""
    log.warning("a table of %s is exported as %s", _named({table.values.dtype}), _named({dtype}))
    scale = 1.0 if table.scale is None else table.scale.unsqueeze(-1)
    with torch.no_grad():
        table.values = nn.Parameter((table.values.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype))
    table.scale = None


def _named(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "float32"
