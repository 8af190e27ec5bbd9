"""`examples/train_from_scratch.py` runs, writes everything it promises, and resumes where it stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_from_scratch.py"


def run(out: Path, *options: str) -> list[float]:
    """The losses of every step up to now."""
    subprocess.run([sys.executable, str(EXAMPLE), "--out", str(out), *options], check=True, capture_output=True)
    losses: list[float] = torch.load(out / "training.pt", weights_only=True)["losses"]
    return losses


def test_a_resumed_run_equals_one_without_a_stop(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run(tmp_path / "whole", "--steps", "4")
    assert run(tmp_path / "parts", "--steps", "2") == whole[:2]
    assert run(tmp_path / "parts", "--steps", "4", "--resume") == whole
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"model", "training.pt", "losses.png", "usage.png"}
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80
