"""The README runs as printed: its recipe and model, every shell command, the Python script."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
FILES = {text.splitlines()[0].removeprefix("# "): text for kind, text in BLOCKS if kind in ("yaml", "python")}
COMMANDS = [line.partition("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("readme")
    for name, text in FILES.items():
        (made / name).write_text(text)
    return made


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_shell_commands_run_as_printed(folder: Path) -> None:
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "memrewrite"
        done = run(folder, sys.executable, "-m", "memrewrite.cli", *words)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_python_runs_as_printed(folder: Path) -> None:
    done = run(folder, sys.executable, "train.py")
    assert done.returncode == 0, done.stderr
    assert "identity: passed" in done.stdout
    assert (folder / "trained" / "plan.json").is_file()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 90
