"""`replacing`: a target changes all at once or not at all, no temporary file is left, and nothing else is replaced."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memrewrite import atomic_write, renames
from memrewrite.atomic_write import prepare, recover, replacing, side_file
from memrewrite.errors import CheckpointError, ExportError, MemrewriteError
from memrewrite.output_target import Target, saved_directory

MANIFEST = '{"memrewrite": 1, "base": {}, "files": {}}'
SYSTEMS = ["exchange", "two steps"]


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with the system's exchange, and as on a system that has no `renameat2`."""
    if request.param == "two steps":
        monkeypatch.setattr(renames, "_function", lambda: None)
    return str(request.param)


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, by its path."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_file(path: Path, text: str, *, overwrite: bool = False, **options: Any) -> None:
    with replacing(Target(path, overwrite=overwrite, **options)) as draft:
        draft.write_text(text)


def write_directory(path: Path, text: str, **options: Any) -> None:
    with replacing(saved_directory(path, **{"overwrite": False, **options})) as draft:
        draft.mkdir()
        (draft / "memrewrite.json").write_text(MANIFEST)
        (draft / "text").write_text(text)


# --------------------------------------------------------------------------------------------------------- what it replaces


@pytest.mark.usefixtures("system")
def test_a_new_file_and_a_replaced_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing(Target(tmp_path / "a", overwrite=True)) as draft:
            draft.write_text(text)
            assert draft.parent.parent.parent == tmp_path  # on the same file system, so that a rename is possible
        assert contents(tmp_path) == {"a": text}


@pytest.mark.usefixtures("system")
def test_a_directory_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", "one")
    (tmp_path / "a" / "more").write_text("")
    (tmp_path / "a" / "folder").mkdir(mode=0o500)
    write_directory(tmp_path / "a", "two", overwrite=True)
    assert contents(tmp_path) == {"a/memrewrite.json": MANIFEST, "a/text": "two"}


@pytest.mark.usefixtures("system")
def test_an_empty_directory_is_replaced_and_parents_are_created(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_directory(tmp_path / "a", "one")
    write_directory(tmp_path / "b" / "c" / "d", "one")
    assert contents(tmp_path).keys() == {f"{where}/{name}" for where in ("a", "b/c/d") for name in ("memrewrite.json", "text")}


def test_a_relative_target_stays_where_it_was_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing(Target(Path("a"))) as draft:
        draft.write_text("new")
        os.chdir("other")
    assert contents(tmp_path) == {"a": "new"}


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # a null device of our own
    except PermissionError:
        pytest.skip("devices cannot be created here")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


def _link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def _directory(**files: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, text in files.items():
            (path / name.replace("_", ".")).write_text(text)

    return make


OTHERS: dict[str, Callable[[Path], None]] = {  # what neither a file nor a directory may replace
    "a device": _device,
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a symbolic link, to 'file'": _link("file"),
    "a symbolic link, to 'folder'": _link("folder"),
    "a symbolic link, to 'saved'": _link("saved"),
    "a symbolic link, to 'nowhere'": _link("nowhere"),
    "a symbolic link, to 'target'": _link("target"),
}
FILES = {"is a file": lambda path: path.write_text("mine")}
DIRECTORIES = {"is a directory": _directory(), " is a directory": _directory(mine="mine")}
NOT_OURS = {
    "memrewrite did not save it": _directory(mine="mine"),
    " memrewrite did not save it": _directory(memrewrite_json="{}"),
    "  memrewrite did not save it": _directory(memrewrite_json="[" * 100_000),
    "   memrewrite did not save it": _directory(memrewrite_json=MANIFEST[:-1]),
    "    memrewrite did not save it": lambda path: (path.mkdir(), os.mkfifo(path / "memrewrite.json"))[0],
    "     memrewrite did not save it": lambda path: (path.mkdir(), (path / "memrewrite.json").symlink_to("../file"))[0],
}


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, mode and content of everything below `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        at = path.lstat()
        found[str(path.relative_to(folder))] = (at.st_ino, at.st_mode, path.read_bytes() if path.is_file() else b"")
    return found


REFUSED = [
    *[(write_file, message, make) for message, make in (OTHERS | DIRECTORIES).items()],
    *[(write_directory, message, make) for message, make in (OTHERS | FILES | NOT_OURS).items()],
]


@pytest.mark.parametrize("when", ["before", "after the draft"])
@pytest.mark.parametrize(("write", "message", "make"), REFUSED, ids=[f"{w.__name__} {m}" for w, m, _ in REFUSED])
def test_nothing_but_an_earlier_output_is_replaced(
    write: Callable[..., None], message: str, make: Callable[[Path], None], when: str, system: str, tmp_path: Path
) -> None:
    """`overwrite` is set; what is refused is there at the start, or appears while the draft is written."""
    (tmp_path / "file").write_text(MANIFEST)
    (tmp_path / "folder").mkdir()
    write_directory(tmp_path / "saved", "theirs")
    target = tmp_path / "target"
    if when == "before":
        make(target)
        before = state(tmp_path)
        with pytest.raises(CheckpointError, match=message.strip()) as caught:
            write(target, "new", overwrite=True)
        assert caught.value.where == str(target)
        assert caught.value.hint
    else:
        options = {"ours": saved_directory(target, overwrite=True).ours, "directory": True} if write is write_directory else {}
        with (  # noqa: PT012
            pytest.raises(CheckpointError, match=message.strip()),
            replacing(Target(target, overwrite=True, **options)) as draft,
        ):
            draft.mkdir() if options else draft.write_text("new")
            make(target)
            before = {name: at for name, at in state(tmp_path).items() if not name.startswith(atomic_write.PREFIX)}
    assert state(tmp_path) == before


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("write", [write_file, write_directory])
def test_without_overwrite_what_appears_meanwhile_is_kept(write: Callable[..., None], tmp_path: Path) -> None:
    target = tmp_path / "a"
    goal = Target(target, directory=write is write_directory)
    with pytest.raises(CheckpointError, match=r"exists|in use"), replacing(goal) as draft:  # noqa: PT012
        draft.mkdir() if goal.directory else draft.write_text("the loser")
        write(target, "the winner")
    assert "the winner" in contents(tmp_path).values()
    assert list(tmp_path.iterdir()) == [target]


def test_what_comes_out_of_an_exchange_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last instant: the check before the exchange sees an earlier output, the exchange takes out something else."""
    write_directory(tmp_path / "a", "old")
    real, calls = renames.exchange, []

    def late(one: Path, other: Path) -> bool:
        if not calls:
            other.rename(tmp_path / "aside")
            _directory(mine="mine")(other)
        calls.append(1)
        return real(one, other)

    monkeypatch.setattr(atomic_write, "exchange", late)
    with pytest.raises(CheckpointError, match="did not save it"):
        write_directory(tmp_path / "a", "new", overwrite=True)
    assert contents(tmp_path)["a/mine"] == "mine"
    assert len(calls) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"a", "aside"}


@pytest.mark.parametrize("write", [write_file, write_directory])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no name|would delete"),
        (".", "no name|would delete"),
        ("..", "no name|would delete"),
        ("a/..", "no name|would delete"),
        ("/", "no name|would delete"),
        ("n" * 256, "File name too long"),
        ("d/" * 2100 + "n", "File name too long"),
        ("a\0b", "no possible name"),
        ("a\ud800", "no possible name"),
        ("file/a", "Not a directory"),
        ("circle/a", "symbolic links"),
    ],
)
def test_impossible_names(write: Callable[..., None], name: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        write(Path(name), "new", overwrite=True)
    assert caught.value.hint
    assert {p.name for p in tmp_path.iterdir()} == {"file", "circle"}


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "a", "old")
    monkeypatch.chdir(tmp_path / "a")
    for path in (tmp_path / "a", Path("../a")):
        with pytest.raises(CheckpointError, match="working directory"):
            write_directory(path, "new", overwrite_any=path)


def test_a_deleted_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for write in (write_file, write_directory):
        with pytest.raises(CheckpointError, match="No such file or directory"):
            write(Path("a"), "new")
        write(tmp_path / write.__name__, "new")  # an absolute path needs none


# ------------------------------------------------------------------------------------------------------- errors and kills


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_body_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    write_file(tmp_path / "a", "old")
    before = state(tmp_path)
    with pytest.raises(error), replacing(Target(tmp_path / "a", overwrite=True)) as draft:  # noqa: PT012
        draft.write_text("new")
        raise error
    with pytest.raises(error), replacing(Target(tmp_path / "b" / "c" / "d", directory=True)) as draft:  # noqa: PT012
        draft.mkdir()
        raise error
    assert state(tmp_path) == before


class Fault:
    """Makes the n-th call of the system fail that `replacing` makes after the draft is complete."""

    CALLS = (*[(Path, name) for name in ("rename", "replace", "unlink", "mkdir")], (os, "link"), (os, "fsync"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
        self.left, self.action, self.fired = number, action, False
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))
        for name in ("exchange", "move_new"):
            monkeypatch.setattr(atomic_write, name, self.failing(getattr(renames, name)))

    def failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.fired = True
                self.action()
            return real(*arguments, **options)

        return call


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


OPERATIONS: dict[str, Callable[[Path, str], None]] = {
    "new file": lambda folder, text: write_file(folder / f"{text}.a", text),
    "file": lambda folder, text: write_file(folder / "a", text, overwrite=True),
    "new directory": lambda folder, text: write_directory(folder / f"{text}.a", text),
    "directory": lambda folder, text: write_directory(folder / "a", text, overwrite=True),
    "with side file": lambda folder, text: _with_side_file(folder / "a", text),
}


def _with_side_file(path: Path, text: str) -> None:
    side = side_file(path)
    with replacing(Target(path, overwrite=True, error=ExportError)) as draft:
        draft.write_text(f"weights in {side.name}")
        draft.with_name(side.name).write_text(text)


def result(folder: Path) -> str:
    """What the operations' output says, or "absent"; an incomplete one is an error."""
    if (folder / "a").is_dir():
        assert (folder / "a" / "memrewrite.json").read_text() == MANIFEST
        return (folder / "a" / "text").read_text()
    found = [path for path in (folder / "a", folder / "new.a") if path.exists()]
    if not found:
        return "absent"
    if found[0].is_dir():
        return (found[0] / "text").read_text()
    text = found[0].read_text()
    return (folder / text.removeprefix("weights in ")).read_text() if text.startswith("weights in ") else text


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_error_of_any_call_changes_nothing(
    operation: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call fails in turn. The target is old or new, complete; without a fault after it, nothing else is left."""
    new = operation.startswith("new")
    for number in range(1, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        if not new:
            OPERATIONS[operation](folder, "old")
        with monkeypatch.context() as patch:
            fault = Fault(patch, number, _no_room)
            failed: list[MemrewriteError] = []
            try:
                OPERATIONS[operation](folder, "new")
            except (CheckpointError, ExportError) as error:
                failed.append(error)
            assert all("No space left on device" in error.what for error in failed)
            assert all(error.hint == "free space on this disk, or write to another one" for error in failed)
        assert result(folder) in ({"absent", "new"} if new else {"old", "new"})
        _no_leftovers(operation, folder)
        if not fault.fired:
            assert number > 3
            return
    raise AssertionError("no end")


def _no_leftovers(operation: str, folder: Path) -> None:
    """At once, or after the next save beside it."""
    write_file(folder / "beside", "", overwrite=True)
    names = {path.name for path in folder.iterdir()} - {"beside"}
    sides = {name for name in names if name.endswith(".data")}
    assert names - sides <= {"a", "new.a"}
    assert len(sides) == (operation == "with side file")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_output(
    operation: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A child kills itself at every call in turn; where there is no exchange, the next save moves the old output back."""
    new = operation.startswith("new")
    for number in range(1, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        if not new:
            OPERATIONS[operation](folder, "old")
        child = os.fork()
        if child == 0:
            try:
                Fault(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                OPERATIONS[operation](folder, "new")
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if system == "exchange":
            assert result(folder) in ({"absent", "new"} if new else {"old", "new"})
        moved = result(folder) == "absent" and not new
        assert recover(folder / "a") == moved
        assert ("its previous content is back" in caplog.text) == moved
        caplog.clear()
        assert result(folder) in ({"absent", "new"} if new else {"old", "new"})
        _no_leftovers(operation, folder)
        if not killed:
            assert number > 3
            return
    raise AssertionError("no end")


def test_an_old_output_is_kept_where_something_else_took_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A killed run of a system without exchange, and then the user writes something under the name."""
    left = tmp_path / f"{atomic_write.PREFIX}x"
    for name in ("old", "new"):
        (left / name / "a").mkdir(parents=True)
    (tmp_path / "a").write_text("mine")
    write_file(tmp_path / "b", "new")
    assert f"its previous content is in {left / 'old' / 'a'}" in caplog.text
    assert (left / "old" / "a").is_dir()
    assert (tmp_path / "a").read_text() == "mine"


def test_the_temporary_directory_of_a_running_save_is_kept(tmp_path: Path) -> None:
    with replacing(Target(tmp_path / "a")) as draft:
        draft.write_text("a")
        write_file(tmp_path / "b", "b")
        prepare(Target(tmp_path / "c"))
        assert draft.exists()
        run = f"from memrewrite.atomic_write import *; prepare(Target(Path({str(tmp_path / 'c')!r})))"
        subprocess.run([sys.executable, "-c", run], check=True)
        assert draft.exists()
    assert contents(tmp_path) == {"a": "a", "b": "b"}


def test_links_and_files_with_the_name_of_a_temporary_directory_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    (tmp_path / f"{atomic_write.PREFIX}link").symlink_to("mine")
    (tmp_path / f"{atomic_write.PREFIX}file").write_text("")
    before = state(tmp_path)
    write_file(tmp_path / "a", "a")
    assert state(tmp_path).items() >= before.items()


def test_side_files_that_no_replaced_file_names_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("mine")
    (tmp_path / "a.12345678.data").write_text("mine")
    for text in ("one", "two"):
        _with_side_file(tmp_path / "a", text)
        assert result(tmp_path) == text
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_two_savers(overwrite: bool, kind: str, tmp_path: Path) -> None:
    """25 races of two processes to one path: without `overwrite` exactly one wins; with it, the last; nothing is left."""
    for race in range(25):
        folder = tmp_path / str(race)
        folder.mkdir()
        gate, opened = os.pipe()
        children = []
        for number in range(2):
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    os.close(opened)
                    os.read(gate, 1)  # ends for both at once
                    write = write_file if kind == "file" else write_directory
                    write(folder / "a", f"saver {number}", overwrite=overwrite)
                    code = 0
                except CheckpointError:
                    code = 2
                finally:
                    os._exit(code)
            children.append(child)
        os.close(gate)
        os.close(opened)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == ([0, 0] if overwrite else [0, 2])
        winner = result(folder)
        assert winner in ("saver 0", "saver 1") if overwrite else winner == f"saver {codes.index(0)}"
        assert [p.name for p in folder.iterdir()] == ["a"]


def test_savers_in_threads(tmp_path: Path) -> None:
    def save(number: int) -> None:
        for _ in range(5):
            write_directory(tmp_path / "a", f"saver {number}", overwrite=True)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert result(tmp_path).startswith("saver")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    write_file(small_disk / "a", "old")
    for write in (write_file, write_directory):
        with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device") as caught:
            write(small_disk / f"new {write.__name__}", "x" * 100_000)
        assert "free space" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="No space left"):
        write_file(small_disk / "a", "x" * 100_000, overwrite=True)
    assert contents(small_disk) == {"a": "old"}


def test_a_mount_point_and_a_read_only_file_system(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="mount point"):
        write_directory(small_disk, "new", overwrite=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in (write_file, write_directory):
        with pytest.raises(CheckpointError, match=r"Read-only file system|no permission"):
            write(small_disk / "a", "new")


def test_a_limit_of_file_sizes(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            write_file(tmp_path / "a", "x" * 20_000)
        except CheckpointError as error:
            code = 0 if "File too large" in error.what and "ulimit -f" in str(error.hint) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES])
def test_errors_inside_errors_of_libraries(number: int, tmp_path: Path) -> None:
    """safetensors and tokenizers, written in Rust, report the system's errors as text; others as a cause."""
    texts = (f"I/O error: no luck (os error {number})", f"IoError(Os {{ code: {number}, kind: Other }})")
    for error in (*map(RuntimeError, texts), RuntimeError("caused")):
        if "caused" in str(error):
            error.__cause__ = OSError(number, os.strerror(number))
        with pytest.raises(ExportError, match=os.strerror(number)), replacing(Target(tmp_path / "a", error=ExportError)):
            raise error
    with pytest.raises(RuntimeError, match="other"), replacing(Target(tmp_path / "a")):
        raise RuntimeError("other")
    assert not list(tmp_path.iterdir())
