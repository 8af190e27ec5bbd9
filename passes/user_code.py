"""The user's own Python: a file or module that builds a model, imported and run; their mistakes come back as their traceback.

A model file defines `build()` (or `model`) and `inputs()` (or `inputs`).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn


def build_from_file(file: Path, builder: str) -> nn.Module:
    """Import `file` and call its `builder`."""
    raise NotImplementedError
