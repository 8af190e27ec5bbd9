"""The README runs as printed: its recipe and model, every shell command, the Python script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/memrewrite/memrewrite/"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
FILES = {text.splitlines()[0].removeprefix("# "): text for kind, text in BLOCKS if kind in ("yaml", "python")}
COMMANDS = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.partition(" ")[0] == "memrewrite"
]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("readme")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    with Commands(folder) as commands:
        yield commands


def test_shell_commands_run_as_printed(shell: Commands) -> None:
    assert len(COMMANDS) == 11
    for number, command in enumerate(COMMANDS):
        done = shell.cold(command) if number == 0 else shell.run(command)
        assert done.code == 0, f"{command}\n{done.out}\n{done.err}"


def test_python_runs_as_printed(shell: Commands) -> None:
    done = shell.run("python train.py")
    assert done.code == 0, done.err
    assert "identity: passed" in done.out
    assert (shell.folder / "trained" / "plan.json").is_file()


def test_links_work_outside_of_the_repository() -> None:
    """PyPI shows the README by itself."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert not [link for link in links if not link.startswith("https://")]
    files = [link.removeprefix(REPOSITORY) for link in links if link.startswith(REPOSITORY)]
    assert not [file for file in files if not (ROOT / file.partition("/main/")[2]).exists()]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 90
