"""Hostile changes of a graphs.json, and a command that loads each: `python graph_attacks.py FOLDER` prints outcomes as JSON.

A hook on the interpreter's audit events records every process, import and opened file, and every compilation that is not one of
torch.fx; FOLDER/sentinel is what the attacks try to make.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memrewrite
from memrewrite.errors import CheckpointError, SelectError
from memrewrite.passes.rewrite.build_layers import pools_of
from memrewrite.passes.rewrite.edit_module import substitute
from memrewrite.passes.storage.graph_json import hosts_from_json
from memrewrite.plans import Plan

D = 16
Change = Callable[[dict[str, Any]], object]
Attack = tuple[str, Change, bool]  # name, change, and whether the changed file may be read: its text is data only
EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "import",
    "open",
    "compile",
    "socket.connect",
)


class Block(nn.Module):
    """A block whose MLP's matrices are parameters of its own, with a number, a dict and text among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(D), nn.Linear(D, 3 * D)
        self.up, self.down = nn.Parameter(torch.randn(D, 32) * 0.1), nn.Parameter(torch.randn(32, D) * 0.1)

    def forward(self, x: Tensor, *, options: dict[str, Any]) -> dict[str, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT, -1) @ v * options["scale"] + torch.tensor([0.5, 1.0] * (D // 2))
        y = x + nn.functional.gelu(self.norm(x) @ self.up, approximate="tanh") @ self.down
        return {"y": y.reshape(x.shape[0], x.shape[1] * 2, D // 2).reshape(x.shape)}


class Model(nn.Module):
    """Two of these blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, options={"scale": 0.5, "name": "a"})["y"]
        return x


def rewritten() -> nn.Module:
    """The model, rewritten without checks."""
    rule = {"where": {"all": True}, "with": "memory_plus", "pool": "w", "placement": "parallel"}
    options = {"options": {"heads": 2, "topk": 4}}
    recipe = {"memrewrite": 1, "verify": "off", "pools": {"w": {"keys": 8}}, "replace": [rule | options]}
    model = Model().eval()
    memrewrite.apply(model, recipe, (torch.randn(2, 5, D),))
    return model


def nodes_of(data: Any) -> list[Any]:
    """The nodes of the first trace."""
    found: list[Any] = data["hosts"][0]["traces"]["eval"]["nodes"]
    return found


def node_of(data: Any, op: str, target: str = "") -> list[Any]:
    """The first node of an op whose target contains `target`."""
    found: list[Any] = next(node for node in nodes_of(data) if node[1] == op and target in node[2])
    return found


def trace_of(data: Any) -> dict[str, Any]:
    """The first trace."""
    found: dict[str, Any] = data["hosts"][0]["traces"]["eval"]
    return found


def renamed(data: dict[str, Any], old: str, new: str) -> None:
    """Rename a node wherever the file refers to it."""
    text = json.dumps(data)
    data.clear()
    data.update(json.loads(text.replace(json.dumps(old), json.dumps(new))))


def call(target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> Change:
    """A change that adds a call, whose result is multiplied into the first output, so that it is no dead code."""

    def change(data: dict[str, Any]) -> None:
        nodes = nodes_of(data)
        first = next(node for node in nodes if node[1] == "placeholder")[0]
        given = [{"node": first} if arg == "X" else arg for arg in args]
        nodes.insert(-1, ["added", op, target, given, kwargs])
        results = nodes[-1][3][0]["tuple"]
        nodes.insert(-1, ["used", "call_function", "torch.ops.aten.mul.Tensor", [results[0], {"node": "added"}], {}])
        results[0] = {"node": "used"}

    return change


def numbers(*calls: tuple[str, list[Any]]) -> Change:
    """A change that computes with the size of an axis: functions and their arguments, in which N is the last result."""

    def change(data: dict[str, Any]) -> None:
        last = {"node": "size"}
        first = next(node for node in nodes_of(data) if node[1] == "placeholder")[0]
        added: list[list[Any]] = [["size", "call_function", "torch.ops.aten.sym_size.int", [{"node": first}, 1], {}]]
        for number, (function, args) in enumerate(calls):
            given = [last if arg == "N" else arg for arg in args]
            added.append([f"size_{number}", "call_function", f"_operator.{function}", given, {}])
            last = {"node": f"size_{number}"}
        results = nodes_of(data)[-1][3][0]["tuple"]
        added.append(["used", "call_function", "torch.ops.aten.mul.Tensor", [results[0], last], {}])
        nodes_of(data)[-1:-1] = added
        results[0] = {"node": "used"}

    return change


def set_at(*path: Any, to: Any) -> Change:
    """A change that sets one value of the file."""

    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to

    return change


def attacks(sentinel: str) -> Iterator[Attack]:
    """All attacks, which try to make the file `sentinel`."""
    run = f"__import__('os').system('touch {sentinel}')"
    yield from text_attacks(run)
    yield from function_attacks(sentinel)
    yield from number_attacks()
    yield from value_attacks(run)
    yield from structure_attacks()
    yield from end_attacks()
    yield from field_attacks(run)
    yield from node_attacks()


def text_attacks(run: str) -> Iterator[Attack]:
    """Text that torch.fx would write into source code."""
    for number, text in enumerate((f"x=({run})", f"x, y={run}", f"x: ({run})", "*x", "x):\n    pass\n#", "")):
        yield f"target of a placeholder {number}", lambda d, t=text: node_of(d, "placeholder").__setitem__(2, t), True  # type: ignore[misc]
    for number, text in enumerate((f"a\n    {run}\n    ", f"a = {run};  b", "self", "torch", "return", "", "n1", "class")):
        yield f"name of a node {number}", lambda d, t=text: renamed(d, node_of(d, "call_function")[0], t), True  # type: ignore[misc]
        yield f"name of an argument {number}", lambda d, t=text: renamed(d, node_of(d, "placeholder")[0], t), True  # type: ignore[misc]
        yield f"target of the output {number}", lambda d, t=text: nodes_of(d)[-1].__setitem__(2, t), False  # type: ignore[misc]
    for number, text in enumerate((f"a={run}, b", f"**{{}}) or {run} or dict(a", "", "self", "from", "alpha=1, b")):
        yield f"keyword {number}", lambda d, t=text: node_of(d, "call_function", "aten.add")[4].__setitem__(t, 1), False  # type: ignore[misc]
    targets = (
        "__class__", "__class__.__init__.__globals__", "forward", "forward.__globals__", "norm", "norm.weight.grad",
        "norm.__dict__",
        "norm.weight.__class__", f'up"); {run}; ("', f"up\n    {run}", "norm..weight", "", "memrewrite_constant_7",
        "norm.wei\uff47ht", "_parameters", "norm._parameters.weight", "_modules.norm.weight",
    )  # fmt: skip
    for number, text in enumerate(targets):
        yield f"name of a weight {number}", lambda d, t=text: node_of(d, "get_attr").__setitem__(2, t), False  # type: ignore[misc]


def function_attacks(sentinel: str) -> Iterator[Attack]:
    """Functions, methods and modules."""
    functions = (
        "os.system", "builtins.eval", "builtins.exec", "_operator.attrgetter", "_operator.methodcaller", "_operator.itemgetter",
        "_operator.call", "_operator.concat", "_operator.setitem", "_operator.iadd", "_operator.matmul", "_operator.contains",
        "operator.add", "math.__loader__", "math.factorial", "math.comb", "math.prod", "torch.load", "torch.save",
        "torch.hub.load", "torch.sym_add", "torch.ops", "torch.ops.aten", "torch.ops.aten.add", "torch.ops.load_library.a.b",
        "torch.ops.aten.__class__.__init__", "torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out",
        "torch.ops.aten._print.default", "torch.ops.aten.warn.default", "torch.ops.aten.save.default",
        "torch.ops.aten.resize_.default", "torch.ops.aten.set_.source_Tensor", "torch.ops.aten.set_data.default",
        "torch.ops.aten.manual_seed.default", "torch.ops.aten._unsafe_index.Tensor", "torch.ops.aten.record_stream.default",
        "torch.ops.aten._nested_view_from_buffer.default", "torch.ops.aten._sparse_coo_tensor_unsafe.default",
        "torch.ops.aten.eq.str", "torch.ops.aten.list.t", "torch.ops.aten._backward.default", "torch.ops.prims.resize.default",
        "torch.ops.higher_order.cond", "torch.ops.memrewrite.sparse_lookup_keep.default",
        "torch.ops.memrewrite.rowwise_adam_.default", "torch.ops.inductor.resize_storage_bytes_.default", "torch.ops.a.b.c",
        "torch.ops.aten.relu.default.__call__", "torch.ops.aten.relu\n.default", "", ".", "torch.ops.aten..relu",
    )  # fmt: skip
    for function in functions:
        yield f"function {function!r}", call(function, "X"), False
        yield f"function {function!r} of text", call(function, sentinel), False
    for method in ("system", "__reduce_ex__", "data_ptr", "add_", "tofile", "view"):
        yield f"method {method}", call(method, "X", op="call_method"), False
    for path in ("norm", "os", "blocks.0", "memory.0"):
        yield f"module {path}", call(path, "X", op="call_module"), False
    yield "a file", call("torch.ops.aten.from_file.default", sentinel, True, 4), False
    yield "a file by keyword", call("torch.ops.aten.from_file.default", filename=sentinel, shared=True, size=4), False
    for number, args in enumerate((["X", "__class__"], ["X", 0], [[1], 0], ["abc", 0], ["X"], ["X", {"node": "added"}])):
        yield f"getitem {number}", call("_operator.getitem", *args), False


def number_attacks() -> Iterator[Attack]:
    """Arithmetic on values of other kinds, or with results that fill the memory."""
    for function in ("add", "mul", "mod", "getitem", "pow"):
        yield f"{function} of text", call(f"_operator.{function}", "a%s" * 5, 10**9), False
        yield f"{function} of a list", call(f"_operator.{function}", [0], 10**9), False
        yield f"{function} of a tensor", call(f"_operator.{function}", "X", 2), False
    yield "a power", numbers(("pow", [10, 10**9])), False
    yield "a power by a size", numbers(("pow", [10, "N"])), False
    yield "a shift", numbers(("lshift", [1, 10**11])), False
    yield "a negative shift of a power", numbers(("pow", ["N", 64]), ("pow", ["N", 64]), ("pow", ["N", 64])), False
    yield "squares", numbers(*[("mul", ["N", "N"])] * 40), False
    yield "sums", numbers(*[("add", ["N", "N"])] * 40), True
    yield "too few numbers", numbers(("add", ["N"])), False
    yield "keywords of numbers", call("_operator.add", 1, 2, a=1), False


def value_attacks(run: str) -> Iterator[Attack]:
    """Values, in three places."""
    values: list[Any] = [
        {"device": f"cpu'); {run}; ('"}, {"device": "cpu:-1"}, {"device": 1}, {"device": "os"}, {"device": "cuda:999"},
        {"dtype": "_dynamo"}, {"dtype": "onnx"}, {"dtype": "load"}, {"dtype": "__class__"}, {"dtype": []}, {"layout": "hub"},
        {"memory_format": "float32"}, {"float": "1e5"}, {"float": run}, {"tuple": "ab"}, {"tuple": {"a": 1}}, {"node": []},
        {"node": "nowhere"}, {"node": run}, {"os": "system"}, {}, {"any": True}, {"any": True, "node": "x"}, 1e999, 10**30,
        {"slice": [1, 2]}, "\ud800", run, None, [[[[1]]]],
    ]  # fmt: skip
    for number, value in enumerate(values):
        yield f"value {number}", lambda d, v=value: node_of(d, "call_function", "aten.softmax")[3].__setitem__(1, v), False  # type: ignore[misc]
        yield f"given {number}", lambda d, v=value: trace_of(d)["given"].append(v), False  # type: ignore[misc]
        yield f"output {number}", lambda d, v=value: nodes_of(d)[-1][3].__setitem__(0, v), False  # type: ignore[misc]


def structure_attacks() -> Iterator[Attack]:
    """Structures of arguments, in both formats."""
    enum = {"__enum__": True, "fqn": "antigravity:a", "name": "b"}
    leaf, leaf_1 = "*", {"type": None, "context": None, "children_spec": []}
    specs: list[Any] = [
        {"os.system": []}, {"namedtuple": [leaf]}, {"collections.deque": [leaf]}, {"enum": enum}, {"tuple": enum},
        {"dict": [[enum, leaf]]},
        {"dict": [leaf]}, {"dict": [["a", leaf], ["a", leaf]]}, {"dict": [["a"]]}, {"tuple": 3}, [1, leaf_1], None, 3, enum,
        {"transformers.modeling_outputs.BaseModelOutput": [["a", leaf]]}, {"antigravity.A": [["a", leaf]]},
        {"tuple": [leaf] * 3},
    ]  # fmt: skip
    for number, spec in enumerate(specs):
        for key in ("in", "out"):
            yield f"{key} {number}", lambda d, k=key, s=spec: trace_of(d).__setitem__(k, s), False  # type: ignore[misc]
    for number, text in enumerate(
        (json.dumps(enum), json.dumps([enum]), "[" * 10**5, '{"a":1}', "", "1", '["a", "b"]', "[NaN]")
    ):
        for name in ("builtins.dict", "builtins.tuple", "collections.OrderedDict", "collections.defaultdict", "os.system"):
            old = [1, {"type": name, "context": text, "children_spec": [leaf_1]}]

            def as_format_1(data: dict[str, Any], spec: Any = old) -> None:
                data["graphs"] = 1
                for host in data["hosts"]:
                    for trace in host["traces"].values():
                        trace["in"] = trace["out"] = spec

            yield f"format 1 {name} {number}", as_format_1, False


def end_attacks() -> Iterator[Attack]:
    """The ends of sites."""
    ends: list[Any] = [[["nowhere", "add"]], [["output", "output"]], [[]], {"a": 1}, [["add", "add"]]]
    for number, pairs in enumerate(ends):
        yield f"ends {number}", lambda d, p=pairs: trace_of(d)["ends"].update({"blocks.0": p}), False  # type: ignore[misc]
    yield "reversed ends", lambda d: [pair.reverse() for pairs in trace_of(d)["ends"].values() for pair in pairs], False
    yield "other sites", lambda d: trace_of(d).__setitem__("ends", {}), False


def field_attacks(run: str) -> Iterator[Attack]:
    """Paths, constants, and fields."""
    for number, path in enumerate((f"a\n{run}", "__class__", "", "blocks.1", "blocks.9", "blocks..0")):
        yield f"path {number}", set_at("hosts", 0, "path", to=path), False
    for number, (name, value) in enumerate({
        run: [{"dtype": "float32"}, [1]], "up": [{"dtype": "float32"}, [1]],
        "memrewrite_constant_0\n": [{"dtype": "float32"}, [1]],
        "memrewrite_constant_8": [{"dtype": "qint8"}, [1]], "memrewrite_constant_9": [{"dtype": "float32"}, [2**40, 2**40]],
        "memrewrite_constant_10": [{"dtype": "float32"}, [-1]], "memrewrite_constant_11": [{"float": "nan"}, [1]],
        "memrewrite_constant_12": [{"dtype": "float32"}, [True]], "memrewrite_constant_13": [{"dtype": "float32"}, [1.5]],
    }.items()):  # fmt: skip
        yield f"constant {number}", lambda d, n=name, v=value: d["hosts"][0]["constants"].__setitem__(n, v), False  # type: ignore[misc]
    yield "skewed", set_at("hosts", 0, "skewed", to=[run]), False
    yield "one mode", lambda d: d["hosts"][0]["traces"].pop("train"), False
    yield "another mode", lambda d: d["hosts"][0]["traces"].update(test={}), False
    for format_ in (0, 3, 10**4000, "2", 2.0, True, None):
        yield f"format {str(format_)[:9]}", set_at("graphs", to=format_), False
    for path in ((), ("hosts", 0), ("hosts", 0, "traces", "eval")):

        def extra(data: dict[str, Any], path: tuple[Any, ...] = path) -> None:
            place: Any = data
            for part in path:
                place = place[part]
            place["extra"] = run

        yield f"another key in {path}", extra, False


def node_attacks() -> Iterator[Attack]:
    """Nodes that are missing, or more than allowed."""
    yield "a host twice", lambda d: d["hosts"].append(copy.deepcopy(d["hosts"][0])), False
    yield "no output", lambda d: nodes_of(d).pop(), False
    yield "two outputs", lambda d: nodes_of(d).append(["o", *nodes_of(d)[-1][1:]]), False
    yield "no nodes", lambda d: nodes_of(d).clear(), False
    yield "two nodes of one name", lambda d: nodes_of(d).insert(1, nodes_of(d)[0]), False
    yield "a default of an argument", lambda d: node_of(d, "placeholder")[3].append(1), False


def outcome(text: str, plan: Plan, inputs: Tensor) -> str:
    """ "refused", "run", or the error of torch that the forward raised."""
    try:
        hosts = hosts_from_json(text)
        model = Model().eval()
        substitute(model, plan, hosts=hosts).commit()
    except (CheckpointError, SelectError):
        return "refused"
    try:
        with torch.no_grad():
            model(inputs)
    except Exception as error:  # noqa: BLE001 - the test reports every error
        return f"forward: {type(error).__name__}: {error}"
    return "run"


def main(folder: Path) -> None:
    """Load every attack and print its outcome and the events that it caused."""
    sentinel, events = folder / "sentinel", list[str]()
    model = rewritten()
    record = pools_of(model).record
    assert record is not None
    assert record.graphs is not None
    text, plan, inputs = record.graphs, Plan.model_validate_json(record.plan), torch.randn(3, 7, D)
    assert outcome(text, plan, inputs) == "run"  # everything that a load imports is imported now

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        allowed = (event == "import" and arguments[0] in sys.modules) or (
            event == "compile" and str(arguments[1]) == "<string>" and b"def forward(self" in bytes(arguments[0] or b"")
        )
        if event in EVENTS and not allowed:
            events.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)
    found = {}
    for name, change, may_run in attacks(str(sentinel)):
        data = json.loads(text)
        change(data)
        events.clear()
        found[name] = {"outcome": outcome(json.dumps(data), plan, inputs), "may_run": may_run, "events": list(events)}
    print(json.dumps({"attacks": found, "sentinel": sentinel.exists()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
