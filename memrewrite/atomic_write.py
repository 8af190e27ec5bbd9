"""Writes every output: it appears complete, all at once or not at all, and replaces nothing but what `Target` allows.

Flow: what killed runs left is removed → the caller writes a draft into a temporary directory next to the target → it is synced
to the disk → one rename puts it in place: onto nothing or an empty directory, or in exchange for the old output → what came
out by the exchange is checked again, and deleted with the temporary directory.

A kill at any moment leaves the old output or the new one under the target's name. Where the file system cannot exchange, an
old directory is first moved into the temporary directory, and a kill right after leaves no output under the name: `recover`
and the next save beside it move it back, and log that.

A temporary directory is locked by the process that uses it. The system drops the lock when that process ends, however it ends,
so a directory whose lock is free was left by a killed run. A file system without locks keeps such directories.
"""

from __future__ import annotations

import glob
import logging
import mmap
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memrewrite.output_target import Target
from memrewrite.renames import UNSUPPORTED, exchange, move_new, sync, sync_directory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

PREFIX = ".memrewrite-"  # of temporary directories
NEW, OLD = "new", "old"  # in it: the draft, or after an exchange the old output; an old directory that was moved out of the way

log = logging.getLogger("memrewrite")


@contextmanager
def replacing(target: Target) -> Iterator[Path]:
    """Yield the path of a draft, which takes the target's place when the body ends without an error.

    The body creates the draft, with the permissions that the target shall have. The parents of a directory are created. Side
    files, which a draft file names, are created next to it under their final names (see `side_file`); they are put in place
    before it, and the side files that only the replaced file named are deleted.

    Raises:
        UserError: `target.error`, if the target may not be replaced, at the start or when the draft is complete, or if the
            system refuses a write. Everything is as before.
    """
    with target.errors(), _parent_of(target) as parent:
        folder, lock = _temporary(parent)
        try:
            (folder / NEW).mkdir()
            draft = folder / NEW / target.path.name
            yield draft
            sync(folder)
            _put_in_place(draft, parent / target.path.name, target)
            sync_directory(parent)  # before the old output is deleted
        finally:
            try:
                _dispose(folder)
            finally:
                if lock is not None:
                    os.close(lock)


def prepare(target: Target) -> None:
    """Remove what killed runs left next to the target, then raise `target.error` if it may not or cannot be written."""
    with target.errors():
        target.check_name()
        for folder in _abandoned(target.path.absolute().parent):
            _dispose(folder)
    target.check()


def recover(path: Path) -> bool:
    """Move the directory back that a killed run had moved out of the way, if `path` does not exist; the log says so.

    Returns True if it was moved back.
    """
    if os.path.lexists(path):
        return False
    for folder in _abandoned(path.absolute().parent):
        if os.path.lexists(folder / OLD / path.name):
            _dispose(folder)
    return os.path.lexists(path)


def side_file(file: Path) -> Path:
    """A path for the weights next to `file`: `file` + ".data", or, if that is in use, with a unique part.

    A new name, because the old file and the old weights are in use together until one rename replaces the file.
    """
    plain = file.with_name(f"{file.name}.data")
    return file.with_name(f"{file.name}.{secrets.randbelow(10**8):08}.data") if os.path.lexists(plain) else plain


# ------------------------------------------------------------------------------------------------------------ replacing


@contextmanager
def _parent_of(target: Target) -> Iterator[Path]:
    """The directory of the target, absolute; created for a directory, and removed again after an error."""
    prepare(target)
    parent = target.path.absolute().parent
    missing = [p for p in (parent, *parent.parents) if not os.path.lexists(p)] if target.directory else []
    try:
        if target.directory:
            parent.mkdir(parents=True, exist_ok=True)
        yield parent
    except BaseException:
        for directory in missing:
            with suppress(OSError):  # another process put something there
                directory.rmdir()
        raise


def _put_in_place(draft: Path, path: Path, target: Target) -> None:
    """Rename side files and draft. The rules of the target apply to what is replaced, not to what was there before."""
    for side in sorted(set(draft.parent.iterdir()) - {draft}):
        move_new(side, path.with_name(side.name))
    while True:
        try:
            if target.directory:
                draft.rename(path)  # the system refuses it unless nothing or an empty directory is there
            else:
                move_new(draft, path)
        except OSError:
            if not (os.path.lexists(path) and os.path.lexists(draft)):
                raise
        else:
            return
        target.may_replace(path)
        try:
            exchanged = exchange(draft, path)
        except FileNotFoundError:
            continue  # it was deleted just now
        if exchanged:
            _check_exchanged(draft, path, target)
        else:
            _replace_without_exchange(draft, path, target)
        return


def _check_exchanged(found: Path, path: Path, target: Target) -> None:
    """Undo the exchange if what came out of it may not be replaced: something else was put there just before."""
    try:
        target.may_replace(found)
    except BaseException:
        exchange(found, path)
        raise


def _replace_without_exchange(draft: Path, path: Path, target: Target) -> None:
    """Replace a file in one step, a directory in two: after an error between them `_dispose` moves the old one back."""
    old = draft.parent.with_name(OLD) / path.name
    old.parent.mkdir()
    if not target.directory:
        try:
            os.link(path, old)  # for its side files
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("the weights of the replaced %s may be left next to it: this file system has no hard links", path)
        draft.replace(path)
        return
    path.rename(old)
    target.may_replace(old)
    draft.rename(path)


# -------------------------------------------------------------------------------------------------- temporary directories


def _temporary(parent: Path) -> tuple[Path, int | None]:
    """A new temporary directory, and its lock, if the file system has locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = _lock(folder)
        except OSError:
            return folder, None
        if lock is not None:
            return folder, lock
        # another saver took it for abandoned before it was locked, and removes it


def _lock(folder: Path) -> int | None:
    """An open handle that locks the directory; None if another process has the lock, or the directory is gone.

    Raises `OSError` where directories cannot be locked.
    """
    if fcntl is None:
        raise OSError("no locks")
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.lstat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _abandoned(parent: Path) -> Iterator[Path]:
    """The temporary directories that killed runs of this user left; each is locked while the caller looks at it."""
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        try:
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or (hasattr(os, "geteuid") and state.st_uid != os.geteuid()):
                continue
            lock = _lock(folder)
        except OSError:
            continue  # gone, or locks are not known here
        if lock is not None:
            try:
                yield folder
            finally:
                os.close(lock)


def _dispose(folder: Path) -> None:
    """Remove a temporary directory, after a success, an error or a kill; an old output without a successor is moved back."""
    for old in (folder / OLD).glob("*"):
        path = folder.parent / old.name
        if not os.path.lexists(folder / NEW / old.name):
            continue  # the new output has taken its place
        if os.path.lexists(path) and path.samefile(old):
            continue  # a file, which is replaced in one step
        if os.path.lexists(path):
            log.warning("a save of %s did not finish, and its previous content is in %s: move or delete it", path, old)
            return
        try:
            old.rename(path)
        except OSError as error:
            log.warning("a save of %s did not finish, and its previous content is in %s (%s)", path, old, error)
            return
        log.warning("a save of %s did not finish: its previous content is back", path)
    for file in folder.glob("*/*"):
        _remove_side_files(file, folder.parent / file.name)
    for directory, _, _ in os.walk(folder):
        with suppress(OSError):
            Path(directory).chmod(0o700)  # a saved directory may be read-only
    shutil.rmtree(folder, ignore_errors=True)


def _remove_side_files(gone: Path, path: Path) -> None:
    """Delete the side files at `path` that the file `gone` names, and the file at `path` does not."""
    pattern = re.compile(re.escape(path.name) + r"(\.[0-9]{8})?\.data")
    for side in path.parent.glob(glob.escape(path.name) + ".*data"):
        draft = gone.with_name(side.name)
        foreign = os.path.lexists(draft) and not draft.samefile(side)  # the draft was not put in place: the name was in use
        if pattern.fullmatch(side.name) and not foreign and _names(gone, side.name) and not _names(path, side.name):
            side.unlink()


def _names(file: Path, name: str) -> bool:
    """Whether a file contains a name, as an ONNX file that of its weights."""
    if not file.is_file() or file.is_symlink() or not file.stat().st_size:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(os.fsencode(name)) >= 0
