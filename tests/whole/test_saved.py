"""Directories that earlier versions saved: they load, and compute what the saved model computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from saved.make import bare
from torch import nn

import memrewrite

SAVED = Path(__file__).parent / "saved"
BASES: dict[str, Callable[[], nn.Module]] = {
    "given": tiny.loose,
    "module-graph": bare,
    "module-graph-parallel": bare,
    "module-graph-2": bare,
    "module-graph-2-parallel": bare,
}  # those that carry no base: the user builds it


@pytest.mark.parametrize("name", sorted(path.name for path in SAVED.iterdir() if (path / "memrewrite.json").is_file()))
def test_a_directory_of_an_earlier_version_loads(name: str) -> None:
    example = load_file(SAVED / f"{name}.example.safetensors")
    expected = example.pop("output")
    base = BASES[name]() if name in BASES else None
    model = memrewrite.load(SAVED / name, base, trust_code=name in ("graph", "python"))
    with torch.no_grad():
        output = model(**example)
    output = output if isinstance(output, torch.Tensor) else output[0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # another CPU rounds otherwise
