"""Writes a model's tensors to safetensors files, which `saved_tensors` reads.

Flow: the state → each tensor once, and the names tied to it → one file, or shards of `SHARD_BYTES`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrewrite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

INDEX = "model.safetensors.index.json"
TRANSIENT = "buffers.safetensors"  # the non-persistent buffers, which `state_dict` omits
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit, which suits hubs and file systems


def named_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state with each tensor under its first name only; and the other names, mapped to the first.

    Raises `CheckpointError` for a value that is no tensor, is sparse or nested, or is on `meta`.
    """
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's state contains {name!r}, which is no tensor and cannot be saved", where=name)
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on meta and has no values to save", where=name)
        if not _is_dense(value):
            raise CheckpointError(
                f"{name!r} has the layout {value.layout}, and safetensors files hold dense tensors only",
                where=name,
                hint="make it dense; or, if the model computes it, register it with persistent=False",
            )
        memory = memory_of(value)
        if seen.setdefault(memory, name) == name:
            state[name] = value
        else:
            tied[name] = seen[memory]
    return state, tied


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def memory_of(value: Tensor) -> Any:
    """A key that two tensors share when they are the same elements of the same memory."""
    return value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), value.stride()


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
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def save_transient(model: nn.Module, saved: Set[str], folder: Path) -> None:
    """Write the non-persistent buffers: `model.to(dtype)` has cast them too, which no config records.

    Sparse ones are left out: the model computes them again, in the type in which it is built.
    """
    from safetensors.torch import save_file

    buffers = model.named_buffers(remove_duplicate=False)
    kept = {name: b for name, b in buffers if name not in saved and not b.is_meta and _is_dense(b)}
    transient = {name: b.cpu().contiguous().clone() for name, b in kept.items()}
    if transient:
        save_file(transient, folder / TRANSIENT)


def _contiguous(value: Tensor) -> Tensor:
    """The tensor on the CPU; a view of a part of a storage is copied, because safetensors refuses overlapping storages."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
