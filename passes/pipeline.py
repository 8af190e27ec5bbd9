"""The whole product: capture → locate → select → substitute → verify. The verbs a user calls.

Every function takes a live `nn.Module`, an `ExportedProgram` or an `fx.GraphModule`, and inputs as a tuple, a dict or
`(args, kwargs)`. `step` is told the name of each stage as it begins.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from memrewrite.errors import ModelError, SelectError, VerificationError
from memrewrite.explanation import Explanation
from memrewrite.module_node import ModuleNode
from memrewrite.passes.capture.capture import capture, is_traced
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.explain.explain import explained
from memrewrite.passes.explain.module_tree import outline
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.locate.located_sites import LocatedSites
from memrewrite.passes.models.fingerprints import fingerprints
from memrewrite.passes.models.forward import evaluating
from memrewrite.passes.plan.memory_budget import refuse_too_large
from memrewrite.passes.plan.select import select
from memrewrite.passes.rewrite.build_layers import pools_of, refuse_rewritten
from memrewrite.passes.rewrite.edit_graph import emit_graph
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.given_graph import all_hidden, anchored
from memrewrite.passes.rewrite.host_tracing import trace_hosts
from memrewrite.passes.rewrite.undo_log import UndoLog
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_to_json
from memrewrite.passes.verify.evidence import Evidence, failed
from memrewrite.passes.verify.null_check import run_with_originals
from memrewrite.passes.verify.null_train_check import null_train
from memrewrite.passes.verify.verify import before_editing, prove_graph, verify
from memrewrite.plans import ROOT, Plan
from memrewrite.recipes.reader import read_recipe
from memrewrite.recipes.schema import Recipe
from memrewrite.report import Check, Report
from memrewrite.site import Inspection

Model = nn.Module | ExportedProgram
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
Step = Callable[[str], None]
Emit = Literal["module", "graph"]


def inspect(model: Model, inputs: Any = None, *, step: Step | None = None) -> Inspection:
    """Every MLP of a model, and every region that only looked like one, with the reason.

    Raises `ModelError` when the model does not run on `inputs`, `CaptureError` when torch cannot trace it.
    """
    return _look(model, inputs, step or _quiet)[1].located


def survey(
    model: Model, inputs: Any = None, recipe: RecipeLike | None = None, *, step: Step | None = None
) -> tuple[Inspection, ModuleNode, Plan | None]:
    """What `inspect` finds, the tree of modules it was found in, and what `plan` would say of a recipe: one capture for all."""
    wanted = None if recipe is None else read_recipe(recipe)
    if wanted is not None and isinstance(model, nn.Module):
        refuse_rewritten(model)
    before, locations = _look(model, inputs, step or _quiet)
    return locations.located, outline(model, before), None if wanted is None else _plan(model, before, locations, wanted)


def explain(model: Model, path: str, inputs: Any = None, *, step: Step | None = None) -> Explanation:
    """Why a module, container, parameter or graph node is an MLP, or is not: which rule, at which node, from which line.

    Raises what `inspect` raises, and `UserError` with close matches when the model has nothing of that name.
    """
    before, locations = _look(model, inputs, step or _quiet)
    return explained(model, before, locations, path)


def plan(model: Model, recipe: RecipeLike, inputs: Any = None, *, step: Step | None = None) -> Plan:
    """What `apply` would do. Raises what `inspect` raises, `RecipeError`, and `SelectError` where they do not fit."""
    wanted = read_recipe(recipe)
    if isinstance(model, nn.Module):
        refuse_rewritten(model)
    before, locations = _look(model, inputs, step or _quiet)
    return _plan(model, before, locations, wanted)


def apply(
    model: Model,
    recipe: RecipeLike,
    inputs: Any = None,
    *,
    emit: Emit = "module",
    allow_large: bool = False,
    step: Step | None = None,
) -> Report:
    """Rewrite `model` as `recipe` says, prove it, and report; `report.model` is the rewritten model.

    A live module is edited in place (`emit="graph"`: left alone, its captured graph rewritten); a traced one gives a new
    `GraphModule`. When a check fails the model is as it was and `VerificationError` is raised, with the `report`. Raises
    also what `plan` raises, and `SelectError` when the result would not fit in memory and `allow_large` is not set.
    """
    begun, say = time.perf_counter(), step or _quiet
    wanted = read_recipe(recipe)
    if isinstance(model, nn.Module):
        refuse_rewritten(model)
    with evaluating(model), torch.enable_grad():
        if emit == "graph" and not is_traced(model):
            say("capturing the model with dynamic shapes")
            traced = capture(model, inputs, dynamic=True)
            if [segment.path for segment in traced.segments] != [""]:
                raise SelectError(f"there is no one graph of this model: {traced.how}", hint="use --emit module")
            model = traced.segments[0].program
        before, locations = _look(model, inputs, say)
        made = _plan(model, before, locations, wanted)
        if not allow_large:
            refuse_too_large(made)
        old_size = _size(model)
        if isinstance(model, nn.Module) and not before.is_graph:
            result, checks = _apply_to_module(model, made, before, locations, wanted, say)
        else:
            locations = anchored(locations, [s.site.path for s in made.substitutions])
            result, checks = _apply_to_graph(made, before, locations, wanted, say)
    if result is not model and isinstance(model, nn.Module):
        _as_in(model, result)
    report = Report(
        plan=made,
        checks=checks,
        parameters_before=old_size,
        parameters_after=_size(result),
        before=made.before(),
        after=made.after(),
        seconds=time.perf_counter() - begun,
    ).of_model(result)
    if report.ok:
        pools_of(result).record |= {
            "recipe.yaml": wanted.to_yaml(),
            "plan.json": made.model_dump_json(indent=1),
            "report.json": report.model_dump_json(indent=1),
        }
    else:
        failed = next(check for check in checks if check.outcome == "failed")
        raise VerificationError(
            f"the check {failed.name!r} failed: {failed.sentence}",
            where=made.captured,
            hint="nothing was changed; please report the model and the recipe",
        ).with_report(report)
    return report


def _apply_to_module(
    model: nn.Module, made: Plan, before: Capture, locations: LocatedSites, recipe: Recipe, say: Step
) -> tuple[nn.Module, tuple[Check, ...]]:
    hosts = trace_hosts(model, made, before)
    graphs = {GRAPHS: hosts_to_json(hosts)} if hosts else {}
    if recipe.verify == "off":
        say("substituting")
        substitute(model, made, hosts=hosts).commit()
        pools_of(model).record |= graphs
        return model, ()
    say("fingerprinting every tensor")
    evidence = Evidence(model, made, before, locations, fingerprints(model), hosts=hosts)
    say("checking the plan with the original MLPs wrapped")
    first = before_editing(evidence, lambda gradients: run_with_originals(evidence, gradients=gradients), null_train)
    if failed(first):
        return model, first
    say("substituting")
    edit: UndoLog = substitute(model, made, hosts=hosts)
    say("verifying")
    try:
        evidence.layers = dict(edit.layers)
        checks = (*first, *verify(evidence))
    except BaseException:
        edit.revert()
        raise
    if failed(checks):
        edit.revert()
    else:
        pools_of(model).record |= graphs
    edit.commit()
    return model, checks


def _apply_to_graph(
    made: Plan, before: Capture, locations: LocatedSites, recipe: Recipe, say: Step
) -> tuple[nn.Module, tuple[Check, ...]]:
    say("rewriting the graph")
    result, layers = emit_graph(before.segments[0], made, locations)
    if recipe.verify == "off":
        return result, ()
    say("verifying")
    return result, prove_graph(result, layers, made, before, locations)


def _look(model: Model, inputs: Any, say: Step) -> tuple[Capture, LocatedSites]:
    if inputs is None and not isinstance(model, ExportedProgram):
        raise ModelError("no example inputs were given", hint="give a tuple, a dict or (args, kwargs) that the model runs on")
    say("capturing the model")
    with evaluating(model):
        before = capture(model, inputs)
        say("locating its MLPs")
        locations = locate(before)
        if before.is_graph and all_hidden(locations):  # a graph that only calls the modules that hold its MLPs
            before = capture(model, inputs, as_tree=True)
            locations = locate(before)
    return before, locations


def _plan(model: Model, before: Capture, locations: LocatedSites, recipe: Recipe) -> Plan:
    made = select(locations.located, recipe, live=not before.is_graph)
    taken = isinstance(model, nn.Module) and hasattr(model, ROOT)
    return made.model_copy(update={"root": f"memrewrite_{ROOT}"}) if taken else made


def _as_in(given: nn.Module, result: nn.Module) -> None:
    """Every module of a rewritten graph in the mode of the module it is a copy of; new ones go with the whole."""
    modes = {path: module.training for path, module in given.named_modules(remove_duplicate=False)}
    for path, module in result.named_modules():
        module.training = modes.get(path, given.training)


def _size(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def _quiet(_: str) -> None:
    """No one is told."""
