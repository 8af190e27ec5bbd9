"""Rewritten models on disk: a directory that loads again without capturing, and that says when it was changed.

Flow of save: weights to safetensors, the base's config, tokenizer and code beside them, recipe, plan, report and a manifest
of every file → all in a temporary directory, renamed at the end. Flow of load: manifest → base model → the plan replayed →
weights. Weights travel through safetensors only; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn

from memrewrite.errors import CheckpointError, MemrewriteError, ModelError
from memrewrite.passes.bases import Base, Kind, base_of, build_base
from memrewrite.passes.substitute import pools_of, substitute
from memrewrite.plans import Plan
from memrewrite.report import Report
from memrewrite.site import Frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set

MANIFEST = "memrewrite.json"
GRAPH = "model.pt2"
TRANSIENT = "buffers.safetensors"  # what is no part of a model's state, and of its function
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit: hubs and file systems like files no larger
FORMAT = 1


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
    record = record_of(model)
    refuse_used(target, overwrite)
    base = source or base_of(model)
    tied: dict[str, str] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_at_the_end(target) as folder:
        say("writing the weights")
        if isinstance(model, fx.GraphModule):
            base = Base(kind="graph")
            _save_graph(model, folder / GRAPH)
        else:
            base.write(model, folder)
            state, tied = _named_once(model)
            _save_tensors(state, folder)
            _save_transient(model, state.keys() | tied.keys(), folder)
        for name, text in record.items():
            (folder / name).write_text(text, encoding="utf-8")
        say("writing the manifest")
        _write_manifest(folder, base, tied)
    return target


def record_of(model: nn.Module) -> dict[str, str]:
    """The recipe, plan and report a rewritten model carries, as files' texts."""
    record: dict[str, str] = pools_of(model).record
    if "plan.json" not in record:
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


# ---------------------------------------------------------------------------------------------------------- tensors


def _named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state, each tensor under its first name only; and the other names, each with that first one."""
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state holds {name!r}, which is no tensor and cannot be saved", where=name)
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on meta and has no values to save", where=name)
        place = (value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), value.stride())
        if seen.setdefault(place, name) == name:
            state[name] = value
        else:
            tied[name] = seen[place]
    return state, tied


def _save_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = _whole(value)
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _save_transient(model: nn.Module, saved: Set[str], folder: Path) -> None:
    """The buffers that a state leaves out: `model.to(dtype)` rounded them too, and no config says so."""
    from safetensors.torch import save_file

    buffers = model.named_buffers(remove_duplicate=False)
    kept = {name: b.cpu().contiguous().clone() for name, b in buffers if name not in saved and not b.is_meta}
    if kept:
        save_file(kept, folder / TRANSIENT)


def _fill_transient(model: nn.Module, folder: Path) -> None:
    """Bring those buffers back where the model has them already: one that a forward makes is made again."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in _tensors_in(folder / TRANSIENT) if (folder / TRANSIENT).is_file() else ():
        if name in buffers:
            buffers[name].data = value.to(buffers[name].device, copy=True)


def _whole(value: Tensor) -> Tensor:
    """On the CPU, and with a storage of its own when it saw only a part of one: safetensors refuses storages that overlap."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _fill(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
    """Copy the saved tensors into the model and tie what was tied; names and shapes must fit exactly."""
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    loaded: set[str] = set()
    with torch.no_grad():
        for file in sorted(set(folder.glob("*.safetensors")) - {folder / TRANSIENT}):
            for name, value in _tensors_in(file):
                _copy_into(wanted, name, value, file)
                loaded.add(name)
    missing = sorted(set(wanted) - loaded - set(tied))
    if missing:
        raise _tampered(folder, f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    for name, first in tied.items():
        if name not in wanted or first not in loaded:
            raise _tampered(folder / MANIFEST, f"it ties {name!r} to {first!r}, and one of them is missing")
        parent, _, leaf = name.rpartition(".")
        held = model.get_submodule(parent)._parameters
        if wanted[name] is wanted[first]:
            continue
        if leaf in held and isinstance(wanted[first], nn.Parameter):
            held[leaf] = wanted[first]  # type: ignore[assignment]
        else:
            wanted[name].data = wanted[first].data


def _tensors_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file, one at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise _tampered(file, f"it is no whole safetensors file ({error})") from error


def _copy_into(wanted: Mapping[str, Tensor], name: str, value: Tensor, file: Path) -> None:
    if name not in wanted:
        raise _tampered(file, f"it holds {name!r}, which the model does not have")
    mine = wanted[name]
    if mine.is_meta:
        raise CheckpointError(
            f"the base model's {name!r} is on meta: there is no memory to load it into",
            hint="model.to_empty(device='cpu') gives it some, before load(directory, model)",
        )
    if mine.shape != value.shape:
        raise _tampered(file, f"{name!r} is {tuple(value.shape)}, and the model's is {tuple(mine.shape)}")
    if mine.dtype == value.dtype and 0 not in mine.stride():  # an expanded buffer cannot be written to
        mine.copy_(value)
    else:
        mine.data = value.to(mine.device, copy=True)  # kept in another dtype than its model's; a file's memory is unaligned


# --------------------------------------------------------------------------------------------------------- manifest


class _KeptFile(Frozen):
    bytes: int
    sha256: str


class _KeptBase(Frozen):
    kind: Kind
    code: str
    builder: str


class _Manifest(Frozen):
    """What a manifest of this format holds."""

    memrewrite: int
    base: _KeptBase
    versions: dict[str, str]
    tied: dict[str, str]
    files: dict[str, _KeptFile]


def _write_manifest(folder: Path, base: Base, tied: Mapping[str, str]) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    versions = {name: metadata.version(name) for name in ("memrewrite", "torch", "safetensors")}
    manifest = {"memrewrite": FORMAT, "base": base.to_data(), "versions": versions, "tied": tied, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10
    total = hashlib.sha256()
    while block := stream.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def is_saved(directory: str | Path) -> bool:
    """Whether `save` wrote this directory."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path, *, every_bit: bool = False) -> dict[str, Any]:
    """The manifest, held against the files: sizes of all, hashes of the small ones (`every_bit`: of all).

    Raises `CheckpointError` for a directory that is none of ours, or that was cut short or changed.
    """
    folder = Path(directory)
    if not is_saved(folder):
        raise CheckpointError(
            f"{str(folder)!r} is no directory that memrewrite saved",
            where=str(folder / MANIFEST),
            hint="memrewrite apply MODEL RECIPE -o DIR",
        )
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["memrewrite"]
        if version == FORMAT:
            _Manifest.model_validate(manifest)
    except (ValueError, KeyError, TypeError) as error:  # pydantic's are ValueErrors
        raise _tampered(folder / MANIFEST, f"it is not a manifest ({error})") from error
    if version != FORMAT:
        raise CheckpointError(
            f"format {version!r} cannot be read here", where=str(folder / MANIFEST), hint="upgrade memrewrite"
        )
    files = manifest["files"]
    for name, kept in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise _tampered(file, "it is missing")
        if file.stat().st_size != kept["bytes"]:
            raise _tampered(file, f"it has {file.stat().st_size} bytes, and was saved with {kept['bytes']}")
        weights = file.suffix in (".safetensors", ".pt2")
        if (every_bit or not weights) and digest(file) != kept["sha256"]:
            raise _tampered(file, "its content was changed after it was saved")
    extra = {p.name for p in folder.glob("*.safetensors")} - set(files)
    if extra:
        raise _tampered(folder, f"{sorted(extra)[0]} was added after it was saved")
    return manifest


def _tampered(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the saved model is damaged: {file.name}: {why}", where=str(file), hint="save it again, or copy it again whole"
    )


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
        substitute(built, plan, initialise=False).commit()
    except MemrewriteError as error:
        raise CheckpointError(
            f"the saved plan does not fit the base model: {error.what}",
            where=str(folder / "plan.json"),
            hint=error.hint,
        ) from error
    _fill(built, folder, manifest["tied"])
    _fill_transient(built, folder)
    pools_of(built).record = {n: (folder / n).read_text(encoding="utf-8") for n in RECORD if (folder / n).is_file()}
    return built.eval()


RECORD = ("recipe.yaml", "plan.json", "report.json")


def read_plan(directory: str | Path) -> Plan:
    """The plan of a saved directory."""
    file = Path(directory) / "plan.json"
    try:
        return Plan.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise _tampered(file, "it is not a plan") from error


def read_report(directory: str | Path) -> Report:
    """The report that was saved with the model."""
    file = Path(directory) / "report.json"
    try:
        return Report.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise _tampered(file, "it is not a report") from error


def _save_graph(model: fx.GraphModule, file: Path) -> None:
    args, kwargs = model.meta["inputs"]
    with torch.no_grad():
        torch.export.save(torch.export.export(model, args, kwargs), file)


def _load_graph(folder: Path, trust_code: bool) -> nn.Module:
    if not trust_code:
        raise CheckpointError(
            f"{GRAPH} is a torch.export archive, which may hold pickles",
            where=str(folder / GRAPH),
            hint="if you trust the file, allow it: --trust-code, load(..., trust_code=True)",
        )

    return torch.export.load(folder / GRAPH).module(check_guards=False)
