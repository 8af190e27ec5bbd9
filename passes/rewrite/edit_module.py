"""Puts the Plan's layers into the live module tree, in place, once; what was done can be undone until it is committed.

Flow: pools are built and hung at the root → each layer is built on its site's device and dtype → it takes the place of the
MLP's module, or hooks hand it the MLP's input → every replacement is logged and leaves its undo behind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest

from torch import nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.passes.rewrite.build_layers import build_all, refuse_rewritten
from memrewrite.passes.rewrite.graph_host import GraphHost, layer_in, put
from memrewrite.passes.rewrite.hooks import (
    AddMemory,
    GiveItem,
    InputSlot,
    StoreInput,
    TakeArgument,
    UseStoredInput,
    ZeroStub,
)
from memrewrite.passes.rewrite.undo_log import UndoLog, hooked, module_at, swap
from memrewrite.plans import Placement, Plan
from memrewrite.site import Binding, Site

log = logging.getLogger("memrewrite")

CHILD = "memory"  # a layer beside an MLP is this child of the module it is hooked to


def substitute(
    model: nn.Module, plan: Plan, *, hosts: Mapping[str, GraphHost] | None = None, initialise: bool = True
) -> UndoLog:
    """Apply `plan` to `model` in place. `initialise=False` leaves new parameters unset, for a checkpoint to fill.

    `hosts` are the modules that become graphs (`traced.trace_hosts`).

    Raises `ModelError` for a model that already holds pools, `SelectError` when a path of the plan is not in the model.
    On any error the model is as it was.
    """
    refuse_rewritten(model)
    edit = UndoLog(hosts)
    try:
        layers = build_all(model, plan, edit, initialise)
        for substitution in plan.substitutions:
            layer = layers[substitution.site.path].train(model.training)
            place(model, substitution.site, layer, substitution.placement, edit)
            said = "takes the place of" if substitution.placement == "replace" else "is added to"
            log.info("%s %s the MLP %s", substitution.kind, said, substitution.site.path)
    except BaseException:
        edit.revert()
        raise
    return edit


def layers_of(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The layers that `substitute` put into `model`, by site path."""
    found = {}
    inside = Counter[str]()
    for substitution in plan.substitutions:
        binding = substitution.site.bindings[0]
        exit_ = module_at(model, binding.exit)
        if binding.kind == "graph":
            found[substitution.site.path] = layer_in(model, binding.exit, inside[binding.exit])
            inside[binding.exit] += 1
            continue
        found[substitution.site.path] = exit_ if substitution.placement == "replace" else _host(exit_).get_submodule(CHILD)
    return found


def place(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: UndoLog) -> None:
    """Put one layer at one site, through every binding the site has (weights that several modules share have several)."""
    if any(binding.kind == "graph" for binding in site.bindings):
        _place_in_graph(model, site, layer, placement, edit)
        return
    handed = any(binding.kind == "span" or (placement == "parallel" and binding.takes != 0) for binding in site.bindings)
    hand = InputSlot() if handed else None
    for number, binding in enumerate(_each_once(model, site)):
        if binding.kind == "none":
            raise SelectError(f"the MLP at {site.path!r} cannot be edited in the module tree: {binding.why}")
        exit_ = module_at(model, binding.exit)
        if hand:
            _listen(model, site, binding, placement, hand, edit)
        if placement == "replace":
            swap(model, exit_, layer, edit)
        else:
            if number == 0:
                _hang(site, exit_, layer, edit)
            hooked(exit_.register_forward_hook(AddMemory(layer, hand, binding.gives[0] if binding.gives else None)), edit)
    if placement == "replace":
        _stand_in(site.bindings[0], layer, hand, edit)
    edit.layers[site.path] = layer


def _place_in_graph(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: UndoLog) -> None:
    host = edit.hosts.get(site.bindings[0].exit)
    if host is None or len(_each_once(model, site)) > 1:
        what = f"the MLP at {site.path!r} needs {site.bindings[0].exit!r} as a graph, which it is not"
        raise SelectError(what, hint="leave this site out, or rewrite the exported program: `--emit graph`")
    put(model, host, site, layer, placement, edit.done)
    edit.layers[site.path] = layer


def _stand_in(binding: Binding, layer: nn.Module, hand: InputSlot | None, edit: UndoLog) -> None:
    """Have a layer called as the module in whose place it is, and return what that returned."""
    if hand:
        hooked(layer.register_forward_pre_hook(UseStoredInput(hand), with_kwargs=True, prepend=True), edit)
    elif not binding.alone or binding.takes != 0:
        hooked(layer.register_forward_pre_hook(TakeArgument(binding.takes), with_kwargs=True, prepend=True), edit)
    if binding.gives:
        hooked(layer.register_forward_hook(GiveItem(*binding.gives)), edit)


def _each_once(model: nn.Module, site: Site) -> list[Binding]:
    """The bindings of a site, those that reach the same modules by other names left out."""
    seen: dict[tuple[int, ...], Binding] = {}
    for binding in site.bindings:
        seen.setdefault(tuple(id(module_at(model, path)) for path in (*binding.entries, binding.exit)), binding)
    return list(seen.values())


def _listen(model: nn.Module, site: Site, binding: Binding, placement: Placement, hand: InputSlot, edit: UndoLog) -> None:
    """Have the MLP's input remembered when it reaches the entries; in a replaced MLP these compute nothing any more."""
    widths = binding.widths if placement == "replace" else ()
    for path, width in zip_longest(binding.entries, widths):
        entry = module_at(model, path)
        if width is not None:
            hollow = ZeroStub(width, site.axis)
            swap(model, entry, hollow, edit)
            entry = hollow
        hooked(entry.register_forward_pre_hook(StoreInput(hand, binding.takes), with_kwargs=True), edit)


def _hang(site: Site, exit_: nn.Module, layer: nn.Module, edit: UndoLog) -> None:
    """Make a layer beside an MLP a child of the module that returns the MLP's output."""
    host = _host(exit_)
    if hasattr(host, CHILD):
        raise ModelError(f"the module at {site.path!r} has an attribute {CHILD!r} of its own, where the layer was to hang")
    host.add_module(CHILD, layer)
    edit.done(lambda: delattr(host, CHILD))


def _host(exit_: nn.Module) -> nn.Module:
    """The module a layer beside an MLP is a child of: containers call every child they have, so the last one in them."""
    while isinstance(exit_, (nn.Sequential, nn.ModuleList)):
        exit_ = list(exit_.children())[-1]
    return exit_
