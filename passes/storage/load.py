"""Loads a saved directory without capturing; changes of the files are detected.

Flow: manifest → base model → the plan is applied again → weights. Weights are read from safetensors only; nothing is
unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from torch import nn

from memrewrite.errors import CheckpointError, MemrewriteError
from memrewrite.frozen import Frozen
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.storage.base_model import Base, build_base
from memrewrite.passes.storage.exported_program import read_program
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json
from memrewrite.passes.storage.manifest import read_manifest, tampered
from memrewrite.passes.storage.tensor_files import fill, fill_transient
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.report import Report

F = TypeVar("F", bound=Frozen)
GRAPH = "model.pt2"
RECORD = {"recipe": "recipe.yaml", "plan": "plan.json", "report": "report.json", "graphs": GRAPHS}  # fields and their files


def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a rewritten model: build its base, apply the saved plan to it, and load the weights. Nothing is captured.

    Before anything is loaded, the manifest is checked: the sizes of all files, and the hashes of all but the weights.

    Args:
        directory: a directory that `save` wrote. Weights are read from safetensors only, and nothing in it is run or unpickled,
            except with `trust_code`.
        model: the base model, when you build it yourself. It is edited in place; its own weights are overwritten. Default: the
            class that the saved Hugging Face config names, or the builder of the saved Python file.
        trust_code: allow code of the directory to run. It runs the saved Python file, which builds the base; for a saved graph
            it reads `model.pt2`, a torch.export archive, which may contain pickles. Not needed for Hugging Face models, or
            with `model`.

    Returns:
        The model in eval mode: `model` itself if it was passed. For a saved graph, its graph module.

    Raises:
        CheckpointError: the directory was not written by `save`, or was changed; it needs `trust_code` or `model`; the plan or
            the weights do not fit `model`.
        ModelError: the saved Python file fails.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    base = Base.from_data(manifest["base"])
    if base.kind == "graph":
        return _load_graph(folder, trust_code)
    plan = read_plan(folder)
    built = build_base(base, folder, trust_code=trust_code) if model is None else model
    try:
        hosts = hosts_from_json((folder / GRAPHS).read_text(encoding="utf-8")) if (folder / GRAPHS).is_file() else {}
        substitute(built, plan, hosts=hosts, initialise=False).commit()
    except MemrewriteError as error:
        raise CheckpointError(
            f"the saved plan does not fit the base model: {error.what}",
            where=str(folder / "plan.json"),
            hint=error.hint,
        ) from error
    fill(built, folder, manifest["tied"])
    fill_transient(built, folder)
    texts = {f: (folder / name).read_text(encoding="utf-8") for f, name in RECORD.items() if (folder / name).is_file()}
    pools_of(built).record = RewriteRecord(**texts)
    return built.eval()


def read_plan(directory: str | Path) -> Plan:
    """The plan of a saved directory. Raises `CheckpointError` when the file is damaged."""
    return _read(Path(directory) / "plan.json", Plan)


def read_report(directory: str | Path) -> Report:
    """The report that was saved with the model. Raises `CheckpointError` when the file is damaged."""
    return _read(Path(directory) / "report.json", Report)


def _read(file: Path, kind: type[F]) -> F:
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise tampered(file, f"it is not a {kind.__name__.lower()}") from error


def _load_graph(folder: Path, trust_code: bool) -> nn.Module:
    if not trust_code:
        raise CheckpointError(
            f"{GRAPH} is a torch.export archive, which may contain pickles",
            where=str(folder / GRAPH),
            hint="if you trust the file, allow it: --trust-code, load(..., trust_code=True)",
        )
    return read_program(folder / GRAPH).module(check_guards=False)
