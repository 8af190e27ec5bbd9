"""The tree of a model's modules as plain data, for drawing: `ModuleNode`."""

from __future__ import annotations

from memrewrite.frozen import Frozen


class ModuleNode(Frozen):
    """One module: its path, its class ("" where a traced model forgot it), and its children in the order they first ran.

    `parameters` counts those inside it, each once. `ran` says whether it, or anything inside it, ran on the example inputs.
    """

    path: str
    kind: str
    parameters: int
    ran: bool = True
    children: tuple[ModuleNode, ...] = ()
