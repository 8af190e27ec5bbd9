"""What is drawn where: every site and near miss at one module of the tree, and what a plan makes of the sites."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memrewrite.module_node import ModuleNode
    from memrewrite.plans import Plan, Substitution
    from memrewrite.site import Inspection, NearMiss, Site


class Marks:
    """The sites and near misses of a model by the path of the module they are drawn at, and where its towers are."""

    def __init__(self, root: ModuleNode, located: Inspection, plan: Plan | None) -> None:
        self.plan = plan
        self.made: dict[str, Substitution] = {s.site.path: s for s in plan.substitutions} if plan else {}
        self.anchors = {site.path: f"site-{i}" for i, site in enumerate(located.sites)}
        self.towers = {site.tower for site in located.sites if site.block is not None}
        self.sites: dict[str, list[Site]] = {}
        self.misses: dict[str, list[NearMiss]] = {}
        known = {part.path for part in everything(root)}
        for site in located.sites:
            self.sites.setdefault(_home(site.path.partition("#")[0], known), []).append(site)
        for miss in located.near_misses:
            self.misses.setdefault(_home(miss.path, known), []).append(miss)
        spread = [site for site in located.sites if any(binding.kind != "module" for binding in site.bindings)]
        self.used = {prefix for site in spread for module in site.modules for prefix in _prefixes(module)}
        self.marked = {prefix for path in (*self.sites, *self.misses) for prefix in _prefixes(path)}

    def holds(self, part: ModuleNode) -> bool:
        """Whether anything is marked at a module or below it."""
        return part.path in self.marked

    def is_tower(self, part: ModuleNode) -> bool:
        """Whether a module is a stack of blocks: one that sites are counted in, else one of like modules in a row."""
        if starred(part.path) in self.towers:
            return bool(part.children)
        numbered = len(part.children) > 1 and all(_number(child) is not None for child in part.children)
        deep = all(child.children for child in part.children) and len({child.kind for child in part.children}) == 1
        return numbered and deep and not any(starred(p.path) in self.towers for p in everything(part))

    def holds_tower(self, part: ModuleNode) -> bool:
        """Whether a module is a stack of blocks or holds one."""
        return self.is_tower(part) or any(self.holds_tower(child) for child in part.children)

    def towers_of(self, part: ModuleNode) -> list[ModuleNode]:
        """The stacks of blocks in a module, outermost ones."""
        return [part] if self.is_tower(part) else [tower for child in part.children for tower in self.towers_of(child)]

    def likeness(self, block: ModuleNode) -> object:
        """Equal for two blocks that look alike: the same modules, sizes, MLPs, refusals and layers; numbers aside."""
        found: list[object] = []
        for part in everything(block):
            at = part.path[len(block.path) :]
            found.append((at, part.kind, part.parameters))
            found += [(at, *_of_site(site), *_of_layer(self.made.get(site.path))) for site in self.sites.get(part.path, ())]
            found += [(at, re.sub(r"`[^`]*`", "`", miss.reason)) for miss in self.misses.get(part.path, ())]
        return tuple(found)

    def inside(self, part: ModuleNode) -> tuple[list[Site], list[NearMiss]]:
        """Everything marked at a module and below."""
        paths = [p.path for p in everything(part)]
        return [s for path in paths for s in self.sites.get(path, ())], [m for path in paths for m in self.misses.get(path, ())]


def everything(part: ModuleNode) -> Iterator[ModuleNode]:
    """A module and all below it."""
    yield part
    for child in part.children:
        yield from everything(child)


def numbered(tower: ModuleNode) -> list[ModuleNode]:
    """The blocks of a tower, in the order of their numbers."""
    return sorted((child for child in tower.children if _number(child) is not None), key=lambda c: _number(c) or 0)


def _number(part: ModuleNode) -> int | None:
    name = part.path.rpartition(".")[2]
    return int(name) if name.isdigit() else None


def starred(path: str) -> str:
    """A path with its numbers as `*`: the same for the stages of one tower."""
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _home(path: str, known: set[str]) -> str:
    """The module of the tree that a path lies at, or in."""
    return next(prefix for prefix in reversed(_prefixes(path)) if prefix in known)


def _of_site(site: Site) -> tuple[object, ...]:
    kinds = tuple(binding.kind for binding in site.bindings)
    return (site.pattern, site.d_in, site.d_hidden, site.d_model, site.activation, site.calls, site.weights, kinds)


def _of_layer(made: Substitution | None) -> tuple[object, ...]:
    return (made.kind, made.pool, made.placement, str(made.options)) if made else ()
