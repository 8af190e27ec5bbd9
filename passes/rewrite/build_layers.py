"""Builds a plan's pools and layers on their sites' devices, in their sites' dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memrewrite.errors import ModelError, SelectError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.pool import Pool, Pools, find_pools
from memrewrite.passes.rewrite.hooks import FeaturesBack, FeaturesLast
from memrewrite.passes.rewrite.undo_log import UndoLog, module_at
from memrewrite.plans import Plan, Substitution
from memrewrite.site import Site, dtype_named


def build_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Build the plan's pools, registered on `model`, and its layers, which are not placed yet; returns them by site path."""
    return build_all(model, plan, UndoLog(), initialise=True)


def refuse_rewritten(model: nn.Module) -> None:
    """Raise `ModelError` for a model that was rewritten before, or is the compiled form of one."""
    if "_orig_mod" in model._modules:
        raise ModelError(
            "the model is the result of torch.compile, which runs without its modules",
            hint="rewrite the model that was compiled (`_orig_mod`), then compile it again",
        )
    if find_pools(model) is not None:
        raise ModelError(
            "this model was already rewritten: it contains a memory pool",
            hint="start from the original model; one recipe can have many rules and pools",
        )


def pools_of(model: nn.Module) -> Pools:
    """The pools of a rewritten model. Raises `ModelError` for a model that was not rewritten."""
    found = find_pools(model)
    if found is None:
        raise ModelError("this model has no memory pool", hint="rewrite it first: memrewrite.apply(...)")
    return found


def build_all(
    model: nn.Module, plan: Plan, edit: UndoLog, initialise: bool, device: torch.device | None = None
) -> dict[str, nn.Module]:
    """`build_layers`, with an undo log; `initialise=False` leaves parameters unset; `device` overrides the sites' devices."""
    pools = _built_pools(model, plan, initialise, device)
    layers: dict[str, nn.Module] = {}
    for number, substitution in enumerate(plan.substitutions):
        on = device or _device(model, substitution.site)
        layer = build_layer(substitution, pools, on)
        if initialise:
            layer.reset_parameters(generator_of(on, plan, number))
        layers[substitution.site.path] = layer
    owner = module_at(model, plan.owner)
    if hasattr(owner, plan.root):
        raise ModelError(f"the model already has an attribute {plan.root!r}, the name of the pools", where=plan.owner)
    owner.add_module(plan.root, pools)
    edit.done(lambda: delattr(owner, plan.root))
    read_pools_of(owner, plan, layers)
    return layers


def read_pools_of(owner: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> None:
    """Make `layers`, by site path, read the pools that are registered on `owner` at every call."""
    for substitution in plan.substitutions:
        layer = layers[substitution.site.path]
        if substitution.pool and isinstance(layer, MemoryLayer):
            layer.read_pool_at(owner, plan.root, substitution.pool)


def _built_pools(model: nn.Module, plan: Plan, initialise: bool, device: torch.device | None) -> Pools:
    users = {s.pool: s.site for s in reversed(plan.substitutions) if s.pool}
    pools = {name: Pool(spec, device=device or _device(model, users[name])) for name, spec in plan.pools.items()}
    if initialise:
        for pool in pools.values():
            pool.reset_parameters()
    return Pools(pools).train(model.training)


def build_layer(substitution: Substitution, pools: Mapping[str, Pool] | Pools, device: torch.device) -> MemoryLayer:
    """One layer that reads its pool; its parameters are not set yet."""
    site, kind = substitution.site, kind_named(substitution.kind)
    layer = kind(
        site.d_in,
        site.d_model,
        kind.Options.model_validate(substitution.options),
        pools[substitution.pool] if substitution.pool else None,
        zero_output=substitution.init.zero,
        device=device,
        dtype=dtype_named(site.dtype),
    )
    if site.axis != -1:
        layer.register_forward_pre_hook(FeaturesLast(site.axis))
        layer.register_forward_hook(FeaturesBack(site.axis))
    return layer


def _device(model: nn.Module, site: Site) -> torch.device:
    """The device of the MLP's weights now: a plan may be applied on another machine."""
    path, _, name = site.parameters[0].rpartition(".")
    weight = getattr(module_at(model, path), name, None)
    if not isinstance(weight, Tensor):
        what = f"the model has no weight {site.parameters[0]!r}"
        raise SelectError(what, hint="the plan was made for another model: plan again")
    return weight.device


def generator_of(device: torch.device, plan: Plan, number: int) -> torch.Generator | None:
    """The random numbers of one layer, the same on every run: the seed depends on the pool's seed and the layer's number."""
    if device.type == "meta":
        return None
    name = plan.substitutions[number].pool
    seed = plan.pools[name].seed if name else 0
    return torch.Generator(device).manual_seed((seed * 1_000_003 + number + 1) % 2**63)
