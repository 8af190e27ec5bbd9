"""What an output may replace, and what the system's refusals mean: the rules of every directory and file that is written.

Flow: `Target.check` before the work → `atomic_write.replacing` applies the same rules again to what it replaces → an `OSError`
on the way becomes an error that says what, where and what to try.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memrewrite.errors import CheckpointError, MemrewriteError, UserError, in_one_line

MANIFEST = "memrewrite.json"  # of a saved directory
HINTS = {  # of the system's errors that a user can act on; all others are shown without a hint
    errno.ENOSPC: "free space on this disk, or write to another one",
    errno.EDQUOT: "your quota on this file system is used up: delete files, or write to another one",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use a file system for large files",
    errno.EROFS: "this file system is read-only: write to another one",
    errno.EACCES: "use a directory with write permission",
    errno.EPERM: "use a directory with write permission",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "a directory of this path was deleted: create it, change to one that exists, or give another path",
    errno.ENOTDIR: "a part of this path is a file: use another path",
    errno.ELOOP: "symbolic links of this path form a circle: use another path",
    errno.EINVAL: "this file system does not take the name: use letters and digits",
    errno.EILSEQ: "this file system does not take the name: use letters and digits",
    errno.EBUSY: "it is in use, for example as a mount point: use another path",
    errno.EXDEV: "it is a mount point: use a path inside it",
    errno.EIO: "the disk reports a failure: write to another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files: end other programs",
    errno.ENOMEM: "the system has no memory left: end other programs",
    errno.EPIPE: "the program that reads the output ended first",
}
_NUMBER = re.compile(r"\((?:os error |.*?\bcode: )(\d+)\b")  # in errors of libraries written in Rust
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
)


@dataclass(frozen=True)
class Target:
    """One output and what it may replace.

    Nothing but a regular file is replaced by a file, and nothing but a directory by a directory: never a device, FIFO, socket
    or symbolic link, to whatever it leads. An empty directory is always replaced; a file only with `overwrite`; a directory
    that is not empty only with `overwrite` and if `ours` returns True for it, or if `overwrite_any` names the same directory.

    Args:
        path: Where the output appears.
        directory: The output is a directory, else a file.
        overwrite: The user allows that an earlier output is replaced.
        ours: Whether a directory is an earlier output.
        overwrite_any: The directory that is replaced whatever it contains.
        error: The class of all errors.
        from_command_line: Hints name options of the command line, not arguments of Python.
    """

    path: Path
    directory: bool = False
    overwrite: bool = False
    ours: Callable[[Path], bool] = lambda _: False
    overwrite_any: Path | None = None
    error: type[UserError] = CheckpointError
    from_command_line: bool = False

    @property
    def _overwrite(self) -> str:
        return "--overwrite" if self.from_command_line else "overwrite=True"

    @property
    def _overwrite_any(self) -> str:
        return f"--overwrite-any {self.path}" if self.from_command_line else f"overwrite_any={str(self.path)!r}"

    def check(self) -> None:
        """Raise `error` if the output may not or cannot be written, without writing anything."""
        with self.errors():
            self.check_name()
            if self.overwrite_any is not None and _real(self.overwrite_any) != _real(self.path):
                name = "--overwrite-any" if self.from_command_line else "overwrite_any"
                what = f"{name} names {str(self.overwrite_any)!r}, and the output is {str(self.path)!r}"
                raise self._error(what, f"repeat the path of the output, or omit {name}")
            self.may_replace(self.path)
            self._check_parent()

    def may_replace(self, found: Path) -> None:
        """Raise `error` if what is at `found` may not be replaced: the output's path, or where its content is for now."""
        try:
            mode = found.lstat().st_mode
        except FileNotFoundError:
            return
        kind, shown = next((name for test, name in _KINDS if test(mode)), "of an unknown kind"), repr(str(self.path))
        if not (stat.S_ISDIR(mode) if self.directory else stat.S_ISREG(mode)):
            wanted = "a directory" if self.directory else "a file, such as model.onnx"
            link = f", to {str(found.readlink())!r}" if stat.S_ISLNK(mode) else ""
            raise self._error(f"the output {shown} is {kind}{link}", f"give a path that is not in use, or {wanted}")
        if not self.directory:
            if not self.overwrite:
                raise self._error(f"the file {shown} exists", f"use a new name, or {self._overwrite} to replace it")
            return
        working = _working_directory()
        if found == self.path and working and working.is_relative_to(found.resolve()):
            raise self._error(f"{shown} would delete the working directory", "use another output directory")
        if found == self.path and os.path.ismount(found):
            raise self._error(f"the output directory {shown} is a mount point", "use a directory inside it")
        if not any(found.iterdir()) or self.overwrite_any is not None:
            return
        if not self.overwrite:
            hint = f"use a new directory, or {self._overwrite} to replace a saved result"
            raise self._error(f"the output directory {shown} is in use: it is not empty", hint)
        if not self.ours(found):
            what = f"the output directory {shown} is not empty, and memrewrite did not save it: it has no valid memrewrite.json"
            hint = f"use a new directory; to delete all that it contains: {self._overwrite_any}"
            raise self._error(what, hint)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an `OSError` of the body, also inside another library's error, into `error`, with what to try."""
        try:
            yield
        except MemrewriteError:
            raise
        except Exception as error:
            cause = system_error(error)
            if cause is None:
                raise
            reason = cause.strerror or in_one_line(cause)
            named = cause.filename is not None and Path(os.fsdecode(cause.filename)) != self.path
            about = f" ({os.fsdecode(cause.filename)})" if named else ""
            hint = HINTS.get(cause.errno or 0, "use another path")
            raise self._error(f"{str(self.path)!r} cannot be written: {reason}{about}", hint) from error

    def check_name(self) -> None:
        """Raise `error` for a path that cannot name a new file or directory, before the system is asked."""
        name, working = self.path.name, _working_directory()
        if name in ("", ".", ".."):
            if self.directory and working and working.is_relative_to(self.path.resolve()):
                raise self._error(f"{str(self.path)!r} would delete the working directory", "use another output directory")
            raise self._error(f"the output {str(self.path)!r} has no name of its own", "give a new name")
        try:
            legal = b"\0" not in os.fsencode(self.path)
        except UnicodeEncodeError:
            legal = False
        if not legal or (os.name == "nt" and name[-1] in " ."):  # Windows removes these characters
            raise self._error(f"the output {str(self.path)!r} is no possible name", "use letters and digits")

    def _check_parent(self) -> None:
        parents = self.path.absolute().parents
        parent = next(p for p in parents if os.path.lexists(p)) if self.directory else parents[0]
        if not parent.exists():
            raise self._error(f"the directory of {str(self.path)!r} does not exist: it cannot be written", "create it")
        if not parent.is_dir():
            raise self._error(f"{str(self.path)!r} cannot be written: {str(parent)!r} is no directory", "use another path")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise self._error(f"{str(self.path)!r} cannot be written: no permission", "use a directory with write permission")

    def _error(self, what: str, hint: str) -> UserError:
        return self.error(what, where=str(self.path), hint=hint)


def saved_directory(path: str | Path, *, overwrite: bool, overwrite_any: str | Path | None = None) -> Target:
    """A directory for a rewritten model; `overwrite` replaces one with a manifest, `overwrite_any` any directory it names."""
    repeated = None if overwrite_any is None else Path(overwrite_any)
    return Target(Path(path), directory=True, overwrite=overwrite, ours=_carries_manifest, overwrite_any=repeated)


def _carries_manifest(folder: Path) -> bool:
    """Whether a saved directory has its manifest; other files may have been added or changed since."""
    file = folder / MANIFEST
    if file.is_symlink() or not file.is_file():
        return False
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"memrewrite", "base", "files"} <= manifest.keys()


def system_error(error: BaseException) -> OSError | None:
    """The `OSError` that an error is, has as its cause, or has as a number in its text; None if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        if number := _NUMBER.search(str(seen)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        seen = seen.__cause__
    return None


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None  # it was deleted


def _real(path: Path) -> str:
    """The path without links in its parents, which are what two spellings of one directory differ in."""
    return os.path.join(os.path.realpath(path.absolute().parent), path.name)  # noqa: PTH118 - the last part is not resolved
