"""A kind of file whose reader does everything that a reader must not do: the fuzzer must report each. It needs no torch.

`act.txt` names what the reader does; case N uses seed N.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from memrewrite.errors import MemrewriteError, UserError

from .hostile import MODULE, Hostile
from .kinds import Kind

Act = Callable[[Path], object]
LIBC = ctypes.CDLL(None)


def _refuse(case: Path) -> None:
    raise UserError("the file is damaged")


def _blame_us(case: Path) -> None:
    raise MemrewriteError("it failed", hint="please report it")


def _hidden(act: Act) -> Act:
    """The act, by a reader that swallows everything."""

    def hidden(case: Path) -> None:
        try:
            act(case)
        except BaseException:  # noqa: BLE001 - a reader as bad as possible
            return

    return hidden


def _import_from_case(case: Path) -> None:
    sys.path.insert(0, str(case))
    importlib.import_module(MODULE)


def _hang(case: Path) -> None:
    while True:
        time.sleep(0.01)


def _hang_natively(case: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGPROF})  # as native code, which no signal interrupts
    time.sleep(3_600)


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.getpid, ()


CODE = (lambda: "zqx").__code__.replace(co_filename="<text>")
PICKLE = pickle.dumps(_Code())
# what the reader does, and the beginning of the reported outcome
ACTS: tuple[tuple[str, Act, str], ...] = (
    ("does nothing", lambda case: None, "loaded"),
    ("refuses", _refuse, "refused"),
    ("raises", lambda case: {}["zqy"], "failed KeyError"),
    ("exits", lambda case: sys.exit(0), "failed SystemExit"),
    ("blames memrewrite", _blame_us, "failed blames memrewrite"),
    ("executes", lambda case: exec("zqx = 1"), "failed violation: text of the file is compiled"),
    ("evaluates", _hidden(lambda case: eval("len('zqx')")), "failed violation: text of the file is compiled"),
    ("runs code", lambda case: exec(CODE), "failed violation: code that contains text of the file"),
    ("imports", _import_from_case, "failed violation: text of the file is compiled"),
    ("imports a name", lambda case: importlib.import_module("turtledemo.clock"), "failed violation: the module turtledemo"),
    ("reads outside", lambda case: (case / "../decoy/secret.bin").read_bytes(), "failed violation: "),
    ("reads a refused file", lambda case: (case / "refused.txt").open(), "failed violation: "),
    ("lists outside", lambda case: list((case / "..").iterdir()), "failed violation: os."),
    ("writes outside", _hidden(lambda case: (case / "../zqy").write_text("")), "failed violation: "),
    ("deletes outside", _hidden(lambda case: (case / "../decoy/secret.bin").unlink()), "failed violation: os.remove"),
    ("opens natively", lambda case: LIBC.open(os.fsencode(case.parent / "decoy/secret.bin"), 0), "failed violation: native"),
    ("runs a command", _hidden(lambda case: os.system("true")), "failed violation: os.system"),
    ("starts a process", _hidden(lambda case: subprocess.run(["true"])), "failed violation: subprocess.Popen"),
    ("opens a socket", lambda case: socket.create_connection(("127.0.0.1", 9)), "failed violation: socket."),
    ("loads a library", lambda case: ctypes.CDLL("libm.so.6"), "failed violation: ctypes.dlopen"),
    ("unpickles", lambda case: pickle.loads(PICKLE), "failed violation: pickle.find_class"),
    ("asks", lambda case: input("zqy? "), "failed violation: builtins.input"),
    ("replaces stdout", lambda case: setattr(sys, "stdout", None), "failed violation: stdout was left changed"),
    ("changes directory", lambda case: os.chdir("/"), "failed violation: the working directory was left changed"),
    ("needs memory", lambda case: bytearray(2**40), "failed MemoryError"),
    ("hangs", _hang, "failed hang: more than"),
    ("hangs natively", _hang_natively, "failed hang: nothing for"),
    ("aborts", lambda case: os.abort(), "failed crash: SIGABRT"),
    ("crashes", lambda case: ctypes.string_at(1), "failed crash: SIGSEGV"),
    ("ends the process", lambda case: os._exit(0), "failed crash: exit code 0"),
)


def _seeds(folder: Path) -> None:
    for number, (name, _, _) in enumerate(ACTS):
        (folder / f"{number:02}").mkdir()
        (folder / f"{number:02}" / "act.txt").write_text(name)
        (folder / f"{number:02}" / "refused.txt").touch()


def _change(rng: Random, data: bytes, other: bytes, words: Hostile) -> bytes:
    return b"turtledemo.clock"


def _act(case: Path, file: Path) -> None:
    name = (case / "act.txt").read_text()
    if file.stat().st_size:  # the process warms up with seeds, unwatched
        next(act for known, act, _ in ACTS if known == name)(case)


KINDS = {
    "acts": Kind("acts", "", "*/refused.txt", _change, (_act,), unread=True, seeds=_seeds),
    "broken": Kind("broken", "", "*/refused.txt", _change, (lambda case, file: _refuse(case),), seeds=_seeds),
}
