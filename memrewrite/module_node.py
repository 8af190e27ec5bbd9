"""The tree of a model's modules as plain data, for drawing: `ModuleNode`."""

from __future__ import annotations

from memrewrite.frozen import Frozen


class ModuleNode(Frozen):
    """One module.

    Attributes:
        path: Module path, "" for the root.
        kind: Class name; "" where a traced model no longer has it.
        parameters: Number of parameters inside it, shared ones counted once.
        ran: True if it, or a module inside it, ran on the example inputs.
        children: Child modules in the order in which they first ran.
    """

    path: str
    kind: str
    parameters: int
    ran: bool = True
    children: tuple[ModuleNode, ...] = ()
