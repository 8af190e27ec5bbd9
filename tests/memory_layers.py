"""Single memory layers with small pools of their own, for tests that need no model around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.kinds import kind_named
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pool import Pool, Pools, PoolSpec


def layer(kind: str = "memory_plus", keys: int = 5, heads: int = 2, topk: int = 3, **options: Any) -> MemoryLayer:
    """A layer [..., 8] -> [..., 6], seeded."""
    found = kind_named(kind)
    pool = Pool(PoolSpec(keys=keys, value_dim=6, input_dim=8 if found.reads_inputs else None))
    return initialized(found(8, 6, found.Options(heads=heads, topk=topk, **options), pool))


def stack(count: int = 3) -> nn.Sequential:
    """Layers [..., 8] -> [..., 8] one after another, "0", "1", ..., that share the pool "shared" of 5 × 5 slots."""
    pool = Pool(PoolSpec(keys=5, value_dim=8))
    options = MemoryPlusOptions(heads=2, topk=3)
    layers = [initialized(MemoryPlus(8, 8, options, pool), seed) for seed in range(count)]
    made = nn.Sequential(*layers)
    made.add_module("memory", Pools({"shared": pool}))
    return made


def initialized(layer: MemoryLayer, seed: int = 0) -> MemoryLayer:
    """The layer with seeded parameters, its pool too."""
    generator = torch.Generator().manual_seed(seed)
    assert layer.pool is not None
    layer.pool.reset_parameters(generator)
    layer.reset_parameters(generator)
    return layer
