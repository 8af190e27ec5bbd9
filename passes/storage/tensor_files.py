"""Writes a model's tensors to safetensors files and reads them back.

Flow of saving: the state → each tensor once, and the names tied to it → one file, or shards of `SHARD_BYTES`. Flow of loading:
every tensor is copied into the model → the names that were tied are tied again. Names and shapes must match exactly; nothing
is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrewrite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set

from memrewrite.passes.storage.manifest import MANIFEST, tampered

TRANSIENT = "buffers.safetensors"  # the non-persistent buffers, which `state_dict` omits
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit, which suits hubs and file systems


def named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state with each tensor under its first name only; and the other names, mapped to the first.

    Raises `CheckpointError` for a value that is no tensor, or is on `meta`.
    """
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state contains {name!r}, which is no tensor and cannot be saved", where=name)
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on meta and has no values to save", where=name)
        memory = (value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), value.stride())
        if seen.setdefault(memory, name) == name:
            state[name] = value
        else:
            tied[name] = seen[memory]
    return state, tied


def save_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write one safetensors file, or shards of `SHARD_BYTES` with an index in Hugging Face's format."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = _contiguous(value)
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


def save_transient(model: nn.Module, saved: Set[str], folder: Path) -> None:
    """Write the non-persistent buffers: `model.to(dtype)` has cast them too, which no config records."""
    from safetensors.torch import save_file

    buffers = model.named_buffers(remove_duplicate=False)
    transient = {name: b.cpu().contiguous().clone() for name, b in buffers if name not in saved and not b.is_meta}
    if transient:
        save_file(transient, folder / TRANSIENT)


def fill_transient(model: nn.Module, folder: Path) -> None:
    """Load the non-persistent buffers that the model already has; a forward creates any others again."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in _tensors_in(folder / TRANSIENT) if (folder / TRANSIENT).is_file() else ():
        if name in buffers:
            buffers[name].data = value.to(buffers[name].device, copy=True)


def transient_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the saved non-persistent buffers, by name."""
    return {n: tuple(value.shape) for n, value in _tensors_in(folder / TRANSIENT)} if (folder / TRANSIENT).is_file() else {}


def _contiguous(value: Tensor) -> Tensor:
    """The tensor on the CPU; a view of a part of a storage is copied, because safetensors refuses overlapping storages."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def fill(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
    """Copy the saved tensors into the model, then tie each name in `tied`.

    Raises `CheckpointError` unless names and shapes match exactly.
    """
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    loaded: set[str] = set()
    with torch.no_grad():
        for file in sorted(set(folder.glob("*.safetensors")) - {folder / TRANSIENT}):
            for name, value in _tensors_in(file):
                _copy_into(wanted, name, value, file)
                loaded.add(name)
    missing = sorted(set(wanted) - loaded - set(tied))
    if missing:
        raise tampered(folder, f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    for name, first in tied.items():
        if name not in wanted or first not in loaded:
            raise tampered(folder / MANIFEST, f"it ties {name!r} to {first!r}, and one of them is missing")
        parent, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(parent)._parameters
        if wanted[name] is wanted[first]:
            continue
        if leaf in parameters and isinstance(wanted[first], nn.Parameter):
            parameters[leaf] = wanted[first]  # type: ignore[assignment]
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
        raise tampered(file, f"it is not a complete safetensors file ({error})") from error


def _copy_into(wanted: Mapping[str, Tensor], name: str, value: Tensor, file: Path) -> None:
    if name not in wanted:
        raise tampered(file, f"it contains {name!r}, which the model does not have")
    target = wanted[name]
    if target.is_meta:
        raise CheckpointError(
            f"the base model's {name!r} is on meta: it has no storage to load into",
            hint="call model.to_empty(device='cpu') before load(directory, model)",
        )
    if target.shape != value.shape:
        raise tampered(file, f"{name!r} has the shape {tuple(value.shape)}, and the model's has {tuple(target.shape)}")
    if target.dtype == value.dtype and 0 not in target.stride():  # an expanded buffer cannot be written to
        target.copy_(value)
    else:
        target.data = value.to(target.device, copy=True)  # in the saved dtype; a copy: the memory of a file is unaligned
