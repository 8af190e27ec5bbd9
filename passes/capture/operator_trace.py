"""A graph of what really ran: for modules whose forward decides by values, which `torch.export` cannot follow.

Flow: the module runs on its inputs under a dispatch mode → every operator becomes a node, its tensors known by identity →
blocks that were captured by themselves stay single nodes. The graph holds for these inputs alone: loops are written out as
often as they went, numbers read from tensors are literals. It witnesses where the MLPs are; nothing runs it instead.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from operator import getitem
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from memrewrite.passes.graphs.provenance import TORCH
from memrewrite.passes.models.forward import Inputs, run


def record(module: nn.Module, inputs: Inputs, opaque: Collection[str] = ()) -> fx.GraphModule:
    """The graph of one forward of `module`; calls of the modules at the paths `opaque` are one node each."""
    tape = OperatorTrace(module, frozenset(opaque))
    return tape.play(inputs)


class OperatorTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that runs while it is entered."""

    def __init__(self, module: nn.Module, opaque: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module, self.opaque = module, opaque
        self.graph = fx.Graph()
        self.held: dict[str, Tensor] = {}  # what get_attr nodes name
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._node: Any = WeakTensorKeyDictionary()
        self._names = {id(t): name for name, t in [*module.named_buffers(), *module.named_parameters()]}
        self._stack: list[tuple[str, str, str]] = []  # call, path, class
        self._counts: dict[str, int] = {}
        self._muted = 0

    def play(self, inputs: Inputs) -> fx.GraphModule:
        """Run the module and return its graph, on its own weights."""
        out: Any = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal out
            for number, leaf in enumerate(tree_leaves((args, kwargs))):
                if isinstance(leaf, Tensor) and leaf not in self._node:
                    self._note(leaf, self.graph.placeholder(f"input_{number}"))
            with self:
                out = self.module(*args, **kwargs)
            return out

        handles = [h for path, m in self.module.named_modules() for h in self._hooks(path, m)]
        try:
            run(_Calling(self.module, forward), inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.graph.output(tuple(self._of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        self.graph.eliminate_dead_code(is_impure_node=_counts)  # what Python alone looked at
        return fx.GraphModule(dict(self.held), self.graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and note it."""
        out = func(*args, **(kwargs or {}))
        if not self._muted and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            given = tree_map(self._of, (args, kwargs or {}))
            self._note(out, self.graph.call_function(func, *given))
        return out

    def _of(self, leaf: Any) -> Any:
        """The node of a tensor: what made it, or the weight or constant it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf not in self._node:
            name = self._names.get(id(leaf), f"_constant_{len(self.held)}")
            self.held[name] = leaf
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                self._note(leaf, self.graph.get_attr(name))
        return self._node[leaf]

    def _note(self, value: Any, node: fx.Node) -> None:
        if node.op != "get_attr":
            node.meta["nn_module_stack"] = {call: (path, kind) for call, path, kind in self._stack}
            node.meta["stack_trace"] = _where(sys._getframe(1))
        if isinstance(value, Tensor):
            self._node[value] = node
            node.meta["val"] = self._shape(value)
        elif isinstance(value, (tuple, list)):
            node.meta["val"] = tree_map(self._shape, value)
            for number, item in enumerate(value):
                if isinstance(item, (Tensor, tuple, list)):
                    self._note(item, self.graph.call_function(getitem, (node, number)))

    def _shape(self, value: Any) -> Any:
        return self._fake.from_tensor(value.detach(), static_shapes=True) if isinstance(value, Tensor) else value

    def _hooks(self, path: str, module: nn.Module) -> list[Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            count = self._counts[path] = self._counts.get(path, -1) + 1
            self._stack.append((f"{path}@{count}" if count else path, path, type(module).__name__))
            self._muted += path in self.opaque

        def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self._muted -= path in self.opaque
            if path in self.opaque and not self._muted:
                given = [self._of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
                self._note(tuple(leaves), self.graph.call_function(captured_apart, (path, *given)))
            self._stack.pop()

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(leave, with_kwargs=True, always_call=False),
        ]


def captured_apart(path: str, *tensors: Tensor) -> Any:
    """Stands in a recorded graph for a block that has a graph of its own."""
    raise RuntimeError(f"the block {path!r} was captured by itself: this graph is to be read, not run")


def _counts(node: fx.Node) -> bool:
    """Whether a node without readers counts: it writes into what others read."""
    if not isinstance(node.target, OpOverload):
        return node.op != "call_function"
    into = node.all_input_nodes[0] if node.target._schema.is_mutable else None
    return into is not None and (into.op != "call_function" or set(into.users) != {node})


class _Calling(nn.Module):
    """A module whose call is another's, so that `run` seeds and copies for both."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module, self.forward = module, forward


def _where(frame: FrameType | None) -> str:
    """The innermost line of the model's own code."""
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH)):
        frame = frame.f_back
    return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}' if frame else ""
