"""Exported models that tests share. Each is exported once per run, since an export takes seconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny
import torch
from native_builds import built
from numpy.typing import NDArray
from torch import Tensor, nn

import memrewrite
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pool import Pool, Pools, PoolSpec
from memrewrite.passes.onnx.export import Exported


class File(NamedTuple):
    """An exported file, its model, and the inputs with which it was traced."""

    path: Path
    model: Any
    inputs: dict[str, Any]
    exported: Exported


@cache
def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    """A rewritten model of `tiny.MODELS` whose memory layers are not zero, and its inputs. Tests must not change it."""
    if name == "t5":  # one layer for each tower, to keep the export short
        model, (_, inputs) = tiny.t5(num_layers=1), tiny.named("t5")
        memrewrite.apply(model, tiny.recipe() | {"verify": "off"}, inputs)
    else:
        model, inputs = tiny.rewritten(name)
    if name == "llama":
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    tiny.open_up(model)
    return model, inputs


def exported(folder: Path, name: str, **options: Any) -> File:
    """`model_of(name)` as a file in `folder`, which several processes may use; `options` are passed to `export_onnx`."""
    model, inputs = model_of(name)
    file = folder / f"{'-'.join(map(str, (name, *options.values())))}.onnx"

    def export(summary: Path) -> None:
        summary.write_text(memrewrite.export_onnx(model, file, inputs, overwrite=True, **options).model_dump_json())

    summary = built(folder / f"{file.stem}.json", export)
    return File(file, model, inputs, Exported.model_validate_json(summary.read_text()))


class Layers(nn.Module):
    """Two memory layers with one table and no other layers, so that an export is fast."""

    def __init__(self, **spec: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        pool = Pool(PoolSpec(**{"keys": 8, "value_dim": 16, **spec}))
        self.memory = Pools({"shared": pool})
        layers = [MemoryPlus(16, 16, MemoryPlusOptions(heads=2, topk=4), pool) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        for layer in (pool, *layers):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def layers(**spec: Any) -> tuple[Layers, dict[str, Tensor]]:
    """`Layers`, with these options of its pool, and inputs."""
    return Layers(**spec).eval(), {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))}


def arrays(inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors among the inputs, as onnxruntime takes them."""
    return {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def difference(found: NDArray[Any], wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖, in float64."""
    reference = np.asarray(wanted.detach().double() if isinstance(wanted, torch.Tensor) else wanted, dtype=np.float64)
    assert found.shape == reference.shape
    return float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference))
