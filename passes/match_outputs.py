"""Scales the layers of a rewritten model to the MLPs that stayed in it: for models that had no values when they were rewritten.

Flow: capture → locate the MLPs that are left → one forward in which the layers return zeros: what layers read, what MLPs
return, the residual stream → each layer is scaled to the median MLP of its stack of blocks, or to a fraction of the stream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from memrewrite.errors import ModelError
from memrewrite.passes.capture.capture import capture
from memrewrite.passes.initialize.measure import Measured, Record, watch_block
from memrewrite.passes.initialize.output_scale import set_scales
from memrewrite.passes.locate.locate import locate
from memrewrite.passes.models.exclusive import exclusive
from memrewrite.passes.models.forward import Inputs, as_inputs, evaluating, on_device_of, on_meta, run
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import layers_of
from memrewrite.passes.rewrite.undo_log import module_at
from memrewrite.plans import Plan, Substitution
from memrewrite.report import LayerScale, Report
from memrewrite.site import Site

log = logging.getLogger("memrewrite")
FRACTION = 0.1  # of the residual stream's rms, where no MLP is left


@exclusive
def match_outputs(model: nn.Module, inputs: Any, *, step: Callable[[str], None] | None = None) -> tuple[LayerScale, ...]:
    """Make the layers of a rewritten model start as its recipe says (`init`), if `apply` could not: it was on `meta`.

    Call it when the model has values, its base and its layers (`reset_parameters`) are initialized, and before training. Each
    layer whose `init` is a number or `match` is scaled: its output gets that multiple of the median output rms of the MLPs that
    stayed in the same stack of blocks. Where none stayed, it gets that multiple of 1/10 of the residual stream's rms, with a
    warning. Other layers stay as they are, and so does everything else in the model.

    Args:
        model: a module tree that `memrewrite.apply` rewrote, with values.
        inputs: example inputs: a tuple, a dict, a pair `(args, kwargs)` or one tensor.
        step: receives the name of each stage as it begins.

    Returns:
        How large every layer starts; it is in the report that `memrewrite.save` saves, too.

    Raises:
        ModelError: the model is on `meta`, was not rewritten, is a graph, or does not run on `inputs`.
        CaptureError: torch cannot trace the model, whole or in blocks.

    Example:
        >>> memrewrite.apply(model, "memory-plus", inputs)  # a model on meta
        >>> model.to_empty(device="cuda")  # then initialize the base, the pools and the layers
        >>> memrewrite.match_outputs(model, inputs)
    """
    report_step, plan = step or (lambda _: None), _plan_of(model)
    layers = layers_of(model, plan)
    usable = on_device_of(model, as_inputs(inputs))
    with evaluating(model):
        report_step("capturing the model")
        captured = capture(model, usable)
        report_step("locating the MLPs that stayed in it")
        stayed = _stayed(model, layers, locate(captured).sites)
        report_step("measuring them")
        seen = _run(model, plan, layers, stayed, captured.inputs)
    references = {s.site.path: _reference(s, seen) for s in plan.substitutions if s.site.path in seen.layers}
    measured = {path: replace(seen.layers[path], mlp=reference.rms) for path, reference in references.items()}
    scales = tuple(_noted(scale, references.get(scale.path)) for scale in set_scales(plan, layers, measured))
    _record(model, scales)
    return scales


@dataclass(frozen=True)
class _Seen:
    """What was measured: at the layers, by site path; and the output rms of the MLPs that stayed, by stack of blocks."""

    layers: Mapping[str, Measured]
    mlps: Mapping[str, list[float]]


@dataclass(frozen=True)
class _Reference:
    """The output rms that a layer is scaled to; `note`: why it is not that of MLPs."""

    rms: float
    note: str = ""


def _plan_of(model: nn.Module) -> Plan:
    record = pools_of(model).record
    if record is None or isinstance(model, fx.GraphModule):
        raise ModelError("only a module tree that memrewrite.apply rewrote can be matched", where=type(model).__name__)
    if on_meta(model):
        hint = 'give it values first: `model.to_empty(device="cpu")`, then initialize every module'
        raise ModelError("the model is on meta: there are no values to measure", where=type(model).__name__, hint=hint)
    return Plan.model_validate_json(record.plan)


def _stayed(model: nn.Module, layers: Mapping[str, nn.Module], sites: tuple[Site, ...]) -> list[Site]:
    """The MLPs that are modules or spans of modules of the base: the output of an exit is an output of the MLP."""
    ours = {id(p) for module in (*layers.values(), pools_of(model)) for p in module.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ours}
    return [
        site for site in sites if names.isdisjoint(site.parameters) and all(b.kind in ("module", "span") for b in site.bindings)
    ]


def _run(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module], stayed: list[Site], inputs: Inputs) -> _Seen:
    """One forward in which every layer returns zeros."""
    at_layers = {s.site.path: Record(s.site) for s in plan.substitutions}
    at_mlps = {site.path: Record(site) for site in stayed}
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as hooks:
        for substitution in plan.substitutions:
            site, record = substitution.site, at_layers[substitution.site.path]
            hooks.callback(layers[site.path].register_forward_hook(_silent(record), prepend=True).remove)
            watch_block(modules, site, record, hooks)
        for site in stayed:
            for exit_, item in _exits(model, site):
                hooks.callback(exit_.register_forward_hook(_output_of(at_mlps[site.path], item), prepend=True).remove)
        run(model, inputs)
    rms: dict[str, list[float]] = {}
    for site in stayed:
        value = at_mlps[site.path].rms()
        if math.isfinite(value):
            rms.setdefault(site.tower, []).append(value)
    return _Seen({path: record.measured() for path, record in at_layers.items() if record.seen}, rms)


def _silent(record: Record) -> Any:
    """A forward hook of a layer: records the tokens it reads [..., d_in] and returns zeros in place of its output."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        record.read(args[0].reshape(-1, args[0].shape[-1]))
        return torch.zeros_like(output)

    return hook


def _exits(model: nn.Module, site: Site) -> Iterator[tuple[nn.Module, int | None]]:
    """The modules that return an MLP's output, and its place in the tuple that they return; each once."""
    found = {id(exit_): (exit_, b.gives) for b in site.bindings for exit_ in [module_at(model, b.exit)]}
    return ((exit_, None if gives is None else gives[0]) for exit_, gives in found.values())


def _output_of(record: Record, item: int | None) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        record.returned(output if item is None else output[item])

    return hook


def _reference(substitution: Substitution, seen: _Seen) -> _Reference:
    site = substitution.site
    mlps, stream = seen.mlps.get(site.tower, []), seen.layers[site.path].stream
    if mlps or isinstance(substitution.init.output, str):
        return _Reference(median(mlps) if mlps else math.nan)
    return _Reference(math.nan if stream is None else FRACTION * stream, f"no MLP stayed in {site.tower or 'the model'!r}")


def _noted(scale: LayerScale, reference: _Reference | None) -> LayerScale:
    """The scale of a layer, with a note and a warning where it was not compared with MLPs."""
    if reference is None or not reference.note:
        return scale
    if scale.note:
        return scale.model_copy(update={"mlp": None, "note": f"not matched: {reference.note}, and its stream is not known"})
    note = f"{reference.note}: scaled to {FRACTION:g} of the stream's rms"
    log.warning("the layer at %s: %s", scale.path, note)
    return scale.model_copy(update={"mlp": None, "note": note})


def _record(model: nn.Module, scales: tuple[LayerScale, ...]) -> None:
    """Put the scales into the report that is saved with the model."""
    pools = pools_of(model)
    if pools.record is not None and pools.record.report is not None:
        report = Report.model_validate_json(pools.record.report).model_copy(update={"scales": scales})
        pools.record = replace(pools.record, report=report.model_dump_json(indent=1))
