"""Renames that lose nothing, and writes that survive a power failure: the calls of the system that `atomic_write` is built on.

`exchange` and the strict half of `move_new` are Linux's `renameat2`, called through ctypes. Where the system or the file system
has no such call, `exchange` returns False, and `move_new` makes a hard link, which also fails if the name is taken.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of linux/fcntl.h and linux/fs.h
# What a call raises that is not known. Containers raise EPERM; an ordinary rename then reports a missing permission as such.
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two existing paths name, in one step; False, and no change, where the system cannot.

    Raises `OSError` for any other reason, such as a missing path or permission.
    """
    return _renameat2(one, other, _EXCHANGE)


def move_new(file: Path, target: Path) -> None:
    """Give a file a path that is not in use. Raises `FileExistsError` if it is, whatever is there.

    Without `renameat2` the file keeps its old path too, which is in a temporary directory.
    """
    if _renameat2(file, target, _NOREPLACE):
        return
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EMLINK):
            raise
        if os.path.lexists(target):  # without hard links a file that appears after this line is replaced
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        file.replace(target)


def sync(path: Path) -> None:
    """Wait until a file, or a directory with all that is in it, is on the disk.

    Without this, a rename can reach the disk before the content of the file, and a power failure then leaves an empty file
    under the new name and nothing under the old. Errors of delayed writes (a full disk, a quota) are raised here too.
    """
    if os.name != "posix":
        return  # other systems cannot open a directory, and sync a file only through the handle that wrote it
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        for child in path.iterdir():
            sync(child)
        sync_directory(path)
    elif stat.S_ISREG(mode):
        _fsync(path)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk; the files are not waited for."""
    if os.name != "posix":
        return
    try:
        _fsync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED and error.errno not in (errno.EBADF, errno.EACCES):
            raise  # some network file systems have no fsync of directories; a directory may be writable and not readable


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@functools.cache
def _function() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """`renameat2` of the C library; None where there is none."""
    if os.name != "posix":
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    found: Callable[[int, bytes, int, bytes, int], int] = call
    return found


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    call = _function()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))
