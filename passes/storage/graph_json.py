"""Modules that became graphs, as JSON and back: loading a saved model captures nothing and runs no saved code.

A graph is written node by node. The only functions that a file can name are operators of `torch.ops` and Python's arithmetic.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._pytree import treespec_dumps, treespec_loads

from memrewrite.errors import CheckpointError, ModelError
from memrewrite.passes.rewrite.graph_host import ANY, GraphHost, Trace

GRAPHS = "graphs.json"
FORMAT = 1
MODULES = {"_operator": operator, "math": math}
SYMBOLIC = ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_sum", "sym_sqrt")  # torch's, on sizes
KINDS: dict[str, type[Any]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def hosts_to_json(hosts: Mapping[str, GraphHost]) -> str:
    """The graphs of `hosts` as JSON text. Raises `ModelError` for a function or value that cannot be written."""
    return json.dumps({"graphs": FORMAT, "hosts": [_host(host) for host in hosts.values()]}, indent=1)


def hosts_from_json(text: str) -> dict[str, GraphHost]:
    """The hosts in a text of `hosts_to_json`, without layers, by path. Raises `CheckpointError` for any other text."""
    try:
        data = json.loads(text)
        if data["graphs"] != FORMAT:
            raise CheckpointError(f"graphs.json has format {data['graphs']}, this version reads {FORMAT}")
        return {host["path"]: _read_host(host) for host in data["hosts"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"graphs.json cannot be read: {error}", hint="save the model again") from error


def _host(host: GraphHost) -> dict[str, Any]:
    constants = {name: [_value(value.dtype), list(value.shape)] for name, value in host.constants.items()}
    traces = {("train" if training else "eval"): _trace(trace) for training, trace in host.traces.items()}
    return {"path": host.path, "constants": constants, "skewed": sorted(host.skewed), "traces": traces}


def _read_host(data: Mapping[str, Any]) -> GraphHost:
    constants = {name: torch.empty(shape, dtype=_read(dtype, {})) for name, (dtype, shape) in data["constants"].items()}
    traces = {mode == "train": _read_trace(trace) for mode, trace in data["traces"].items()}
    return GraphHost(data["path"], traces, constants, frozenset(data["skewed"]))


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "in": json.loads(treespec_dumps(trace.in_spec)),
        "out": json.loads(treespec_dumps(trace.out_spec)),
        "given": [_value(given) for given in trace.given],
        "ends": {site: [list(pair) for pair in pairs] for site, pairs in trace.ends.items()},
        "nodes": [_node(node) for node in trace.graph.nodes],
    }


def _read_trace(data: Mapping[str, Any]) -> Trace:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for name, op, target, args, kwargs in data["nodes"]:
        function = _function(target) if op == "call_function" else target
        nodes[name] = graph.create_node(
            op, function, tuple(_read(args, nodes)), {k: _read(v, nodes) for k, v in kwargs.items()}, name
        )
        if nodes[name].name != name:
            raise ValueError(f"two nodes have the name {name!r}")
    ends = {site: tuple((x, y) for x, y in pairs) for site, pairs in data["ends"].items()}
    in_spec, out_spec = (treespec_loads(json.dumps(data[key])) for key in ("in", "out"))
    return Trace(graph, in_spec, out_spec, tuple(_read(given, nodes) for given in data["given"]), ends)


def _node(node: fx.Node) -> list[Any]:
    target = node.target if isinstance(node.target, str) else _named(node.target)
    return [node.name, node.op, target, [_value(arg) for arg in node.args], {k: _value(v) for k, v in node.kwargs.items()}]


def _named(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in MODULES or (module == "torch" and name in SYMBOLIC):
        return f"{module}.{name}"
    raise ModelError(f"a graph that calls {target!r} cannot be saved")


def _function(name: str) -> Any:
    module, _, last = name.rpartition(".")
    if name.startswith("torch.ops."):
        namespace, packet, overload = name.removeprefix("torch.ops.").split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        if isinstance(found, OpOverload):
            return found
    if module in MODULES and last.isidentifier() and not last.startswith("_"):
        return getattr(MODULES[module], last)
    if module == "torch" and last in SYMBOLIC:
        return getattr(torch, last)
    raise ValueError(f"it names the function {name!r}, which is not allowed")


def _value(value: Any) -> Any:
    """A value as JSON: lists and plain numbers unchanged, any other value as an object with one key, its kind."""
    if value is ANY:
        return {"any": True}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value] if isinstance(value, list) else {"tuple": [_value(item) for item in value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, class_ in KINDS.items():
        if isinstance(value, class_):
            return {kind: str(value).removeprefix("torch.")}
    raise ModelError(f"a graph that contains {value!r} cannot be saved")


def _read(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, what),) = value.items()
    if kind in KINDS:
        found = getattr(torch, what)
        if not isinstance(found, KINDS[kind]):
            raise TypeError(f"{what!r} is no {kind}")
        return found
    readers: dict[str, Callable[[Any], Any]] = {
        "any": lambda _: ANY,
        "node": nodes.__getitem__,
        "float": float,
        "tuple": lambda items: tuple(_read(item, nodes) for item in items),
        "device": torch.device,
    }
    return readers[kind](what)
