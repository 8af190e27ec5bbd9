"""A graph of the operators that ran: for modules with data-dependent control flow, which `torch.export` cannot trace.

Flow: the module runs on its inputs under a dispatch mode → every operator becomes a node; tensors are identified by object
identity → a block that was captured separately is a single node. The graph is valid for these inputs only: loops are unrolled,
and numbers read from tensors are literals. It shows where the MLPs are; it is never run in place of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack
from operator import getitem
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from memrewrite.errors import CaptureError, in_one_line
from memrewrite.passes.graphs.provenance import TORCH
from memrewrite.passes.models.call_recorder import hookable_modules
from memrewrite.passes.models.forward import Inputs, run
from memrewrite.passes.models.tensors import first_names


def record(module: nn.Module, inputs: Inputs, opaque: Collection[str] = ()) -> fx.GraphModule:
    """The graph of one forward of `module`; calls of the modules at the paths `opaque` are one node each."""
    return OperatorTrace(module, frozenset(opaque)).record(inputs)


class OperatorTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, records every operator that runs."""

    def __init__(self, module: nn.Module, opaque: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module, self.opaque = module, opaque
        self.graph = fx.Graph()
        self._objects: dict[int, str] = {}  # names of the targets that are no tensors
        self._tensors: dict[str, Any] = {}  # targets of get_attr nodes: weights and constants
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._node: Any = WeakTensorKeyDictionary()
        self._names = first_names(module)
        self._stack: list[tuple[str, str, str]] = []  # call, path, class
        self._calls: dict[str, int] = {}
        self._inside_opaque = 0

    def record(self, inputs: Inputs) -> fx.GraphModule:
        """Run the module on `inputs`; return the graph, which refers to the module's own weights."""
        out: Any = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal out
            for number, leaf in enumerate(tree_leaves((args, kwargs))):
                if isinstance(leaf, Tensor) and leaf not in self._node:
                    self._record_value(leaf, self.graph.placeholder(f"input_{number}"))
            with self:
                out = self.module(*args, **kwargs)
            return out

        with ExitStack() as hooks:
            for module, path in {m: path for path, m in reversed(hookable_modules(self.module))}.items():  # by first name
                self._add_hooks(path, module, hooks)
            called = type(type(self.module).__name__, (_CallThrough,), {})  # the name is in error messages
            run(called(self.module, forward), inputs)
        self.graph.output(tuple(self._of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        self.graph.eliminate_dead_code(is_impure_node=_mutates_used)  # values that only Python code read
        return fx.GraphModule(dict(self._tensors), self.graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and record it."""
        out = func(*args, **(kwargs or {}))
        if not self._inside_opaque and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            node_args, node_kwargs = tree_map(self._of, (args, kwargs or {}))
            self._record_value(out, self.graph.call_function(func, node_args, node_kwargs))
        return out

    def _of(self, leaf: Any) -> Any:
        """The node of a tensor: the operator that returned it, or the `get_attr` of a weight or constant."""
        if isinstance(leaf, torch.ScriptObject):  # packed weights of a quantized module
            name = self._objects.setdefault(id(leaf), f"_object_{len(self._objects)}")
            self._tensors[name] = leaf
            return self.graph.get_attr(name)
        if not isinstance(leaf, Tensor):
            return None if isinstance(leaf, torch.Generator) else leaf  # a graph has no generators: its code cannot name them
        if leaf not in self._node:
            name = self._names.get(id(leaf), f"_constant_{len(self._tensors)}")
            self._tensors[name] = leaf
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                self._record_value(leaf, self.graph.get_attr(name))
        return self._node[leaf]

    def _record_value(self, value: Any, node: fx.Node) -> None:
        """Record that `node` returned `value`, with its shape, modules and source line."""
        if node.op != "get_attr":
            node.meta["nn_module_stack"] = {call: (path, kind) for call, path, kind in self._stack}
            node.meta["stack_trace"] = _source_of(sys._getframe(1))
        if isinstance(value, Tensor):
            self._node[value] = node
            node.meta["val"] = self._shape(value)
        elif isinstance(value, (tuple, list)):
            node.meta["val"] = tree_map(self._shape, value)
            for number, item in enumerate(value):
                if isinstance(item, (Tensor, tuple, list)):
                    self._record_value(item, self.graph.call_function(getitem, (node, number)))

    def _shape(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        try:
            return self._fake.from_tensor(value.detach(), static_shapes=True)
        except Exception as error:  # torch raises many classes for tensors of which it cannot make a fake one
            form = f"{value.dtype}, {value.layout}".replace("torch.", "")
            path = next((path for _, path, _ in reversed(self._stack) if path), type(self.module).__name__)
            hint = "convert it before the model, or in a module of its own that returns a plain tensor"
            raise CaptureError(f"torch cannot trace a tensor ({form}): {in_one_line(error)}", where=path, hint=hint) from error

    def _add_hooks(self, path: str, module: nn.Module, hooks: ExitStack) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            count = self._calls[path] = self._calls.get(path, -1) + 1
            self._stack.append((f"{path}@{count}" if count else path, path, type(module).__name__))
            self._inside_opaque += path in self.opaque

        def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self._inside_opaque -= path in self.opaque
            if path in self.opaque and not self._inside_opaque:
                operands = [self._of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
                self._record_value(tuple(leaves), self.graph.call_function(captured_separately, (path, *operands)))
            self._stack.pop()

        hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


def captured_separately(path: str, *tensors: Tensor) -> Any:
    """The target of the node that represents a block with its own graph."""
    raise RuntimeError(f"the block {path!r} was captured separately: this graph is not for running")


def _mutates_used(node: fx.Node) -> bool:
    """True if the node must be kept although its result is unused: it mutates a tensor that other nodes read."""
    if not isinstance(node.target, OpOverload):
        return node.op != "call_function"
    mutated = node.all_input_nodes[0] if node.target._schema.is_mutable else None
    return mutated is not None and (mutated.op != "call_function" or set(mutated.users) != {node})


class _CallThrough(nn.Module):
    """Has the parameters of `module` and another forward: `run` seeds, copies inputs and calls `forward`."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module, self.forward = module, forward


def _source_of(frame: FrameType | None) -> str:
    """The innermost frame outside of torch and of this file, as a line of a traceback."""
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH)):
        frame = frame.f_back
    return f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}' if frame else ""
