"""Loads a saved directory without capturing; changes of the files are detected, and a failed load changes nothing.

Flow: manifest → plan, graphs and headers of the weights, all checked → the plan is applied on meta, and compared with the
headers → the plan is applied → weights. Weights are read from safetensors only; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from memrewrite.errors import CheckpointError, MemrewriteError, in_one_line
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.rewrite.undo_log import UndoLog
from memrewrite.passes.sources.exported_program import read_program
from memrewrite.passes.storage.base_model import CONFIG, build_base, saved_architecture
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json, refuse_unsaved_constants
from memrewrite.passes.storage.manifest import SavedFiles, read_manifest
from memrewrite.passes.storage.rewritten_model import load_rewritten, rewritten_data
from memrewrite.passes.storage.saved_plan import PLAN, REPORT, read_plan, read_report
from memrewrite.passes.storage.saved_tensors import (
    SavedTensors,
    bytes_of,
    refuse_meta,
    refuse_too_large,
    saved_tensors,
    state_of,
)
from memrewrite.passes.storage.unwrapped import set_record
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.training import freeze

GRAPH = "model.pt2"
RECORD = {"recipe": "recipe.yaml", "plan": PLAN, "report": REPORT, "graphs": GRAPHS}  # fields and their files


@exclusive
def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a rewritten model: build its base, apply the saved plan to it, and load the weights. Nothing is captured.

    Before anything is built or changed, every file is checked: sizes, the hashes of all but the weights, and the names, shapes
    and dtypes of the weights. Only files that the manifest names are read.

    Args:
        directory: a directory that `save` wrote, or transformers of a rewritten model (`save_pretrained`, a Trainer's
            checkpoint). Weights are read from safetensors only, and nothing in it is run or unpickled,
            except with `trust_code`.
        model: the base model, when you build it yourself. It is edited in place; its own weights are overwritten. After an
            error the model is as before; until then, weights that differ are in memory twice. Default: the class that the
            saved Hugging Face config names, or the builder of the saved Python file.
        trust_code: allow code of the directory to run. It runs the saved Python file, which builds the base; for a saved graph
            it reads `model.pt2`, a torch.export archive, which may contain pickles; and it allows modules that became graphs to
            call operators of other libraries than torch. Else not needed for Hugging Face models, or with `model`.

    Returns:
        The model in eval mode: `model` itself if it was passed. For a saved graph, its graph module.

    Raises:
        CheckpointError: the directory was not written by `save`, or was changed; it needs `trust_code` or `model`; the plan or
            the weights do not fit `model`; memory does not suffice.
        ModelError: the saved config is no config of a model of transformers, or the saved Python file fails.
    """
    if model is None and (data := rewritten_data(Path(directory))):
        return load_rewritten(Path(directory), data)
    files = read_manifest(directory)
    if files.base.kind == "graph":
        return saved_program(files, trust_code=trust_code).module(check_guards=False)
    plan, record, tensors = read_plan(files), _record(files), saved_tensors(files)
    if REPORT in files:
        read_report(files)
    hosts = hosts_from_json(files.text(GRAPHS), trust_code=trust_code) if GRAPHS in files else {}
    refuse_unsaved_constants(hosts, {name: header.shape for name, header in tensors.transient.items()})
    if model is None:
        if files.base.kind == "huggingface":
            outline = saved_architecture(files).outline(len(tensors.state))
            refuse_too_large(bytes_of(outline), torch.device("cpu"), files.folder / CONFIG)
            _refuse_misfit(outline, plan, hosts, tensors, files, torch.device("cpu"))
        model, given = build_base(files, trust_code=trust_code), False
    else:
        given = True
    refuse_meta(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    _refuse_misfit(model, plan, hosts, tensors, files, device)
    edit = _substitute(model, plan, hosts, files)
    try:
        tensors.fill(model, edit.done, keep=given)
        set_record(model, record, edit.done)
        for module in model.modules():
            edit.done(partial(setattr, module, "training", module.training))
        model.eval()
    except BaseException as error:
        edit.revert()
        if _is_out_of_memory(error):
            what = f"memory does not suffice for the saved tensors: {in_one_line(error)}"
            raise CheckpointError(what, where=str(files.folder), hint="load it on a larger machine") from error
        raise
    edit.commit()
    if plan.train == "memory_only":
        freeze(model)
    return model


def saved_program(files: SavedFiles, *, trust_code: bool) -> ExportedProgram:
    """The exported program of a saved graph. Raises `CheckpointError` without `trust_code`: it may contain pickles."""
    files.check(GRAPH, hashed=trust_code)
    return read_program(files.folder / GRAPH, trust_code=trust_code, kind=CheckpointError)


def _record(files: SavedFiles) -> RewriteRecord:
    return RewriteRecord(**{field: files.text(name) for field, name in RECORD.items() if name in files or field == "plan"})


def _refuse_misfit(
    model: nn.Module,
    plan: Plan,
    hosts: Mapping[str, GraphHost],
    tensors: SavedTensors,
    files: SavedFiles,
    device: torch.device,
) -> None:
    """Raise `CheckpointError` unless plan and tensors fit `model`, and the memory of `device`; `model` is unchanged."""
    edit = _substitute(model, plan, hosts, files, device=torch.device("meta"))
    try:
        new = frozenset(name for name, value in state_of(model).items() if value.is_meta)
        tensors.refuse_misfit(model, new=new, device=device)
    finally:
        edit.revert()


def _substitute(
    model: nn.Module,
    plan: Plan,
    hosts: Mapping[str, GraphHost],
    files: SavedFiles,
    device: torch.device | None = None,
) -> UndoLog:
    unused = {path: replace(host, placed={}) for path, host in hosts.items()}  # a substitution changes its hosts
    try:
        return substitute(model, plan, hosts=unused, initialise=False, device=device)
    except MemrewriteError as error:
        raise CheckpointError(
            f"the saved plan does not fit the base model: {error.what}",
            where=str(files.folder / PLAN),
            hint=error.hint,
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """True for torch's errors: those of the CPU have no class of their own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
