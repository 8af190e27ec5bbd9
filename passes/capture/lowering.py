"""Lowers a graph of torch's own functions and modules, as `fx.symbolic_trace` and `torch.compile` make it, to an ATen graph.

Flow: weights become inputs → `make_fx` (pre-dispatch) traces an interpreter of the graph → for every node of the given graph,
the ATen node with its value. MLPs are found in the ATen graph; the given graph is edited, and keeps its modules and sizes.
"""

from __future__ import annotations

import copy
import inspect
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from memrewrite.errors import CaptureError, in_one_line
from memrewrite.passes.graphs.copying import copied
from memrewrite.passes.graphs.provenance import clean
from memrewrite.passes.models.forward import Inputs
from memrewrite.passes.models.state_guard import StateGuard

STACK = "nn_module_stack"


class Lowered(NamedTuple):
    """An ATen graph. All nodes are identified by name."""

    graph: fx.Graph
    weights: dict[str, str]  # placeholder -> parameter or buffer
    literals: dict[str, Tensor]  # get_attr -> a constant
    values: dict[str, str]  # node of the given graph, in its order -> ATen node
    written: tuple[str, ...]  # parameters and buffers that the graph mutates


def lower(module: fx.GraphModule, inputs: Inputs) -> Lowered:
    """The ATen graph of `module` on `inputs`; neither inputs nor weights are mutated.

    Raises `CaptureError` when the graph cannot be traced.
    """
    names, weights = _weights(module)
    leaves, spec = tree_flatten(_positional(module, inputs))
    lifted = [*(t for t in leaves if isinstance(t, Tensor)), *weights]
    interpreter = _Interpreter(module, _with_module_stacks(module))

    def flat(*tensors: Tensor) -> Any:
        values = iter(tensors)
        args = tree_unflatten([next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        state = {f"module.{name}": tensor for name, tensor in zip(names, values, strict=True)}
        with traceback.preserve_node_meta():
            return functional_call(interpreter, state, tuple(args))

    try:
        with StateGuard(module), torch.inference_mode(False), torch.no_grad():
            copies = [t.detach().clone() for t in lifted]
            traced = make_fx(flat, pre_dispatch=True)(*copies)
    except (Exception, SystemExit) as error:
        what = f"the graph could not be lowered to ATen: {in_one_line(error)}"
        raise CaptureError(what, where=interpreter.at, hint="does the graph module run on these inputs?") from error
    placeholders = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    first = len(lifted) - len(weights)  # the tensors among the arguments come before the weights
    constants = {n.name: attrgetter(str(n.target))(traced) for n in traced.graph.nodes if n.op == "get_attr"}
    literals = {name: value for name, value in constants.items() if isinstance(value, Tensor)}
    written = tuple(name for name, copied in zip(names, copies[first:], strict=True) if copied._version)
    by_placeholder = dict(zip(placeholders[first:], names, strict=True))
    return Lowered(traced.graph, by_placeholder, literals, interpreter.values, written)


class _Interpreter(nn.Module):
    """Runs a graph node by node, and records the proxy of each node's value."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__()
        self.module, self.graph = module, graph
        self.values: dict[str, str] = {}
        self.at: str | None = None

    def forward(self, *args: Any) -> Any:
        """What the module returns."""
        return _ProxyRecorder(self).run(*args)


class _ProxyRecorder(fx.Interpreter):
    def __init__(self, of: _Interpreter) -> None:
        super().__init__(of.module, graph=of.graph)
        self.of = of

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; the name of its proxy is recorded."""
        self.of.at = n.name
        value = super().run_node(n)
        mode = get_proxy_mode()
        if isinstance(value, Tensor) and mode is not None:
            slot: Any = get_proxy_slot(value, mode.tracer, None)
            if slot is not None:
                self.of.values[n.name] = slot.proxy.node.name
        return value


def _weights(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    """The names and values of the module's parameters and buffers; a tied tensor is one input, with its first name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # torch omits duplicates
    return list(named), list(named.values())


def _positional(module: fx.GraphModule, inputs: Inputs) -> tuple[Any, ...]:
    bound = inspect.signature(module.forward).bind(*inputs[0], **inputs[1])
    bound.apply_defaults()
    return bound.args


def _with_module_stacks(module: fx.GraphModule) -> fx.Graph:
    """A copy of the graph whose nodes have a module stack of plain paths, with the modules that the graph calls."""
    graph, copies = copied(module.graph.nodes)
    for node, copied_node in copies.items():
        stack = {str(key): (clean(str(path)), _class_name(kind)) for key, (path, kind) in (node.meta.get(STACK) or {}).items()}
        if node.op == "call_module" and [path for path, _ in stack.values()][-1:] != [node.target]:
            stack[node.name] = (str(node.target), _class_name(type(module.get_submodule(str(node.target)))))
        copied_node.meta = {**node.meta, STACK: stack}
    graph.set_codegen(copy.copy(module.graph._codegen))
    return graph


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
