"""Applies a Plan to a live module tree, in place; every change can be undone until it is committed.

Flow: pools are built and registered on the root module → each layer is built on its site's device and dtype → it replaces the
MLP's module, or hooks pass the MLP's input to it → every change is recorded in an undo log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.layers.references import ModuleAt
from memrewrite.passes.rewrite.build_layers import build_all, refuse_rewritten
from memrewrite.passes.rewrite.graph_host import GraphHost, layer_in, put
from memrewrite.passes.rewrite.hooks import (
    AddMemory,
    GiveItem,
    InputSlot,
    StoreInput,
    TakeArgument,
    UseStoredInput,
)
from memrewrite.passes.rewrite.layer_call import CHILD
from memrewrite.passes.rewrite.undo_log import UndoLog, hooked, module_at, swap
from memrewrite.plans import Placement, Plan
from memrewrite.site import Binding, Site

log = logging.getLogger("memrewrite")


def substitute(
    model: nn.Module,
    plan: Plan,
    *,
    hosts: Mapping[str, GraphHost] | None = None,
    initialise: bool = True,
    device: torch.device | None = None,
) -> UndoLog:
    """Apply `plan` to `model` in place.

    Args:
        model: the module tree to edit.
        plan: what to place where; its paths must be in `model`.
        hosts: the modules whose forward becomes a graph, by path (`host_tracing.trace_hosts`).
        initialise: False leaves the new parameters unset, to be loaded from a checkpoint.
        device: device of the new parameters; default: each site's. "meta" shows what would be built, without memory.

    Returns:
        The log of all changes, to be committed or reverted.

    Raises:
        ModelError: `model` contains pools already.
        SelectError: a path of the plan is not in the model. On any error the model is as before.
    """
    refuse_rewritten(model)
    edit = UndoLog(hosts)
    try:
        layers = build_all(model, plan, edit, initialise, device)
        for substitution in plan.substitutions:
            layer = layers[substitution.site.path].train(model.training)
            place(model, substitution.site, layer, substitution.placement, edit)
            verb = "replaces" if substitution.placement == "replace" else "is added to"
            level = logging.INFO if device is None else logging.DEBUG  # on meta it is a trial
            log.log(level, "%s %s the MLP %s", substitution.kind, verb, substitution.site.path)
    except BaseException:
        edit.revert()
        raise
    return edit


def layers_of(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The layers that `substitute` placed in `model`, by site path."""
    found = {}
    in_host = Counter[str]()
    for substitution in plan.substitutions:
        binding = substitution.site.bindings[0]
        exit_ = module_at(model, binding.exit)
        if binding.kind == "graph":
            found[substitution.site.path] = layer_in(model, binding.exit, in_host[binding.exit])
            in_host[binding.exit] += 1
        elif substitution.placement == "replace":
            found[substitution.site.path] = exit_
        else:
            found[substitution.site.path] = _parent_of_layer(exit_).get_submodule(CHILD)
    return found


def place(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: UndoLog) -> None:
    """Place one layer at one site, through every binding of the site (one for each module that shares the weights)."""
    if any(binding.kind == "graph" for binding in site.bindings):
        _place_in_graph(model, site, layer, placement, edit)
        return
    stored = any(binding.kind == "span" or (placement == "parallel" and binding.takes != 0) for binding in site.bindings)
    slot = InputSlot(model) if stored else None
    for number, binding in enumerate(_distinct_bindings(model, site)):
        if binding.kind == "none":
            raise SelectError(f"the MLP at {site.path!r} cannot be edited in the module tree: {binding.why}")
        exit_ = module_at(model, binding.exit)
        if slot:
            _store_input(model, site, binding, placement, slot, edit)
        if placement == "replace":
            swap(model, exit_, layer, edit)
        else:
            if number == 0:
                child = _add_child(model, site, exit_, layer, edit)
            hooked(exit_.register_forward_hook(AddMemory(child, slot, binding.gives[0] if binding.gives else None)), edit)
    if placement == "replace":
        _adapt_calls(site.bindings[0], layer, slot, edit)
    edit.layers[site.path] = layer


def _place_in_graph(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: UndoLog) -> None:
    host = edit.hosts.get(site.bindings[0].exit)
    if host is None or len(_distinct_bindings(model, site)) > 1:
        what = f"the MLP at {site.path!r} needs {site.bindings[0].exit!r} as a graph, which it is not"
        raise SelectError(what, hint="leave this site out, or rewrite the exported program: `--emit graph`")
    put(model, host, site, layer, placement, edit.done)
    edit.layers[site.path] = layer


def _adapt_calls(binding: Binding, layer: nn.Module, slot: InputSlot | None, edit: UndoLog) -> None:
    """Add hooks by which a layer accepts the arguments of the module that it replaces, and returns what that returned."""
    if slot:
        hooked(layer.register_forward_pre_hook(UseStoredInput(slot), with_kwargs=True, prepend=True), edit)
    elif not binding.alone or binding.takes != 0:
        hooked(layer.register_forward_pre_hook(TakeArgument(binding.takes), with_kwargs=True, prepend=True), edit)
    if binding.gives:
        hooked(layer.register_forward_hook(GiveItem(*binding.gives)), edit)


def _distinct_bindings(model: nn.Module, site: Site) -> list[Binding]:
    """The bindings of a site, without those that reach the same modules by other names."""
    seen: dict[tuple[int, ...], Binding] = {}
    for binding in site.bindings:
        seen.setdefault(tuple(id(module_at(model, path)) for path in (*binding.entries, binding.exit)), binding)
    return list(seen.values())


def _store_input(model: nn.Module, site: Site, binding: Binding, placement: Placement, slot: InputSlot, edit: UndoLog) -> None:
    """Store the MLP's input when it reaches an entry; the entries of a replaced MLP become stubs that compute nothing."""
    widths = binding.widths if placement == "replace" else ()
    for path, width in zip_longest(binding.entries, widths):
        entry = module_at(model, path)
        if width is not None:
            stub = edit.stub(width, site.axis).train(model.training)
            swap(model, entry, stub, edit)
            entry = stub
        hooked(entry.register_forward_pre_hook(StoreInput(slot, binding.takes), with_kwargs=True), edit)


def _add_child(model: nn.Module, site: Site, exit_: nn.Module, layer: nn.Module, edit: UndoLog) -> ModuleAt:
    """Register a parallel layer as a child of the module that returns the MLP's output."""
    parent = _parent_of_layer(exit_)
    if hasattr(parent, CHILD):
        raise ModelError(f"the module at {site.path!r} already has an attribute {CHILD!r}, the name of the layer")
    parent.add_module(CHILD, layer)
    edit.done(lambda: delattr(parent, CHILD))
    return ModuleAt(parent, CHILD, within=model)


def _parent_of_layer(exit_: nn.Module) -> nn.Module:
    """The module whose child a parallel layer is. A container calls all its children, so its last child is taken instead."""
    while isinstance(exit_, (nn.Sequential, nn.ModuleList)):
        exit_ = list(exit_.children())[-1]
    return exit_
