"""The immutable `Plan` between locating and editing: which layer goes to which site. Saved with the weights."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from memrewrite.cost import Cost
from memrewrite.frozen import Frozen
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import PoolSpec
from memrewrite.site import Site, itemsize_of

ROOT = "memory"  # pools are registered on the root module as `model.memory.<name>`
Placement = Literal["replace", "parallel"]
Train = Literal["all", "memory_only"]


class Substitution(Frozen):
    """One layer at one site.

    Attributes:
        site: The MLP.
        kind: Layer kind, such as "memory_plus".
        pool: Name of the pool that the layer reads, if the kind reads one.
        placement: "replace": the layer replaces the MLP; "parallel": its output is added to the MLP's.
        options: All options of the layer kind, defaults included.
    """

    site: Site
    kind: str
    pool: str | None
    placement: Placement
    options: dict[str, Any]

    def cost(self, pools: dict[str, PoolSpec]) -> Cost:
        """Cost of the new layer for one token and one call, without the parameters of the pool.

        Args:
            pools: Pools of the plan by name.
        """
        kind = kind_named(self.kind)
        spec = pools[self.pool] if self.pool else None
        parallel = self.placement == "parallel"
        itemsize = itemsize_of(self.site.dtype)
        options = kind.Options.model_validate(self.options)
        layer = kind.cost(self.site.d_in, self.site.d_model, options, spec, itemsize, zero_output=parallel)
        return layer + self.site.cost() if parallel else layer


class Plan(Frozen):
    """Substitutions in the order of the sites, and the pools they share. The same model and recipe give the same plan.

    Attributes:
        memrewrite: Version of the format.
        root: Attribute of the root module that contains the pools.
        captured: How the model was captured.
        pools: Pools by name, complete.
        substitutions: One per selected site.
        train: "memory_only": after the rewrite only pools and layers require gradients; "all": nothing is frozen.
    """

    memrewrite: Literal[1] = 1
    root: str = ROOT
    captured: str
    pools: dict[str, PoolSpec]
    substitutions: tuple[Substitution, ...]
    train: Train = "all"

    def before(self) -> Cost:
        """Cost of the selected MLPs: parameters counted once, flops and bytes read for one token over all calls."""
        return sum((_through_calls(s.site, s.site.cost()) for s in self.substitutions), Cost())

    def after(self) -> Cost:
        """Cost of the new layers (with the kept MLPs, where placement is "parallel"), each pool counted once."""
        layers = sum((_through_calls(s.site, s.cost(self.pools)) for s in self.substitutions), Cost())
        return sum((pool.cost() for pool in self.pools.values()), layers)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def _through_calls(site: Site, cost: Cost) -> Cost:
    """A module that is called many times is stored once and computed many times."""
    return cost.model_copy(update={"flops": cost.flops * site.calls, "bytes_read": cost.bytes_read * site.calls})
