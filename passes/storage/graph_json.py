"""Modules that became graphs, as JSON and back: loading a saved model captures nothing and runs no saved code.

Flow of reading: text → JSON → fields (`graph_data/fields`) → graphs, node by node (`graph_data/graph_reader`). The only
functions that a file can name are operators on tensors and arithmetic on numbers (`graph_data/functions`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import fx

from memrewrite.errors import CheckpointError, ModelError
from memrewrite.passes.rewrite.graph_host import GraphHost, Trace
from memrewrite.passes.sources.json_text import parse_json
from memrewrite.passes.storage.graph_data.fields import FORMATS, Malformed, fields_of, shown
from memrewrite.passes.storage.graph_data.functions import name_of
from memrewrite.passes.storage.graph_data.graph_reader import host_of
from memrewrite.passes.storage.graph_data.specs import spec_to_data
from memrewrite.passes.storage.graph_data.values import value_to_data
from memrewrite.site import relative

GRAPHS = "graphs.json"


def hosts_to_json(hosts: Mapping[str, GraphHost]) -> str:
    """The graphs of `hosts` as JSON text.

    Raises `ModelError` for a function, value or class of arguments that cannot be written, and for a graph that
    `hosts_from_json` would refuse even with `trust_code`.
    """
    text = json.dumps({"graphs": FORMATS[-1], "hosts": [_host(host) for host in hosts.values()]}, indent=1)
    try:
        hosts_from_json(text, trust_code=True)
    except CheckpointError as error:
        raise ModelError(f"a module that becomes a graph cannot be saved: {error.what}", hint="leave its MLPs out") from error
    return text


def hosts_from_json(text: str, *, trust_code: bool = False) -> dict[str, GraphHost]:
    """The hosts in a text of `hosts_to_json`, without layers, by path.

    Their constants have a shape and no memory: the values are saved with the buffers, and `refuse_unsaved_constants` says
    whether all are. `trust_code` allows every operator that is registered in this process; without it, only operators of ATen
    that compute tensors, and those of memory layers. Raises `CheckpointError` for any other text.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise _unreadable(error) from error
    try:
        fields = fields_of(data)
        hosts: dict[str, GraphHost] = {}
        for host in fields.hosts:
            if host.path in hosts:
                raise Malformed(f"two hosts are {shown(host.path)}")
            hosts[host.path] = host_of(host, fields.graphs, trust_code=trust_code)
    except Malformed as reason:
        raise _unreadable(reason) from reason
    return hosts


def graphs_relative_to(prefix: str, text: str) -> str:
    """A text of `hosts_to_json` for the module at `prefix`, which contains all hosts."""
    data = json.loads(text)
    for host in data["hosts"]:
        host["path"], host["skewed"] = relative(host["path"], prefix), [relative(site, prefix) for site in host["skewed"]]
        for trace in host["traces"].values():
            trace["ends"] = {relative(site, prefix): pairs for site, pairs in trace["ends"].items()}
    return json.dumps(data, indent=1)


def _unreadable(reason: Exception) -> CheckpointError:
    return CheckpointError(f"{GRAPHS} cannot be read: {reason}", hint="save the model again")


def refuse_unsaved_constants(hosts: Mapping[str, GraphHost], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless `saved`, the shapes of the saved buffers by name, has every constant of the hosts."""
    for host in hosts.values():
        for name, value in host.constants.items():
            shape = saved.get(f"{host.path}.{name}")
            if shape != tuple(value.shape):
                what = f"{GRAPHS}: the constant {name!r} of {host.path!r} has the shape {tuple(value.shape)}"
                raise CheckpointError(f"{what}, and the saved buffers have {shape}", hint="save the model again")


def _host(host: GraphHost) -> dict[str, Any]:
    constants = {name: [value_to_data(value.dtype), list(value.shape)] for name, value in host.constants.items()}
    traces = {("train" if training else "eval"): _trace(trace) for training, trace in host.traces.items()}
    return {"path": host.path, "constants": constants, "skewed": sorted(host.skewed), "traces": traces}


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "in": spec_to_data(trace.in_spec),
        "out": spec_to_data(trace.out_spec),
        "given": [value_to_data(given) for given in trace.given],
        "ends": {site: [list(pair) for pair in pairs] for site, pairs in trace.ends.items()},
        "nodes": [_node(node) for node in trace.graph.nodes],
    }


def _node(node: fx.Node) -> list[Any]:
    target = node.target if isinstance(node.target, str) else name_of(node.target)
    args, kwargs = [value_to_data(arg) for arg in node.args], {key: value_to_data(value) for key, value in node.kwargs.items()}
    return [node.name, node.op, target, args, kwargs]
