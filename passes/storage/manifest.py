"""The manifest of a saved directory, and the one way to read the directory's files.

`write_manifest` writes format, base, tied names, and the size and hash of every file. `read_manifest` checks the files and
returns `SavedFiles`, through which everything else is read: a file that is not in the manifest is refused, and text is parsed
from the very bytes that were hashed. Weights are data and may be large: their sizes are checked, their hashes only with
`every_bit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import Field, ValidationError, model_validator

from memrewrite.atomic_write import recover
from memrewrite.errors import CheckpointError, in_one_line
from memrewrite.frozen import Frozen
from memrewrite.output_target import MANIFEST as MANIFEST
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.sources.python_file import require_trust
from memrewrite.passes.storage.base_model import Base, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
MAX_TEXT = 256 * 2**20  # bytes of a file that is read whole; the largest tokenizers have 40 MiB
WEIGHTS = (".safetensors", ".pt2")


class _SavedFile(Frozen):
    bytes: Annotated[int, Field(ge=0, strict=True)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _SavedBase(Frozen):
    kind: Kind
    code: str
    builder: str

    @model_validator(mode="after")
    def _agrees(self) -> _SavedBase:
        if (self.kind == "python") != bool(self.code) or bool(self.code) != bool(self.builder):
            raise ValueError(f"a base of the kind {self.kind!r} with code {self.code!r} and builder {self.builder!r}")
        if self.code and not self.code.endswith(".py"):
            raise ValueError(f"the code {self.code!r} is no Python file")
        if self.builder and (not self.builder.isidentifier() or self.builder.startswith("__")):
            raise ValueError(f"the builder {self.builder!r} is no name of a function")
        return self


class Manifest(Frozen):
    """The schema of a manifest of this format."""

    memrewrite: Annotated[int, Field(ge=FORMAT, le=FORMAT, strict=True)]
    base: _SavedBase
    versions: dict[str, str]
    tied: dict[str, str]
    files: dict[str, _SavedFile]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name in self.files:
            if not _is_plain(name) or name == MANIFEST:
                raise ValueError(f"{name[:80]!r} is no name of a saved file")
        if self.base.code and self.base.code not in self.files:
            raise ValueError(f"the code {self.base.code!r} is not among the files")
        chained = next((name for name, first in self.tied.items() if first in self.tied), None)
        if chained is not None:
            raise ValueError(f"it ties {chained!r} to {self.tied[chained]!r}, which is tied itself")
        return self


def _is_plain(name: str) -> bool:
    """True for the name of a file directly in a directory."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(os.fsencode(name)) <= 255


@dataclass(frozen=True)
class SavedFiles:
    """The files of a saved directory that its manifest names. Nothing else in the directory is read."""

    folder: Path
    manifest: Manifest

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.files

    def names(self, suffix: str = "") -> list[str]:
        """The names that end with `suffix`, sorted."""
        return sorted(name for name in self.manifest.files if name.endswith(suffix))

    @property
    def base(self) -> Base:
        """What the base is built from."""
        return Base.from_data(self.manifest.base.model_dump())

    def path(self, name: str) -> Path:
        """The path of a file, for a library that reads it itself: weights. Raises `CheckpointError` as `check` does."""
        with self._opened(name):
            return self.folder / name

    def check(self, name: str, *, hashed: bool) -> None:
        """Raise `CheckpointError` for a file that is not in the manifest, is missing or no plain file, or was changed."""
        with self._opened(name) as stream:
            if hashed and _digest(stream) != self.manifest.files[name].sha256:
                raise tampered(self.folder / name, "its content was changed after it was saved")

    def content(self, name: str) -> bytes:
        """The content of a file, after a check of its hash."""
        with self._opened(name) as stream:
            size = self.manifest.files[name].bytes
            if size > MAX_TEXT:
                raise tampered(self.folder / name, f"it has {size} bytes; at most {MAX_TEXT} are read")
            content = stream.read(size + 1)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise tampered(self.folder / name, "its content was changed after it was saved")
        return content

    def text(self, name: str) -> str:
        """The content of a UTF-8 file, after a check of its hash."""
        try:
            return self.content(name).decode()
        except UnicodeDecodeError as error:
            raise tampered(self.folder / name, "it is no UTF-8 text") from error

    def json(self, name: str) -> Any:
        """The value of a JSON file, after a check of its hash."""
        try:
            return parse_json(self.text(name))
        except ValueError as error:
            raise tampered(self.folder / name, f"it is no JSON: {in_one_line(error, kind=False)}") from error

    def code(self, *, trust_code: bool) -> Path:
        """The Python file that builds the base. Raises `CheckpointError` without `trust_code`, and where there is none."""
        name = self.manifest.base.code
        require_trust(
            trust_code,
            f"the base model is built by the saved file {name!r}, which is code and was not run",
            where=self.folder / name,
            otherwise="or pass the base: load(..., model)",
        )
        self.check(name, hashed=True)
        return self.folder / name

    def _opened(self, name: str) -> BinaryIO:
        """A file, opened for reading, of the size in the manifest: a plain file in this directory, and no link out of it."""
        file = self.folder / name
        if name not in self.manifest.files:
            raise CheckpointError(
                f"the saved model is damaged: {MANIFEST} does not list {name!r}, so it is not read",
                where=str(file),
                hint="save it again; a file that is added by hand is not used",
            )
        try:
            stream = _open_plain(self.folder, name)
        except FileNotFoundError as error:
            raise tampered(file, "it is missing") from error
        except OSError as error:
            raise tampered(file, f"it cannot be read: {in_one_line(error, kind=False)}") from error
        size, expected = os.fstat(stream.fileno()).st_size, self.manifest.files[name].bytes
        if size != expected:
            stream.close()
            raise tampered(file, f"it has {size} bytes, and was saved with {expected}")
        return stream


def _open_plain(folder: Path, name: str) -> BinaryIO:
    """Open a plain file directly in `folder`. Raises OSError for another kind, and for a link that leads out of it."""
    file = Path(os.path.realpath(folder / name, strict=True))  # `Path.resolve` raises RuntimeError for a circle of links
    if file.parent != folder.resolve():
        raise OSError("it is a link to a file of another directory; copy the directory with `cp -rL`")
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))  # a FIFO does not block
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is no plain file")
    return os.fdopen(handle, "rb")


def write_manifest(folder: Path, base: Base, tied: Mapping[str, str]) -> None:
    """Write the manifest of all files in `folder`; `tied` maps each tied name to the name under which its tensor is saved."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    versions = {name: metadata.version(name) for name in ("memrewrite", "torch", "safetensors")}
    manifest = {"memrewrite": FORMAT, "base": base.to_data(), "versions": versions, "tied": tied, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return _digest(stream)


def _digest(stream: Any) -> str:
    if hasattr(hashlib, "file_digest"):
        return str(hashlib.file_digest(stream, "sha256").hexdigest())
    total = hashlib.sha256()  # Python 3.10
    while block := stream.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def is_saved(directory: str | Path) -> bool:
    """True if `directory` has a manifest, which only `save` writes."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path, *, every_bit: bool = False) -> SavedFiles:
    """The files of a saved directory, after a check of all sizes, and of the hashes of all but weights (`every_bit`: of all).

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
    files = SavedFiles(folder, _manifest(folder))
    for name in files.names():
        files.check(name, hashed=every_bit or not name.endswith(WEIGHTS))
    extra = {p.name for p in folder.iterdir() if p.name.endswith(WEIGHTS)} - set(files.names())
    if extra:
        raise tampered(folder, f"{sorted(extra)[0]} was added after it was saved")
    return files


def _manifest(folder: Path) -> Manifest:
    try:
        with _open_plain(folder, MANIFEST) as stream:
            content = stream.read(MAX_TEXT + 1)
        if len(content) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT} bytes")
        data = parse_json(content)
        version = data["memrewrite"]
        if type(version) is not int or version == FORMAT:
            return Manifest.model_validate(data)
    except ValidationError as error:
        raise tampered(folder / MANIFEST, f"it is not a manifest ({first_fault(error)})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tampered(folder / MANIFEST, f"it is not a manifest ({in_one_line(error)})") from error
    raise CheckpointError(
        f"format {version!r} cannot be read by this version", where=str(folder / MANIFEST), hint="upgrade memrewrite"
    )


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, in one line: its place and its reason."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place}: {fault['msg']}"[:300] if place else fault["msg"][:300]


def tampered(file: Path, why: str) -> CheckpointError:
    """The error for a saved file that was changed or is missing."""
    return CheckpointError(
        f"the saved model is damaged: {file.name}: {why}",
        where=str(file),
        hint="save it again, or copy the whole directory again",
    )
