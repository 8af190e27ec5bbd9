"""Replaces files and directories all at once or not at all.

Flow: the caller writes drafts into a temporary directory next to the targets → each draft is renamed to its target → after an
error the targets are as they were. The temporary directory is removed in both cases.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one draft path for each target; drafts replace their targets when the body ends without an error.

    The targets are in one directory, which exists. The body creates each draft, a file or a directory, with the permissions
    that the target shall have. A target whose draft was not created is removed. When the last draft replaces a file by a
    file, the target exists at every moment: a reader gets the old content or the new one.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{targets[0].name}.", dir=targets[0].absolute().parent))
    drafts = [folder / target.name for target in targets]
    try:
        yield drafts
        _replace_all(drafts, targets, folder.with_name(f"{folder.name}.old"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_all(drafts: Sequence[Path], targets: Sequence[Path], backups: Path) -> None:
    """Rename drafts to targets. Old targets are in `backups` until the last rename; an error reverses every rename."""
    renames: list[tuple[Path, Path]] = []

    def rename(old: Path, new: Path) -> None:
        old.replace(new)
        renames.append((old, new))

    backups.mkdir()
    try:
        for draft, target in zip(drafts, targets, strict=True):
            one_step = draft.is_file() and not target.is_dir() and target == targets[-1]
            if target.exists() and not one_step:  # the last rename needs no backup: nothing follows that could fail
                rename(target, backups / target.name)
            if draft.exists():
                rename(draft, target)
    except BaseException:
        for old, new in reversed(renames):
            new.replace(old)
        backups.rmdir()
        raise
    shutil.rmtree(backups, ignore_errors=True)
