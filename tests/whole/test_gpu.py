"""Tests that need a CUDA device: the memory operators in ONNX Runtime with every dtype, by the benchmark's command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMMAND = Path(__file__).parents[2] / "benchmarks" / "gpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA device"),
]


def test_the_operators_in_onnx_runtime(tmp_path: Path) -> None:
    found = tmp_path / "gpu.json"
    line = [sys.executable, str(COMMAND), "--sections", "onnx", "--json", str(found)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["ms"] > 0 for row in rows if row["case"].startswith(("SparseLookup", "ProductKeyTopk")))
