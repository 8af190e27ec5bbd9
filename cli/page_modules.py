"""The model as it stands: modules in order, towers of blocks, MLPs and near misses at the module where they are.

Flow: the module tree is walked to its towers → blocks that look alike are folded → inside a block, only what has parameters
or marks is drawn.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from memrewrite.cli.page_html import Html, count, named, short, tag
from memrewrite.cli.page_marks import Marks, numbered, starred
from memrewrite.cli.page_rows import chips, miss_row, site_row

if TYPE_CHECKING:
    from memrewrite.module_node import ModuleNode


LISTS = ("", "ModuleList", "ModuleDict")

OFTEN = 8  # runs in a row, above which they are folded into one


class Drawing:
    """One drawing of a model. `counted` goes on counting blocks where one tower lies in several containers."""

    def __init__(self, root: ModuleNode, marks: Marks) -> None:
        self.root, self.marks = root, marks
        self.counted: dict[str, int] = {}
        self.seen: dict[object, str] = {}  # looks of a block -> the number of the first that looked so

    def model(self) -> Html:
        """The whole model."""
        return tag("div", *(self._walk(self.root) if self.root.children else [self._leaf(self.root)]), class_="model")

    def _walk(self, part: ModuleNode) -> list[Html]:
        """What is drawn for a module: a tower, a plain module, or its children when it holds towers."""
        if self.marks.is_tower(part):
            return [self._tower(part)]
        if part is not self.root and not self.marks.holds_tower(part):
            return [self._leaf(part)] if part.parameters or self.marks.holds(part) else []
        holding = [i for i, child in enumerate(part.children) if self.marks.holds_tower(child)]
        drawn = [self._walk(child) for child in part.children]
        if len(holding) > 1:  # side by side, or one under the other where they are stages of one stack
            columns = [self._column(part.children[i], drawn[i]) for i in holding]
            stages = all(part.children[i].path.rpartition(".")[2].isdigit() for i in holding)
            together = tag("div", *columns, class_="stages" if stages else "columns")
            drawn = [[together] if i == holding[0] else shown for i, shown in enumerate(drawn) if i not in holding[1:]]
        return [*(one for shown in drawn for one in shown), *self._own(part)]

    def _column(self, part: ModuleNode, drawn: list[Html]) -> Html:
        name = tag("h3", tag("code", named(part.path)), tag("span", part.kind, class_="class"))
        return tag("section", None if self.marks.is_tower(part) else name, *drawn, class_="column")

    def _leaf(self, part: ModuleNode) -> Html:
        """A module outside of every tower."""
        below = self._children(part, part.path) if any(map(self.marks.holds, part.children)) else []
        return tag("div", self._line(part, ""), *below, *self._own(part), class_="outside")

    def _line(self, part: ModuleNode, under: str) -> Html:
        """A module in a line: its name, class and size."""
        name = part.path.removeprefix(f"{under}.") if under else part.path
        size = tag("span", short(part.parameters), class_="size", title=f"{part.parameters:,} parameters")
        return tag(
            "div",
            tag("code", named(name or "(root)"), class_="name"),
            tag("span", part.kind, class_="class"),
            None if part.ran else tag("span", "did not run", class_="idle"),
            size if part.parameters else None,
            class_="line used" if part.path in self.marks.used else "line",
        )

    # ---------------------------------------------------------------------------------------------------- towers

    def _tower(self, tower: ModuleNode) -> Html:
        blocks = numbered(tower)
        others = [child for child in tower.children if child not in blocks]
        key = starred(tower.path)
        first = self.counted.get(key, 0)
        self.counted[key] = first + len(blocks)
        kinds = ", ".join(dict.fromkeys(block.kind for block in blocks))
        head = tag(
            "header",
            tag("code", named(tower.path), class_="name"),
            tag("span", f"{count(len(blocks), 'block')} of {kinds}", class_="class"),
            tag("span", short(tower.parameters), class_="size", title=f"{tower.parameters:,} parameters"),
        )
        drawn = [self._leaf(child) for child in others]
        runs = [list(run) for _, run in groupby(enumerate(blocks, first), lambda it: self.marks.likeness(it[1]))]
        known: list[list[tuple[int, ModuleNode]]] = []  # runs in a row of looks that were drawn already
        for run in runs:
            look = self.marks.likeness(run[0][1])
            if look not in self.seen:
                drawn += [*self._folds(known), self._block(*run[0])]
                self.seen[look], known, run = str(run[0][0]), [], run[1:]
            known += [run] if run else []
        drawn += self._folds(known)
        return tag("section", head, *drawn, *self._own(tower), class_="tower", data_tower=tower.path)

    def _folds(self, runs: list[list[tuple[int, ModuleNode]]]) -> list[Html]:
        """A fold for each run of blocks that look alike; one for all, where they alternate too often to be read."""
        return (
            [self._fold([block for run in runs for block in run])] if len(runs) > OFTEN else [self._fold(run) for run in runs]
        )

    def _fold(self, run: list[tuple[int, ModuleNode]]) -> Html:
        looks = list(dict.fromkeys(self.seen[self.marks.likeness(block)] for _, block in run))
        like = f"block {looks[0]}" if len(looks) == 1 else f"block {', '.join(looks[:-1])} or {looks[-1]}"
        numbers = f"block {run[0][0]}" if len(run) == 1 else f"blocks {run[0][0]}–{run[-1][0]}"
        which = "like" if len(run) == 1 else "all like" if len(looks) == 1 else "each like"
        summary = tag(
            "summary",
            tag("span", numbers, class_="number"),
            tag("span", f"{which} {like}", class_="alike"),
            chips(self.marks, [block for _, block in run]),
        )
        return tag("details", summary, *(self._block(*block) for block in run), class_="fold", data_alike=len(run))

    def _block(self, number: int, block: ModuleNode) -> Html:
        head = tag(
            "header",
            tag("span", f"block {number}", class_="number"),
            tag("span", block.kind, class_="class"),
            tag("span", short(block.parameters), class_="size", title=f"{block.parameters:,} parameters"),
        )
        return tag("article", head, *self._children(block, block.path), *self._own(block), class_="block")

    def _children(self, part: ModuleNode, under: str) -> list[Html]:
        """What is inside a module: lines for what has parameters, rows for what is marked, deeper where marks are.

        Names are given from `under` on; lists of modules do nothing themselves, and only lengthen the names of what they hold.
        """
        drawn = list[Html]()
        for child in part.children:
            own, deeper = self._own(child), any(map(self.marks.holds, child.children))
            if child.kind in LISTS and not own:
                drawn += self._children(child, under)
            elif not self.marks.holds(child):
                drawn += [self._line(child, under)] if child.parameters else []
            elif child.path in self.marks.sites and not deeper:  # its row names the module
                drawn += own
            else:
                inner = self._children(child, child.path) if deeper else []
                drawn += [self._line(child, under), tag("div", *inner, *own, class_="inner")]
        return drawn

    def _own(self, part: ModuleNode) -> list[Html]:
        """The marks at a module itself."""
        sites = [site_row(site, self.marks, part.kind) for site in self.marks.sites.get(part.path, ())]
        return [*sites, *(miss_row(miss) for miss in self.marks.misses.get(part.path, ()))]
