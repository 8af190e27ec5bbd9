"""Rewritten models on disk: a directory that loads again without capturing, and that says when it was changed.

Flow of save: weights to safetensors, the base's config, tokenizer and code beside them, recipe, plan, report and a manifest
of every file → all in a temporary directory, renamed at the end. Flow of load: manifest → base model → the plan replayed →
weights. Weights travel through safetensors only; nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import ValidationError
from torch import fx, nn

from memrewrite.errors import CheckpointError, MemrewriteError, ModelError
from memrewrite.frozen import Frozen
from memrewrite.passes.capture.torch_export import export_program
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.storage.base_model import Base, base_of, build_base
from memrewrite.passes.storage.exported_program import read_program
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json
from memrewrite.passes.storage.manifest import read_manifest, tampered, write_manifest
from memrewrite.passes.storage.tensor_files import fill, fill_transient, named_once, save_tensors, save_transient
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

F = TypeVar("F", bound=Frozen)
GRAPH = "model.pt2"


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    source: Base | None = None,
    overwrite: bool = False,
    step: Callable[[str], None] | None = None,
) -> Path:
    """Write a rewritten model so that `load(directory)` gives it back; a graph module is saved as an exported program.

    `source` says how the base is built again (`memrewrite apply` knows; a Hugging Face model carries its config). Raises
    `CheckpointError` when the directory is in use and `overwrite` is not set, `ModelError` for a model not rewritten here.
    """
    target, say = Path(directory), step or (lambda _: None)
    record = _record(model)
    refuse_used(target, overwrite)
    base = source or base_of(model)
    tied: dict[str, str] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_at_the_end(target) as folder:
        say("writing the weights")
        if isinstance(model, fx.GraphModule):
            base = Base(kind="graph")
            _save_graph(model, record.inputs, folder / GRAPH)
        else:
            base.write(model, folder)
            state, tied = named_once(model)
            save_tensors(state, folder)
            save_transient(model, state.keys() | tied.keys(), folder)
        for field, name in RECORD.items():
            text: str | None = getattr(record, field)
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        say("writing the manifest")
        write_manifest(folder, base, tied)
    return target


def _record(model: nn.Module) -> RewriteRecord:
    """The record of a rewritten model. Raises `ModelError` for a model that has none."""
    record = pools_of(model).record
    if record is None:
        raise ModelError("this model carries no plan", hint="rewrite it with memrewrite.apply, then save it")
    return record


def refuse_used(target: Path, overwrite: bool) -> None:
    """Raise `CheckpointError` for a target that exists and is not empty, unless it may be overwritten."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise CheckpointError(
            f"the output directory {str(target)!r} is in use",
            where=str(target),
            hint="give a new directory, or --overwrite to replace it whole",
        )


@contextmanager
def _renamed_at_the_end(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its name when all went well, and leaves no trace otherwise."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        _open_to_readers(folder)
        old = folder.with_name(f"{folder.name}.old")
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """The rights that new files get here: temporary directories and safetensors' files start closed to others."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


# ------------------------------------------------------------------------------------------------------------- load


def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """The rewritten model saved in `directory`, in eval mode, built from its config and plan; nothing is captured.

    `model` gives the base yourself (it is edited in place); else a Hugging Face config builds it, or the saved `model.py`
    if you `trust_code` (an exported graph needs that too). Raises `CheckpointError` for a damaged directory or one whose
    base cannot be built.
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


RECORD = {"recipe": "recipe.yaml", "plan": "plan.json", "report": "report.json", "graphs": GRAPHS}  # fields and their files


def read_plan(directory: str | Path) -> Plan:
    """The plan of a saved directory."""
    return _read(Path(directory) / "plan.json", Plan)


def read_report(directory: str | Path) -> Report:
    """The report that was saved with the model."""
    return _read(Path(directory) / "report.json", Report)


def _read(file: Path, kind: type[F]) -> F:
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise tampered(file, f"it is not a {kind.__name__.lower()}") from error


def _save_graph(model: fx.GraphModule, inputs: Inputs, file: Path) -> None:
    program, _ = export_program(model, inputs, dynamic=True)
    torch.export.save(program, file)


def _load_graph(folder: Path, trust_code: bool) -> nn.Module:
    if not trust_code:
        raise CheckpointError(
            f"{GRAPH} is a torch.export archive, which may hold pickles",
            where=str(folder / GRAPH),
            hint="if you trust the file, allow it: --trust-code, load(..., trust_code=True)",
        )
    return read_program(folder / GRAPH).module(check_guards=False)
