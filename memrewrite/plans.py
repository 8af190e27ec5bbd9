"""The immutable `Plan` between locating and editing: which layer goes to which site. Saved with the weights."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field

from memrewrite.cost import Cost
from memrewrite.frozen import Frozen
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import PoolSpec
from memrewrite.site import Site, itemsize_of, joined, relative

ROOT = "memory"  # pools are registered on the root module as `model.memory.<name>`
Placement = Literal["replace", "parallel"]
Train = Literal["all", "memory_only"]
MAX_MULTIPLE = 1e6
Multiple = Annotated[float, Field(strict=True, gt=0, le=MAX_MULTIPLE, allow_inf_nan=False)]
Output = Literal["paper", "zero"] | Multiple
MATCH: Output = 1.0
DEFAULT_OUTPUT: dict[Placement, Output] = {"replace": MATCH, "parallel": "zero"}  # of a recipe's rule without `init`


class LayerInit(Frozen):
    """How a layer starts.

    Attributes:
        output: "paper": with the paper's initialization; "zero": its output is 0; a number: with an output whose rms is this
            multiple of the MLP's output rms on the example inputs.
        scores: "paper": with the paper's initialization; a number: the standard deviation of a query's scores over all slots.
    """

    output: Output = "paper"
    scores: Literal["paper"] | Multiple = "paper"

    @property
    def zero(self) -> bool:
        """True if the layer's output starts at 0."""
        return self.output == "zero"

    @property
    def measured(self) -> bool:
        """True if it depends on what the layer and its MLP compute on the example inputs."""
        return not isinstance(self.output, str) or not isinstance(self.scores, str)


def _of_earlier_versions(data: dict[str, Any]) -> LayerInit:
    """What a plan without `init` means: parallel layers started at zero, all others as in the paper."""
    return LayerInit(output="zero" if data.get("placement") == "parallel" else "paper")


class Substitution(Frozen):
    """One layer at one site.

    Attributes:
        site: The MLP.
        kind: Layer kind, such as "memory_plus".
        pool: Name of the pool that the layer reads, if the kind reads one.
        placement: "replace": the layer replaces the MLP; "parallel": its output is added to the MLP's.
        options: All options of the layer kind, defaults included.
        init: How the layer starts. In plans of earlier versions: at zero in parallel, else as in the paper.
    """

    site: Site
    kind: str
    pool: str | None
    placement: Placement
    options: dict[str, Any]
    init: LayerInit = Field(default_factory=_of_earlier_versions)

    def cost(self, pools: dict[str, PoolSpec]) -> Cost:
        """Cost of the new layer for one token and one call, without the parameters of the pool.

        Args:
            pools: Pools of the plan by name.
        """
        kind = kind_named(self.kind)
        spec = pools[self.pool] if self.pool else None
        itemsize = itemsize_of(self.site.dtype)
        options = kind.Options.model_validate(self.options)
        layer = kind.cost(self.site.d_in, self.site.d_model, options, spec, itemsize, zero_output=self.init.zero)
        return layer + self.site.cost() if self.placement == "parallel" else layer


class Plan(Frozen):
    """Substitutions in the order of the sites, and the pools they share. The same model and recipe give the same plan.

    Attributes:
        memrewrite: Version of the format.
        root: Name of the pools' container, an attribute of the module at `owner`.
        owner: Path of the module that has the pools: inside of a wrapper the model, else "", the root.
        captured: How the model was captured.
        pools: Pools by name, complete.
        substitutions: One per selected site.
        train: "memory_only": after the rewrite only pools and layers require gradients; "all": nothing is frozen.
    """

    memrewrite: Literal[1] = 1
    root: str = ROOT
    owner: str = ""
    captured: str
    pools: dict[str, PoolSpec]
    substitutions: tuple[Substitution, ...]
    train: Train = "all"

    @property
    def pools_path(self) -> str:
        """Path of the pools' container in the model."""
        return joined(self.owner, self.root)

    @property
    def measured(self) -> bool:
        """True if the start of a layer depends on what the model computes on the example inputs."""
        return any(substitution.init.measured for substitution in self.substitutions)

    def relative_to(self, prefix: str) -> Plan:
        """This plan for the module at `prefix`, which contains all that it names."""
        substitutions = tuple(s.model_copy(update={"site": s.site.relative_to(prefix)}) for s in self.substitutions)
        return self.model_copy(update={"owner": relative(self.owner, prefix), "substitutions": substitutions})

    def moved_into(self, prefix: str) -> Plan:
        """This plan for a model that contains this one at `prefix`."""
        substitutions = tuple(s.model_copy(update={"site": s.site.moved_into(prefix)}) for s in self.substitutions)
        return self.model_copy(update={"owner": joined(prefix, self.owner), "substitutions": substitutions})

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
