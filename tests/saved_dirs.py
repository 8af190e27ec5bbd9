"""Changes of saved directories whose manifest is corrected afterwards, as an attacker or a bad tool would make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "memrewrite.json"


def correct_manifest(folder: Path) -> None:
    """Write the present sizes and hashes of the listed files into the manifest."""

    def change(manifest: dict[str, Any]) -> None:
        for name in [n for n in manifest["files"] if (folder / n).is_file()]:
            content = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_json(folder / MANIFEST, change)


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Add a file, also to the manifest."""
    (folder / name).write_bytes(content)
    edit_json(folder / MANIFEST, lambda manifest: manifest["files"].update({name: {}}))
    correct_manifest(folder)


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Change the value of a JSON file in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def edit_saved(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file of a saved directory; a plan in the report too, since the two must agree."""
    edit_json(folder / name, change)
    if name == "plan.json" and (folder / "report.json").exists():
        edit_json(folder / "report.json", lambda report: change(report["plan"]))
    correct_manifest(folder)
