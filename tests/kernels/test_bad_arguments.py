"""Direct calls with wrong arguments, in a process of their own: one that ends it is a failure and not the end of the tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_every_wrong_argument_is_refused_or_computed_right(backend: str, request: pytest.FixtureRequest) -> None:
    library = [str(request.getfixturevalue("library"))] if backend == "native" else []
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bad_arguments.py")), backend, *library]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong[:20])
    assert done.returncode == 0, f"exit status {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}"
    counts = ast.literal_eval(lines[-1])
    print(counts)
    assert counts["refused"] > 1500
    assert counts["ran"] > 500
