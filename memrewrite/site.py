"""What was found in a model, as plain data: `Site`, `NearMiss`, and `Binding`: how the module tree is edited."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

from memrewrite.cost import Cost, dense_cost
from memrewrite.frozen import Frozen

if TYPE_CHECKING:
    import torch


class Binding(Frozen):
    """How a site is edited in the module tree.

    Attributes:
        kind: "module": one module takes the MLP's input and returns its output; it is both entry and exit.
            "span": the modules at `entries` read the input, the module at `exit` returns the output, and other code runs
            in between. "graph": the module at `exit` contains the whole MLP, but no submodule starts or ends there; its
            forward is replaced by its exported graph. "none": the module tree cannot be edited there; `advice`
            says what may help.
        entries: Paths of the modules that read the MLP's input.
        widths: Features that each entry returns. Empty: the entries are not replaced; pre-hooks only read their input.
        takes: Position or keyword of the MLP's input among an entry's arguments.
        alone: True if the input is the only argument that the exit of a "module" binding is called with.
        gives: `(index, length)` of the MLP's output in the tuple that the exit returns; None if it returns the output.
        exit: Path of the module that returns the output.
        why: Reason for "graph" and "none".
        advice: What to try for "none".
    """

    kind: Literal["module", "span", "graph", "none"]
    entries: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    takes: int | str = 0
    alone: bool = True
    gives: tuple[int, int] | None = None
    exit: str = ""
    why: str = ""
    advice: str = ""


class Site(Frozen):
    """One located MLP.

    Attributes:
        path: Narrowest module that contains the whole MLP.
        pattern: How its matrices are arranged, such as "gated".
        d_model: Width of the output.
        d_in: Width of the input.
        d_hidden: Width of the value that the last matrix reads.
        activation: Name of the activation function.
        axis: Feature axis of input and output: -1, except for convolutions.
        calls: Number of runs in one forward, of those whose result is read.
        unused_calls: Number of further runs, such as those on a copy of the input whose result nothing reads.
        parameters: Names of all weights and biases inside: those that the example used, then the others of the modules that a
            `replace` removes, such as experts that no token visited, and buffers.
        modules: Paths of the modules inside.
        weights: Entries of all matrices.
        active: Matrix entries that one token is multiplied by: fewer than `weights` in a mixture of experts.
        biases: Entries of all other parameters.
        dtype: Dtype of the parameters, by its torch name.
        device: Device of the parameters.
        tower: Path of the stack of blocks that contains it, "" outside of one.
        block: Index of its block in `tower`, or None.
        tower_blocks: Number of blocks in `tower`.
        bindings: How it is edited: one binding, or several where modules share the weights.
    """

    path: str
    pattern: str
    d_model: int
    d_in: int
    d_hidden: int
    activation: str
    axis: int = -1
    calls: int
    unused_calls: int = 0
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    weights: int
    active: int
    biases: int
    dtype: str
    device: str
    tower: str
    block: int | None
    tower_blocks: int
    bindings: tuple[Binding, ...]

    def relative_to(self, prefix: str) -> Site:
        """This site in the module at `prefix`, which contains it."""
        return self._renamed(lambda path: relative(path, prefix))

    def moved_into(self, prefix: str) -> Site:
        """This site in a model that contains this one at `prefix`."""
        return self._renamed(lambda path: joined(prefix, path))

    def _renamed(self, new: Callable[[str], str]) -> Site:
        """The site with other paths."""
        bindings = tuple(
            b.model_copy(update={"entries": tuple(map(new, b.entries)), "exit": new(b.exit)}) for b in self.bindings
        )
        tower = new(self.tower) if self.tower else ""
        names = {"parameters": tuple(map(new, self.parameters)), "modules": tuple(map(new, self.modules))}
        return self.model_copy(update={"path": new(self.path), "tower": tower, **names, "bindings": bindings})

    def cost(self) -> Cost:
        """Cost of this MLP for one token and one call."""
        return dense_cost(self.weights, self.biases, itemsize_of(self.dtype), self.active)


class NearMiss(Frozen):
    """A region that looked like an MLP and was refused.

    Attributes:
        path: Module that contains it.
        reason: Why it was refused.
        node: Graph node at which it was refused.
        source: Source line of this node, `file:line`.
        rule: Name of the rule that refused it; "" in files of earlier versions.
    """

    path: str
    reason: str
    node: str
    source: str = ""
    rule: str = ""


class Inspection(Frozen):
    """What `memrewrite.inspect` found.

    Attributes:
        sites: The MLPs, in the order in which they run.
        near_misses: Regions that looked like MLPs and were refused.
        captured: How the model was captured.
    """

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    captured: str


def relative(path: str, prefix: str) -> str:
    """A path in a model as a path in the module at `prefix`; unchanged if it is not inside."""
    return "" if path == prefix else path.removeprefix(f"{prefix}.")


def joined(prefix: str, path: str) -> str:
    """The path of what is at `path` in the module at `prefix`."""
    return ".".join(filter(None, (prefix, path)))


def itemsize_of(dtype: str) -> int:
    """Bytes of one element of a dtype, named as in torch ("bfloat16")."""
    return dtype_named(dtype).itemsize


def dtype_named(name: str) -> torch.dtype:
    """The dtype of torch with this name ("bfloat16"). Raises ValueError for any other name: it may come from a file."""
    found = _dtypes().get(name)
    if found is None:
        raise ValueError(f"{name!r} is no dtype of torch")
    return found


@cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
