"""Reads the plan and the report of a saved directory, and refuses a plan that `memrewrite.plan` cannot have made.

A plan decides which modules are replaced and how much memory is allocated, so every field is bounded before it is used.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from torch import nn

from memrewrite.errors import MemrewriteError
from memrewrite.frozen import Frozen
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import KINDS, kind_named
from memrewrite.layers.pool import Pools
from memrewrite.passes.storage.manifest import SavedFiles, first_fault, tampered
from memrewrite.plans import Plan, Substitution
from memrewrite.report import Report
from memrewrite.site import Binding, dtype_named

F = TypeVar("F", bound=Frozen)
PLAN, REPORT = "plan.json", "report.json"
MAX_SIZE = 2**50  # entries of one pool or layer, and every other number of a plan
MAX_AXES = 64  # torch's own limit of dimensions


def read_plan(files: SavedFiles) -> Plan:
    """The plan of a saved directory. Raises `CheckpointError` when the file is damaged, or no plan of ours."""
    files.json(PLAN)  # refuses what pydantic's own parser accepts: equal keys, deep nesting
    return plan_from(files.text(PLAN), files.folder / PLAN)


def plan_from(text: str, file: Path) -> Plan:
    """The plan in the text of a file. Raises `CheckpointError` when it is damaged, or no plan of ours."""
    plan = _parsed(text, file, Plan)
    fault = next(_faults(plan), None)
    if fault:
        raise tampered(file, fault)
    return plan


def read_report(files: SavedFiles) -> Report:
    """The report that was saved with the model. Raises `CheckpointError` when the file is damaged."""
    files.json(REPORT)  # as for the plan
    report = _parsed(files.text(REPORT), files.folder / REPORT, Report)
    if report.plan != read_plan(files):
        raise tampered(files.folder / REPORT, f"it is the report of another plan than {PLAN}")
    return report


def _parsed(text: str, file: Path, kind: type[F]) -> F:
    try:
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise tampered(file, f"it is not a {kind.__name__.lower()} ({first_fault(error)})") from error


def _faults(plan: Plan) -> Iterator[str]:
    """What no plan of `memrewrite.plan` contains."""
    for name in (plan.root, *plan.pools):
        if not _is_name(name) or hasattr(nn.Module(), name) or (name != plan.root and hasattr(Pools({}), name)):
            yield f"{name!r} cannot be the name of a pool, or of their container"
    if not _is_path(plan.owner):
        yield f"{plan.owner!r} is no path of a module"
    if unread := plan.pools.keys() - {s.pool for s in plan.substitutions}:
        yield f"no layer reads the pool {min(unread)!r}"
    sites = [s.site.path for s in plan.substitutions]
    if len(set(sites)) < len(sites):
        yield "two layers are at one site"
    for name, spec in plan.pools.items():
        if spec.slots * sum(spec.widths) > MAX_SIZE:
            yield f"the pool {name!r} has more than {MAX_SIZE} entries"
        if spec.input_dim is not None and not any(s.pool == name and _reads_inputs(s.kind) for s in plan.substitutions):
            yield f"no layer reads the input weights of the pool {name!r}"
    for substitution in plan.substitutions:
        yield from (f"the layer at {substitution.site.path!r}: {fault}" for fault in _layer_faults(substitution, plan))


def _reads_inputs(kind: str) -> bool:
    return any(known.kind == kind and known.reads_inputs for known in KINDS)


def _layer_faults(substitution: Substitution, plan: Plan) -> Iterator[str]:
    site, pool = substitution.site, substitution.pool
    numbers = {"d_model": site.d_model, "d_in": site.d_in, "d_hidden": site.d_hidden, "calls": site.calls}
    yield from _out_of_range(numbers, 1)
    yield from _out_of_range(
        {"weights": site.weights, "active": site.active, "biases": site.biases, "block": site.block or 0}, 0
    )
    if not -MAX_AXES <= site.axis < MAX_AXES:
        yield f"the axis {site.axis} is no axis of a tensor"
    if pool is not None and pool not in plan.pools:
        yield f"the plan has no pool {pool!r}"
        return
    if not site.parameters:
        yield "its MLP has no parameters"
    for path in (site.path, site.tower, *site.parameters, *site.modules):
        if not _is_path(path):
            yield f"{path!r} is no path of a module or parameter"
    if not site.bindings:
        yield "it has no binding"
    for binding in site.bindings:
        yield from _binding_faults(binding)
    try:
        if not dtype_named(site.dtype).is_floating_point:
            yield f"{site.dtype!r} is no dtype of weights"
        kind = kind_named(substitution.kind)
        options = kind.Options.model_validate(substitution.options, strict=True)
        spec = plan.pools[pool] if pool else None
        yield from _size_faults(kind, options, substitution, plan)
        kind.check(site.d_in, site.d_model, options, spec)
    except ValidationError as error:
        yield f"its options: {first_fault(error)}"
    except MemrewriteError as error:
        yield error.what
    except ValueError as error:
        yield str(error)


def _size_faults(kind: type[MemoryLayer], options: object, substitution: Substitution, plan: Plan) -> Iterator[str]:
    numbers = [n for n in vars(options).values() if isinstance(n, int)]
    if any(n > MAX_SIZE for n in numbers) or substitution.cost(plan.pools).parameters > MAX_SIZE:
        yield f"it has more than {MAX_SIZE} entries"


def _binding_faults(binding: Binding) -> Iterator[str]:
    for path in (binding.exit, *binding.entries):
        if not _is_path(path):
            yield f"{path!r} is no path of a module"
    if binding.kind != "graph" and (not binding.entries or len(binding.widths) > len(binding.entries)):
        yield f"a {binding.kind!r} binding with {len(binding.entries)} entries and {len(binding.widths)} widths"
    if binding.kind == "module" and binding.entries != (binding.exit,):
        yield f"a module that is entered at {binding.entries} and left at {binding.exit!r}"
    yield from _out_of_range({f"width {n}": width for n, width in enumerate(binding.widths)}, 1)
    if isinstance(binding.takes, str) and not binding.takes.isidentifier():
        yield f"{binding.takes!r} is no name of an argument"
    if isinstance(binding.takes, int):
        yield from _out_of_range({"takes": binding.takes}, 0, 255)
    if binding.gives and not 0 <= binding.gives[0] < binding.gives[1] <= 255:
        yield f"it gives item {binding.gives[0]} of {binding.gives[1]}"


def _out_of_range(numbers: dict[str, int], least: int, most: int = MAX_SIZE) -> Iterable[str]:
    return (f"{name} is {n}, which is not in {least} to {most}" for name, n in numbers.items() if not least <= n <= most)


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)


def _is_path(path: str) -> bool:
    """True for a path in a module tree: any names, which torch allows, except names of Python's own attributes."""
    parts = path.split(".") if path else []
    return len(path) <= 4096 and all(part and part.isprintable() and not part.startswith("__") for part in parts)
