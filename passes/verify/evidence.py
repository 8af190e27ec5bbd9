"""What the checks look at, and the questions several of them ask: hashes of tensors, outputs compared, outcomes spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memrewrite.passes.capture.capture import Capture
from memrewrite.passes.locate.locate import Locations
from memrewrite.passes.models.forward import on_meta
from memrewrite.passes.rewrite.edit_module import pools_of
from memrewrite.passes.rewrite.graph_host import Host
from memrewrite.plans import Plan
from memrewrite.report import Check


@dataclass
class Evidence:
    """What the checks look at. `before` and `fingerprints` are from before the edit."""

    model: nn.Module
    plan: Plan
    before: Capture
    locations: Locations
    fingerprints: Mapping[str, Fingerprint]
    reached: frozenset[str] = frozenset()  # sites that outputs depended on differentiably before
    hosts: Mapping[str, Host] = field(default_factory=dict)  # the modules that become graphs
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by site path, as built

    @property
    def on_meta(self) -> bool:
        """No values to compare: the model is on `meta`."""
        return on_meta(self.model)


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


def new_modules(evidence: Evidence) -> list[nn.Module]:
    """The pools and the layers: what was not there before."""
    return [pools_of(evidence.model), *evidence.layers.values()]


def differing(one: Any, other: Any) -> int:
    """Elements in which two outputs differ, NaN equal to NaN; outputs of another structure differ in all."""
    a, b = ([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] for out in (one, other))
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return max(1, sum(t.numel() for t in b))
    return sum(int((~((x == y) | ((x != x) & (y != y)))).sum()) for x, y in zip(a, b, strict=True))


def checked(name: str, good: bool, number: float, sentence: str) -> Check:
    """A check that was made, and how it ended."""
    return Check(name=name, outcome="passed" if good else "failed", number=number, sentence=sentence)


def skipped(name: str, why: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name=name, outcome="skipped", number=0, sentence=why)


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed."""
    return any(check.outcome == "failed" for check in checks)
