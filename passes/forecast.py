"""A plan with the scales at which its layers would start, for `memrewrite plan`.

Flow: capture, locate, select → one forward in which the MLPs are measured → the plan's layers, built as `apply` builds them,
but on pools of limited size → their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import nn

from memrewrite.layers.pool import Pool, PoolSpec
from memrewrite.passes.initialize.measure import Measured
from memrewrite.passes.initialize.output_scale import set_scales
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.pipeline import planned_for
from memrewrite.passes.rewrite.build_layers import build_layer, generator_of, refuse_rewritten
from memrewrite.passes.rewrite.host_tracing import trace_hosts
from memrewrite.passes.rewrite.look import Look, Model, Step, ignore, look_at
from memrewrite.passes.verify.evidence import BeforeEdit
from memrewrite.passes.verify.measured_mlps import measured_graph, measured_module
from memrewrite.plans import Plan
from memrewrite.recipes.reader import RecipeLike, read_recipe
from memrewrite.report import LayerScale

ENTRIES = 2**24  # of the largest pool that is built: the scale of an output depends little on the number of slots


@exclusive
def forecast(
    model: Model, recipe: RecipeLike, inputs: Any = None, *, step: Step | None = None
) -> tuple[Plan, tuple[LayerScale, ...]]:
    """The plan, as `plan` returns it, and how large its layers would start on the example inputs.

    A pool of more than 2**24 entries is replaced by one with fewer slots, which the `note` of a layer that is not matched says:
    a matched layer starts at its target in any pool. The scales are empty on `meta`, and with `verify: off` unless a layer's
    start is measured. Raises what `plan` raises.
    """
    wanted, report_step = read_recipe(recipe), step or ignore
    if isinstance(model, nn.Module):
        refuse_rewritten(model)
    look = look_at(model, inputs, report_step)
    result = planned_for(model, look, wanted)
    if wanted.verify == "off" and not result.measured:
        return result, ()
    report_step("measuring its MLPs")
    seen = _measured(model, look, result)
    return result, _expected(result, seen) if seen else ()


def _measured(model: Model, look: Look, result: Plan) -> dict[str, Measured]:
    if look.given is not None:
        with evaluating(model):
            return measured_graph(result, look.capture, look.given.bound(s.site.path for s in result.substitutions))
    if not isinstance(model, nn.Module):
        raise TypeError(f"an exported program is a graph, not a {type(model).__name__}")
    with evaluating(model):
        hosts = trace_hosts(model, result, look.capture, look.locations)
    return measured_module(BeforeEdit(model, result, look.capture, look.locations, hosts))


def _expected(result: Plan, seen: Mapping[str, Measured]) -> tuple[LayerScale, ...]:
    """The scales of the layers, built for this alone."""
    devices = {s.pool: seen[s.site.path].x.device for s in result.substitutions if s.site.path in seen and s.pool}
    pools = {name: Pool(_smaller(result, name), device=device) for name, device in devices.items()}
    for pool in pools.values():
        pool.reset_parameters()
    layers: dict[str, nn.Module] = {}
    for number, substitution in enumerate(result.substitutions):
        if substitution.site.path in seen:
            device = seen[substitution.site.path].x.device
            layer = build_layer(substitution, pools, device)
            layer.reset_parameters(generator_of(device, result, number))
            layers[substitution.site.path] = layer
    estimated = {
        s.site.path: f"measured with {pools[s.pool].spec.keys}² slots"
        for s in result.substitutions
        if s.pool in pools and s.init.output == "paper" and pools[s.pool].spec != result.pools[s.pool]
    }
    scales = set_scales(result, layers, seen)
    return tuple(s.model_copy(update={"note": estimated[s.path]}) if s.path in estimated else s for s in scales)


def _smaller(result: Plan, name: str) -> PoolSpec:
    """A pool's spec with fewer keys, but as many as one head of any of its layers reads."""
    spec = result.pools[name]
    least = max(s.options.get("topk", 1) for s in result.substitutions if s.pool == name)
    return spec.model_copy(update={"keys": min(spec.keys, max(least, isqrt(ENTRIES // spec.value_dim)))})
