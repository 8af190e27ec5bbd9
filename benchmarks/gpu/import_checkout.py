"""Makes this checkout importable if memrewrite is not installed, e.g. on a GPU machine that has only torch.

The five folders are linked into one package in a temporary folder, with the layout of an installation.
"""

from __future__ import annotations

import atexit
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("passes", "kernels", "recipes", "cli")


def ensure() -> str | None:
    """Make memrewrite importable here. Returns the folder that other processes need on their path; None: it was importable."""
    if importlib.util.find_spec("memrewrite") is not None:
        return None
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    package = Path(folder.name) / "memrewrite"
    package.mkdir()
    for source in [*(ROOT / "memrewrite").iterdir(), *(ROOT / name for name in FOLDERS)]:
        (package / source.name).symlink_to(source)
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    number = found.group(1) if found else "0"
    data = Path(folder.name) / f"memrewrite-{number}.dist-info"
    data.mkdir()
    (data / "METADATA").write_text(f"Metadata-Version: 2.1\nName: memrewrite\nVersion: {number}\n", encoding="utf-8")
    sys.path.insert(0, folder.name)
    return folder.name
