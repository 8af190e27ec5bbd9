"""The frozen Plan between locating and editing: what goes where. Saved beside the weights and replayed on load."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from memrewrite.cost import Cost
from memrewrite.frozen import Frozen
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import PoolSpec
from memrewrite.site import Site, itemsize_of

ROOT = "memory"  # the pools hang at `model.memory.<name>`
Placement = Literal["replace", "parallel"]


class Substitution(Frozen):
    """One layer at one site, with the kind's options, complete."""

    site: Site
    kind: str
    pool: str | None
    placement: Placement
    options: dict[str, Any]

    def cost(self, pools: dict[str, PoolSpec]) -> Cost:
        """Cost of the new layer for one token and one call, without the pool's own parameters."""
        kind = kind_named(self.kind)
        spec = pools[self.pool] if self.pool else None
        parallel = self.placement == "parallel"
        itemsize = itemsize_of(self.site.dtype)
        options = kind.Options.model_validate(self.options)
        layer = kind.cost(self.site.d_in, self.site.d_model, options, spec, itemsize, zero_output=parallel)
        return layer + self.site.cost() if parallel else layer


class Plan(Frozen):
    """Substitutions in the order of the sites, and the pools they share. Same model, same recipe: same plan."""

    memrewrite: Literal[1] = 1
    root: str = ROOT
    captured: str
    pools: dict[str, PoolSpec]
    substitutions: tuple[Substitution, ...]

    def before(self) -> Cost:
        """Cost of the selected MLPs as they are: parameters once, arithmetic and reads for one token through all calls."""
        return sum((_through_calls(s.site, s.site.cost()) for s in self.substitutions), Cost())

    def after(self) -> Cost:
        """Cost of what takes their place, the pools counted once."""
        layers = sum((_through_calls(s.site, s.cost(self.pools)) for s in self.substitutions), Cost())
        return sum((pool.cost() for pool in self.pools.values()), layers)

    def digest(self) -> str:
        """A stable hash of the plan, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _through_calls(site: Site, cost: Cost) -> Cost:
    """A module called many times is stored once and computed many times."""
    return cost.model_copy(update={"flops": cost.flops * site.calls, "bytes_read": cost.bytes_read * site.calls})
