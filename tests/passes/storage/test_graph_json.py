"""graphs.json: what is written is read again, and any other text is refused before anything runs."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from graph_attacks import Change, D, Model, call, node_of, nodes_of, numbers, renamed, rewritten, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils import _pytree
from torch.utils._pytree import tree_structure

import memrewrite
from memrewrite.errors import CheckpointError, ModelError
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.graph_host import ANY, GraphHost, Trace
from memrewrite.passes.storage.graph_data.specs import spec_from_data, spec_from_format_1, spec_to_data
from memrewrite.passes.storage.graph_json import GRAPHS, hosts_from_json, hosts_to_json

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return rewritten()


@pytest.fixture(scope="module")
def text(model: nn.Module) -> str:
    return record_of(model)


def record_of(model: nn.Module) -> str:
    record = pools_of(model).record
    assert record is not None
    assert record.graphs is not None
    return record.graphs


def changed(text: str, change: Change) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


# ------------------------------------------------------------------------------------------------------- what is written


def test_what_is_written_is_read_again(text: str) -> None:
    hosts = hosts_from_json(text)
    again = hosts_to_json(hosts)
    assert hosts_to_json(hosts_from_json(again)) == again
    for one, other in zip(json.loads(text)["hosts"], json.loads(again)["hosts"], strict=True):
        for mode in ("eval", "train"):
            nodes, copies = one["traces"][mode]["nodes"], other["traces"][mode]["nodes"]
            names = dict(zip((node[0] for node in copies), (node[0] for node in nodes), strict=True))
            back = with_names(copies, names)
            assert [node[1] for node in back] == [node[1] for node in nodes]
            assert [node[2:] for node in back if node[1] != "placeholder"] == [n[2:] for n in nodes if n[1] != "placeholder"]
            assert {key: one["traces"][mode][key] for key in ("in", "out", "given")} == {
                key: other["traces"][mode][key] for key in ("in", "out", "given")
            }


def with_names(nodes: Any, names: dict[str, str]) -> Any:
    """Nodes of a file, which refer to each other by other names."""
    return json.loads(json.dumps(nodes), object_hook=lambda d: {"node": names[d["node"]]} if "node" in d else d)


def test_nodes_have_names_of_ours(text: str) -> None:
    for host in hosts_from_json(text).values():
        for trace in host.traces.values():
            assert [node.name for node in trace.graph.nodes][:-1] == [f"n{i}" for i in range(len(trace.graph.nodes) - 1)]
            assert all(node.target == node.name for node in trace.graph.nodes if node.op == "placeholder")


def test_a_loaded_model_computes_the_same_bits(model: nn.Module, tmp_path: Path) -> None:
    memrewrite.save(model, tmp_path / "out")
    loaded, x = memrewrite.load(tmp_path / "out", Model()), torch.randn(3, 7, D)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(torch.compile(copy.deepcopy(loaded), backend="eager", fullgraph=True)(x), model(x))
    exported = torch.export.export(loaded, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), model(x))


def host_with(
    build: Any, given: tuple[Any, ...] = ((2, 3),), in_spec: Any = None, out_spec: Any = None
) -> dict[str, GraphHost]:
    """A host whose graph `build` makes of a graph and its placeholder."""
    graph = fx.Graph()
    result = build(graph, graph.placeholder("given"))
    graph.output((result,))
    trace = Trace(graph, in_spec or tree_structure(((0,), {})), out_spec or tree_structure(0), given, {})
    return {"a": GraphHost("a", {False: trace, True: trace}, {}, frozenset())}


VALUES: dict[str, Any] = {
    "numbers": lambda g, x: g.call_function(torch.ops.aten.full.default, ([2, 3], float("-inf")), {"dtype": torch.float64}),
    "nan": lambda g, x: g.call_function(torch.ops.aten.masked_fill.Scalar, (x, x, float("nan"))),
    "device": lambda g, x: g.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device("cuda:1")}),
    "layout": lambda g, x: g.call_function(
        torch.ops.aten.zeros.default, ([2],), {"layout": torch.strided, "pin_memory": False}
    ),
    "memory format": lambda g, x: g.call_function(torch.ops.aten.clone.default, (x,), {"memory_format": torch.channels_last}),
    "indices": lambda g, x: g.call_function(torch.ops.aten.index.Tensor, (x, [None, x])),
    "one size": lambda g, x: g.call_function(torch.ops.aten.sum.dim_IntList, (x, 1)),
    "text": lambda g, x: g.call_function(torch.ops.aten.einsum.default, ("ab,ab->a", [x, x])),
    "in place": lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, 1)),
    "out of place": lambda g, x: g.call_function(torch.ops.aten.add.out, (x, x), {"out": x}),
    "largest": lambda g, x: g.call_function(torch.ops.aten.slice.Tensor, (x, 0, 0, 2**63 - 1)),
    "a memory layer": lambda g, x: g.call_function(torch.ops.memrewrite.product_keys.default, (x, x, 4)),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_kind(name: str) -> None:
    hosts = host_with(VALUES[name])
    (host,) = hosts_from_json(hosts_to_json(hosts)).values()
    one, other = (next(n for n in h.traces[True].graph.nodes if n.op == "call_function") for h in (hosts["a"], host))
    assert one.target is other.target
    assert [str(v) for v in (other.args, other.kwargs)] == [str(v).replace("given", "n0") for v in (one.args, one.kwargs)]


class Point(NamedTuple):
    x: int
    y: int


def test_structures_of_arguments() -> None:
    tree = ([1, (2, {"a": 3, 5: 4})], torch.Size([1, 2]), OrderedDict(b=1, a=2), {}, None)
    spec = tree_structure(((tree,), {"k": [0]}))
    assert spec_from_data(json.loads(json.dumps(spec_to_data(spec)))) == spec
    assert spec_from_format_1(json.loads(_pytree.treespec_dumps(spec))) == spec


@pytest.mark.parametrize("tree", [Point(1, 2), namedtuple("Other", "a")(1), {(1, 2): 3}], ids=["named", "other", "key"])
def test_a_class_that_cannot_be_written_is_named(tree: Any) -> None:
    with pytest.raises(ModelError, match=r"Point|Other|dict"):
        hosts_to_json(host_with(lambda g, x: x, out_spec=tree_structure(tree)))


def test_outputs_of_hugging_face() -> None:
    outputs = pytest.importorskip("transformers").modeling_outputs
    spec = tree_structure(outputs.BaseModelOutput(last_hidden_state=0))
    hosts = host_with(lambda g, x: x, out_spec=spec)
    text = hosts_to_json(hosts)
    assert hosts_from_json(text)["a"].traces[True].out_spec == spec
    old = json.loads(text)
    old["graphs"] = 1
    for trace in old["hosts"][0]["traces"].values():
        trace["in"], trace["out"] = (json.loads(_pytree.treespec_dumps(s)) for s in (tree_structure(((0,), {})), spec))
    assert hosts_from_json(json.dumps(old))["a"].traces[True].out_spec == spec
    with pytest.raises(CheckpointError, match="no field 'nonsense'"):
        hosts_from_json(text.replace("last_hidden_state", "nonsense"))


def test_a_graph_that_cannot_be_read_is_not_written() -> None:
    def chain(graph: fx.Graph, x: fx.Node) -> fx.Node:
        size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
        for _ in range(20):
            size = graph.call_function(torch.sym_sum, ([size, size],))
            size = graph.call_function(__import__("operator").mul, (size, size))
        return size

    with pytest.raises(ModelError, match="bits"):
        hosts_to_json(host_with(chain))


def test_operators_of_other_libraries_need_trust() -> None:
    with torch.library._scoped_library("graph_json_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        text = hosts_to_json(host_with(lambda g, x: g.call_function(torch.ops.graph_json_test.twice.default, (x,))))
        with pytest.raises(CheckpointError, match="trust"):
            hosts_from_json(text)
        assert hosts_from_json(text, trust_code=True)["a"].traces[True].given == ((2, 3),)


def test_any_number_is_kept() -> None:
    assert hosts_from_json(hosts_to_json(host_with(lambda g, x: 3, given=(ANY,))))["a"].traces[True].given == (ANY,)


# ------------------------------------------------------------------------------------------------------- what is refused


def test_no_attack_runs_anything(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "graph_attacks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["sentinel"]
    assert len(found["attacks"]) > 350
    assert not {name: each for name, each in found["attacks"].items() if each["events"]}
    assert not {n: a for n, a in found["attacks"].items() if a["outcome"] != ("run" if a["may_run"] else "refused")}


def test_an_error_says_where(text: str) -> None:
    def bad_argument(data: Any) -> None:
        node_of(data, "call_function", "aten.softmax")[3][1] = "a"

    name = next(node[0] for node in nodes_of(json.loads(text)) if "softmax" in node[2])
    with pytest.raises(CheckpointError, match=rf"host 'blocks\.0': eval: node \d+, '{name}': the argument 'dim'"):
        hosts_from_json(changed(text, bad_argument))
    with pytest.raises(CheckpointError, match="the argument 'dim'"):  # an operator's integers are those of int64
        hosts_from_json(changed(text, lambda d: node_of(d, "call_function", "aten.softmax")[3].__setitem__(1, 2**63)))
    with pytest.raises(CheckpointError, match=r"hosts\.0\.traces\.eval\.nodes\.2\.1"):
        hosts_from_json(changed(text, lambda d: nodes_of(d)[2].__setitem__(1, "call_method")))
    with pytest.raises(CheckpointError, match=r"hosts\.0\.traces\.train"):
        hosts_from_json(changed(text, lambda d: d["hosts"][0]["traces"].pop("train")))


TEXTS = {
    "depth": "[" * 10**5 + "]" * 10**5,
    "depth of objects": '{"a":' * 10**5,
    "digits": '{"graphs": ' + "1" * 10**5 + "}",
    "nan": '{"graphs": NaN, "hosts": []}',
    "twice": '{"graphs": 2, "graphs": 2, "hosts": []}',
    "nothing": "",
    "a list": "[]",
    "text": '"a"',
    "null": "null",
    "no hosts": '{"graphs": 2}',
    "bytes": "\x00",
}


@pytest.mark.parametrize("name", TEXTS)
def test_other_texts_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=GRAPHS):
        hosts_from_json(TEXTS[name])


def test_deep_values_are_refused(text: str) -> None:
    for depth in (50, 150, 10**5):
        value = "[" * depth + "]" * depth
        deep = text.replace('"given": [', f'"given": [{value},', 1)
        with pytest.raises(CheckpointError, match=GRAPHS):
            hosts_from_json(deep)


def test_a_long_graph_takes_linear_time(text: str) -> None:
    def long(data: Any) -> None:
        nodes = nodes_of(data)
        first = next(n[0] for n in nodes if n[1] == "placeholder")
        more = [[f"more{i}", "call_function", "torch.ops.aten.relu.default", [{"node": first}], {}] for i in range(20_000)]
        nodes[-1:-1] = more

    assert len(hosts_from_json(changed(text, long))["blocks.0"].traces[False].graph.nodes) > 20_000


@pytest.mark.parametrize("change", [numbers(("pow", ["N", 2]), ("mul", ["N", 3])), call("torch.ops.aten.add.Tensor", "X", 2)])
def test_arithmetic_of_reasonable_size_is_read(text: str, change: Change) -> None:
    hosts_from_json(changed(text, change))


def test_a_renamed_node_is_the_same_graph(text: str) -> None:
    other = changed(text, lambda d: renamed(d, node_of(d, "call_function")[0], "a\nb = 1"))
    assert hosts_to_json(hosts_from_json(other)) == hosts_to_json(hosts_from_json(text))


def test_the_shape_of_a_constant_takes_no_memory(text: str) -> None:
    data = json.loads(text)
    data["hosts"][0]["constants"]["memrewrite_constant_0"][1] = [2**40]
    host = hosts_from_json(json.dumps(data))["blocks.0"]
    assert host.constants["memrewrite_constant_0"].shape == (2**40,)
    assert host.constants["memrewrite_constant_0"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize("drop", [True, False], ids=["missing", "another shape"])
def test_a_constant_must_be_saved(drop: bool, model: nn.Module, tmp_path: Path) -> None:
    import hashlib

    memrewrite.save(model, tmp_path / "out")
    file = tmp_path / "out" / "buffers.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "memrewrite_constant" in name)
    value = tensors.pop(name)
    save_file(tensors if drop else {**tensors, name: value[:1].clone()}, file)
    manifest = tmp_path / "out" / "memrewrite.json"
    data = json.loads(manifest.read_text())
    data["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="memrewrite_constant"):
        memrewrite.load(tmp_path / "out", Model())


# ------------------------------------------------------------------------------------------------------------- mutations

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["node", "tuple", "device", "dtype", "float", "any", "x", "output", "torch.ops.aten.add.Tensor"]),
)  # fmt: skip
JSON = st.recursive(
    LEAVES, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=6), s, max_size=2), max_leaves=6
)
TEXT: list[str] = []


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), value=JSON, count=st.integers(1, 3))
def test_a_mutated_file_is_read_or_refused(seed: int, value: Any, count: int) -> None:
    if not TEXT:
        TEXT.append(record_of(rewritten()))
    data, rng = json.loads(TEXT[0]), random.Random(seed)
    for _ in range(count):
        _mutate(data, value, rng)
    try:
        hosts = hosts_from_json(json.dumps(data))
    except CheckpointError:
        return
    for host in hosts.values():
        for trace in host.traces.values():
            trace.graph.lint()
            assert len(trace.given) == trace.in_spec.num_leaves


def _mutate(data: Any, value: Any, rng: random.Random) -> None:
    """Replace, remove, repeat or move one place of a file."""
    places: list[tuple[Any, Any]] = []
    stack = [data]
    while stack:
        each = stack.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else []
        places += [(each, key) for key in keys]
        stack += [each[key] for key in keys]
    where, key = rng.choice(places)
    other, place = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        where[key] = copy.deepcopy(value)
    elif kind == 1:
        del where[key]
    elif kind == 2:
        where[key] = copy.deepcopy(other[place])
    elif isinstance(where, list):
        where.insert(key, copy.deepcopy(where[key]))
    else:
        where[str(value)] = where.pop(key)


def test_the_trace_has_what_the_attacks_change(text: str) -> None:
    assert {"in", "out", "given", "ends", "nodes"} == set(trace_of(json.loads(text)))
    assert json.loads(text)["graphs"] == 2
