"""Watches a process while a file is read: what it compiles, imports, opens, starts, and how long it takes.

An audit hook sees what Python does. What native code opens is seen by inotify, on the decoy folder that hostile paths name. A
violation is recorded and raises `Blocked`, which no `except Exception` catches, so that nothing harmful is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar

from .hostile import MARK

ROOT = Path(__file__).resolve().parents[2]
NEVER = (  # events that reading a file never causes
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "pty.spawn",
    "socket.",
    "ctypes.dlopen",
    "pickle.find_class",
    "builtins.input",
    "webbrowser.open",
    "urllib.Request",
    "ftplib.connect",
    "http.client.connect",
    "code.interact",
    "shelve.open",
    "dbm.open",
    "sqlite3.connect",
    "shutil.unpack_archive",
)
FOLDERS = {  # where the descriptors of directories begin in the arguments of an event
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 2,
    "os.symlink": 2,
    "os.chmod": 2,
    "os.rename": 2,
    "os.link": 2,
    "os.chown": 3,
}
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LISTS = ("os.listdir", "os.scandir")
WORD = re.compile(rb"[A-Za-z_]\w*(?:\.\w+)*")
WAIT = 3  # a case may take so many times its CPU time
DEVICES = ("/dev/null", "/dev/urandom", "/proc", "/sys", "/etc/localtime", "/usr/share/zoneinfo", "/etc/nsswitch.conf")


class Blocked(BaseException):
    """A violation, at the moment when it happens."""


class Hang(BaseException):
    """A case that exceeds its time."""


def words_of(data: bytes) -> set[str]:
    """The identifiers and dotted names in a file."""
    return {word.decode() for word in WORD.findall(data)}


class _Imports:
    """A finder that finds nothing: it reports the name of each module that is imported and not yet loaded."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self._report(name)


class Guard:
    """The hook of this process. It observes only inside `watching`."""

    def __init__(self, decoy: Path) -> None:
        self.violations: list[str] = []
        self._active = False
        self._case = ""
        self._new: set[str] = set()
        self._unread: set[str] = set()
        self._decoy = _Decoy(decoy)
        self._installed = _installed()
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.signal(signal.SIGPROF, _on_alarm)
        sys.addaudithook(self._hook)
        sys.meta_path.insert(0, _Imports(self._import))  # `importlib.import_module` has no audit event

    @contextlib.contextmanager
    def watching(self, case: Path, new: set[str], seconds: float, unread: set[str] = frozenset()) -> Iterator[None]:  # type: ignore[assignment]
        """Watch the body. It may read and write in `case`; `new` are the words that the damage added to the file.

        `unread`: files in `case` that may not be opened.
        """
        self.violations.clear()
        self._decoy.events()
        self._case, self._new, self._unread = os.path.realpath(case), new, {os.path.realpath(p) for p in unread}
        state = _state()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process, so that a busy machine makes no failures
        signal.setitimer(signal.ITIMER_REAL, WAIT * seconds)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.violations += [f"native code or a child touched the decoy: {event}" for event in self._decoy.events()]
            self.violations += [f"{name} was left changed" for name, old, new_ in _pairs(state, _state()) if old != new_]
            _restore(state)

    # ----------------------------------------------------------------------------------------------------------- the hook

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active:
            return
        handler = self._HANDLERS.get(event)
        if handler is not None:
            handler(self, event, args)
        elif event.startswith(NEVER):
            self._found(f"{event} {args!r}"[:200])

    def _found(self, what: str) -> None:
        self.violations.append(what)
        raise Blocked(what)

    def _compile(self, event: str, args: tuple[Any, ...]) -> None:
        """Text of the file may not be compiled. Parsing alone (`ast.literal_eval`) runs nothing."""
        source, filename = args
        frame = sys._getframe(2)
        if source is None or frame.f_code.co_filename.endswith(("/ast.py", "<frozen ast>")):
            return
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)
        if MARK in text and not self._is_installed(str(filename)):
            self._found(f"text of the file is compiled: {text[:120]!r}")

    def _exec(self, event: str, args: tuple[Any, ...]) -> None:
        code = args[0]
        if isinstance(code, CodeType):
            file = code.co_filename
            if file.startswith("/") and not self._is_installed(file):
                self._found(f"code of {file} runs")
            if not self._is_installed(file) and any(MARK in name for name in _names(code)):
                self._found(f"code that contains text of the file runs: {[n for n in _names(code) if MARK in n][:3]}")

    def _import(self, name: str) -> None:
        """A name that only the damage contains is not imported. (`_exec` finds code outside of the installed packages.)"""
        parts = name.split(".")
        if self._active and any(".".join(parts[:count]) in self._new for count in range(1, len(parts) + 1)):
            self._found(f"the module {name} is imported, which the file names")

    def _open(self, event: str, args: tuple[Any, ...]) -> None:
        path, mode, flags = args
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        writes = bool(set(mode or "") & set("wax+")) or bool(
            int(flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        )
        full = _full(path)
        if full in self._unread:
            self._found(f"{full} is opened, which is refused")
        if not self._inside(full) and (writes or not self._may_read(full)):
            self._found(f"{full} is opened for {'writing' if writes else 'reading'}")

    def _changes(self, event: str, args: tuple[Any, ...]) -> None:
        paths = [a for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))]
        folders = args[FOLDERS[event] :] if event in FOLDERS else ()
        for number, path in enumerate(paths):
            full = _full(path, folders[min(number, len(folders) - 1)] if folders else -1)
            if not self._inside(full):
                self._found(f"{event} {full}")

    def _lists(self, event: str, args: tuple[Any, ...]) -> None:
        path = args[0] if isinstance(args[0], (str, bytes)) else "." if args[0] is None else self._case
        if not self._inside(_full(path)) and not self._may_read(_full(path)):
            self._found(f"{event} {_full(path)}")

    def _inside(self, full: str) -> bool:
        return full == self._case or full.startswith(self._case + "/")

    def _may_read(self, full: str) -> bool:
        return self._is_installed(full) or full.startswith(DEVICES)

    def _is_installed(self, path: str) -> bool:
        return path.startswith((*self._installed, "<frozen "))

    _HANDLERS: ClassVar[dict[str, Callable[[Guard, str, tuple[Any, ...]], None]]] = {
        "compile": _compile,
        "exec": _exec,
        "open": _open,
        **dict.fromkeys(CHANGES, _changes),
        **dict.fromkeys(LISTS, _lists),
    }


def _full(path: Any, folder: int = -1) -> str:
    """The path itself, in `folder` if that is the descriptor of a directory."""
    try:
        return os.path.realpath(os.path.join("." if folder < 0 else f"/proc/self/fd/{folder}", os.fsdecode(path)))  # noqa: PTH118
    except (ValueError, OSError):  # a zero byte: the system refuses it
        return ""


def _installed() -> tuple[str, ...]:
    """The folders of Python, of the installed packages and of this package."""
    own = {sys.prefix, sys.base_prefix, *site.getsitepackages(), *sysconfig.get_paths().values()}
    own |= {path for path in sys.path if path and ("site-packages" in path or path.startswith(tuple(own)))}
    return tuple(sorted({os.path.realpath(path) for path in own} | own | {str(ROOT)}))


def _names(code: CodeType) -> list[str]:
    """Names and texts in a code object and in those inside it."""
    found = [*code.co_names, *code.co_varnames, *(value for value in code.co_consts if isinstance(value, str))]
    for value in code.co_consts:
        if isinstance(value, CodeType):
            found += _names(value)
    return found


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise Hang("the case exceeds its time")


def limit_memory(more: int) -> None:
    """Allow this process `more` bytes of memory beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ------------------------------------------------------------------------------------------------------------ the process


def _state() -> dict[str, Any]:
    """What of a process a reader may not leave changed."""
    state: dict[str, Any] = {
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "the working directory": str(Path.cwd()),
        "sys.path": list(sys.path),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch's default dtype"] = torch.get_default_dtype()
        state["torch's grad mode"] = torch.is_grad_enabled()
        state["torch's inference mode"] = torch.is_inference_mode_enabled()
    return state


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    return ((name, old[name], new[name]) for name in old)


def _restore(state: dict[str, Any]) -> None:
    sys.stdout, sys.stderr, sys.path[:] = state["stdout"], state["stderr"], state["sys.path"]
    os.chdir(state["the working directory"])
    torch = sys.modules.get("torch")
    if torch is not None and "torch's default dtype" in state:
        torch.set_default_dtype(state["torch's default dtype"])
        torch.set_grad_enabled(state["torch's grad mode"])


class _Decoy:
    """Reports every file of a folder that anything opens, creates, changes or deletes (Linux's inotify)."""

    OPENED, CHANGED = 0x20, 0x2 | 0x100 | 0x200 | 0x40 | 0x80

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._stream = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._stream < 0 or libc.inotify_add_watch(self._stream, os.fsencode(folder), self.OPENED | self.CHANGED) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def events(self) -> list[str]:
        """The names of the files that were touched since the last call."""
        try:
            data = os.read(self._stream, 65_536)
        except BlockingIOError:
            return []
        names = []
        while data:
            length = int.from_bytes(data[12:16], sys.byteorder)
            names.append(data[16 : 16 + length].rstrip(b"\0").decode() or "the folder")
            data = data[16 + length :]
        return sorted(set(names))
