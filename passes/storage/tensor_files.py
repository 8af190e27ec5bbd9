"""A model's tensors to safetensors and back: each stored once, in shards when large, tied names tied again.

Names and shapes must fit exactly; nothing is unpickled.
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

TRANSIENT = "buffers.safetensors"  # what is no part of a model's state, and of its function
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit: hubs and file systems like files no larger


def named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def save_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write one safetensors file, or shards of `SHARD_BYTES` with an index in Hugging Face's format."""
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


def save_transient(model: nn.Module, saved: Set[str], folder: Path) -> None:
    """The buffers that a state leaves out: `model.to(dtype)` rounded them too, and no config says so."""
    from safetensors.torch import save_file

    buffers = model.named_buffers(remove_duplicate=False)
    kept = {name: b.cpu().contiguous().clone() for name, b in buffers if name not in saved and not b.is_meta}
    if kept:
        save_file(kept, folder / TRANSIENT)


def fill_transient(model: nn.Module, folder: Path) -> None:
    """Bring those buffers back where the model has them already: one that a forward makes is made again."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in _tensors_in(folder / TRANSIENT) if (folder / TRANSIENT).is_file() else ():
        if name in buffers:
            buffers[name].data = value.to(buffers[name].device, copy=True)


def _whole(value: Tensor) -> Tensor:
    """On the CPU, and with a storage of its own when it saw only a part of one: safetensors refuses storages that overlap."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def fill(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
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
        raise tampered(folder, f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    for name, first in tied.items():
        if name not in wanted or first not in loaded:
            raise tampered(folder / MANIFEST, f"it ties {name!r} to {first!r}, and one of them is missing")
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
        raise tampered(file, f"it is no whole safetensors file ({error})") from error


def _copy_into(wanted: Mapping[str, Tensor], name: str, value: Tensor, file: Path) -> None:
    if name not in wanted:
        raise tampered(file, f"it holds {name!r}, which the model does not have")
    mine = wanted[name]
    if mine.is_meta:
        raise CheckpointError(
            f"the base model's {name!r} is on meta: there is no memory to load it into",
            hint="model.to_empty(device='cpu') gives it some, before load(directory, model)",
        )
    if mine.shape != value.shape:
        raise tampered(file, f"{name!r} is {tuple(value.shape)}, and the model's is {tuple(mine.shape)}")
    if mine.dtype == value.dtype and 0 not in mine.stride():  # an expanded buffer cannot be written to
        mine.copy_(value)
    else:
        mine.data = value.to(mine.device, copy=True)  # kept in another dtype than its model's; a file's memory is unaligned
