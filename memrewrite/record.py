"""What a rewritten model records about its rewrite, so that it can be saved and exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RewriteRecord:
    """A rewrite: its recipe (YAML), its plan, report and module graphs (JSON), and the example inputs of a rewritten graph."""

    plan: str
    recipe: str | None = None
    report: str | None = None
    graphs: str | None = None  # of modules whose forward became a graph
    inputs: Any = None  # (args, kwargs) that an fx.GraphModule was captured with, to export it again
