"""Helpers for training a rewritten model: the values of a memory learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from memrewrite.layers.pool import Pool


def param_groups(
    model: nn.Module, lr: float, value_lr: float | None = None, *, weight_decay: float = 0.1, value_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimizer: everything else at `lr`, the value tables at `value_lr`.

    `value_lr` defaults to ten times `lr`, the paper's ratio (1e-3 against 1e-4; section 4, "Memory Layers at Scale", arXiv
    2412.09764). The paper decays values like all weights; rows that are not read would shrink, so the default here is not to.
    Frozen parameters are left out.
    """
    tables = {id(p) for module in model.modules() if isinstance(module, Pool) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in tables], "lr": lr, "weight_decay": weight_decay},
        {
            "params": [p for p in trainable if id(p) in tables],
            "lr": 10 * lr if value_lr is None else value_lr,
            "weight_decay": value_decay,
        },
    ]
