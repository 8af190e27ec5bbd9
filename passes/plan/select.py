"""Decides which layer is placed at which site: located sites and a recipe in, a frozen Plan out. No model is used.

Flow: each rule's `where` selects sites → two rules that select one site, or a rule that selects nothing, are errors → options
and pools are completed from the sites → pools and layers that cannot be built, run or trained there are refused (`feasible`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from memrewrite.errors import SelectError, UserError
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import PoolSpec
from memrewrite.passes.plan.feasible import COMPUTED, refuse_layer, refuse_pool
from memrewrite.passes.plan.selectors import fitting, matching
from memrewrite.plans import Plan, Substitution
from memrewrite.recipes.schema import Recipe, Rule
from memrewrite.recipes.where import Where
from memrewrite.site import Binding, Inspection, Site


def select(located: Inspection, recipe: Recipe, *, live: bool = True) -> Plan:
    """The plan of `recipe` for the located sites. In a `live` module tree, every selected site must have a binding.

    Raises `SelectError` when the model has no MLP, a selector matches nothing or names a block or tower that does not exist,
    two rules select one site, the sites of one pool have different widths, dtypes or devices, or a layer or pool cannot be
    built, run or trained with its options: what `apply` would find later, where the plan's data suffice to know it.
    """
    if not located.sites:
        near = "; ".join(f"{miss.path or 'the root'}: {miss.reason}" for miss in located.near_misses[:3])
        raise SelectError(
            "no MLP was found in this model" + (f" ({len(located.near_misses)} near misses: {near})" if near else ""),
            where=located.captured,
            hint="`memrewrite inspect MODEL` lists the near misses with reasons",
        )
    chosen_by: dict[str, tuple[int, Rule]] = {}
    for index, rule in enumerate(recipe.replace):
        for site in matching(located.sites, rule.where, f"replace[{index}].where"):
            if site.path in chosen_by:
                raise SelectError(
                    f"rules {chosen_by[site.path][0]} and {index} both select {site.path!r}",
                    where=f"replace[{index}].where",
                    hint="narrow one of them: selectors in one `where` combine with and",
                )
            chosen_by[site.path] = (index, rule)
    chosen = [(site, *chosen_by[site.path]) for site in located.sites if site.path in chosen_by]
    if live:
        chosen = [(_within(site, [s for s, _, _ in chosen]), index, rule) for site, index, rule in chosen]
    pools = {name: _pool(recipe, name, [(s, rule) for s, _, rule in chosen if rule.pool == name]) for name in recipe.pools}
    substitutions = tuple(_substitution(site, index, rule, pools, live) for site, index, rule in chosen)
    return Plan(captured=located.captured, pools=pools, substitutions=substitutions, train=recipe.train)


def narrowed(sites: Sequence[Site], recipe: Recipe, towers: dict[int, str]) -> dict[int, Rule]:
    """For sites of a part of a model: the rules that select some of them, by number, each narrowed to these sites.

    A rule may select nothing here. `towers` has, for the rules that count blocks, the tower in which they count; it is
    extended, and passed again with the next part. Raises `SelectError` for a block that the tower does not have, and when
    the sites are in several towers.
    """
    found: dict[int, Rule] = {}
    for index, rule in enumerate(recipe.replace):
        chosen = fitting(sites, rule.where, f"replace[{index}].where", index, towers)
        if chosen:
            paths = "|".join(re.escape(site.path) for site in chosen)
            exactly = Where.model_construct(regex=f"^(?:{paths})$")  # of many sites, longer than a recipe may write
            found[index] = rule.model_copy(update={"where": exactly})
    return found


def _within(site: Site, chosen: Sequence[Site]) -> Site:
    """The site, bound to the graph of a module around it if the forward of such a module becomes a graph."""
    hosts = {b.exit for s in chosen for b in s.bindings if b.kind == "graph"}
    around = min((host for host in hosts if f"{site.path}.".startswith(f"{host}.")), key=len, default=None)
    if around is None or all(b.exit == around for b in site.bindings):
        return site
    binding = Binding(kind="graph", exit=around, why="the module around it becomes a graph")
    return site.model_copy(update={"bindings": (binding,), "modules": ()})


def _substitution(site: Site, index: int, rule: Rule, pools: dict[str, PoolSpec], live: bool) -> Substitution:
    kind = kind_named(rule.with_)
    init = rule.init.of_layer(rule.placement, kind)
    try:
        options = kind.complete(rule.layer_options(), site)
        refuse_layer(kind, site, options, pools[rule.pool] if rule.pool else None, init.zero)
    except UserError as error:
        raise SelectError(error.what, where=f"replace[{index}] at {site.path!r}", hint=error.hint) from error
    unreachable = next((b for b in site.bindings if b.kind == "none"), None)
    if live and unreachable:
        raise SelectError(
            f"the MLP at {site.path!r} cannot be edited in the module tree: {unreachable.why}",
            where=f"replace[{index}]",
            hint=unreachable.advice or "leave this site out",
        )
    return Substitution(
        site=site,
        kind=kind.kind,
        pool=rule.pool,
        placement=rule.placement,
        options=options.model_dump(mode="json"),
        init=init,
    )


def _pool(recipe: Recipe, name: str, readers: Sequence[tuple[Site, Rule]]) -> PoolSpec:
    requested, sites = recipe.pools[name], [site for site, _ in readers]
    widths, dtypes = sorted({s.d_model for s in sites}), sorted({s.dtype for s in sites})
    if requested.value_dim is None and len(widths) > 1:
        raise SelectError(
            f"the sites that share pool {name!r} have different d_model: {widths}",
            where=f"pools.{name}",
            hint="give the pool a `value_dim`, or use one pool for each width (`where: {d_model: ...}`)",
        )
    if requested.dtype is None and len(dtypes) > 1:
        raise SelectError(
            f"the sites that share pool {name!r} have different dtypes: {dtypes}",
            where=f"pools.{name}",
            hint="give the pool a `dtype`",
        )
    if requested.dtype is None and dtypes[0] not in COMPUTED:
        what = f"the sites of pool {name!r} have weights of {dtypes[0]}, which is no dtype of a new table"
        raise SelectError(what, where=f"pools.{name}", hint="give the pool a `dtype`")
    inputs = sorted({site.d_in for site, rule in readers if rule.kind.reads_inputs})
    if len(inputs) > 1:
        what = f"the sites whose layers read the input weights of pool {name!r} have inputs of different widths: {inputs}"
        raise SelectError(what, where=f"pools.{name}", hint="use one pool for each width")
    completed = {
        "value_dim": requested.value_dim or widths[0],
        "input_dim": inputs[0] if inputs else None,
        "dtype": requested.dtype or dtypes[0],
    }
    pool = PoolSpec.model_validate(requested.model_dump() | completed)
    refuse_pool(name, pool, sites)
    return pool
