"""Bitwise comparison: a hash of every tensor of a model, and the number of elements in which two outputs differ.

Flow: every parameter and buffer → a hash of its bits, dtype, shape and `requires_grad` → hashes before and after an edit are
compared by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.passes.models.tensors import strided_parts, tensors_of


class Fingerprint(NamedTuple):
    """A hash of one tensor, and the tensor's first name: a tied tensor has several names."""

    bits: str
    first: str


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """A hash of every parameter and buffer: bits, dtype, shape and `requires_grad`. On `meta` there are no bits to hash."""
    return hashed(tensors_of(model))


def hashed(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Fingerprint]:
    """A hash of every tensor by name; a tensor with several names is read once."""
    known: dict[int, Fingerprint] = {}
    for name, tensor in (named := list(tensors)):
        if id(tensor) not in known:
            known[id(tensor)] = Fingerprint(hash_of(tensor), name)
    return {name: known[id(tensor)] for name, tensor in named}


def hash_of(tensor: Tensor) -> str:
    """A hash of a tensor of any layout: bits, dtype, shape and `requires_grad`; on `meta` without the bits."""
    kind = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.requires_grad}"
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in () if tensor.is_meta else strided_parts(tensor.detach()):
        if part.numel():
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differing(one: Any, other: Any) -> int:
    """The number of elements in which two outputs differ, NaN equal to NaN; with another structure, all of `other`'s."""
    a, b = ([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in (one, other))
    if [_form(t) for t in a] != [_form(t) for t in b]:
        return max(1, sum(t.numel() for t in b))
    parts = ((x, y) for pair in zip(a, b, strict=True) for x, y in zip(*map(strided_parts, pair), strict=True))
    return sum(y.numel() if x.shape != y.shape else int((~((x == y) | ((x != x) & (y != y)))).sum()) for x, y in parts)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What must be the same before values can be compared; of nested tensors the sizes of every row."""
    shapes = [row.shape for row in tensor.unbind()] if tensor.is_nested else [tensor.shape]
    return shapes, tensor.dtype, tensor.layout
