"""The pools and layers that a backend of `torch.compile` puts into graphs: built once, reused in every later graph.

A layer is identified by the weights of its MLP, so that the same MLP in a second graph (another shape, another mode) gets the
same layer. The store is one module, to be loaded, trained and saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memrewrite.errors import SelectError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.pool import Pool, Pools, PoolSpec
from memrewrite.passes.rewrite.build_layers import build_layer, generator_of
from memrewrite.plans import Plan, Substitution


class LayerStore(nn.Module):
    """Pools (`pools.<name>`) and layers (`layers.<path>`, with `/` for `.`) in the order in which they were built."""

    def __init__(self) -> None:
        super().__init__()
        self.pools, self.layers = Pools({}), nn.Module()
        self._specs: dict[str, PoolSpec] = {}
        self._known: dict[frozenset[int], tuple[tuple[weakref.ref[Tensor], ...], str, Substitution]] = {}

    @property
    def plan(self) -> tuple[Substitution, ...]:
        """The substitutions so far, in the order in which their layers were built."""
        return tuple(substitution for _, _, substitution in self._known.values())

    def known(self, weights: Mapping[str, Tensor], substitution: Substitution) -> MemoryLayer | None:
        """The layer of an MLP that was in an earlier graph, identified by its weights; None for a new MLP."""
        entry = self._known.get(_key(weights, substitution))
        if entry is None or any(reference() is None for reference in entry[0]):  # the id may belong to a new tensor
            return None
        layer = self.layers.get_submodule(entry[1])
        return layer if isinstance(layer, MemoryLayer) else None

    def layers_for(self, plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """The layers of a plan, by site path; those that are new are built. `weights` are the graph's, by name.

        Raises `SelectError` when a pool was built with another spec for an earlier graph.
        """
        self._build_pools(plan, weights)
        layers: dict[str, nn.Module] = {}
        for substitution in plan.substitutions:
            layers[substitution.site.path] = self.known(weights, substitution) or self._new(plan, substitution, weights)
        return layers

    def _build_pools(self, plan: Plan, weights: Mapping[str, Tensor]) -> None:
        for substitution in plan.substitutions:
            name = substitution.pool
            if name is None:
                continue
            spec = plan.pools[name]
            if self._specs.setdefault(name, spec) != spec:
                raise SelectError(
                    f"pool {name!r} was built as {self._specs[name]!r}, and this graph needs {spec!r}",
                    where=substitution.site.path,
                    hint="give the pool a `value_dim` and a `dtype`",
                )
            if name not in self.pools._modules:
                pool = Pool(spec, device=_device(weights, substitution))
                pool.reset_parameters()
                self.pools.add_module(name, pool.train(self.training))

    def _new(self, plan: Plan, substitution: Substitution, weights: Mapping[str, Tensor]) -> MemoryLayer:
        device = _device(weights, substitution)
        layer = build_layer(substitution, self.pools, device).train(self.training)
        layer.reset_parameters(generator_of(device, self._with(plan, substitution), len(self._known)))
        name = base = substitution.site.path.replace(".", "/") or "root"
        while name in self.layers._modules:  # other weights with that name: another model, or one frame for many blocks
            name = f"{base}#{len(self.layers._modules)}"
        self.layers.add_module(name, layer)
        references = tuple(weakref.ref(weights[parameter]) for parameter in substitution.site.parameters)
        self._known[_key(weights, substitution)] = references, name, substitution
        return layer

    def _with(self, plan: Plan, substitution: Substitution) -> Plan:
        return plan.model_copy(update={"substitutions": (*self.plan, substitution)})


def _key(weights: Mapping[str, Tensor], substitution: Substitution) -> frozenset[int]:
    return frozenset(id(weights[name]) for name in substitution.site.parameters)


def _device(weights: Mapping[str, Tensor], substitution: Substitution) -> torch.device:
    return weights[substitution.site.parameters[0]].device
