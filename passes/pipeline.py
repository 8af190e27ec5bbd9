"""The functions that users call: capture → locate → select → rewrite → verify.

Models are `nn.Module`s, `fx.GraphModule`s or `ExportedProgram`s. Example inputs are a tuple of positional arguments, a dict of
keyword arguments, a pair `(args, kwargs)`, or one tensor; tensors are moved to the model's device. `step` receives the name
of each stage as it begins.
"""

from __future__ import annotations

import time
from typing import Any, Literal, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from memrewrite.explanation import Explanation
from memrewrite.module_node import ModuleNode
from memrewrite.passes.capture.capture import is_traced
from memrewrite.passes.explain.explain import explained
from memrewrite.passes.explain.module_tree import outline
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.models.state_guard import StateGuard
from memrewrite.passes.models.wrappers import model_inside
from memrewrite.passes.plan.memory_budget import refuse_too_large
from memrewrite.passes.plan.select import select
from memrewrite.passes.rewrite.build_layers import refuse_rewritten
from memrewrite.passes.rewrite.edit_graph import with_own_parameters
from memrewrite.passes.rewrite.host_tracing import trace_hosts
from memrewrite.passes.rewrite.look import Look, Model, Step, ignore, look_at, look_at_export
from memrewrite.passes.storage.graph_json import hosts_to_json
from memrewrite.passes.storage.unwrapped import set_record
from memrewrite.passes.verify.evidence import refuse_failed
from memrewrite.passes.verify.verified_rewrite import Rewrite, rewrite_graph, rewrite_module
from memrewrite.phases import Phases
from memrewrite.plans import ROOT, Plan
from memrewrite.recipes.reader import RecipeLike, read_recipe
from memrewrite.recipes.schema import Recipe
from memrewrite.record import RewriteRecord
from memrewrite.report import Report
from memrewrite.site import Inspection
from memrewrite.training import freeze

Emit = Literal["module", "graph"]


@exclusive
def inspect(model: Model, inputs: Any = None, *, step: Step | None = None) -> Inspection:
    """Find every MLP of a model.

    Args:
        model: an `nn.Module`, on any device, `meta` included; an `fx.GraphModule`; or an `ExportedProgram`. It does not change.
        inputs: example inputs: a tuple, a dict, a pair `(args, kwargs)` or one tensor. An `ExportedProgram` has its own.
        step: receives the name of each stage as it begins.

    Returns:
        The MLPs in the order they run, and the regions that resemble one, each with the reason why it is none.

    Raises:
        ModelError: the model does not run on `inputs`.
        CaptureError: torch cannot trace the model, whole or in blocks.

    Example:
        >>> found = memrewrite.inspect(model, {"input_ids": torch.arange(8)[None]})
        >>> [(site.path, site.pattern, site.d_model) for site in found.sites]
    """
    return look_at(model, inputs, step or ignore).locations.located


@exclusive
def survey(
    model: Model, inputs: Any = None, recipe: RecipeLike | None = None, *, step: Step | None = None
) -> tuple[Inspection, ModuleNode, Plan | None]:
    """`inspect`, the module tree with its MLPs, and `plan` for a recipe, from one capture. Raises what these raise."""
    wanted = None if recipe is None else read_recipe(recipe)
    if wanted is not None and isinstance(model, nn.Module):
        refuse_rewritten(model)
    look = look_at(model, inputs, step or ignore)
    tree = outline(model, look.capture)
    return look.locations.located, tree, None if wanted is None else planned_for(model, look, wanted)


@exclusive
def explain(model: Model, path: str, inputs: Any = None, *, step: Step | None = None) -> Explanation:
    """Explain why a part of a model is an MLP, or why it is not.

    Args:
        model: as for `inspect`. It does not change.
        path: the name of a module, container, parameter or graph node.
        inputs: example inputs, as for `inspect`.
        step: receives the name of each stage as it begins.

    Returns:
        The MLPs and near misses in that part: the rule that decided, the graph node and the source line.

    Raises:
        UserError: the model has nothing named `path`; the hint lists similar names.
        ModelError, CaptureError: as for `inspect`.

    Example:
        >>> print(memrewrite.explain(model, "layers.3.attn", inputs).verdict)
    """
    look = look_at(model, inputs, step or ignore)
    return explained(model, look.capture, look.locations, path)


@exclusive
def plan(model: Model, recipe: RecipeLike, inputs: Any = None, *, step: Step | None = None) -> Plan:
    """Compute what `apply` would do, without doing it.

    Args:
        model: as for `inspect`, not rewritten before. It does not change.
        recipe: the name of a recipe in the gallery, a path, a mapping, or a `Recipe`.
        inputs: example inputs, as for `inspect`.
        step: receives the name of each stage as it begins.

    Returns:
        The pools, and every substitution: site, kind, options, placement.

    Raises:
        RecipeError: the recipe cannot be read, or is not well formed.
        SelectError: the recipe does not fit the model: a selector matches nothing, two rules claim one MLP, ...
        ModelError, CaptureError: as for `inspect`.

    Example:
        >>> plan = memrewrite.plan(model, "memory-plus", inputs)
        >>> print(plan.after().parameters - plan.before().parameters)
    """
    wanted = read_recipe(recipe)
    if isinstance(model, nn.Module):
        refuse_rewritten(model)
    return planned_for(model, look_at(model, inputs, step or ignore), wanted)


@exclusive
def apply(
    model: Model,
    recipe: RecipeLike,
    inputs: Any = None,
    *,
    emit: Emit = "module",
    allow_large: bool = False,
    allow_inexact: bool = False,
    step: Step | None = None,
) -> Report:
    """Rewrite a model by a recipe, and verify the result.

    Args:
        model: as for `inspect`, not rewritten before. An `nn.Module` is edited in place; an `fx.GraphModule` or
            `ExportedProgram` does not change, and the result is a new `fx.GraphModule`. (A graph module whose MLPs are all
            inside of modules that it calls is edited in place, as a module tree.)
        recipe: the name of a recipe in the gallery, a path, a mapping, or a `Recipe`.
        inputs: example inputs, as for `inspect`.
        emit: "graph" exports an `nn.Module`, with dynamic shapes, and rewrites the graph; the module does not change.
        allow_large: do not compare the size of the pools with the free memory of their devices.
        allow_inexact: with `emit="graph"`, accept an exported program whose outputs differ from the module's by more than
            rounding: tracing may change what a module computes. The check *capture* says how far it is.
        step: receives the name of each stage as it begins.

    Returns:
        The plan, all checks, sizes and costs. `report.model` is the rewritten model.

    Raises:
        VerificationError: a check failed; its `report` has all checks. The model is as before.
        SelectError: also if the pools do not fit in memory, or there is no one graph of the model for `emit="graph"`.
        RecipeError, ModelError, CaptureError: as for `plan`. CaptureError also if the program for `emit="graph"` computes
            something else than the module.

    Example:
        >>> report = memrewrite.apply(model, "memory-plus", {"input_ids": torch.arange(8)[None]})
        >>> memrewrite.save(report.model, "rewritten")
    """
    wanted = read_recipe(recipe)
    if isinstance(model, nn.Module):
        refuse_rewritten(model)
    with Phases(step) as phases, StateGuard(model) as state, torch.enable_grad():
        report = _applied(model, wanted, inputs, emit, allow_large, allow_inexact, phases)
        if report.model is model:
            state.release()  # the edit stays
    if report.plan.train == "memory_only":
        freeze(report.model if report.model is model else with_own_parameters(report.model))
    return report


def _applied(
    model: Model, wanted: Recipe, inputs: Any, emit: Emit, allow_large: bool, allow_inexact: bool, phases: Phases
) -> Report:
    """`apply`, in a guard of the model's state."""
    begun = time.perf_counter()
    if emit == "graph" and not is_traced(model):
        model, look = look_at_export(model, inputs, allow_inexact, phases)
    else:
        look = look_at(model, inputs, phases)
    phases("planning")
    planned = planned_for(model, look, wanted)
    if not allow_large:
        refuse_too_large(planned)
    size = _size(model)
    done, graphs = _rewrite(model, planned, look, wanted, phases)
    if isinstance(model, ExportedProgram):
        done.model.eval()  # a program has no mode, and a new graph module would be in train mode, its layers too
    elif done.model is not model:
        _copy_modes(model, done.model)
    phases.end()
    report = Report(
        plan=planned,
        checks=done.checks,
        parameters_before=size,
        parameters_after=_size(done.model),
        before=planned.before(),
        after=planned.after(),
        seconds=time.perf_counter() - begun,
        scales=done.scales,
        phases=tuple(phases.ended),
    ).of_model(done.model)
    refuse_failed(
        done.checks,
        where=planned.captured,
        hint="nothing was changed; please report the model and the recipe",
        report=report,
    )
    record = RewriteRecord(
        plan=planned.model_dump_json(indent=1),
        recipe=wanted.to_yaml(),
        report=report.model_dump_json(indent=1),
        graphs=graphs,
        inputs=look.capture.inputs if isinstance(done.model, fx.GraphModule) else None,
    )
    set_record(done.model, record)
    return report


def planned_for(model: Model, look: Look, recipe: Recipe) -> Plan:
    """The plan of a recipe for a captured model."""
    planned, owner = select(look.locations.located, recipe, live=look.given is None), ""
    if isinstance(model, nn.Module):
        owner = "" if look.given is not None else model_inside(model)
        if hasattr(model.get_submodule(owner), ROOT):
            planned = planned.model_copy(update={"root": f"memrewrite_{ROOT}"})
    return planned.model_copy(update={"owner": owner})


def _rewrite(model: Model, planned: Plan, look: Look, recipe: Recipe, step: Step) -> tuple[Rewrite, str | None]:
    """Edit and verify a graph or a module tree; and the graphs of modules whose forward becomes one, as JSON."""
    with_checks = recipe.verify != "off"
    if look.given is not None:
        locations = look.given.bound(s.site.path for s in planned.substitutions)
        with evaluating(model):
            return rewrite_graph(planned, look.capture, locations, with_checks=with_checks, step=step), None
    module = cast(nn.Module, model)  # an exported program is a graph
    with evaluating(module):
        hosts = trace_hosts(module, planned, look.capture, look.locations)
    graphs = hosts_to_json(hosts) if hosts else None  # before the edit: it raises an error for what cannot be saved
    return rewrite_module(module, planned, look.capture, look.locations, hosts, with_checks=with_checks, step=step), graphs


def _copy_modes(given: nn.Module, result: nn.Module) -> None:
    """Set every module of a rewritten graph to the training mode of the module it is a copy of; new ones to the root's."""
    modes = {path: module.training for path, module in given.named_modules(remove_duplicate=False)}
    for path, module in result.named_modules():
        module.training = modes.get(path, given.training)


def _size(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())
