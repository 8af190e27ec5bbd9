"""The selectors of a rule's `where`: sites in, the selected sites out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from memrewrite.errors import SelectError
from memrewrite.recipes.where import Where
from memrewrite.site import Site


def fitting(sites: Sequence[Site], where: Where, place: str, index: int, towers: dict[int, str]) -> list[Site]:
    """The sites of a part of a model that a rule's `where` selects, which may be none.

    A rule that counts blocks selects in one tower, which is stored in `towers` by the rule's `index`. Raises `SelectError`
    when the sites are in several towers, or the tower has no such block.
    """
    filters = {name: getattr(where, name) for name in _FILTERS if getattr(where, name) is not None}
    chosen = [site for site in sites if all(_FILTERS[name](site, value) for name, value in filters.items())]
    if not where.counts:
        return chosen
    here = dict.fromkeys(site.tower for site in chosen if site.block is not None)
    tower = where.tower or towers.get(index) or next(iter(here), None)
    if tower is None:
        return []
    towers[index] = tower
    if where.tower is None and set(here) - {tower}:
        hint = f"give the tower: `tower: {tower}`"
        raise SelectError(f"blocks are counted in one stack, and there are {', '.join(here)}", where=place, hint=hint)
    if tower not in here:
        return []
    blocks = _blocks(sites, tower, where, place)
    return [site for site in chosen if site.tower == tower and site.block in blocks]


def matching(sites: Sequence[Site], where: Where, place: str) -> list[Site]:
    """The sites that every selector of `where` selects. Raises `SelectError` when there is none, or a named block has none."""
    tower = _tower(sites, where, place)
    blocks = _blocks(sites, tower, where, place)
    chosen = [s for s in sites if tower is None or (s.tower == tower and s.block in blocks)]
    for name, fits in _FILTERS.items():
        wanted = getattr(where, name)
        if wanted is not None:
            kept = [s for s in chosen if fits(s, wanted)]
            if not kept:
                raise SelectError(
                    f"`{name}: {wanted}` matches none of {len(chosen)} MLPs",
                    where=place,
                    hint=_known(chosen, name, wanted),
                )
            chosen = kept
    named = set(where.layers or ()) | (blocks if where.centred else set())  # `every` may count blocks without an MLP
    missing = named - {s.block for s in chosen}
    if missing:
        raise SelectError(
            f"block {min(missing)} of {tower!r} has no MLP that fits",
            where=f"{place}.layers" if where.layers is not None else f"{place}.centred",
            hint=f"blocks with one: {_ranges({s.block for s in sites if s.tower == tower})}",
        )
    if not chosen:
        raise SelectError("the selectors match no MLP together", where=place, hint="drop one of them")
    return chosen


_FILTERS: dict[str, Callable[[Site, Any], bool]] = {
    "path": lambda site, glob: fnmatch.fnmatchcase(site.path, glob),
    "regex": lambda site, expression: re.search(expression, site.path) is not None,
    "pattern": lambda site, name: site.pattern == name,
    "d_model": lambda site, width: site.d_model == width,
}


def _known(sites: Sequence[Site], name: str, wanted: object) -> str:
    values = [str(getattr(site, "path" if name in ("path", "regex") else name)) for site in sites]
    values = list(dict.fromkeys(values))
    near = get_close_matches(str(wanted), values, n=1)
    shown = ", ".join(values[:6]) + (", ..." if len(values) > 6 else "")
    return f"did you mean {near[0]!r}? there are: {shown}" if near else f"there are: {shown}"


def _tower(sites: Sequence[Site], where: Where, place: str) -> str | None:
    """The tower whose blocks are counted: the named one, else the one with most MLPs; None if `where` counts no blocks."""
    towers = [s.tower for s in sites if s.block is not None]
    if where.tower is not None:
        if where.tower not in towers:
            hint = f"there are: {', '.join(dict.fromkeys(towers)) or 'none'}"
            raise SelectError(f"no MLP is in a tower {where.tower!r}", where=f"{place}.tower", hint=hint)
        return where.tower
    if where.layers is None and where.centred is None and where.every is None:
        return None
    if not towers:
        raise SelectError("this model has no stack of blocks to count", where=place, hint="select by `path` or `all: true`")
    return max(dict.fromkeys(towers), key=towers.count)


def _blocks(sites: Sequence[Site], tower: str | None, where: Where, place: str) -> set[int]:
    depth = next((s.tower_blocks for s in sites if s.tower == tower), 0)
    blocks = set(range(depth))
    if where.layers is not None:
        outside = [i for i in where.layers if i >= depth]
        if outside:
            hint = f"{tower!r} has blocks 0 to {depth - 1}"
            raise SelectError(f"there is no block {outside[0]}", where=f"{place}.layers", hint=hint)
        blocks &= set(where.layers)
    if where.every is not None:
        blocks &= set(range(where.every - 1, depth, where.every))
    if where.centred is not None:
        blocks &= set(centred(depth, where.centred.count, where.centred.stride, place))
    return blocks


def centred(depth: int, count: int, stride: int, place: str = "centred") -> list[int]:
    """`count` blocks `stride` apart around block depth // 2: 24 blocks, 3 and 8 give 4, 12, 20 (the paper's layout)."""
    chosen = _around_the_middle(depth, count, stride)
    if not _inside(chosen, depth):
        strides = [s for s in range(1, depth + 1) if _inside(_around_the_middle(depth, count, s), depth)]
        change = f"a stride of at most {strides[-1]}" if strides else "fewer blocks"
        raise SelectError(
            f"{count} blocks {stride} apart do not fit around the middle of {depth} blocks: {_listed(chosen)}",
            where=f"{place}.centred",
            hint=f"{change}, or name the blocks: `layers: [...]`",
        )
    return list(chosen)


def _listed(blocks: range) -> str:
    return str(list(blocks)) if blocks[-1] - blocks[0] < 100 * blocks.step else f"{blocks[0]} to {blocks[-1]}"


def _around_the_middle(depth: int, count: int, stride: int) -> range:
    """The blocks, which may be outside of the stack: a range takes no memory, however many they are."""
    first = depth // 2 - (count // 2) * stride + (0 if count % 2 else stride // 2)
    return range(first, first + count * stride, stride)


def _inside(blocks: Sequence[int], depth: int) -> bool:
    """True if all of these ascending block numbers exist in a stack of `depth` blocks."""
    return blocks[0] >= 0 and blocks[-1] < depth


def _ranges(numbers: set[int | None]) -> str:
    """`0-3, 7` for {0, 1, 2, 3, 7}."""
    ordered, parts = sorted(n for n in numbers if n is not None), []
    start = previous = None
    for n in [*ordered, None]:
        if previous is not None and n != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = n
        start = n if start is None else start
        previous = n
    return ", ".join(parts)
