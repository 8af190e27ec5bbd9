"""Runs commands of documentation, each in its own process, without paying for the imports of torch each time.

Flow: one process imports the libraries → for each command it forks → the child runs `memrewrite ...` or `python FILE` as its
main program → exit code, stdout and stderr come back. No state passes from one command to the next, except files.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 300  # seconds for each command


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


class Commands:
    """Runs command lines in one folder: `memrewrite ...` and `python FILE ...`; any other program is a ValueError.

    What they write to the user's cache goes into that folder too. `path` is searched first for imports.
    """

    def __init__(self, folder: Path, *, path: Path | None = None) -> None:
        self.folder = folder
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        self._environment = environment
        line = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(line, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(TIMEOUT)

    def run(self, command: str) -> Done:
        """Run one line."""
        words = shlex.split(command, comments=True)
        if words[:1] not in (["memrewrite"], ["python"]):
            raise ValueError(f"only memrewrite and python can be run here: {command}")
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return Done(*json.loads(self._server.stdout.readline()))

    def cold(self, command: str) -> Done:
        """Run one `memrewrite` line in a new interpreter, as a shell does."""
        program, *words = shlex.split(command, comments=True)
        assert program == "memrewrite"
        line = [sys.executable, "-m", "memrewrite.cli", *words]
        how = {"cwd": self.folder, "env": self._environment, "timeout": TIMEOUT}
        done = subprocess.run(line, capture_output=True, text=True, check=False, **how)
        return Done(done.returncode, done.stdout, done.stderr)


def _serve() -> None:
    """Import what commands need, then fork once for every line on stdin."""
    import torch._dynamo
    import torch.export
    import torch.onnx
    import transformers

    import memrewrite.cli.app
    import memrewrite.passes.onnx.check.check
    import memrewrite.passes.pipeline
    import memrewrite.passes.verify_saved  # noqa: F401

    assert transformers.LlamaForCausalLM
    assert torch.get_num_threads()
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os._exit(_child(json.loads(line), out.fileno(), err.fileno()))
            _, status = os.waitpid(child, 0)
            printed = []
            for stream in (out, err):
                stream.seek(0)
                printed.append(stream.read())
        print(json.dumps([os.waitstatus_to_exitcode(status), *printed]), flush=True)


def _child(words: list[str], out: int, err: int) -> int:
    """The body of a command, in the forked process; returns its exit code."""
    signal.alarm(TIMEOUT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    program, *arguments = words
    code = 0
    try:
        if program == "memrewrite":
            import memrewrite.cli

            sys.argv = words
            memrewrite.cli.main()
        else:
            sys.argv = arguments
            sys.path[0] = ""
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the top
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
