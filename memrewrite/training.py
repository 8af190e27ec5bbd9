"""Training a rewritten model: parameter groups, a schedule that treats value tables apart, and which parameters are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memrewrite.errors import ModelError, UserError
from memrewrite.fused import DEFAULT_RULE, Rule
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.layers.value_table import Table
from memrewrite.plans import Train

PAPER_FACTOR = 10.0  # the values' rate over the others' in the paper
REST, KEYS, VALUES = "rest", "keys", "values"  # names of the groups

Factor = Callable[[int], float]


def param_groups(
    model: nn.Module,
    lr: float,
    value_lr: float | None = None,
    *,
    key_lr: float | None = None,
    rule: Rule | None = None,
    weight_decay: float = 0.1,
    value_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: "rest", all other parameters; "keys", if `key_lr` is given; "values", the tables.

    Parameters with `requires_grad=False` are omitted. The names are entries `name` of the groups; `schedule` reads them.

    Args:
        model: A model, rewritten or not.
        lr: Learning rate of the other parameters.
        value_lr: Learning rate of the tables. Default: `lr` times the `value_lr_factor` of the rule that updates them; where
            no rule does, ten times `lr`, the paper's ratio (1e-3 and 1e-4; section 4, "Memory Layers at Scale",
            arXiv 2412.09764).
        key_lr: Learning rate of the parameters that select slots: query projections, half keys and their norms. With it they
            are a group between the two others. Default: they are in "rest".
        rule: The rule that `memrewrite.fuse` will get. Default: for a model with fused tables, the default rule of `fuse`.
        weight_decay: Weight decay of the other parameters, queries and keys included.
        value_decay: Weight decay of the tables. The paper decays values like all weights; rows that are not read
            would shrink, so the default is 0.

    Returns:
        Two groups, or three with `key_lr`. Every trained parameter is in exactly one.
    """
    tables = [module for module in model.modules() if isinstance(module, Table)]
    if rule is None and any(table.pending is not None for table in tables):
        rule = DEFAULT_RULE
    if value_lr is None:
        value_lr = lr * (PAPER_FACTOR if rule is None else rule.value_lr_factor)
    group_of = {id(p): VALUES for table in tables for p in table.parameters()}
    groups = {REST: _group(REST, lr, weight_decay), VALUES: _group(VALUES, value_lr, value_decay)}
    if key_lr is not None:
        group_of |= {id(p): KEYS for module in model.modules() if isinstance(module, ProductKeys) for p in module.parameters()}
        groups = {REST: groups[REST], KEYS: _group(KEYS, key_lr, weight_decay), VALUES: groups[VALUES]}
    for p in model.parameters():
        if p.requires_grad:
            groups[group_of.get(id(p), REST)]["params"].append(p)
    return list(groups.values())


def _group(name: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": [], "lr": lr, "weight_decay": weight_decay, "name": name}


def schedule(optimizer: Optimizer, factor: Factor, values: Literal["fixed", "same"] | Factor = "fixed") -> LambdaLR:
    """A learning rate schedule in which the tables' rate has its own course: a torch `LambdaLR`.

    The paper keeps the values' rate fixed while the base rate warms up and decays.

    Args:
        optimizer: An optimizer with the groups of `param_groups`; a wrapper around it is accepted where torch accepts it.
        factor: Multiple of the initial rate at step n (from 0), for all groups but the values.
        values: "fixed": the values' rate does not change. "same": it has the same factor. A function: a factor of its own.

    Raises:
        UserError: No group is named "values", or `values` is another word.
    """
    if not any(group.get("name") == VALUES for group in optimizer.param_groups):
        hint = "build the optimizer with memrewrite.param_groups(model, lr=...)"
        raise UserError('the optimizer has no parameter group named "values"', hint=hint)
    courses: dict[str, Factor] = {"fixed": lambda step: 1.0, "same": factor}
    own = values if callable(values) else courses.get(values)
    if own is None:
        raise UserError(f"there is no schedule of values named {values!r}", hint='"fixed", "same", or a function of the step')
    return LambdaLR(optimizer, [own if group.get("name") == VALUES else factor for group in optimizer.param_groups])


def freeze(model: nn.Module, train: Train = "memory_only") -> int:
    """Set which parameters are trained, by `requires_grad`; call it before the optimizer is created.

    Args:
        model: A rewritten model; a module tree, or the graph module of `apply(..., emit="graph")`.
        train: "memory_only": pools and memory layers are trained, and nothing else. "all": every floating-point parameter is
            trained, those too that were frozen before the rewrite: what was frozen is not recorded.

    Returns:
        The number of trained parameters (elements).

    Raises:
        ModelError: The model has no pool and no memory layer, and "memory_only" would train nothing.
        UserError: `train` is another word. Nothing was changed.
    """
    if train not in ("all", "memory_only"):
        raise UserError(f"there is nothing to train named {train!r}", hint='"memory_only" or "all"')
    memory = {id(p) for module in _memory(model) for p in module.parameters()}
    if train == "memory_only" and not memory:
        raise ModelError(
            "this model has no pool and no memory layer, so nothing would be trained",
            hint="rewrite it with memrewrite.apply; in a graph that was saved and loaded, layers are operators and not modules",
        )
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_(p.is_floating_point() and (train == "all" or id(p) in memory))
    return sum(p.numel() for p in parameters if p.requires_grad)


def _memory(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (Table, MemoryLayer)))
