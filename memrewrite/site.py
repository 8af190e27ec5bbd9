"""What was located in a model, as plain data: `Site`, `NearMiss`, and the `Binding` by which the live model is edited."""

from __future__ import annotations

from typing import Literal

from memrewrite.cost import Cost, dense_cost
from memrewrite.frozen import Frozen


class Binding(Frozen):
    """How a site is reached in the live module tree.

    module: one module reads the MLP's input and returns its output; it is both entry and exit.
    span:   the modules at `entries` read the input, the module at `exit` returns the output, other code runs in between.
    graph:  the module at `exit` contains the whole MLP, but no submodule starts or ends there, for the reason in `why`; the
            module's forward becomes a graph.
    none:   no module can be edited, for the reason in `why`. The graph emitter can still rewrite the MLP.
    """

    kind: Literal["module", "span", "graph", "none"]
    entries: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()  # features each entry returns; none: entries are kept, and their input is recorded
    takes: int | str = 0  # position or keyword, among an entry's arguments, of the MLP's input
    alone: bool = True  # the exit of a module is called with the input and nothing else
    gives: tuple[int, int] | None = None  # which item is the output, and of how many, where the exit returns a tuple
    exit: str = ""
    why: str = ""


class Site(Frozen):
    """One located MLP.

    `path` is the narrowest module that contains the whole MLP, `block` its index in the stack of blocks `tower`
    (`None` outside of one). `d_model` is the width of the output, `d_in` of the input, `d_hidden` of the value the last
    matrix reads. `calls` counts runs in one forward. `parameters` names every weight and bias inside.
    """

    path: str
    pattern: str
    d_model: int
    d_in: int
    d_hidden: int
    activation: str
    axis: int = -1  # of the features in the input and the output, as the model lays them out: -1, but for convolutions
    calls: int
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    weights: int  # entries of the matrices
    active: int  # multiplications by them for one token: fewer in a mixture of experts
    biases: int  # entries of everything else
    dtype: str
    device: str
    tower: str
    block: int | None
    tower_blocks: int
    bindings: tuple[Binding, ...]  # one, but for weights that several modules share

    def cost(self) -> Cost:
        """Cost of this MLP for one token and one call."""
        return dense_cost(self.weights, self.biases, itemsize_of(self.dtype), self.active)


class NearMiss(Frozen):
    """A region that looked like an MLP and was rejected: why, at which graph node, from which source line, by which rule."""

    path: str
    reason: str
    node: str
    source: str = ""
    rule: str = ""  # the name of the rule; "" in files of earlier versions


class Inspection(Frozen):
    """What `locate` found: the sites in the order they run, the near misses, and how the model was captured."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    captured: str


def itemsize_of(dtype: str) -> int:
    """Bytes of one element of a dtype given by its torch name."""
    import torch

    size: int = getattr(torch, dtype).itemsize
    return size
