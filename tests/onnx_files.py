"""Exported models that tests share: each is rewritten and exported once in a process, into a directory that goes with it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny
import torch
from numpy.typing import NDArray

import memrewrite
from memrewrite.passes.export_onnx import Exported

FOLDER = tempfile.TemporaryDirectory(prefix="memrewrite-onnx-")


class File(NamedTuple):
    """An exported file, the model it came from, and the inputs it was traced with."""

    path: Path
    model: Any
    inputs: dict[str, Any]
    exported: Exported


@cache
def rewritten(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of `tiny.MODELS` with memory layers, and its inputs. Do not change it."""
    model, inputs = tiny.rewritten(name)
    model.memory.record["recipe.yaml"] = "memrewrite: 1\n"
    return model, inputs


@cache
def exported(name: str, **options: Any) -> File:
    """`rewritten(name)` as a file; `options` go to `export_onnx`."""
    model, inputs = rewritten(name)
    written = "-".join([name, *(f"{key}-{value}" for key, value in sorted(options.items()))])
    path = Path(FOLDER.name) / f"{written}.onnx"
    made = memrewrite.export_onnx(model, path, None if options.get("with_past") else inputs, **options)
    return File(path, model, inputs, made)


def arrays(inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """What onnxruntime is fed: the tensors among the inputs."""
    return {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def difference(found: NDArray[Any], wanted: Any) -> float:
    """The largest difference, relative to the largest magnitude of what is wanted."""
    reference = np.asarray(wanted.detach().double() if isinstance(wanted, torch.Tensor) else wanted, dtype=np.float64)
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())
