"""A session: stdout belongs to the result, signals clean up, and everything is restored afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from memrewrite import atomic_write
from memrewrite.cli import streams
from memrewrite.cli.session import session

# The command `show` of a program that has our session: it runs the file of the "model", then prints a document.
PROGRAM = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background of a shell, which ignores it
import typer
from memrewrite.cli import app as whole
from memrewrite.cli.session import session
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def show(as_json: bool = True):
    with session(None, as_json) as current:
        exec(Path("model.txt").read_text(), {})
        current.show({"done": True}, lambda out: out.print("done"))
whole.app = app
whole.run()
"""
PRINTS = {
    "print": "print('noise')",
    "the original stdout": "import sys; sys.__stdout__.write('noise')",
    "bytes": "import sys; sys.__stdout__.buffer.write(b'noise')",
    "the descriptor": "import os; os.write(1, b'noise')",
    "C stdio, not flushed": "import ctypes; ctypes.CDLL(None).printf(b'noise')",
    "a subprocess": "import subprocess; subprocess.run(['echo', 'noise'])",
    "os.system": "import os; os.system('echo noise')",
    "a logger": "import logging, sys; logging.basicConfig(stream=sys.__stdout__); logging.warning('noise')",
    "at the end": "import atexit; atexit.register(print, 'noise')",
    "at the end, to the original stdout": "import atexit, sys; atexit.register(lambda: sys.__stdout__.write('noise'))",
    "at the end, C stdio": "import atexit, ctypes; atexit.register(ctypes.CDLL(None).printf, b'noise')",
    "in a thread": "import threading, os; t = threading.Thread(target=os.write, args=(1, b'noise')); t.start(); t.join()",
}


def program(folder: Path, model: str, **options: object) -> subprocess.Popen[str]:
    (folder / "model.txt").write_text(model)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=folder, text=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize("how", PRINTS)
def test_what_the_models_code_prints_goes_to_stderr(how: str, tmp_path: Path) -> None:
    child = program(tmp_path, PRINTS[how])
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert json.loads(out) == {"done": True}
    assert "noise" in err


def test_the_descriptor_is_restored_where_stdout_is_another_object(capfd: pytest.CaptureFixture[str]) -> None:
    """pytest's and CliRunner's stdout have other descriptors, or none."""
    before = os.fstat(1), sys.stdout, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with session(None, as_json=True) as current:
        os.write(1, b"noise")
        print("more")
        current.show({"done": True}, lambda _: None)
    os.write(1, b"later")
    assert os.path.samestat(before[0], os.fstat(1))
    assert before[1:] == (sys.stdout, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP))
    out, err = capfd.readouterr()
    assert "noise" in err
    assert "more" in err
    assert out.endswith("later")
    assert json.loads(out.removesuffix("later")) == {"done": True}


@pytest.mark.parametrize("closed", [1, 2])
def test_a_process_without_stdout_or_stderr(closed: int, tmp_path: Path) -> None:
    child = program(tmp_path, "import os; print('noise'); os.system('echo noise')", preexec_fn=lambda: os.close(closed))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert (not out) if closed == 1 else json.loads(out) == {"done": True}


def test_a_full_disk_and_a_closed_pipe_at_stdout(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:  # opened for writing, as any user may
        child = program(tmp_path, "", stdout=full)
        _, err = child.communicate(timeout=120)
        assert child.returncode == 2
        assert "the result cannot be written to stdout: No space left on device" in err
    reader, writer = os.pipe()
    os.close(reader)
    child = program(tmp_path, "", stdout=writer)
    os.close(writer)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (1, "")


def test_a_deleted_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(typer.Exit) as caught, session(None):
        raise AssertionError("it does not come here")
    assert caught.value.exit_code == 2
    assert "the working directory was deleted" in capsys.readouterr().err


SAVES = """
import os, time
from pathlib import Path
from memrewrite.atomic_write import replacing
from memrewrite.output_target import Target
with replacing(Target(Path("out"), directory=True)) as draft:
    draft.mkdir()
    (draft / "file").write_text("half")
    Path("started").touch()
    time.sleep(100)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_clean_up(number: int, code: int, tmp_path: Path) -> None:
    child = program(tmp_path, SAVES)
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    assert list(tmp_path.glob(f"{atomic_write.PREFIX}*"))
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert not out
    assert err.strip() == ("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.txt", "started"]


def test_other_handlers_of_signals_are_kept() -> None:
    """A program that uses our command line inside its own process; `nohup` ignores SIGHUP."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number)), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with streams.stopping():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert seen == [signal.SIGTERM]


def test_a_forked_worker_ends_by_the_signal_itself() -> None:
    with streams.stopping():
        child = os.fork()
        if child == 0:
            try:
                time.sleep(100)
            finally:
                os._exit(1)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
