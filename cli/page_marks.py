"""Which sites, near misses and new layers the HTML page shows at which module of the tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memrewrite.module_node import ModuleNode
    from memrewrite.plans import Plan, Substitution
    from memrewrite.site import Inspection, NearMiss, Site


class Marks:
    """The sites and near misses of a model by the path of the module that shows them, and the model's towers."""

    def __init__(self, root: ModuleNode, inspection: Inspection, plan: Plan | None) -> None:
        self.plan = plan
        self.layers: dict[str, Substitution] = {s.site.path: s for s in plan.substitutions} if plan else {}
        self.anchors = {site.path: f"site-{i}" for i, site in enumerate(inspection.sites)}
        self.towers = {site.tower for site in inspection.sites if site.block is not None}
        self.sites: dict[str, list[Site]] = {}
        self.misses: dict[str, list[NearMiss]] = {}
        known = {node.path for node in walk(root)}
        for site in inspection.sites:
            self.sites.setdefault(_nearest_module(site.path.partition("#")[0], known), []).append(site)
        for miss in inspection.near_misses:
            self.misses.setdefault(_nearest_module(miss.path, known), []).append(miss)
        spread = [site for site in inspection.sites if any(binding.kind != "module" for binding in site.bindings)]
        self.used = {prefix for site in spread for module in site.modules for prefix in _prefixes(module)}
        self.marked = {prefix for path in (*self.sites, *self.misses) for prefix in _prefixes(path)}

    def contains_marks(self, node: ModuleNode) -> bool:
        """True if a module, or a module inside it, has a mark."""
        return node.path in self.marked

    def is_tower(self, node: ModuleNode) -> bool:
        """True for a stack of blocks: the tower of a site, or else numbered modules of one class."""
        if wildcard_path(node.path) in self.towers:
            return bool(node.children)
        numbered = len(node.children) > 1 and all(_number(child) is not None for child in node.children)
        deep = all(child.children for child in node.children) and len({child.kind for child in node.children}) == 1
        return numbered and deep and not any(wildcard_path(p.path) in self.towers for p in walk(node))

    def contains_tower(self, node: ModuleNode) -> bool:
        """True if a module is, or contains, a stack of blocks."""
        return self.is_tower(node) or any(self.contains_tower(child) for child in node.children)

    def towers_of(self, node: ModuleNode) -> list[ModuleNode]:
        """The outermost stacks of blocks in a module."""
        return [node] if self.is_tower(node) else [tower for child in node.children for tower in self.towers_of(child)]

    def signature(self, block: ModuleNode) -> object:
        """Equal for two blocks with the same modules, sizes, MLPs, near misses and layers; block numbers are ignored."""
        found: list[object] = []
        for node in walk(block):
            at = node.path[len(block.path) :]
            found.append((at, node.kind, node.parameters))
            found += [(at, *_of_site(site), *_of_layer(self.layers.get(site.path))) for site in self.sites.get(node.path, ())]
            found += [(at, re.sub(r"`[^`]*`", "`", miss.reason)) for miss in self.misses.get(node.path, ())]
        return tuple(found)

    def inside(self, node: ModuleNode) -> tuple[list[Site], list[NearMiss]]:
        """All sites and near misses at a module and inside it."""
        paths = [p.path for p in walk(node)]
        return [s for path in paths for s in self.sites.get(path, ())], [m for path in paths for m in self.misses.get(path, ())]


def walk(node: ModuleNode) -> Iterator[ModuleNode]:
    """A module and all modules inside it, depth first."""
    yield node
    for child in node.children:
        yield from walk(child)


def numbered(tower: ModuleNode) -> list[ModuleNode]:
    """The blocks of a tower, in the order of their numbers."""
    return sorted((child for child in tower.children if _number(child) is not None), key=lambda c: _number(c) or 0)


def _number(node: ModuleNode) -> int | None:
    name = node.path.rpartition(".")[2]
    return int(name) if name.isdigit() else None


def wildcard_path(path: str) -> str:
    """A path with `*` for its numbers: the same for all stages of one tower."""
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _nearest_module(path: str, known: set[str]) -> str:
    """The longest prefix of a path that is a module of the tree."""
    return next(prefix for prefix in reversed(_prefixes(path)) if prefix in known)


def _of_site(site: Site) -> tuple[object, ...]:
    kinds = tuple(binding.kind for binding in site.bindings)
    return (site.pattern, site.d_in, site.d_hidden, site.d_model, site.activation, site.calls, site.weights, kinds)


def _of_layer(substitution: Substitution | None) -> tuple[object, ...]:
    return (substitution.kind, substitution.pool, substitution.placement, str(substitution.options)) if substitution else ()
