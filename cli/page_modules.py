"""The module tree on the HTML page: modules in order, towers (stacks of blocks), and MLPs and near misses at their modules.

Flow: walk the module tree to its towers → fold equal blocks → inside a block, show only modules with parameters or marks.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from memrewrite.cli.page_html import Html, breakable, count, short, tag
from memrewrite.cli.page_marks import Marks, numbered, wildcard_path
from memrewrite.cli.page_rows import chips, miss_row, site_row

if TYPE_CHECKING:
    from memrewrite.module_node import ModuleNode


LISTS = ("", "ModuleList", "ModuleDict")

MAX_FOLDS = 8  # more consecutive runs of equal blocks are folded into one


class Drawing:
    """The HTML of a module tree. `counted` continues the block numbers of a tower that is split over several containers."""

    def __init__(self, root: ModuleNode, marks: Marks) -> None:
        self.root, self.marks = root, marks
        self.counted: dict[str, int] = {}
        self.seen: dict[object, str] = {}  # signature of a block -> number of the first block with it

    def model(self) -> Html:
        """The whole model."""
        return tag("div", *(self._walk(self.root) if self.root.children else [self._leaf(self.root)]), class_="model")

    def _walk(self, node: ModuleNode) -> list[Html]:
        """The HTML of a module: a tower, a plain module, or its children if it contains towers."""
        if self.marks.is_tower(node):
            return [self._tower(node)]
        if node is not self.root and not self.marks.contains_tower(node):
            return [self._leaf(node)] if node.parameters or self.marks.contains_marks(node) else []
        with_tower = [i for i, child in enumerate(node.children) if self.marks.contains_tower(child)]
        drawn = [self._walk(child) for child in node.children]
        if len(with_tower) > 1:  # in columns, or in rows if they are stages of one stack
            columns = [self._column(node.children[i], drawn[i]) for i in with_tower]
            stages = all(node.children[i].path.rpartition(".")[2].isdigit() for i in with_tower)
            together = tag("div", *columns, class_="stages" if stages else "columns")
            drawn = [[together] if i == with_tower[0] else shown for i, shown in enumerate(drawn) if i not in with_tower[1:]]
        return [*(one for shown in drawn for one in shown), *self._own(node)]

    def _column(self, node: ModuleNode, drawn: list[Html]) -> Html:
        name = tag("h3", tag("code", breakable(node.path)), tag("span", node.kind, class_="class"))
        return tag("section", None if self.marks.is_tower(node) else name, *drawn, class_="column")

    def _leaf(self, node: ModuleNode) -> Html:
        """A module outside all towers."""
        below = self._children(node, node.path) if any(map(self.marks.contains_marks, node.children)) else []
        return tag("div", self._line(node, ""), *below, *self._own(node), class_="outside")

    def _line(self, node: ModuleNode, under: str) -> Html:
        """One line for a module: name, class and size."""
        name = node.path.removeprefix(f"{under}.") if under else node.path
        size = tag("span", short(node.parameters), class_="size", title=f"{node.parameters:,} parameters")
        return tag(
            "div",
            tag("code", breakable(name or "(root)"), class_="name"),
            tag("span", node.kind, class_="class"),
            None if node.ran else tag("span", "did not run", class_="idle"),
            size if node.parameters else None,
            class_="line used" if node.path in self.marks.used else "line",
        )

    # ---------------------------------------------------------------------------------------------------- towers

    def _tower(self, tower: ModuleNode) -> Html:
        blocks = numbered(tower)
        others = [child for child in tower.children if child not in blocks]
        key = wildcard_path(tower.path)
        first = self.counted.get(key, 0)
        self.counted[key] = first + len(blocks)
        kinds = ", ".join(dict.fromkeys(block.kind for block in blocks))
        head = tag(
            "header",
            tag("code", breakable(tower.path), class_="name"),
            tag("span", f"{count(len(blocks), 'block')} of {kinds}", class_="class"),
            tag("span", short(tower.parameters), class_="size", title=f"{tower.parameters:,} parameters"),
        )
        drawn = [self._leaf(child) for child in others]
        runs = [list(run) for _, run in groupby(enumerate(blocks, first), lambda it: self.marks.signature(it[1]))]
        known: list[list[tuple[int, ModuleNode]]] = []  # consecutive runs whose signature was shown already
        for run in runs:
            signature = self.marks.signature(run[0][1])
            if signature not in self.seen:
                drawn += [*self._folds(known), self._block(*run[0])]
                self.seen[signature], known, run = str(run[0][0]), [], run[1:]
            known += [run] if run else []
        drawn += self._folds(known)
        return tag("section", head, *drawn, *self._own(tower), class_="tower", data_tower=tower.path)

    def _folds(self, runs: list[list[tuple[int, ModuleNode]]]) -> list[Html]:
        """One fold per run of equal blocks; a single fold if there are more than `MAX_FOLDS` runs."""
        if len(runs) > MAX_FOLDS:
            return [self._fold([block for run in runs for block in run])]
        return [self._fold(run) for run in runs]

    def _fold(self, run: list[tuple[int, ModuleNode]]) -> Html:
        first = list(dict.fromkeys(self.seen[self.marks.signature(block)] for _, block in run))
        like = f"block {first[0]}" if len(first) == 1 else f"block {', '.join(first[:-1])} or {first[-1]}"
        numbers = f"block {run[0][0]}" if len(run) == 1 else f"blocks {run[0][0]}–{run[-1][0]}"
        which = "like" if len(run) == 1 else "all like" if len(first) == 1 else "each like"
        summary = tag(
            "summary",
            tag("span", numbers, class_="number"),
            tag("span", f"{which} {like}", class_="similar"),
            chips(self.marks, [block for _, block in run]),
        )
        return tag("details", summary, *(self._block(*block) for block in run), class_="fold", data_similar=len(run))

    def _block(self, number: int, block: ModuleNode) -> Html:
        head = tag(
            "header",
            tag("span", f"block {number}", class_="number"),
            tag("span", block.kind, class_="class"),
            tag("span", short(block.parameters), class_="size", title=f"{block.parameters:,} parameters"),
        )
        return tag("article", head, *self._children(block, block.path), *self._own(block), class_="block")

    def _children(self, node: ModuleNode, under: str) -> list[Html]:
        """The inside of a module: a line per module with parameters, a row per mark, recursively where there are marks.

        Names are relative to `under`. Module lists get no line; they only appear in the names of their children.
        """
        drawn = list[Html]()
        for child in node.children:
            own, deeper = self._own(child), any(map(self.marks.contains_marks, child.children))
            if child.kind in LISTS and not own:
                drawn += self._children(child, under)
            elif not self.marks.contains_marks(child):
                drawn += [self._line(child, under)] if child.parameters else []
            elif child.path in self.marks.sites and not deeper:  # the row of the site shows the module's name
                drawn += own
            else:
                inner = self._children(child, child.path) if deeper else []
                drawn += [self._line(child, under), tag("div", *inner, *own, class_="inner")]
        return drawn

    def _own(self, node: ModuleNode) -> list[Html]:
        """The rows of the marks at a module itself."""
        sites = [site_row(site, self.marks, node.kind) for site in self.marks.sites.get(node.path, ())]
        return [*sites, *(miss_row(miss) for miss in self.marks.misses.get(node.path, ()))]
