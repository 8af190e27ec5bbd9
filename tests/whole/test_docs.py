"""The documentation is true: tutorial and how-to pages run as printed, examples are valid, commands and options exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import Commands, Done

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "zoo.md")
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block: its language, the file that it is, its text."""

    kind: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups("")) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(DOCS))) for page in pages]


# ---------------------------------------------------------------------------------------------------- pages that are run


def is_printed(line: str, printed: str) -> bool:
    """Whether the words of a line are printed, in this order, in one line."""
    words = ".*".join(re.escape(word) for word in line.split())
    return re.search(words, printed) is not None


def run_page(page: Path, commands: Commands) -> None:
    """Write the files of a page, run its commands in order, and compare each `text` block with what was printed before it."""
    for block in blocks(page):
        if block.title and not (commands.folder / block.title).exists():
            target = commands.folder / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
    printed = ""
    for block in blocks(page):
        if block.kind == "bash":
            printed = ""
            for command in block.text.splitlines():
                if command.startswith("pip "):
                    continue
                done: Done = commands.run(command)
                assert done.code == 0, f"{command}\n{done.out}\n{done.err}"
                printed += done.out
        elif block.kind == "text":
            missing = [line for line in block.text.splitlines() if not is_printed(line, printed)]
            assert not missing, f"{page.name} shows {missing}, and this was printed:\n{printed}"


def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    with Commands(tmp_path) as commands:
        run_page(DOCS / "tutorial.md", commands)


@pytest.mark.parametrize("page", named(sorted((DOCS / "working-with").glob("*.md"))))
def test_the_code_with_another_library_runs_as_printed(page: Path, tmp_path: Path) -> None:
    with Commands(tmp_path) as commands:
        run_page(page, commands)


@pytest.mark.parametrize("page", named(sorted((DOCS / "how-to").glob("*.md"))))
def test_the_example_of_a_how_to_page_works(page: Path, tmp_path: Path) -> None:
    """Its changes are made in a copy of the package, and its commands run with that copy."""
    tree, folder = tmp_path / "tree", tmp_path / "folder"
    folder.mkdir()
    subprocess.run([ROOT / ".ci" / "tree", tree], check=True)
    for block in blocks(page):
        target = place(tree, block.title) if block.title else None
        if target is not None:
            change(target, block.text)
    with Commands(folder, path=tree) as commands:
        where = subprocess.run([sys.executable, "-c", "import memrewrite; print(memrewrite.__file__)"], **in_tree(tree))
        assert where.stdout.startswith(str(tree)), where.stderr
        run_page(page, commands)


def in_tree(tree: Path) -> dict[str, object]:
    return {"env": {**os.environ, "PYTHONPATH": str(tree)}, "capture_output": True, "text": True, "cwd": tree}


def place(tree: Path, title: str) -> Path | None:
    """Where a file of the repository is in the tree; None for files of the user."""
    top = title.partition("/")[0]
    if "/" not in title:
        return None
    return tree / title if top == "memrewrite" else tree / "memrewrite" / title


def change(file: Path, text: str) -> None:
    """Make the change that a block shows: imports are added, tables replaced, classes inserted before the first table."""
    if not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    for node in ast.parse(text).body:
        new = ast.get_source_segment(text, node) or ""
        body = ast.parse("\n".join(lines)).body
        imports = [old.end_lineno for old in body if isinstance(old, (ast.Import, ast.ImportFrom))]
        if isinstance(node, ast.ImportFrom):
            lines[imports[-1] : imports[-1]] = [new]  # type: ignore[misc]
        elif isinstance(node, ast.AnnAssign):
            old = next(o for o in body if isinstance(o, ast.AnnAssign) and ast.unparse(o.target) == ast.unparse(node.target))
            assert elements(old) <= elements(node), f"{file.name} has more entries than the page shows: {ast.unparse(old)}"
            lines[old.lineno - 1 : old.end_lineno] = [new]
        else:
            table = next(o.lineno for o in body if isinstance(o, ast.AnnAssign) and "tuple" in ast.unparse(o.annotation))
            lines[table - 1 : table - 1] = [new, "", ""]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def elements(table: ast.AnnAssign) -> set[str]:
    assert isinstance(table.value, ast.Tuple)
    return {ast.unparse(element) for element in table.value.elts}


# --------------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("page", named(PAGES))
def test_python_and_recipes_are_well_formed(page: Path) -> None:
    from memrewrite.recipes.reader import read_recipe

    for block in blocks(page):
        if block.kind == "python":
            ast.parse(block.text)
        elif block.kind == "yaml" and page.stem != "layer":  # whose recipe names the layer kind that the page adds
            import yaml

            read_recipe(yaml.safe_load(block.text))


def test_every_command_and_option_that_is_shown_exists() -> None:
    import typer

    from memrewrite.cli.app import app

    top = typer.main.get_command(app)
    texts = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    shown = {
        line
        for path in texts
        for line in [
            *re.findall(r"`(memrewrite [^`\n]+)`", path.read_text(encoding="utf-8")),
            *(line for b in blocks(path) if b.kind == "bash" for line in b.text.splitlines() if line.startswith("memrewrite ")),
        ]
    }
    assert len(shown) > 15
    for line in shown:
        words = shlex.split(line, comments=True)[1:]
        command = top.commands.get(words[0])  # type: ignore[attr-defined]
        if command is None:
            assert words[0] == "COMMAND" or words[0].startswith("--"), line
            continue
        if getattr(command, "commands", None) and len(words) > 1 and words[1] in command.commands:
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert not {word for word in words if re.match(r"--?[a-z]", word)} - known - {"--help"}, line


def test_every_name_of_the_package_that_is_shown_exists() -> None:
    import memrewrite

    for page in PAGES:
        for block in blocks(page):
            names = set(re.findall(r"\bmemrewrite\.([a-zA-Z_]+)\b", block.text)) if block.kind == "python" else set()
            missing = [n for n in names if not hasattr(memrewrite, n) and importlib.util.find_spec(f"memrewrite.{n}") is None]
            assert not missing, page


def test_every_file_that_is_shown_exists() -> None:
    """Paths of the repository in code spans."""
    top = "passes|kernels|recipes|cli|tests|benchmarks|examples|memrewrite"
    for page in PAGES:
        for path in re.findall(rf"`((?:{top})/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
