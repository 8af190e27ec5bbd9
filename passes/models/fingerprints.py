"""Hashes of every tensor of a model, and how many elements of two outputs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Fingerprint(NamedTuple):
    """A hash of one tensor, and its first name: a tied tensor has several."""

    bits: str
    first: str


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """A hash of every parameter and buffer, bit by bit, and of its kind; of that alone on `meta`."""
    return hashed(tensors_of(model))


def hashed(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Fingerprint]:
    """A tensor with several names is read once."""
    known: dict[int, Fingerprint] = {}
    for name, tensor in (named := list(tensors)):
        if id(tensor) not in known:
            known[id(tensor)] = Fingerprint(_hash(tensor), name)
    return {name: known[id(tensor)] for name, tensor in named}


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, by each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _hash(tensor: Tensor) -> str:
    kind = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.requires_grad}"
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    if not tensor.is_meta and tensor.numel():
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differing(one: Any, other: Any) -> int:
    """Elements in which two outputs differ, NaN equal to NaN; outputs of another structure differ in all."""
    a, b = ([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in (one, other))
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return max(1, sum(t.numel() for t in b))
    return sum(int((~((x == y) | ((x != x) & (y != y)))).sum()) for x, y in zip(a, b, strict=True))
