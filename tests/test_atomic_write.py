"""`replacing`: targets change all at once or not at all, and no temporary file is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memrewrite.atomic_write import replacing


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, by its path."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_file_and_a_replaced_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing(tmp_path / "a") as (draft,):
            draft.write_text(text)
            assert draft.parent.parent == tmp_path  # on the same file system, so that a rename is possible
        assert contents(tmp_path) == {"a": text}


def test_a_directory_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with replacing(tmp_path / "a") as (draft,):
            draft.mkdir()
            (draft / name).write_text(name)
        assert contents(tmp_path) == {f"a/{name}": name}


def test_a_target_without_a_draft_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a", tmp_path / "b") as (_, draft):
        draft.write_text("new")
    assert contents(tmp_path) == {"b": "new"}


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing(Path("a")) as (draft,):
        draft.write_text("new")
    assert contents(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_in_the_body_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), replacing(tmp_path / "a", tmp_path / "b") as drafts:  # noqa: PT012
        for draft in drafts:
            draft.write_text("new")
        raise error
    assert contents(tmp_path) == {"a": "old"}


OLD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "one file": lambda folder: (folder / "a").write_text("old"),
    "both files": lambda folder: [(folder / name).write_text("old") for name in "ab"],
    "directories": lambda folder: [(folder / name / "x").mkdir(parents=True) for name in "ab"],
}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("renames", range(5))
def test_an_error_in_any_rename_changes_nothing(
    old: str, renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes after `renames` renames; undoing them works."""
    OLD[old](tmp_path)
    before = sorted(tmp_path.rglob("*")), contents(tmp_path)
    real, left = Path.replace, iter(range(renames))

    def replace(self: Path, target: Path) -> Path:
        if failing and next(left, None) is None:
            failing.clear()
            raise OSError("no room")
        return real(self, target)

    failing = [True]
    monkeypatch.setattr(Path, "replace", replace)
    try:
        with replacing(tmp_path / "a", tmp_path / "b") as drafts:
            for draft in drafts:
                draft.write_text("new")
    except OSError:
        assert (sorted(tmp_path.rglob("*")), contents(tmp_path)) == before
    else:
        assert failing  # it needs fewer renames
        assert contents(tmp_path) == {"a": "new", "b": "new"}


def test_the_last_file_exists_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        assert (tmp_path / "a").read_text() == "old"
        out = real(self, target)
        assert (tmp_path / "a").read_text() == "new"
        return out

    monkeypatch.setattr(Path, "replace", replace)
    with replacing(tmp_path / "a") as (draft,):
        draft.write_text("new")
