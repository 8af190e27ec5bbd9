"""Repeated blocks: which lists of a module tree are stacks of blocks, and which block of which tower a path belongs to.

A stack is a container of numbered children; its blocks are counted in order. Of names, only the numbers play a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn


class Place(NamedTuple):
    """Where a path stands: its tower, the number of its block there, and how many blocks the tower has."""

    tower: str
    block: int | None
    blocks: int


def outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Numbered containers (`ModuleList`, `Sequential`) that lie in no other one, with their paths."""
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop(0)
        children = list(module.named_children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and children and all(n.isdigit() for n, _ in children):
            yield path, module
        else:
            pending.extend((f"{path}.{name}" if path else name, child) for name, child in children)


def places(paths: Iterable[str], types: Mapping[str, str]) -> dict[str, Place]:
    """The place of every path. `types` gives the class name of every module path that runs.

    A tower is the stack at a path's first number (`encoder.layer.3.output` stands in block 3 of `encoder.layer`). Where
    a stack's elements are stages that hold all their MLPs in stacks of alike blocks, the tower is the stack of those,
    counted through the stages: block 5 of `stages.*.blocks`.
    """
    towers: dict[str, list[str]] = {}
    for path in paths:
        towers.setdefault(_tower(path, 1), []).append(path)
    found: dict[str, Place] = {}
    for tower, members in towers.items():
        depth = 1
        while tower and _is_stages(members, depth, types):
            depth += 1
        blocks = _blocks(depth, types, members)
        for path in members:
            block = _block(path, depth)
            found[path] = Place(_tower(path, depth), blocks.index(block) if tower else None, len(blocks))
    return found


def _numbers(path: str) -> list[int]:
    return [i for i, part in enumerate(path.split(".")) if part.isdigit()]


def _block(path: str, depth: int) -> str:
    """The path up to its `depth`-th number, or "" when it has fewer."""
    at = _numbers(path)
    return ".".join(path.split(".")[: at[depth - 1] + 1]) if len(at) >= depth else ""


def _tower(path: str, depth: int) -> str:
    """The path before its `depth`-th number, earlier numbers written as `*`; "" outside of any stack."""
    block = _block(path, depth)
    return ".".join("*" if part.isdigit() else part for part in block.split(".")[:-1]) if block else ""


def _is_stages(members: list[str], depth: int, types: Mapping[str, str]) -> bool:
    """Whether all members lie one stack deeper, in one stack a stage, whose blocks are all of one class."""
    inner = {_tower(path, depth + 1) for path in members}
    if len(inner) != 1 or "" in inner:
        return False
    blocks = _blocks(depth + 1, types, members)
    return len({types.get(block, "") for block in blocks}) == 1 and len(blocks) > len({_block(p, depth) for p in blocks})


def _blocks(depth: int, types: Mapping[str, str], members: list[str]) -> list[str]:
    """All blocks that run in the tower of `members`, in order of their numbers."""
    tower = _tower(members[0], depth)
    inside = {_block(path, depth) for path in (*types, *members) if _tower(path, depth) == tower} - {""}
    return sorted(inside, key=lambda block: [int(block.split(".")[i]) for i in _numbers(block)])
