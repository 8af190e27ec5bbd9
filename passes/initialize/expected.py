"""How large the layers of a plan would start, without building its pools: for the plan that a user looks at.

Flow: what the MLPs do → the plan's layers, on pools of at most some thousand slots → their scales, as `apply` sets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch

from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.passes.initialize.measure import Measured
from memrewrite.passes.initialize.output_scale import set_scales
from memrewrite.plans import Plan, Substitution
from memrewrite.report import LayerScale
from memrewrite.site import dtype_named

ENTRIES = 2**24  # of a pool on which layers are tried: the scale of an output depends little on the number of slots


def expected_scales(plan: Plan, measured: Mapping[str, Measured]) -> tuple[LayerScale, ...]:
    """How large the layers of a plan would start.

    They are built and run on the MLPs' tokens with pools of at most 2**24 entries, which larger pools stand for: a layer with
    `init: {output: paper}` is estimated there. A layer that is matched starts at its target in any pool.
    """
    pools: dict[tuple[str, str], Pool] = {}
    layers = {s.site.path: _trial(s, plan, measured[s.site.path], pools) for s in plan.substitutions if s.site.path in measured}
    return set_scales(plan, layers, measured)


def _trial(substitution: Substitution, plan: Plan, seen: Measured, pools: dict[tuple[str, str], Pool]) -> MemoryLayer:
    """A layer as `apply` builds it, on the device of the tokens."""
    site, kind, device = substitution.site, kind_named(substitution.kind), seen.x.device
    options, name = kind.Options.model_validate(substitution.options), substitution.pool
    pool = None
    if name is not None:
        key = (name, str(device))
        if key not in pools:
            pools[key] = Pool(_smaller(plan.pools[name], plan, name), device=device)
            pools[key].reset_parameters()
        pool = pools[key]
    dtype = dtype_named(site.dtype)
    layer = kind(site.d_in, site.d_model, options, pool, zero_output=substitution.init.zero, device=device, dtype=dtype)
    layer.reset_parameters(torch.Generator(device).manual_seed(0))
    return layer


def _smaller(spec: PoolSpec, plan: Plan, name: str) -> PoolSpec:
    """The spec with fewer keys, but as many as one head of any of its layers reads."""
    least = max(s.options.get("topk", 1) for s in plan.substitutions if s.pool == name)
    return spec.model_copy(update={"keys": min(spec.keys, max(least, isqrt(ENTRIES // spec.value_dim)))})
