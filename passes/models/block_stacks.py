"""Repeated blocks: which containers of a module tree are stacks of blocks, and in which block of which tower a path is.

A stack is a container of numbered children; its blocks are counted in order. Of module names, only the numbers matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn


class BlockPosition(NamedTuple):
    """Where a path is: its tower, the number of its block in the tower, and the number of blocks of the tower."""

    tower: str
    block: int | None
    blocks: int


def outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Numbered containers (`ModuleList`, `Sequential`) that are in no other one, with their paths."""
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop(0)
        children = list(module.named_children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and children and all(n.isdigit() for n, _ in children):
            yield path, module
        else:
            pending.extend((f"{path}.{name}" if path else name, child) for name, child in children)


def block_positions(paths: Iterable[str], types: Mapping[str, str]) -> dict[str, BlockPosition]:
    """The position of every path. `types` maps the path of every module that runs to its class name.

    A tower is the stack at a path's first number: `encoder.layer.3.output` is in block 3 of `encoder.layer`. Where the
    elements of a stack are stages, which contain all their MLPs in stacks of blocks of one class, the tower is made of those
    inner stacks and its blocks are counted through the stages: block 5 of `stages.*.blocks`.
    """
    towers: dict[str, list[str]] = {}
    for path in paths:
        towers.setdefault(_tower(path, 1), []).append(path)
    found: dict[str, BlockPosition] = {}
    for tower, members in towers.items():
        depth = 1
        while tower and _are_stages(members, depth, types):
            depth += 1
        blocks = _blocks(depth, types, members)
        for path in members:
            block = _block(path, depth)
            found[path] = BlockPosition(_tower(path, depth), blocks.index(block) if tower else None, len(blocks))
    return found


def _numbers(path: str) -> list[int]:
    """The indices of the numeric parts of a path."""
    return [i for i, part in enumerate(path.split(".")) if part.isdigit()]


def _block(path: str, depth: int) -> str:
    """The path up to its `depth`-th number, or "" when it has fewer."""
    at = _numbers(path)
    return ".".join(path.split(".")[: at[depth - 1] + 1]) if len(at) >= depth else ""


def _tower(path: str, depth: int) -> str:
    """The path before its `depth`-th number, earlier numbers written as `*`; "" outside of any stack."""
    block = _block(path, depth)
    return ".".join("*" if part.isdigit() else part for part in block.split(".")[:-1]) if block else ""


def _are_stages(members: list[str], depth: int, types: Mapping[str, str]) -> bool:
    """True if all members are one stack deeper, in one stack per stage, and the blocks of these stacks have one class."""
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
