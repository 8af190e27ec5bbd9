"""Model → the tree of its modules, in the order they ran: a live model's own tree, or the one in a traced graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.export import ExportedProgram

from memrewrite.module_node import ModuleNode
from memrewrite.passes.capture.capture import is_traced
from memrewrite.passes.capture.segment import Capture
from memrewrite.passes.graphs.provenance import clean, modules_of, path_prefixes


def outline(model: nn.Module | ExportedProgram, before: Capture) -> ModuleNode:
    """The module tree. Of a traced model: the modules that computed an operation, and their containers."""
    if isinstance(model, nn.Module) and not is_traced(model):
        first: dict[str, int] = {}  # when a module, or the first inside it, returned: siblings return in order
        for i, path in enumerate(before.calls):
            for prefix in path_prefixes(path):
                first.setdefault(prefix, i)
        return _live("", model, first)
    return _traced(model, before)


def _live(path: str, module: nn.Module, first: Mapping[str, int]) -> ModuleNode:
    prefix = f"{path}." if path else ""
    children = [_live(prefix + name, child, first) for name, child in module.named_children()]
    return ModuleNode(
        path=path,
        kind=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        ran=path in first,
        children=tuple(sorted(children, key=lambda child: first.get(child.path, len(first)))),
    )


def _traced(model: nn.Module | ExportedProgram, before: Capture) -> ModuleNode:
    kinds: dict[str, str] = {"": type(model).__name__}
    for node in before.segments[0].graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for (_, call), (_, kind) in zip(modules_of(node), stack.values(), strict=True):
            for prefix in path_prefixes(clean(call))[1:]:
                kinds.setdefault(prefix, "")
            if clean(call):
                kinds[clean(call)] = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    below: dict[str, list[str]] = {}
    for path in kinds:
        if path:
            below.setdefault(path.rpartition(".")[0], []).append(path)

    def part(path: str) -> ModuleNode:
        inside = sum(n for name, n in sizes.items() if not path or name.startswith(f"{path}."))
        return ModuleNode(
            path=path, kind=kinds[path], parameters=inside, children=tuple(part(child) for child in below.get(path, ()))
        )

    return part("")
