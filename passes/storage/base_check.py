"""Whether a config describes a live model: what was changed by hand, or by another library, is not built again from it.

Flow: the config → the model that it builds, on meta → the plan's layers, on meta too → both module trees side by side: names,
classes, settings, functions, shapes of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.rewrite.graph_host import GraphHost
from memrewrite.passes.sources.hugging_face import Architecture
from memrewrite.plans import Plan


def differences(model: nn.Module, found: Architecture, plan: Plan, hosts: Mapping[str, GraphHost]) -> list[str]:
    """What of a rewritten model differs from what its config builds, each in a few words. Values of tensors are not compared.

    `hosts` have no layers yet, and get those of the plan. Raises `ModelError` for a config of which no model can be built, and
    `SelectError` for a plan that does not fit that model.
    """
    live = _outline(model)
    built = found.outline(len(live))
    substitute(built, plan, hosts=hosts, initialise=False, device=torch.device("meta")).commit()
    expected = _outline(built)
    missing = [f"{name!r} is missing" for name in expected if name not in live]
    added = [f"{name!r} was added" for name in live if name not in expected]
    changed = [f"{name!r} is {live[name]}, not {what}" for name, what in expected.items() if live.get(name, what) != what]
    return added + missing + changed


def _outline(model: nn.Module) -> dict[str, str]:
    """What is compared, by name: classes of modules, functions and settings, shapes of tensors."""
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = f"{type(module).__name__}({_settings(module)})"
        found |= {f"{path}.{name}".lstrip("."): function for name, function in _functions(module)}
    found |= {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}
    return found


def _settings(module: nn.Module) -> str:
    """The settings of a module of torch or transformers, as its text has them; "" for others, and where there is no such text.

    Those of dropout have no effect on the outputs of a saved model.
    """
    if not type(module).__module__.startswith(("torch.nn.", "transformers.")) or isinstance(
        module, nn.modules.dropout._DropoutNd
    ):
        return ""
    try:
        return module.extra_repr()
    except AttributeError:  # its weights are gone: those of a replaced MLP in a module that became a graph
        return ""


def _functions(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The functions that a module has as attributes, such as its activation."""
    for name, value in vars(module).items():
        if isinstance(value, Callable) and not isinstance(value, (type, nn.Module)) and not name.startswith("_"):  # type: ignore[arg-type]
            named: Any = getattr(value, "__qualname__", type(value).__qualname__)
            yield name, str(named)
