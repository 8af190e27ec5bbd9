"""Makes the `GraphHost`s of the fields of graphs.json, node by node; nothing of the file becomes a name in the graph.

Each node is made anew, with a name of ours, of an allowed function and of plain values. So the source that torch.fx makes of
the graph consists of these, and of the names of weights, which `graph_host.put` compares with those of the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec

from memrewrite.passes.rewrite.graph_host import ANY, CONSTANT, GraphHost, Trace
from memrewrite.passes.storage.graph_data.fields import HostFields, Malformed, TraceFields, shown
from memrewrite.passes.storage.graph_data.functions import function_named, result_of
from memrewrite.passes.storage.graph_data.results import INT_BITS, NUMBER, OTHER, TENSOR, Result
from memrewrite.passes.storage.graph_data.specs import spec_from_data, spec_from_format_1
from memrewrite.passes.storage.graph_data.values import given_from_data, value_from_data

READ_SPEC = {1: spec_from_format_1, 2: spec_from_data}  # by format


def host_of(fields: HostFields, format_: int, *, trust_code: bool) -> GraphHost:
    """One host, without layers; its constants have a shape and a dtype, and no memory. Raises `Malformed`."""
    with _at(f"host {shown(fields.path)}"):
        if not fields.path:
            raise Malformed("the root of a model is no host")
        constants = {name: _constant(name, dtype, shape) for name, (dtype, shape) in fields.constants.items()}
        traces = {}
        for mode, trace in (("eval", fields.traces.eval), ("train", fields.traces.train)):
            with _at(mode):
                traces[mode == "train"] = _Reader(trace, frozenset(constants), READ_SPEC[format_], trust_code).trace()
        sites = {site for trace in traces.values() for site in trace.ends}
        for site in fields.skewed:
            if site not in sites:
                raise Malformed(f"skewed: no trace has the site {shown(site)}")
        return GraphHost(fields.path, traces, constants, frozenset(fields.skewed))


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Adds a place to what is malformed inside."""
    try:
        yield
    except Malformed as reason:
        raise Malformed(f"{place}: {reason}") from None


def _constant(name: str, dtype: Any, shape: list[int]) -> Tensor:
    with _at(f"constant {shown(name)}"):
        if not re.fullmatch(rf"{CONSTANT}_[0-9]{{1,9}}", name):
            raise Malformed(f"its name must be {CONSTANT}_ and a number")
        kind = value_from_data(dtype, {})
        if not isinstance(kind, torch.dtype) or any(n < 0 for n in shape):
            raise Malformed(f"{shown([dtype, shape])} is no dtype and shape")
        try:
            return torch.empty((), dtype=kind).expand(shape)  # of one element: a shape in a file must not take memory
        except RuntimeError:  # more elements than an integer can count, or a dtype that only quantized tensors have
            raise Malformed(f"no tensor has the dtype and shape {shown([dtype, shape])}") from None


@dataclass
class _Reader:
    """Reads one trace."""

    fields: TraceFields
    constants: frozenset[str]
    read_spec: Callable[[Any], TreeSpec]
    trust_code: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, fx.Node] = field(default_factory=dict)  # by their names in the file
    results: dict[fx.Node, Result] = field(default_factory=dict)

    def trace(self) -> Trace:
        """The trace. Raises `Malformed`."""
        specs = []
        for name, data in (("in", self.fields.in_spec), ("out", self.fields.out_spec)):
            with _at(name):
                specs.append(self.read_spec(data))
        in_spec, out_spec = specs
        if in_spec.type is not tuple or [child.type for child in in_spec.children()] != [tuple, dict]:
            raise Malformed("in: it must be a tuple of a tuple, the arguments, and a dict, the keyword arguments")
        given = []
        for number, data in enumerate(self.fields.given):
            with _at(f"given {number}"):
                given.append(given_from_data(data))
        self._read_nodes(given)
        arguments = sum(node.op == "placeholder" for node in self.graph.nodes)
        if not arguments == len(given) == in_spec.num_leaves:
            raise Malformed(
                f"in: it has {in_spec.num_leaves} arguments, and there are {arguments} placeholders and {len(given)} given"
            )
        outputs = len(next(reversed(self.graph.nodes)).args[0])
        if outputs != out_spec.num_leaves:
            raise Malformed(f"out: it has {out_spec.num_leaves} results, and the node output has {outputs}")
        return Trace(self.graph, in_spec, out_spec, tuple(given), self._ends())

    def _read_nodes(self, given: list[Any]) -> None:
        arguments = iter(given)
        for number, (name, op, target, args, kwargs) in enumerate(self.fields.nodes):
            with _at(f"node {number}, {shown(name)}"):
                if name in self.nodes:
                    raise Malformed("another node has this name")
                if (op == "output") != (number == len(self.fields.nodes) - 1):
                    raise Malformed("the last node, and no other, must be the output")
                if op in ("placeholder", "get_attr") and (args or kwargs):
                    raise Malformed(f"a {op} has no arguments")
                node = self._node(f"n{number}", op, target, self._value(args), {k: self._value(v) for k, v in kwargs.items()})
                self.nodes[name] = node
                if op == "placeholder":
                    self.results[node] = _result_of_argument(next(arguments, None))
        if not self.fields.nodes:
            raise Malformed("there is no node output")

    def _value(self, data: Any) -> Any:
        return value_from_data(data, self.nodes)

    def _node(self, name: str, op: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        """A node of the graph; a placeholder has the target `name`, and `target` is not used."""
        if op == "placeholder":
            return self.graph.create_node(op, name, (), {}, name)
        if op == "get_attr":
            if target.startswith(CONSTANT) and target not in self.constants:
                raise Malformed(f"there is no constant {shown(target)}")
            node = self.graph.create_node(op, target, (), {}, name)
            self.results[node] = TENSOR
            return node
        if op == "call_function":
            function = function_named(target, trust_code=self.trust_code)
            result = result_of(function, args, kwargs, self.results)
            node = self.graph.create_node(op, function, tuple(args), kwargs, name)
            self.results[node] = result
            return node
        if target != "output" or kwargs or len(args) != 1 or not isinstance(args[0], tuple):
            raise Malformed("the output has one argument, a tuple of results")
        if any(isinstance(each, (list, tuple)) for each in args[0]):
            raise Malformed("a result is a node, a number, a text, or none")
        return self.graph.create_node(op, "output", tuple(args), {}, "output")

    def _ends(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """The ends of every site, by our names."""
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        ends = {}
        for site, pairs in self.fields.ends.items():
            with _at(f"ends of {shown(site)}"):
                for pair in pairs:
                    for name in pair:
                        if name not in self.nodes or self.results.get(self.nodes[name]) != TENSOR:
                            raise Malformed(f"{shown(name)} is no node that returns a tensor")
                    x, y = (self.nodes[name] for name in pair)
                    if order[x] >= order[y] or y.op != "call_function":
                        raise Malformed(f"{shown(pair[1])} is not computed after {shown(pair[0])}")
                ends[site] = tuple((self.nodes[x].name, self.nodes[y].name) for x, y in pairs)
        return ends


def _result_of_argument(given: Any) -> Result:
    if isinstance(given, tuple):
        return TENSOR
    if given is ANY or isinstance(given, int):
        return Result("number", bits=INT_BITS)
    return NUMBER if isinstance(given, float) else OTHER
