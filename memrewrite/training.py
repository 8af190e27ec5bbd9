"""Training a rewritten model: parameter groups with a separate learning rate for the value tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from memrewrite.layers.pool import Pool


def param_groups(
    model: nn.Module, lr: float, value_lr: float | None = None, *, weight_decay: float = 0.1, value_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimizer: first all other parameters, then the value tables of the pools.

    Parameters with `requires_grad=False` are omitted.

    Args:
        model: A model, rewritten or not.
        lr: Learning rate of the other parameters.
        value_lr: Learning rate of the value tables. Default: ten times `lr`, the paper's ratio (1e-3 and 1e-4; section 4,
            "Memory Layers at Scale", arXiv 2412.09764).
        weight_decay: Weight decay of the other parameters.
        value_decay: Weight decay of the value tables. The paper decays values like all weights; rows that are not read
            would shrink, so the default is 0.
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
