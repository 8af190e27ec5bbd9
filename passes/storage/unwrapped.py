"""Which part of a live model `save` writes: the model that was rewritten, without wrappers; and its record, for that part.

Flow: where the pools are now, and where the plan says → modules around the rewritten model are left out, or the plan's paths
are made relative to the part of it that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx, nn

from memrewrite.errors import ModelError
from memrewrite.passes.models.tensors import tensors_of
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.storage.graph_json import graphs_relative_to
from memrewrite.passes.storage.rewritten_config import carry
from memrewrite.plans import Plan
from memrewrite.record import RewriteRecord
from memrewrite.report import Report


def unwrapped(model: nn.Module) -> tuple[nn.Module, RewriteRecord]:
    """The rewritten model in `model`, and its record with paths in it.

    Raises `ModelError` for a model without a plan, and for a wrapper with tensors that would not be saved.
    """
    pools = pools_of(model)
    if pools.record is None:
        raise ModelError("this model has no plan", hint="rewrite it with memrewrite.apply, then save it")
    if isinstance(model, fx.GraphModule):
        return model, pools.record
    plan = Plan.model_validate_json(pools.record.plan)
    now = next(path for path, module in model.named_modules() if module is pools)
    if now == plan.pools_path:
        return model, pools.record
    if around := _without_suffix(now, plan.pools_path):
        inside = model.get_submodule(around)
        _refuse_other_tensors(model, inside, around)
        return inside, pools.record
    if prefix := _without_suffix(plan.pools_path, now):
        return model, _relative_to(prefix, plan, pools.record)
    what = f"the pools are at {now!r}, and the plan has them at {plan.pools_path!r}"
    raise ModelError(what, hint="save the model that `memrewrite.apply` rewrote, or one that contains it")


def set_record(
    model: nn.Module, record: RewriteRecord, done: Callable[[Callable[[], object]], None] = lambda undo: None
) -> None:
    """Set the record of a rewritten model, in its pools and in its config. `done` receives what undoes the latter."""
    pools_of(model).record = record
    plan = Plan.model_validate_json(record.plan)
    owner = model.get_submodule(plan.owner)
    carry(owner, _relative_to(plan.owner, plan, record) if plan.owner else record, done)


def _without_suffix(path: str, suffix: str) -> str:
    return path.removesuffix(f".{suffix}") if path.endswith(f".{suffix}") else ""


def _refuse_other_tensors(model: nn.Module, inside: nn.Module, path: str) -> None:
    kept = {id(tensor) for _, tensor in tensors_of(inside)}
    others = [name for name, tensor in tensors_of(model) if id(tensor) not in kept]
    if others:
        what = f"the rewritten model is {path!r}, and {len(others)} tensors are outside of it: {', '.join(others[:3])}"
        hint = f"merge them into the model, or save the model alone: memrewrite.save(model.{path}, ...)"
        raise ModelError(what, where=type(model).__name__, hint=hint)


def _relative_to(prefix: str, plan: Plan, record: RewriteRecord) -> RewriteRecord:
    """A record for the module at `prefix`."""
    moved = plan.relative_to(prefix)
    report = record.report
    if report is not None:
        report = Report.model_validate_json(report).model_copy(update={"plan": moved}).model_dump_json(indent=1)
    graphs = None if record.graphs is None else graphs_relative_to(prefix, record.graphs)
    return replace(record, plan=moved.model_dump_json(indent=1), report=report, graphs=graphs)
