"""Reads the tensors of safetensors files: first names, shapes and dtypes, which are checked, then the values.

Flow: the headers of all files → comparison with a model whose new layers are on meta: names, shapes, ties, memory → every
tensor is copied into the model → the names that were tied are tied again. Nothing is unpickled. Each change can be undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import CheckpointError, UserError, in_one_line
from memrewrite.passes.plan.memory_budget import free_memory
from memrewrite.passes.storage.manifest import MANIFEST, SavedFiles, tampered
from memrewrite.passes.storage.tensor_files import INDEX, TRANSIENT, memory_of

AddUndo = Callable[[Callable[[], object]], None]  # receives a function that undoes the last change
Damaged = Callable[[Path, str], UserError]  # the error for a file, and why
DTYPES = {  # the names in safetensors files
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of a saved directory by name: the state, the non-persistent buffers, and the tied names."""

    state: Mapping[str, Header]
    transient: Mapping[str, Header]
    tied: Mapping[str, str]
    folder: Path

    def refuse_misfit(self, model: nn.Module, *, new: frozenset[str], device: torch.device) -> None:
        """Raise `CheckpointError` unless every name, shape, kind of dtype and tie fits `model`, and memory suffices.

        `new`: names of tensors that are on meta now and will be allocated on `device`. Nothing is changed.
        """
        wanted, seen = state_of(model), dict[Any, str]()
        for name, header in self.state.items():
            if name not in wanted:
                raise tampered(header.file, f"it contains {name!r}, which the model does not have")
            _refuse_unlike(name, header, wanted[name])
            if (other := seen.setdefault(memory_of(wanted[name]), name)) != name:
                raise tampered(header.file, f"{name!r} and {other!r} are two tensors, and one in the model")
        missing = sorted(set(wanted) - set(self.state) - set(self.tied))
        if missing:
            raise tampered(self.folder, f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
        for name, first in self.tied.items():
            self._refuse_tie(name, first, wanted)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, header in self.transient.items():
            if name in buffers and _class_of(buffers[name].dtype) != _class_of(header.dtype):
                raise tampered(header.file, f"{name!r} is {header.dtype}, and the model's is {buffers[name].dtype}")
        refuse_too_large(sum(header.nbytes for name, header in self.state.items() if name in new), device, self.folder)

    def _refuse_tie(self, name: str, first: str, wanted: Mapping[str, Tensor]) -> None:
        where = self.folder / MANIFEST
        if name not in wanted or first not in self.state:
            raise tampered(where, f"it ties {name!r} to {first!r}, and one of them is missing")
        if name in self.state:
            raise tampered(where, f"it ties {name!r}, which has values of its own")
        one, other = wanted[name], wanted[first]
        if one.shape != other.shape or one.dtype != other.dtype:
            what = f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
            raise tampered(where, f"it ties {name!r} to {first!r}, which are {what}")

    def fill(self, model: nn.Module, done: AddUndo, *, keep: bool) -> None:
        """Copy all tensors into `model`, which `refuse_misfit` accepted, then tie names.

        Args:
            model: The model.
            done: Receives how to undo each change.
            keep: Keep a copy of each tensor that is overwritten, so that it can be undone.
        """
        wanted = state_of(model)
        with torch.no_grad():
            for name, value in values_of(self.state):
                _copy_into(wanted[name], value, done, keep=keep)
        for name, first in self.tied.items():
            _tie(model, name, wanted[name], wanted[first], done)
        buffers = dict(model.named_buffers(remove_duplicate=False))  # a forward creates any others again
        for name, value in values_of({name: h for name, h in self.transient.items() if name in buffers}):
            _replace_data(buffers[name], value, done)


def saved_tensors(files: SavedFiles) -> SavedTensors:
    """The headers of all safetensors files. Raises `CheckpointError` for a damaged file, a name twice, or another index."""
    state: dict[str, Header] = {}
    for file in files.names(".safetensors"):
        if file == TRANSIENT:
            continue
        for name, header in headers_of(files.path(file)).items():
            if name in state:
                raise tampered(header.file, f"it contains {name!r}, which is in {state[name].file.name} too")
            state[name] = header
    if INDEX in files:
        index, names = files.json(INDEX), {name: header.file.name for name, header in state.items()}
        if not isinstance(index, dict) or index.get("weight_map") != names:
            raise tampered(files.folder / INDEX, "it does not agree with the files of weights")
    transient = headers_of(files.path(TRANSIENT)) if TRANSIENT in files else {}
    return SavedTensors(state, transient, files.manifest.tied, files.folder)


def headers_of(file: Path, damaged: Damaged = tampered) -> dict[str, Header]:
    """The names, shapes and dtypes in a safetensors file. Raises the error `damaged` for another file."""
    found = {}
    with _opened(file, damaged) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            part = tensors.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise damaged(file, f"{name!r} has the dtype {part.get_dtype()}, which is not supported")
            found[name] = Header(file, tuple(part.get_shape()), dtype)
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state, as they are."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def refuse_meta(model: nn.Module) -> None:
    """Raise `CheckpointError` for a model with a tensor that has no storage to load into."""
    tensors = {**state_of(model), **dict(model.named_buffers(remove_duplicate=False))}
    on_meta = next((name for name, value in tensors.items() if value.is_meta), None)
    if on_meta is not None:
        raise CheckpointError(
            f"the base model's {on_meta!r} is on meta: it has no storage to load into",
            hint="call model.to_empty(device='cpu') before load(directory, model)",
        )


def _refuse_unlike(name: str, header: Header, target: Tensor) -> None:
    shape = tuple(target.shape)
    if shape != header.shape:
        raise tampered(header.file, f"{name!r} has the shape {header.shape}, and the model's has {shape}")
    if _class_of(header.dtype) != _class_of(target.dtype):
        raise tampered(header.file, f"{name!r} is {header.dtype}, and the model's is {target.dtype}")


def bytes_of(model: nn.Module) -> int:
    """Bytes of the tensors of a model's state, also of one on meta."""
    return sum(tensor.nbytes for tensor in state_of(model).values())


def refuse_too_large(needed: int, device: torch.device, where: Path, *, kind: type[UserError] = CheckpointError) -> None:
    """Raise `kind` if `needed` bytes are more than `device` has free."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise kind(
            f"the model needs {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free",
            where=str(where),
            hint="free memory, or load it on a larger machine",
        )


def _class_of(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


@contextmanager
def _opened(file: Path, damaged: Damaged) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise damaged(file, f"it is not a complete safetensors file ({in_one_line(error, kind=False)})") from error


def values_of(headers: Mapping[str, Header], damaged: Damaged = tampered) -> Iterator[tuple[str, Tensor]]:
    """Names and values, one at a time, file by file. The values are in the memory of the file."""
    for file in dict.fromkeys(header.file for header in headers.values()):
        with _opened(file, damaged) as tensors:
            for name, header in headers.items():
                if header.file == file:
                    yield name, tensors.get_tensor(name)


def _copy_into(target: Tensor, value: Tensor, done: AddUndo, *, keep: bool) -> None:
    if target.dtype != value.dtype or 0 in target.stride():  # an expanded buffer cannot be written to
        _replace_data(target, value, done)
        return
    if keep:
        before = target.detach().clone()
        done(lambda: target.data.copy_(before))
    target.copy_(value)


def _replace_data(target: Tensor, value: Tensor, done: AddUndo) -> None:
    """Give a tensor other values, in the saved dtype; a copy: the memory of a file is unaligned."""
    before = target.data
    done(lambda: setattr(target, "data", before))
    target.data = value.to(target.device, copy=True)


def _tie(model: nn.Module, name: str, tensor: Tensor, first: Tensor, done: AddUndo) -> None:
    if tensor is first:
        return
    parent, _, leaf = name.rpartition(".")
    parameters: dict[str, Any] = model.get_submodule(parent)._parameters
    if leaf in parameters and isinstance(first, nn.Parameter):
        done(lambda: parameters.__setitem__(leaf, tensor))
        parameters[leaf] = first
    else:
        before = tensor.data
        done(lambda: setattr(tensor, "data", before))
        tensor.data = first.data
