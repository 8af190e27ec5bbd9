"""Hooks of mkdocs: the package as one tree for the API reference, reference pages, and documents of the repository's root.

Flow: start → `.ci/tree` lays the five folders into build/docs-source → a page is generated for each package, and for each of
`ROOT_DOCUMENTS`; links in these documents to files that are no pages lead to the repository → the site is built → it must load
nothing from another host.
"""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "docs-source"
ROOT_DOCUMENTS = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
LOADED = re.compile(  # what a browser loads without a click
    r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?(https?:[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*rel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*href=["']?(https?:[^"'\s>]+)"""
    r"""|url\(["']?(https?:[^"')]+)"""
)


def on_startup(**_: object) -> None:
    """Lay the folders into one package, where the API reference reads docstrings."""
    subprocess.run([ROOT / ".ci" / "tree", TREE], check=True)  # noqa: S603 - our own script


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated reference pages to the navigation."""
    section = next(entry for entry in config.nav or [] if isinstance(entry, dict) and "API reference" in entry)
    pages = [{package.removeprefix("memrewrite."): page_of(package)} for package in packages()]
    section["API reference"] = ["reference/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, page in ROOT_DOCUMENTS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(lambda found: target(found[1], config), text)))
    for package in packages():
        files.append(File.generated(config, page_of(package), content=reference(package)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Give the table of architectures the whole width."""
    if page.file.src_uri == "zoo.md":
        page.meta["hide"] = ["toc"]
    return markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for found in LOADED.finditer(path.read_text(encoding="utf-8")):
                raise PluginError(f"{path} loads {next(filter(None, found.groups()))}")


def target(link: str, config: MkDocsConfig) -> str:
    """A link of a document in the repository's root, as its page has to write it."""
    if re.match(r"[a-z]+:|#", link):
        return link
    path, mark, anchor = link.partition("#")
    path = posixpath.normpath(path)
    if path in ROOT_DOCUMENTS:
        return ROOT_DOCUMENTS[path] + mark + anchor
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/") + mark + anchor
    return f"{(config.repo_url or '').rstrip('/')}/blob/main/{path}{mark}{anchor}"


def packages() -> list[str]:
    """Every package with modules, by its dotted name, in the order of the imports: top first."""
    order = [f"memrewrite{folder}" for folder in ("", ".layers", ".recipes", ".kernels", ".passes", ".cli")]
    found = {".".join(init.parent.relative_to(TREE).parts) for init in TREE.rglob("__init__.py")}
    with_modules = [package for package in found if modules(package)]
    top = lambda package: next(i for i in range(len(order) - 1, -1, -1) if f"{package}.".startswith(f"{order[i]}."))  # noqa: E731
    return sorted(with_modules, key=lambda package: (top(package), package))


def modules(package: str) -> list[Path]:
    """The modules directly in a package."""
    folder = TREE.joinpath(*package.split("."))
    return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))


def page_of(package: str) -> str:
    """The path of a package's page."""
    return f"reference/{package}.md"


def reference(package: str) -> str:
    """A page with every module of a package: its docstring, and the public names that it defines."""
    init = TREE.joinpath(*package.split("."), "__init__.py").read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(init)) or ""
    lines = [f"# {package}", "", about, ""]
    for module in modules(package):
        name = f"{package}.{module.stem}"
        lines += [f"## {module.stem}", "", f"::: {name}", "    options:", "      show_root_heading: false"]
        lines += ["      show_root_toc_entry: false", ""]
    return "\n".join(lines)
