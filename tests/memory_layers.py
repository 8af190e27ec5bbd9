"""Single memory layers with small pools of their own, for tests that need no model around them."""

from __future__ import annotations

from typing import Any

import torch

from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.memory_plus import MemoryPlus, MemoryPlusOptions
from memrewrite.layers.pkm import Pkm, PkmOptions
from memrewrite.layers.pool import Pool, PoolSpec


def layer(kind: str = "memory_plus", keys: int = 5, heads: int = 2, topk: int = 3, **options: Any) -> MemoryLayer:
    """A layer [..., 8] -> [..., 6], seeded."""
    pool = Pool(PoolSpec(keys=keys, value_dim=6))
    if kind == "pkm":
        made: MemoryLayer = Pkm(8, 6, PkmOptions(heads=heads, topk=topk, **options), pool)
    else:
        made = MemoryPlus(8, 6, MemoryPlusOptions(heads=heads, topk=topk, **options), pool)
    generator = torch.Generator().manual_seed(0)
    pool.reset_parameters(generator)
    made.reset_parameters(generator)
    return made
