"""Saves a rewritten model to a directory, and loads it again without capturing; changes of the files are detected.

Flow of save: weights to safetensors, the base's config, tokenizer and code, the recipe, plan and report, and a manifest of
every file → all in a temporary directory, which is renamed at the end. Flow of load: manifest → base model → the plan is
applied again → weights. Weights are read from safetensors only; nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from torch import fx, nn

from memrewrite.atomic_write import replacing
from memrewrite.errors import CheckpointError, MemrewriteError, ModelError
from memrewrite.frozen import Frozen
from memrewrite.passes.capture.torch_export import export_program
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.storage.base_model import Base, base_of, build_base
from memrewrite.passes.storage.exported_program import read_program
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json, refuse_unsaved_constants
from memrewrite.passes.storage.manifest import read_manifest, tampered, write_manifest
from memrewrite.passes.storage.tensor_files import (
    fill,
    fill_transient,
    named_once,
    save_tensors,
    save_transient,
    transient_shapes,
)
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.report import Report

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
    """Save a rewritten model so that `load(directory)` returns it again.

    The directory contains the weights as safetensors (one file, or shards of 5 GB with an index), what the base model is built
    from (config, generation config, tokenizer; or the Python file), `recipe.yaml`, `plan.json`, `report.json`, for modules that
    became graphs `graphs.json`, and `memrewrite.json`, the manifest with the size and hash of every file. A graph module is
    saved as an exported program, `model.pt2`, in place of weights and base.

    Args:
        model: a model that `memrewrite.apply` rewrote, or the graph module of its report.
        directory: a new or empty directory; missing parents are created. It appears when all files are complete; after an
            error everything is as before.
        source: how `load` builds the base again. Without it, a Hugging Face model is built from its config, and any other
            base must be passed to `load`. `memrewrite apply` passes it.
        overwrite: replace a directory that is not empty, with all files in it.
        step: receives a line before each step.

    Returns:
        The directory.

    Raises:
        ModelError: the model was not rewritten by memrewrite.
        CheckpointError: the directory is in use and `overwrite` is not set, or a tensor cannot be saved (on `meta`).
    """
    target, report_step = Path(directory), step or (lambda _: None)
    record = _record(model)
    refuse_used(target, overwrite)
    base = source or base_of(model)
    tied: dict[str, str] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as (folder,):
        folder.mkdir()
        report_step("writing the weights")
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
        report_step("writing the manifest")
        write_manifest(folder, base, tied)
        _set_default_permissions(folder)
    return target


def _record(model: nn.Module) -> RewriteRecord:
    """The record of a rewritten model. Raises `ModelError` for a model that has none."""
    record = pools_of(model).record
    if record is None:
        raise ModelError("this model has no plan", hint="rewrite it with memrewrite.apply, then save it")
    return record


def refuse_used(target: Path, overwrite: bool) -> None:
    """Raise `CheckpointError` for a file, and, unless `overwrite` is set, for a directory that is not empty."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise CheckpointError(
            f"the output directory {str(target)!r} is in use",
            where=str(target),
            hint="give a new directory, or --overwrite to replace the whole directory",
        )


def _set_default_permissions(folder: Path) -> None:
    """Give the files the permissions of new files here: safetensors creates files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


# ------------------------------------------------------------------------------------------------------------- load


def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a rewritten model: build its base, apply the saved plan to it, and load the weights. Nothing is captured.

    Before anything is loaded, the manifest is checked: the sizes of all files, and the hashes of all but the weights.

    Args:
        directory: a directory that `save` wrote. Weights are read from safetensors only, and nothing in it is run or unpickled,
            except with `trust_code`.
        model: the base model, when you build it yourself. It is edited in place; its own weights are overwritten. Default: the
            class that the saved Hugging Face config names, or the builder of the saved Python file.
        trust_code: allow code of the directory to run. It runs the saved Python file, which builds the base; for a saved graph
            it reads `model.pt2`, a torch.export archive, which may contain pickles; and it allows modules that became graphs to
            call operators of other libraries than torch. Else not needed for Hugging Face models, or with `model`.

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
    hosts = _hosts_in(folder, trust_code=trust_code)
    try:
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


def _hosts_in(folder: Path, *, trust_code: bool) -> dict[str, GraphHost]:
    if not (folder / GRAPHS).is_file():
        return {}
    hosts = hosts_from_json((folder / GRAPHS).read_text(encoding="utf-8"), trust_code=trust_code)
    refuse_unsaved_constants(hosts, transient_shapes(folder))
    return hosts


RECORD = {"recipe": "recipe.yaml", "plan": "plan.json", "report": "report.json", "graphs": GRAPHS}  # fields and their files


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


def _save_graph(model: fx.GraphModule, inputs: Inputs, file: Path) -> None:
    torch.export.save(export_program(model, inputs, dynamic=True).program, file)


def _load_graph(folder: Path, trust_code: bool) -> nn.Module:
    if not trust_code:
        raise CheckpointError(
            f"{GRAPH} is a torch.export archive, which may contain pickles",
            where=str(folder / GRAPH),
            hint="if you trust the file, allow it: --trust-code, load(..., trust_code=True)",
        )
    return read_program(folder / GRAPH).module(check_guards=False)
