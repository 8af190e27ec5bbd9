"""Saves a rewritten model to a directory, which `load` reads again.

Flow: weights to safetensors, the base's config, tokenizer and code, the recipe, plan and report, and a manifest of every
file → all in a temporary directory next to the target, which takes its place in one step.
"""

from __future__ import annotations

import io
import logging
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx, nn

from memrewrite.atomic_write import replacing
from memrewrite.output_target import saved_directory
from memrewrite.passes.capture.torch_export import BATCH_AND_SEQUENCE, export_program
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.sources.hugging_face import Architecture
from memrewrite.passes.storage.base_check import differences
from memrewrite.passes.storage.base_model import CONFIG, Base, base_of
from memrewrite.passes.storage.graph_json import hosts_from_json
from memrewrite.passes.storage.load import GRAPH, RECORD
from memrewrite.passes.storage.manifest import MANIFEST, write_manifest
from memrewrite.passes.storage.tensor_files import named_once, save_tensors, save_transient
from memrewrite.passes.storage.unwrapped import unwrapped
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord

log = logging.getLogger("memrewrite")


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    source: Base | None = None,
    overwrite: bool = False,
    overwrite_any: str | Path | None = None,
    step: Callable[[str], None] | None = None,
) -> Path:
    """Save a rewritten model so that `load(directory)` returns it again.

    The directory contains the weights as safetensors (one file, or shards of 5 GB with an index), what the base model is built
    from (config, generation config, tokenizer; or the Python file), `recipe.yaml`, `plan.json`, `report.json`, for modules that
    became graphs `graphs.json`, and `memrewrite.json`, the manifest with the size and hash of every file. A graph module is
    saved as an exported program, `model.pt2`, in place of weights and base.

    Args:
        model: a model that `memrewrite.apply` rewrote, or the graph module of its report. Of a wrapper without tensors of its
            own (torch.compile, DDP, a trainer's module) the model inside is saved.
        directory: a new or empty directory; missing parents are created. It appears when all files are complete; after an
            error everything is as before.
        source: how `load` builds the base again. Without it, a Hugging Face model is built from its config, if that builds this
            model; any other base must be passed to `load`, and a warning says what was changed. `memrewrite apply` passes it.
        overwrite: replace a directory that `save` wrote, with all files in it.
        overwrite_any: the same directory again: replace it with all files in it, whatever they are.
        step: receives a line before each step.

    Returns:
        The directory.

    Raises:
        ModelError: the model was not rewritten by memrewrite, or a wrapper around it has tensors, which would not be saved.
        CheckpointError: the directory is in use and may not be replaced; the path is no directory (a file, link or device); it
            cannot be written (disk full, no permission, ...); or a tensor cannot be saved (on `meta`).
    """
    target, report_step = saved_directory(directory, overwrite=overwrite, overwrite_any=overwrite_any), step or (lambda _: None)
    model, record = unwrapped(model)
    base = source or _base(model, record)
    tied: dict[str, str] = {}
    with replacing(target) as folder:
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
    return target.path


def _base(model: nn.Module, record: RewriteRecord) -> Base:
    """The base of a live model: its config, if that builds this model again; else the user must pass it to `load`."""
    base = base_of(model)
    if base.kind == "huggingface":
        found = Architecture(type(model), model.config, Path(CONFIG))
        hosts = hosts_from_json(record.graphs, trust_code=True) if record.graphs else {}
        changes = differences(model, found, Plan.model_validate_json(record.plan), hosts)
        if changes:
            log.warning(
                "the model is not what its config builds: %s%s; to load it, pass the base: memrewrite.load(directory, model)",
                "; ".join(changes[:3]),
                f"; {len(changes) - 3} more" if len(changes) > 3 else "",
            )
            return Base("given")
    return base


def _set_default_permissions(folder: Path) -> None:
    """Give the files the permissions of new files here: safetensors creates files that only their owner can read.

    The manifest is such a new file. `os.umask` can only be read by changing it, for all threads.
    """
    permissions = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for file in folder.iterdir():
        file.chmod(permissions)


def _save_graph(model: fx.GraphModule, inputs: Inputs, file: Path) -> None:
    """Write the archive to memory first: torch's own writer of files ends the process when the disk is full."""
    archive = io.BytesIO()
    torch.export.save(export_program(model, inputs, BATCH_AND_SEQUENCE).program, archive)
    file.write_bytes(archive.getbuffer())
