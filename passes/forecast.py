"""A plan with the scales at which its layers would start, for `memrewrite plan`: what `apply` would measure, measured now."""

from __future__ import annotations

from typing import Any

from torch import nn

from memrewrite.passes.initialize.expected import expected_scales
from memrewrite.passes.initialize.measure import Measured
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.pipeline import Look, Model, ignore, look_at, planned_for
from memrewrite.passes.rewrite.build_layers import refuse_rewritten
from memrewrite.passes.rewrite.host_tracing import trace_hosts
from memrewrite.passes.verify.evidence import BeforeEdit
from memrewrite.passes.verify.measured_mlps import measured_graph, measured_module
from memrewrite.passes.verify.verified_rewrite import Step
from memrewrite.plans import Plan
from memrewrite.recipes.reader import RecipeLike, read_recipe
from memrewrite.report import LayerScale


@exclusive
def forecast(
    model: Model, recipe: RecipeLike, inputs: Any = None, *, step: Step | None = None
) -> tuple[Plan, tuple[LayerScale, ...]]:
    """The plan, as `plan` returns it, and how large its layers would start on the example inputs.

    The scales are empty on `meta`, and with `verify: off` unless a layer's start is measured. Raises what `plan` raises.
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
    return result, expected_scales(result, seen) if seen else ()


def _measured(model: Model, look: Look, result: Plan) -> dict[str, Measured]:
    if look.given is not None:
        with evaluating(model):
            return measured_graph(result, look.capture, look.given.bound(s.site.path for s in result.substitutions))
    if not isinstance(model, nn.Module):
        raise TypeError(f"an exported program is a graph, not a {type(model).__name__}")
    with evaluating(model):
        hosts = trace_hosts(model, result, look.capture)
    return measured_module(BeforeEdit(model, result, look.capture, look.locations, hosts))
