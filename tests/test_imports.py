"""Imports run downward, `__init__` files are for users, importing is cheap, and no architecture is named in the code."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "memrewrite", "recipes", "passes", "cli")  # each may import from those before it, and from itself
# The folders of passes/, and which others each may import from; any other arrow is an error. `pipeline`, `forecast`,
# `match_outputs`, `verify_saved` and `text_usage` are files on top.
ARROWS: dict[str, tuple[str, ...]] = {
    "models": (),
    "graphs": (),
    "plan": (),
    "initialize": ("models",),
    "capture": ("graphs", "models"),
    "canonicalize": ("graphs",),
    "regions": ("graphs",),
    "locate": ("capture", "canonicalize", "regions", "graphs", "models"),
    "explain": ("locate", "regions", "capture", "graphs", "models"),
    "rewrite": ("locate", "capture", "graphs", "models"),
    "verify": ("initialize", "rewrite", "locate", "regions", "capture", "graphs", "models"),
    "sources": ("models",),
    "storage": ("sources", "storage/graph_data", "rewrite", "capture", "plan", "models"),
    "storage/graph_data": ("rewrite",),
    "onnx": ("capture", "models"),
    "texts": ("storage",),
    "onnx/check": ("onnx", "texts", "storage", "sources", "models"),
    "torch_compile": ("initialize", "verify", "rewrite", "plan", "locate", "capture", "graphs", "models"),
    "pipeline": ("verify", "storage", "rewrite", "explain", "plan", "capture", "models"),
    "forecast": ("pipeline", "initialize", "verify", "rewrite", "models"),
    "match_outputs": ("initialize", "rewrite", "locate", "capture", "models"),
    "verify_saved": ("storage", "verify", "rewrite", "models"),
    "text_usage": ("texts", "storage", "models"),
}
INTERFACE = ROOT / "memrewrite" / "__init__.py"  # lazy: each name is imported on first use
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TEXTS = sorted([*SOURCES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "kernels").rglob("*.c*")])


def module_of(path: Path) -> str:
    """The name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] == "memrewrite" else ("memrewrite", *parts)
    return ".".join(inside[:-1] if inside[-1] == "__init__" else inside)


MODULES = {module_of(path) for path in SOURCES}


def floor_of(module: str) -> str:
    """The root folder that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "memrewrite"


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Every import of a file, also inside functions: line, module, and the name taken from it or ""."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, source, alias.name) for alias in node.names)


def ours(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of memrewrite that a file imports."""
    for line, source, name in imports(path):
        if source.split(".")[0] == "memrewrite":
            yield line, f"{source}.{name}" if f"{source}.{name}" in MODULES else source


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def run(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -------------------------------------------------------------------------------------------------------------- downward


@pytest.mark.parametrize("path", named([path for path in SOURCES if path != INTERFACE]))
def test_imports_run_downward(path: Path) -> None:
    """Imports inside functions and under TYPE_CHECKING count: they are dependencies too."""
    mine = FLOORS.index(floor_of(module_of(path)))
    upward = [f"{path}:{line}: {module}" for line, module in ours(path) if FLOORS.index(floor_of(module)) > mine]
    assert not upward


def folder_of(module: str) -> str:
    """The folder of passes/ that a module lies in, or the name of a file on top; "" for modules elsewhere."""
    _, _, inside = module.partition("memrewrite.passes.")
    parts = inside.split(".")
    if module in FOLDERS:
        return inside.replace(".", "/")
    return "/".join(parts[:-1]) or inside


FOLDERS = {module_of(path) for path in SOURCES if path.name == "__init__.py"}


@pytest.mark.parametrize("path", named([path for path in SOURCES if path.is_relative_to(ROOT / "passes")]))
def test_the_arrows_between_the_folders_of_passes(path: Path) -> None:
    mine = folder_of(module_of(path))
    arrows = [(line, module, folder_of(module)) for line, module in ours(path) if module.startswith("memrewrite.passes.")]
    assert not [f"{path}:{line}: {module}" for line, module, to in arrows if to not in (mine, *ARROWS[mine])]


def test_every_arrow_is_in_use_and_they_form_no_circle() -> None:
    used = {(folder_of(module_of(path)), folder_of(to)) for path in SOURCES for _, to in ours(path)}
    assert not [f"{mine} -> {to}" for mine, others in ARROWS.items() for to in others if (mine, to) not in used]
    assert set(ARROWS) == {folder_of(module_of(path)) for path in SOURCES if path.is_relative_to(ROOT / "passes")} - {""}
    below: set[str] = set()  # folders whose imports are all below them
    while len(below) < len(ARROWS):
        free = [name for name, others in ARROWS.items() if name not in below and set(others) <= below]
        assert free, sorted(set(ARROWS) - below)
        below.update(free)


def test_the_folder_picture_in_architecture_is_true() -> None:
    """Every folder is on a floor above all that it imports, and every file of passes/ is named in its folder's row."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^ (\d)  (.+)$", text, flags=re.MULTILINE)
    floors = {name.strip("/").removesuffix(".py"): int(floor) for floor, names in rows for name in names.split()}
    assert set(floors) == set(ARROWS)
    assert not [(mine, to) for mine, others in ARROWS.items() for to in others if floors[to] >= floors[mine]]
    named_in = dict(re.findall(r"^\| `([a-z_/]+)/` \|(.+)$", text, flags=re.MULTILINE))
    files = [path for path in SOURCES if path.is_relative_to(ROOT / "passes") and path.name != "__init__.py"]
    inside = [(folder_of(module_of(path)), path.stem) for path in files if path.parent.name != "passes"]
    assert not [(folder, name) for folder, name in inside if f"`{name}`" not in named_in[folder]]


def test_files_and_folders_of_passes_stay_small() -> None:
    folders = {path.parent for path in SOURCES if path.is_relative_to(ROOT / "passes")}
    crowded = [folder for folder in folders if len([f for f in folder.glob("*.py") if f.name != "__init__.py"]) > 14]
    long = [path for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    assert not crowded
    assert not long


@pytest.mark.parametrize("path", named(SOURCES))
def test_no_module_imports_from_a_public_interface(path: Path) -> None:
    """Our code imports modules from packages; the names in an `__init__` are for users."""
    if path == ROOT / "cli" / "__main__.py":  # `python -m memrewrite.cli` is the console script, which is that interface
        return
    interfaces = {module_of(source) for source in SOURCES if source.name == "__init__.py"}
    taken = [
        f"{path}:{line}: from {source} import {name}"
        for line, source, name in imports(path)
        if source in interfaces and name and f"{source}.{name}" not in MODULES
    ]
    version_alone = [place for place in taken if not place.endswith("import __version__")]
    assert not version_alone


# ----------------------------------------------------------------------------------------------------------- import time

HEAVY = ("torch", "transformers", "triton", "onnx", "onnxruntime", "numpy", "pydantic")


def test_importing_memrewrite_loads_nothing_heavy() -> None:
    assert run(f"import sys, memrewrite; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("module", ["memrewrite.cli", "memrewrite.passes.pipeline", "memrewrite.layers.kinds"])
def test_optional_packages_are_loaded_only_when_used(module: str) -> None:
    optional = ("transformers", "triton", "onnx", "onnxscript", "onnxruntime")
    assert run(f"import sys, {module}; print([m for m in {optional} if m in sys.modules])") == "[]"


def test_loading_imports_no_locator() -> None:
    """A saved plan is replayed: nothing is captured or located."""
    code = "import sys, memrewrite.passes.storage.checkpoint, memrewrite.passes.rewrite.edit_graph; print(*sys.modules)"
    loaded = run(code).split()
    assert "memrewrite.passes.locate.located_sites" in loaded  # the types alone
    assert "memrewrite.passes.locate.locate" not in loaded


def test_importing_the_folder_under_its_own_name_is_harmless() -> None:
    """The Hub's `kernels` is looked for on `sys.path`, the working directory included: finding ours must do nothing."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels, torch; print('memrewrite' in sys.modules)"
    assert run(code) == "False"


@pytest.mark.parametrize("path", named([path for path in SOURCES if path.name == "__init__.py" and path != INTERFACE]))
def test_other_init_files_contain_no_code(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    allowed = (ast.Expr, ast.FunctionDef, ast.ImportFrom, ast.Import, ast.If)
    assert all(isinstance(node, allowed) for node in body)
    if path.parent.name != "cli":  # whose interface is the console script
        assert len(body) <= 1


# ------------------------------------------------------------------------------------------------------------ installing


@pytest.mark.parametrize("name", ["kernels", "passes", "recipes", "cli", "layers"])
def test_no_folder_is_installed_at_the_top_level(name: str, tmp_path: Path) -> None:
    assert "memrewrite" not in packages_distributions().get(name, ())
    code = f"import importlib.util; print(getattr(importlib.util.find_spec({name!r}), 'origin', None))"
    assert not run(code, cwd=tmp_path).startswith(str(ROOT))


def test_every_package_is_listed_for_installing() -> None:
    """setuptools lists the packages by name: a missing one would be missing from the wheel."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert not [package for package in packages if f'"{package}"' not in listed]


# ---------------------------------------------------------------------------------------------------------- architectures

# Model types of Hugging Face transformers. None is named where MLPs are found and replaced: a method that is general needs
# no names, and a comment that gives one invites the first exception.
NAMES = """
    albert apertus aria bamba bart beit bert bitnet blenderbot bloom bridgetower camembert clip cohere conformer
    convnext dbrx deberta decilm deepseek deit detr dinov2 distilbert dots1 electra ernie esmfold exaone falcon
    flaubert fnet funnel fuyu gemma gemma2 gemma3 glm4 gpt2 gptj granite grok groupvit helium hubert ibert idefics
    informer internlm jamba jetmoe kosmos layoutlm llama llama4 llava longformer longt5 luke lxmert mamba mamba2
    marian mbart minicpm mistral mixtral mllama mobilebert mobilevit modernbert moshi mpnet mpt musicgen nemotron
    nezha nystromformer olmo olmo2 olmoe owlvit paligemma pegasus perceiver persimmon phi3 phimoe pixtral prophetnet
    qwen qwen2 qwen3 reformer rembert roberta roformer rwkv segformer siglip smollm smollm2 smollm3 speecht5 splinter
    squeezebert stablelm starcoder starcoder2 swin swinv2 tapas timesfm umt5 unispeech vilt vitdet vits wav2vec2 wavlm
    whisper xglm xlnet xlstm yolos yoso zamba zamba2 gpt_neox gpt_neo neox
"""
ARCHITECTURES = NAMES.split()
NAMED = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(ARCHITECTURES, key=len, reverse=True))})(?![a-z0-9])")


@pytest.mark.parametrize("path", named(TEXTS))
def test_no_architecture_is_named(path: Path) -> None:
    """In code, comments, strings and the gallery; in words of snake_case and CamelCase too."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\bclip_grad\w+", "", text)  # torch's names of functions
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
    found = {match.group(1) for line in split.splitlines() for match in NAMED.finditer(line)}
    assert not found


def test_the_search_for_names_finds_them() -> None:
    finds = lambda text: bool(NAMED.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()))  # noqa: E731
    assert all(map(finds, ["# as in llama", "class LlamaMLP", "if model_type == 'gpt2':", "is_bert_like", "bert-base"]))
    assert not any(map(finds, ["clipped", "an albertine", "barter", "phimoex", "swine"]))


def test_every_file_says_what_it_is_for() -> None:
    """A docstring opens each module, and the file does not print: only the command line prints."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        names = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.NAME]
        assert "print" not in names or path.parent.name == "cli", path
