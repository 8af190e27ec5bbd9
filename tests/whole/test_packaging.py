"""What pyproject.toml promises: extras that do not conflict, packages that are all mapped, links that are complete."""

from __future__ import annotations

import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest needs it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}  # they install into one folder, and the second overwrites the first
TEXTS = [
    path
    for folder in ("", "docs", "passes", "kernels", "memrewrite", "recipes", "cli", "benchmarks", "examples", "tests")
    for path in ((ROOT / folder).rglob("*") if folder else ROOT.glob("*"))
    if path.suffix in (".py", ".md", ".yaml") or path.name == "Makefile"
]


def installed(extras: set[str]) -> set[str]:
    """The distributions that these extras bring, those of extras of our own included."""
    found, pending = set(), list(extras)
    while pending:
        for requirement in EXTRAS[pending.pop()]:
            own = re.match(r"memrewrite\[([^]]+)\]", requirement)
            if own:
                pending += [name.strip() for name in own[1].split(",")]
            else:
                found.add(re.split(r"[\s<>=!~;\[]", requirement)[0].lower())
    return found


def documented() -> dict[str, str]:
    """Every combination of extras that a text names, after `memrewrite` or a dot, and the file."""
    named = re.compile(r"(?:\bmemrewrite|'\.|\"\.|e \.)\[([a-z][a-z, -]*)\]")
    return {found[1]: str(path) for path in TEXTS for found in named.finditer(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_installs_both_runtimes(extra: str) -> None:
    assert not installed({extra}) >= RUNTIMES


def test_no_documented_combination_installs_both_runtimes() -> None:
    combinations_named = documented()
    assert len(combinations_named) >= 4
    for names, path in combinations_named.items():
        extras = {name.strip() for name in names.split(",")}
        assert extras <= set(EXTRAS), path
        assert not installed(extras) >= RUNTIMES, path


def test_the_conflict_would_be_found() -> None:
    assert installed({"onnx-cpu", "onnx-gpu"}) >= RUNTIMES
    pairs = [pair for pair in combinations(sorted(EXTRAS), 2) if installed(set(pair)) >= RUNTIMES]
    assert {"onnx-cpu", "onnx-gpu"} in map(set, pairs)
    assert installed({"onnx"}).isdisjoint(RUNTIMES)
    assert "onnxruntime" in installed({"dev"})


def test_every_package_lies_where_setuptools_looks() -> None:
    """`package-dir` maps a package by its longest prefix; the folder must be a package, or data that `package-data` names."""
    tools = PROJECT["tool"]["setuptools"]
    folders = tools["package-dir"]
    for package in tools["packages"]:
        prefix = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
        folder = ROOT / folders[prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")
        assert (folder / "__init__.py").is_file() or package in tools["package-data"], package


def test_data_files_are_there() -> None:
    tools = PROJECT["tool"]["setuptools"]
    for package, patterns in tools["package-data"].items():
        folder = ROOT / tools["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_links_lead_to_one_repository_and_the_version_is_in_the_changelog() -> None:
    urls = PROJECT["project"]["urls"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(urls)
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {PROJECT['project']['version']}" in changelog
    assert "## Unreleased" in changelog


def test_the_source_distribution_takes_every_tracked_folder() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    hidden = {".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    built = {"build", "dist", "out", "shared"}
    ignored = {*hidden, *built, "__pycache__"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.suffix != ".egg-info"} - ignored
    assert not [name for name in folders if f"graft {name}\n" not in manifest]
