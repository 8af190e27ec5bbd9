"""The manifest of a saved directory: format, base, tied names, and the size and hash of every file.

It is read before anything else: a directory with a truncated, changed or missing file is refused, with the file's name.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memrewrite.atomic_write import recover
from memrewrite.errors import CheckpointError
from memrewrite.frozen import Frozen
from memrewrite.output_target import MANIFEST as MANIFEST
from memrewrite.passes.storage.base_model import Base, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1


class _SavedFile(Frozen):
    bytes: int
    sha256: str


class _SavedBase(Frozen):
    kind: Kind
    code: str
    builder: str


class _Manifest(Frozen):
    """The schema of a manifest of this format."""

    memrewrite: int
    base: _SavedBase
    versions: dict[str, str]
    tied: dict[str, str]
    files: dict[str, _SavedFile]


def write_manifest(folder: Path, base: Base, tied: Mapping[str, str]) -> None:
    """Write the manifest of all files in `folder`; `tied` maps each tied name to the name under which its tensor is saved."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    versions = {name: metadata.version(name) for name in ("memrewrite", "torch", "safetensors")}
    manifest = {"memrewrite": FORMAT, "base": base.to_data(), "versions": versions, "tied": tied, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10
    total = hashlib.sha256()
    while block := stream.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def is_saved(directory: str | Path) -> bool:
    """True if `directory` has a manifest, which only `save` writes."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path, *, every_bit: bool = False) -> dict[str, Any]:
    """The manifest, after a check of the files: the sizes of all, the hashes of all but weights (`every_bit`: of all).

    Raises `CheckpointError` for a directory that `save` did not write, or with a truncated, changed, missing or added file.
    """
    folder = Path(directory)
    recover(folder)
    if not is_saved(folder):
        raise CheckpointError(
            f"{str(folder)!r} is not a directory that memrewrite saved",
            where=str(folder / MANIFEST),
            hint="memrewrite apply MODEL RECIPE -o DIR",
        )
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["memrewrite"]
        if version == FORMAT:
            _Manifest.model_validate(manifest)
    except (ValueError, KeyError, TypeError) as error:  # pydantic raises subclasses of ValueError
        raise tampered(folder / MANIFEST, f"it is not a manifest ({error})") from error
    if version != FORMAT:
        raise CheckpointError(
            f"format {version!r} cannot be read by this version", where=str(folder / MANIFEST), hint="upgrade memrewrite"
        )
    files = manifest["files"]
    for name, saved in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise tampered(file, "it is missing")
        if file.stat().st_size != saved["bytes"]:
            raise tampered(file, f"it has {file.stat().st_size} bytes, and was saved with {saved['bytes']}")
        weights = file.suffix in (".safetensors", ".pt2")
        if (every_bit or not weights) and digest(file) != saved["sha256"]:
            raise tampered(file, "its content was changed after it was saved")
    extra = {p.name for p in folder.glob("*.safetensors")} - set(files)
    if extra:
        raise tampered(folder, f"{sorted(extra)[0]} was added after it was saved")
    return manifest


def tampered(file: Path, why: str) -> CheckpointError:
    """The error for a saved file that was changed or is missing."""
    return CheckpointError(
        f"the saved model is damaged: {file.name}: {why}",
        where=str(file),
        hint="save it again, or copy the whole directory again",
    )
