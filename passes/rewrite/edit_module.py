"""Puts the Plan's layers into the live module tree, in place, once; what was done can be undone until it is committed.

Flow: pools are built and hung at the root → each layer is built on its site's device and dtype → it takes the place of the
MLP's module, or hooks hand it the MLP's input → every replacement is logged and leaves its undo behind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import Pool, Pools
from memrewrite.passes.rewrite.graph_host import Host, layer_in, put
from memrewrite.passes.rewrite.hooks import (
    AddMemory,
    FeaturesBack,
    FeaturesLast,
    GiveItem,
    Hand,
    HandOn,
    Hollow,
    TakeArgument,
    TakeHanded,
)
from memrewrite.plans import Placement, Plan, Substitution
from memrewrite.site import Binding, Site

log = logging.getLogger("memrewrite")

CHILD = "memory"  # a layer beside an MLP is this child of the module it is hooked to


class Edit:
    """What was changed in a module tree, newest last; `revert` brings the old tree back, bit for bit."""

    def __init__(self, hosts: Mapping[str, Host] | None = None) -> None:
        self.hosts = hosts or {}  # the modules that become graphs, by path
        self.layers: dict[str, nn.Module] = {}  # by site path
        self._undo: list[Callable[[], object]] = []

    def done(self, undo: Callable[[], object]) -> None:
        """Note how the last change is undone."""
        self._undo.append(undo)

    def revert(self) -> None:
        """Undo every change, newest first."""
        while self._undo:
            self._undo.pop()()

    def commit(self) -> None:
        """Keep the changes: the replaced modules are let go of, and their memory with them."""
        self._undo.clear()


def substitute(model: nn.Module, plan: Plan, *, hosts: Mapping[str, Host] | None = None, initialise: bool = True) -> Edit:
    """Apply `plan` to `model` in place. `initialise=False` leaves new parameters unset, for a checkpoint to fill.

    `hosts` are the modules that become graphs (`traced.trace_hosts`).

    Raises `ModelError` for a model that already holds pools, `SelectError` when a path of the plan is not in the model.
    On any error the model is as it was.
    """
    refuse_rewritten(model)
    edit = Edit(hosts)
    try:
        layers = _build_all(model, plan, edit, initialise)
        for substitution in plan.substitutions:
            layer = layers[substitution.site.path].train(model.training)
            place(model, substitution.site, layer, substitution.placement, edit)
            said = "takes the place of" if substitution.placement == "replace" else "is added to"
            log.info("%s %s the MLP %s", substitution.kind, said, substitution.site.path)
    except BaseException:
        edit.revert()
        raise
    return edit


def build_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Hang the plan's pools at `model`'s root and build its layers, placed nowhere yet; by site path."""
    return _build_all(model, plan, Edit(), initialise=True)


def refuse_rewritten(model: nn.Module) -> None:
    """Raise `ModelError` for a model that was rewritten before."""
    if any(isinstance(module, Pools) for module in model.modules()):
        raise ModelError(
            "this model was already rewritten: it holds a memory pool",
            hint="start from the original model; one recipe can hold many rules and pools",
        )


def pools_of(model: nn.Module) -> Pools:
    """The pools of a rewritten model. Raises `ModelError` for a model that was not rewritten."""
    found = next((module for module in model.modules() if isinstance(module, Pools)), None)
    if found is None:
        raise ModelError("this model holds no memory pool", hint="rewrite it first: memrewrite.apply(...)")
    return found


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


def _build_all(model: nn.Module, plan: Plan, edit: Edit, initialise: bool) -> dict[str, nn.Module]:
    pools = _hang_pools(model, plan, edit, initialise)
    layers: dict[str, nn.Module] = {}
    for number, substitution in enumerate(plan.substitutions):
        layer = build_layer(substitution, pools, _device(model, substitution.site))
        if initialise:
            layer.reset_parameters(generator_of(layer, plan, number))
        layers[substitution.site.path] = layer
    return layers


def _hang_pools(model: nn.Module, plan: Plan, edit: Edit, initialise: bool) -> dict[str, Pool]:
    users = {s.pool: s.site for s in reversed(plan.substitutions) if s.pool}
    pools = {name: Pool(spec, device=_device(model, users[name])) for name, spec in plan.pools.items()}
    if initialise:
        for pool in pools.values():
            pool.reset_parameters()
    if hasattr(model, plan.root):
        raise ModelError(f"the model has an attribute {plan.root!r} of its own, where the pools were to hang")
    model.add_module(plan.root, Pools(pools).train(model.training))
    edit.done(lambda: delattr(model, plan.root))
    return pools


def build_layer(substitution: Substitution, pools: Mapping[str, Pool] | Pools, device: torch.device) -> MemoryLayer:
    """One layer on its pool, its parameters not set yet."""
    site, kind = substitution.site, kind_named(substitution.kind)
    layer = kind(
        site.d_in,
        site.d_model,
        kind.Options.model_validate(substitution.options),
        pools[substitution.pool] if substitution.pool else None,
        zero_output=substitution.placement == "parallel",
        device=device,
        dtype=getattr(torch, site.dtype),
    )
    if site.axis != -1:
        layer.register_forward_pre_hook(FeaturesLast(site.axis))
        layer.register_forward_hook(FeaturesBack(site.axis))
    return layer


def _device(model: nn.Module, site: Site) -> torch.device:
    """Where the MLP's weights are now: a plan may be replayed on another machine than it was made on."""
    path, _, name = site.parameters[0].rpartition(".")
    weight = getattr(module_at(model, path), name, None)
    if not isinstance(weight, Tensor):
        what = f"the model has no weight {site.parameters[0]!r}"
        raise SelectError(what, hint="the plan was made for another model: plan again")
    return weight.device


def generator_of(layer: nn.Module, plan: Plan, number: int) -> torch.Generator | None:
    """Every layer its own random numbers, the same on every run: they follow from the pool's seed and its place."""
    device = next(layer.parameters()).device
    if device.type == "meta":
        return None
    name = plan.substitutions[number].pool
    seed = plan.pools[name].seed if name else 0
    return torch.Generator(device).manual_seed((seed * 1_000_003 + number + 1) % 2**63)


def place(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: Edit) -> None:
    """Put one layer at one site, through every binding the site has (weights that several modules share have several)."""
    if any(binding.kind == "graph" for binding in site.bindings):
        _place_in_graph(model, site, layer, placement, edit)
        return
    handed = any(binding.kind == "span" or (placement == "parallel" and binding.takes != 0) for binding in site.bindings)
    hand = Hand() if handed else None
    for number, binding in enumerate(_each_once(model, site)):
        if binding.kind == "none":
            raise SelectError(f"the MLP at {site.path!r} cannot be edited in the module tree: {binding.why}")
        exit_ = module_at(model, binding.exit)
        if hand:
            _listen(model, site, binding, placement, hand, edit)
        if placement == "replace":
            _swap(model, exit_, layer, edit)
        else:
            if number == 0:
                _hang(site, exit_, layer, edit)
            _hook(exit_.register_forward_hook(AddMemory(layer, hand, binding.gives[0] if binding.gives else None)), edit)
    if placement == "replace":
        _stand_in(site.bindings[0], layer, hand, edit)
    edit.layers[site.path] = layer


def _place_in_graph(model: nn.Module, site: Site, layer: nn.Module, placement: Placement, edit: Edit) -> None:
    host = edit.hosts.get(site.bindings[0].exit)
    if host is None or len(_each_once(model, site)) > 1:
        what = f"the MLP at {site.path!r} needs {site.bindings[0].exit!r} as a graph, which it is not"
        raise SelectError(what, hint="leave this site out, or rewrite the exported program: `--emit graph`")
    put(model, host, site, layer, placement, edit.done)
    edit.layers[site.path] = layer


def _stand_in(binding: Binding, layer: nn.Module, hand: Hand | None, edit: Edit) -> None:
    """Have a layer called as the module in whose place it is, and return what that returned."""
    if hand:
        _hook(layer.register_forward_pre_hook(TakeHanded(hand), with_kwargs=True, prepend=True), edit)
    elif not binding.alone or binding.takes != 0:
        _hook(layer.register_forward_pre_hook(TakeArgument(binding.takes), with_kwargs=True, prepend=True), edit)
    if binding.gives:
        _hook(layer.register_forward_hook(GiveItem(*binding.gives)), edit)


def _each_once(model: nn.Module, site: Site) -> list[Binding]:
    """The bindings of a site, those that reach the same modules by other names left out."""
    seen: dict[tuple[int, ...], Binding] = {}
    for binding in site.bindings:
        seen.setdefault(tuple(id(module_at(model, path)) for path in (*binding.entries, binding.exit)), binding)
    return list(seen.values())


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Raises `SelectError` when the model has none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SelectError(
            f"the model has no module {path!r}",
            where=str(error),
            hint="the plan was made for another model: plan again",
        ) from error


def _listen(model: nn.Module, site: Site, binding: Binding, placement: Placement, hand: Hand, edit: Edit) -> None:
    """Have the MLP's input remembered when it reaches the entries; in a replaced MLP these compute nothing any more."""
    widths = binding.widths if placement == "replace" else ()
    for path, width in zip_longest(binding.entries, widths):
        entry = module_at(model, path)
        if width is not None:
            hollow = Hollow(width, site.axis)
            _swap(model, entry, hollow, edit)
            entry = hollow
        _hook(entry.register_forward_pre_hook(HandOn(hand, binding.takes), with_kwargs=True), edit)


def _hang(site: Site, exit_: nn.Module, layer: nn.Module, edit: Edit) -> None:
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


def _hook(handle: Any, edit: Edit) -> None:
    edit.done(handle.remove)


def _swap(model: nn.Module, old: nn.Module, new: nn.Module, edit: Edit) -> None:
    """Put `new` wherever `old` hangs: one module may be reached by several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
                edit.done(lambda parent=parent, name=name: setattr(parent, name, old))  # type: ignore[misc]
