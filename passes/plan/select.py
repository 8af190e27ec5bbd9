"""What goes where: located sites and a recipe in, a frozen Plan out. Nothing is touched here.

Flow: each rule's `where` selects sites → two rules claiming one site, or a rule matching nothing, are errors → options and
pools are completed from the sites → every layer kind checks that it can be built so.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from memrewrite.errors import SelectError, UserError
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import PoolSpec
from memrewrite.plans import Plan, Substitution
from memrewrite.recipes.schema import Recipe, Rule, Where
from memrewrite.site import Binding, Located, Site


def select(located: Located, recipe: Recipe, *, live: bool = True) -> Plan:
    """The plan of `recipe` for the located sites; for a `live` module tree every site must be reachable in it.

    Raises `SelectError` when the model has no MLP, a selector matches nothing or names what is not there, two rules claim
    one site, or the sites of one pool do not fit together; `UserError` when a layer cannot be built with its options.
    """
    if not located.sites:
        near = "; ".join(f"{miss.path or 'the root'}: {miss.reason}" for miss in located.near_misses[:3])
        raise SelectError(
            "no MLP was found in this model" + (f" ({len(located.near_misses)} near misses: {near})" if near else ""),
            where=located.captured,
            hint="`memrewrite inspect MODEL` lists the near misses with reasons",
        )
    claims: dict[str, tuple[int, Rule]] = {}
    for index, rule in enumerate(recipe.replace):
        for site in _matching(located.sites, rule.where, f"replace[{index}].where"):
            if site.path in claims:
                raise SelectError(
                    f"rules {claims[site.path][0]} and {index} both claim {site.path!r}",
                    where=f"replace[{index}].where",
                    hint="narrow one of them: selectors in one `where` combine with and",
                )
            claims[site.path] = (index, rule)
    chosen = [(site, *claims[site.path]) for site in located.sites if site.path in claims]
    if live:
        chosen = [(_within(site, [s for s, _, _ in chosen]), index, rule) for site, index, rule in chosen]
    pools = {name: _pool(recipe, name, [s for s, _, rule in chosen if rule.pool == name]) for name in recipe.pools}
    substitutions = tuple(_substitution(site, index, rule, pools, live) for site, index, rule in chosen)
    return Plan(captured=located.captured, pools=pools, substitutions=substitutions)


def narrowed(sites: Sequence[Site], recipe: Recipe, towers: dict[int, str]) -> dict[int, Rule]:
    """For sites of a part of a model: the rules that select some of them, by number, each narrowed to these.

    That a rule selects nothing here is no error. `towers` keeps, from part to part, the tower in which a rule counts blocks.
    Raises `SelectError` for a block that the tower does not have, and when a rule's tower cannot be told.
    """
    found: dict[int, Rule] = {}
    for index, rule in enumerate(recipe.replace):
        chosen = _fitting(sites, rule.where, f"replace[{index}].where", index, towers)
        if chosen:
            paths = "|".join(re.escape(site.path) for site in chosen)
            found[index] = rule.model_copy(update={"where": Where(regex=f"^(?:{paths})$")})
    return found


def _fitting(sites: Sequence[Site], where: Where, place: str, index: int, towers: dict[int, str]) -> list[Site]:
    wishes = {name: getattr(where, name) for name in _FILTERS if getattr(where, name) is not None}
    chosen = [site for site in sites if all(_FILTERS[name](site, wish) for name, wish in wishes.items())]
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


def _within(site: Site, chosen: Sequence[Site]) -> Site:
    """A site as the plan reaches it: through the graph that a module around it becomes, when one does."""
    hosts = {b.exit for s in chosen for b in s.bindings if b.kind == "graph"}
    around = min((host for host in hosts if f"{site.path}.".startswith(f"{host}.")), key=len, default=None)
    if around is None or all(b.exit == around for b in site.bindings):
        return site
    binding = Binding(kind="graph", exit=around, why="the module around it becomes a graph")
    return site.model_copy(update={"bindings": (binding,), "modules": ()})


def _substitution(site: Site, index: int, rule: Rule, pools: dict[str, PoolSpec], live: bool) -> Substitution:
    kind, options = kind_named(rule.with_), rule.layer_options()
    try:
        kind.check(site.d_in, site.d_model, options, pools[rule.pool] if rule.pool else None)
    except UserError as error:
        raise SelectError(error.what, where=f"replace[{index}] at {site.path!r}", hint=error.hint) from error
    unreachable = next((b for b in site.bindings if b.kind == "none"), None)
    if live and unreachable:
        raise SelectError(
            f"the MLP at {site.path!r} cannot be edited in the module tree: {unreachable.why}",
            where=f"replace[{index}]",
            hint="leave this site out, or rewrite the exported program: `--emit graph`",
        )
    return Substitution(
        site=site, kind=kind.kind, pool=rule.pool, placement=rule.placement, options=options.model_dump(mode="json")
    )


def _pool(recipe: Recipe, name: str, sites: Sequence[Site]) -> PoolSpec:
    wish = recipe.pools[name]
    widths, dtypes = sorted({s.d_model for s in sites}), sorted({s.dtype for s in sites})
    if wish.value_dim is None and len(widths) > 1:
        raise SelectError(
            f"the sites that share pool {name!r} have different d_model: {widths}",
            where=f"pools.{name}",
            hint="give the pool a `value_dim`, or use one pool for each width (`where: {d_model: ...}`)",
        )
    if wish.dtype is None and len(dtypes) > 1:
        raise SelectError(
            f"the sites that share pool {name!r} have different dtypes: {dtypes}",
            where=f"pools.{name}",
            hint="give the pool a `dtype`",
        )
    completed = {"value_dim": wish.value_dim or widths[0], "dtype": wish.dtype or dtypes[0]}
    return PoolSpec.model_validate(wish.model_dump() | completed)


# ------------------------------------------------------------------------------------------------------- selectors


def _matching(sites: Sequence[Site], where: Where, place: str) -> list[Site]:
    """The sites that fit every selector of `where`, which must be at least one."""
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
    named = set(where.layers or ()) | (blocks if where.centred else set())  # `every` takes what there is
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
    """The tower whose blocks are counted: the one named, else the one with most MLPs; None when none are counted."""
    towers = [s.tower for s in sites if s.block is not None]
    if where.tower is not None:
        if where.tower not in towers:
            hint = f"there are: {', '.join(dict.fromkeys(towers)) or 'none'}"
            raise SelectError(f"no MLP stands in a tower {where.tower!r}", where=f"{place}.tower", hint=hint)
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
    first = depth // 2 - (count // 2) * stride + (0 if count % 2 else stride // 2)
    chosen = [first + i * stride for i in range(count)]
    if chosen[0] < 0 or chosen[-1] >= depth:
        largest = max((depth - 1) // max(1, count - 1), 1)
        raise SelectError(
            f"{count} blocks {stride} apart do not fit around the middle of {depth} blocks: {chosen}",
            where=f"{place}.centred",
            hint=f"a stride of at most {min(largest, depth // 2 // max(1, count // 2))}, or name the blocks: `layers: [...]`",
        )
    return chosen


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
